"""Steps that the host does not wait for: replayed from a CUDA graph, their tokens fetched on the way."""

from __future__ import annotations

from collections.abc import Callable

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


class StepGraph:
    """A step replayed from a CUDA graph, on tokens and a mask at addresses of its own."""

    def __init__(self, step: Step, like: Tensor) -> None:
        self._tokens, self._active = torch.zeros_like(like), torch.zeros_like(like, dtype=torch.bool)
        # No row is active while kernels are compiled and the graph is recorded: the states stay as they are.
        stream = torch.cuda.Stream(like.device)
        stream.wait_stream(torch.cuda.current_stream(like.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(self._tokens, self._active)
        torch.cuda.current_stream(like.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._logits = step(self._tokens, self._active)

    def __call__(self, tokens: Tensor, active: Tensor) -> Tensor:
        """Logits, at an address of their own too."""
        self._tokens.copy_(tokens)
        self._active.copy_(active)
        self._graph.replay()
        return self._logits
