"""Registered operators, called without torch.library where neither a compiler nor a mode looks on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def untraced(
    operator: Callable[..., Any],
    forward: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    differentiate: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., Any]:
    """``operator``, or the plain function that it registers: what torch.library adds outlasts the launches.

    Args:
        operator: made of ``forward`` by ``torch.library.custom_op``.
        save: its ``setup_context``.
        differentiate: its gradient, by a plain function too.
    """

    class Untraced(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            return differentiate(ctx, *gradients)

    def call(*inputs: Any) -> Any:
        # Fake tensors, selective checkpointing and the like are modes.
        looked_at = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
        return operator(*inputs) if looked_at else Untraced.apply(*inputs)  # type: ignore[no-untyped-call]

    return call
