"""A line of ranks, each of which talks to its neighbours only."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


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

    def shift(self, message: Tensor | None, like: Tensor, what: str, *, back: bool = False) -> Messages:
        """Send ``message`` to the right (``back``: left) and receive one ``like`` it from the other side.

        Returns at once. Every rank takes part; at the ends what has no partner is left out.
        """
        before, behind = (self.rank + 1, self.rank - 1) if back else (self.rank - 1, self.rank + 1)
        sent = message if message is not None and 0 <= behind < self.size else None
        received = torch.empty_like(like) if 0 <= before < self.size else None
        return self._post(what, sent, behind, received, before)

    def carry(
        self, like: Tensor, step: Callable[[Tensor | None], Tensor], what: str, *, back: bool = False
    ) -> Messages:
        """Hand something on from rank to rank: ``step`` makes what is sent from what came (None: the start).

        Returns when the step is done; what is sent may still be on its way.
        """
        incoming = self.shift(None, like, what, back=back).wait()
        message = step(incoming)
        behind = self.rank - 1 if back else self.rank + 1
        if not 0 <= behind < self.size:
            return Messages(what, self.rank, [], None)
        return self._post(what, message.contiguous(), behind, None, None)

    def largest(self, values: Tensor) -> Tensor:
        """The largest of each of ``values`` over all ranks."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group())
        return values

    def group(self) -> dist.ProcessGroup:
        """The process group itself."""
        return dist.distributed_c10d._resolve_process_group(self.name)  # type: ignore[arg-type]

    def _post(
        self, what: str, sent: Tensor | None, target: int, received: Tensor | None, source: int | None
    ) -> Messages:
        group, posted, peers = self.group() if self.size > 1 else None, [], []
        if received is not None:
            posted.append(dist.P2POp(dist.irecv, received, group=group, group_peer=source))
            peers.append(source)
        if sent is not None:
            posted.append(dist.P2POp(dist.isend, sent, group=group, group_peer=target))
            peers.append(target)
        try:
            works = dist.batch_isend_irecv(posted) if posted else []
        except RuntimeError as error:
            raise _lost(self.rank, what, peers, error) from error
        # A backend may put all messages into one piece of work.
        named = peers if len(works) == len(peers) else [None] * len(works)
        return Messages(what, self.rank, list(zip(works, named, strict=True)), received, sent, tuple(peers))


class Messages(NamedTuple):
    """Messages on their way, to be waited for once; then ``received`` is filled and ``sent`` is free."""

    what: str
    rank: int
    works: list[tuple[dist.Work, int | None]]
    received: Tensor | None
    sent: Tensor | None = None
    peers: tuple[int, ...] = ()

    def wait(self) -> Tensor | None:
        """What came, None at the line's end.

        Raises RuntimeError where a neighbour does not answer within the process group's timeout.
        """
        for work, peer in self.works:
            try:
                work.wait()
            except RuntimeError as error:
                raise _lost(self.rank, self.what, self.peers if peer is None else [peer], error) from error
        return self.received


def _lost(rank: int, what: str, peers: list[int] | tuple[int, ...], error: RuntimeError) -> RuntimeError:
    names = " and ".join(str(peer) for peer in peers)
    return RuntimeError(
        f"sequence parallelism stops: rank {rank} could not exchange {what} with rank {names} of its line, "
        f"which has ended, hangs, or computes something else ({str(error).splitlines()[0]})"
    )


def line_of(mesh: DeviceMesh | dist.ProcessGroup) -> Line:
    """The line over which ``mesh``, a single dimension of a device mesh, or a process group slices sequences.

    Raises:
        TypeError: for anything else.
        ValueError: for a mesh of several dimensions, or without this process.
    """
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            names = mesh.mesh_dim_names or tuple(range(mesh.ndim))
            raise ValueError(
                f"mesh must have one dimension, such as mesh['sequence'], got {mesh.ndim}: {', '.join(map(str, names))}"
            )
        if mesh.get_coordinate() is None:
            raise ValueError(f"mesh must hold this process, rank {dist.get_rank()}, got {mesh.mesh.tolist()}")
        mesh = mesh.get_group()
    if not isinstance(mesh, dist.ProcessGroup):
        raise TypeError(f"mesh must be a DeviceMesh or a ProcessGroup, got {type(mesh).__name__}")
    rank = dist.get_rank(mesh)
    if rank < 0:
        raise ValueError(f"mesh must hold this process, rank {dist.get_rank()}, got a group without it")
    return Line(mesh.group_name, rank, mesh.size())
