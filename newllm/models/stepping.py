"""Steps that the host does not wait for: replayed from CUDA graphs, their tokens fetched on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Tokens [B] and a mask [B] of the rows that read them -> logits [B, vocabulary].
Step = Callable[[Tensor, Tensor], Tensor]


class Fetched:
    """A tensor on its way to the CPU, while the device goes on with what it is asked next."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.to("cpu", non_blocking=True)
        self._sent = None
        if tensor.device.type == "cuda":
            self._sent = torch.cuda.Event()
            self._sent.record(torch.cuda.current_stream(tensor.device))

    def get(self) -> Tensor:
        """The tensor, once it has arrived."""
        if self._sent is not None:
            self._sent.synchronize()
        return self._tensor

    def may(self, holds: Callable[[Tensor], bool]) -> bool:
        """Whether the tensor may satisfy ``holds``, without waiting for it."""
        return self._sent is not None or holds(self._tensor)


def going_on(tokens: Tensor, speaking: Tensor, ends: Tensor) -> Tensor:
    """Which ``speaking [B]`` rows go on after ``tokens [B]``: a row ends at one of the ``ends [E]``."""
    return speaking & ~(tokens[:, None] == ends).any(1)


class Turn(NamedTuple):
    """What is said next: ``tokens [B]`` of the rows that were ``speaking [B]``, and who is ``going`` on.

    ``said [B]`` are the tokens of those, -1 in rows that have ended.
    """

    tokens: Tensor
    speaking: Tensor
    going: Tensor
    said: Tensor

    @classmethod
    def of(cls, tokens: Tensor, speaking: Tensor, ends: Tensor) -> Turn:
        """The turn of rows that end at one of the ``ends [E]``."""
        going = going_on(tokens, speaking, ends)
        return cls(tokens, speaking, going, tokens.masked_fill(~going, -1))


class Replay:
    """A function of tensors replayed from a CUDA graph, on inputs at addresses of its own.

    It is first called four times with zeros, which must change nothing that is kept, and lives as long as its
    graph, which reads from the addresses of all that it holds.
    """

    def __init__(self, function: Callable[..., Any], inputs: Iterable[Tensor]) -> None:
        self._function = function
        self.inputs = tuple(torch.zeros_like(each) for each in inputs)
        device = self.inputs[0].device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                function(*self.inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        """What the function returns, at addresses of its own too."""
        for mine, given in zip(self.inputs, inputs, strict=True):
            if given is not mine:
                mine.copy_(given)
        self._graph.replay()
        return self._outputs
