"""A line of ranks, each of which talks to its neighbours only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

# How traceable collectives find their group by its name.
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

# What is carried goes its way beside what is shifted.
_CARRIED = 1


class Line(NamedTuple):
    """The ranks of a process group from left to right; ``name`` is the group's, ``rank`` this process's."""

    name: str
    rank: int
    size: int

    @property
    def first(self) -> bool:
        """Whether nothing is to the left."""
        return self.rank == 0

    @property
    def last(self) -> bool:
        """Whether nothing is to the right."""
        return self.rank == self.size - 1

    def shift(
        self, message: Tensor | None, like: Tensor, what: str, *, back: bool = False, tag: int = 0
    ) -> Messages:
        """Send ``message`` to the right (``back``: left) and receive one ``like`` it from the other side.

        Returns at once. Every rank takes part; at the ends what has no partner is left out. Messages of one
        ``tag`` are sent in one order by all.
        """
        before, behind = (self.rank + 1, self.rank - 1) if back else (self.rank - 1, self.rank + 1)
        sent = message if message is not None and 0 <= behind < self.size else None
        received = torch.empty_like(like) if 0 <= before < self.size else None
        return self._post(what, sent, behind, received, before, tag)

    def carry(
        self, like: Tensor, step: Callable[[Tensor | None], Tensor], what: str, *, back: bool = False
    ) -> Messages:
        """Hand something on from rank to rank: ``step`` makes what is sent from what came (None: the start).

        Returns when the step is done; what is sent may still be on its way. May run beside a shift.
        """
        incoming = self.shift(None, like, what, back=back, tag=_CARRIED).wait()
        message = step(incoming)
        behind = self.rank - 1 if back else self.rank + 1
        sent = message.contiguous() if 0 <= behind < self.size else None
        return self._post(what, sent, behind, None, behind, _CARRIED)

    def largest(self, values: Tensor) -> Tensor:
        """The largest of each of ``values`` over all ranks."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def total(self, values: Tensor) -> Tensor:
        """The sum of each of ``values`` over all ranks."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def _reduced(self, values: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size > 1:
            with self._answering("numbers of all ranks", [*range(self.size)]):
                dist.all_reduce(values, how, group=self.group())
        return values

    def from_last(self, tensor: Tensor) -> Tensor:
        """The last rank's ``tensor``, on all ranks, each of which gives one like it."""
        # What is received is written over what was given: over a copy.
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        if self.size > 1:
            with self._answering("the last rank's state", [self.size - 1]):
                dist.broadcast(tensor, group=self.group(), group_src=self.size - 1)
        return tensor

    def group(self) -> dist.ProcessGroup:
        """The process group itself."""
        return _resolve_process_group(self.name)  # type: ignore[arg-type] # a private NewType of str

    def _post(
        self, what: str, sent: Tensor | None, target: int, received: Tensor | None, source: int, tag: int
    ) -> Messages:
        posted, peers = [], []
        for operation, tensor, peer in ((dist.irecv, received, source), (dist.isend, sent, target)):
            if tensor is not None:
                posted.append(dist.P2POp(operation, tensor, None, self.group(), tag, peer))
                peers.append(peer)
        answering = partial(self._answering, what, peers)
        with answering():
            works = dist.batch_isend_irecv(posted) if posted else []
        # Of both together there may be one handle.
        receiving = works if len(works) < len(posted) else works[: received is not None]
        return Messages(receiving, works[len(receiving) :], received, sent, answering)

    @contextmanager
    def _answering(self, what: str, peers: list[int]) -> Iterator[None]:
        """Say what is wrong when ``peers`` do not answer within the process group's timeout."""
        try:
            yield
        except RuntimeError as error:
            names = " or ".join(str(peer) for peer in peers if peer != self.rank)
            raise RuntimeError(
                f"sequence parallelism stops: rank {self.rank} could not exchange {what} with rank {names} "
                "of its line, which has ended, hangs or computes something else "
                f"({str(error).splitlines()[0]})"
            ) from error


class Messages(NamedTuple):
    """Messages on their way, each to be waited for once; ``answering`` explains where nobody answers."""

    receiving: list[dist.Work]
    sending: list[dist.Work]
    received: Tensor | None
    # What is sent has to stay until it is.
    sent: Tensor | None
    answering: Callable[[], AbstractContextManager[None]]

    def came(self) -> Tensor | None:
        """What came, None at the line's end; a neighbour that is behind need not have taken what was sent.

        Raises RuntimeError where a neighbour does not answer within the process group's timeout.
        """
        self._done(self.receiving)
        return self.received

    def wait(self) -> Tensor | None:
        """What came, when all has been sent too; to be called in the end. Raises as :meth:`came`."""
        self._done(self.receiving)
        self._done(self.sending)
        return self.received

    def _done(self, works: list[dist.Work]) -> None:
        while works:
            with self.answering():
                works.pop().wait()


def line_of(mesh: DeviceMesh | dist.ProcessGroup) -> Line:
    """The line over which ``mesh``, a single dimension of a device mesh, or a process group slices sequences.

    Raises:
        TypeError: for anything else.
        ValueError: for a mesh of several dimensions, or without this process.
    """
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            names = mesh.mesh_dim_names or [f"of {size}" for size in mesh.shape]
            raise ValueError(
                f"mesh must have one dimension, such as mesh['sequence'], got {mesh.ndim}: {', '.join(names)}"
            )
        if mesh.get_coordinate() is None:
            raise ValueError(f"mesh must hold this process, rank {dist.get_rank()}, got {mesh.mesh.tolist()}")
        mesh = mesh.get_group()
    group: object = mesh
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"mesh must hold this process, rank {dist.get_rank()}, got a group without it")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"mesh must be a DeviceMesh or a ProcessGroup, got {type(mesh).__name__}")
    return Line(group.group_name, dist.get_rank(group), group.size())
