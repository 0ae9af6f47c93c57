"""Senri models whose sequences are sliced over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from newllm.distributed.line import Line, line_of
from newllm.distributed.sequence_parallel import Mesh, sequence_attention
from newllm.models.senri.modeling import SenriModel
from newllm.modules.infini_attention import InfiniAttention
from newllm.ops import checks
from newllm.types import InfiniState


def parallelize(model: nn.Module, mesh: Mesh) -> nn.Module:
    """Let every layer of a Senri ``model`` take its sequences in slices over ``mesh``; returns the model.

    Weights stay as they are, so that checkpoints do not depend on it. Each rank then feeds its own slice of
    the tokens, in the order of ranks, without padding or cache; its logits are those of its slice. Losses and
    their gradients are to be summed over the ranks.

    Raises:
        ValueError: for a model without Infini-attention, or with a write gate, decay, a short convolution or
            a shared memory.
    """
    line = mesh if isinstance(mesh, Line) else line_of(mesh)
    layers, decoders = _parts(model)
    checks.require(bool(layers), "model", type(model).__name__, "a model with InfiniAttention layers")
    for attention in layers:
        attention.attend = partial(_attend, mesh=line)
    for decoder in decoders:
        decoder.sliced = True
    return model


def _check(module: nn.Module) -> None:
    """Nothing that a rank would need more of than windows and memories, or in another order."""
    if isinstance(module, SenriModel):
        checks.require(not module.config.share_memory, "share_memory", True, "False over several ranks")
    if isinstance(module, InfiniAttention):
        parts = {
            "write_gate": getattr(module.memory_feature, "write", None),
            "memory_decay": module.memory_decay,
            "short_conv": module.short_conv,
        }
        for name, part in parts.items():
            checks.require(part is None, name, "one", "off over several ranks")


@contextmanager
def sliced(model: nn.Module, line: Line, start: int) -> Iterator[None]:
    """:func:`parallelize` for a while, with a cache: this rank's slice begins ``start`` tokens behind it."""
    layers, decoders = _parts(model)
    before = [attention.attend for attention in layers], [decoder.sliced for decoder in decoders]
    for attention in layers:
        attention.attend = partial(_attend, mesh=line, start=start)
    for decoder in decoders:
        decoder.sliced = True
    try:
        yield
    finally:
        for attention, attend in zip(layers, before[0], strict=True):
            attention.attend = attend
        for decoder, was in zip(decoders, before[1], strict=True):
            decoder.sliced = was


def _parts(model: nn.Module) -> tuple[list[InfiniAttention], list[SenriModel]]:
    """What a slice changes; ValueError for a part that slices cannot have."""
    for module in model.modules():
        _check(module)
    layers = [module for module in model.modules() if isinstance(module, InfiniAttention)]
    return layers, [module for module in model.modules() if isinstance(module, SenriModel)]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    *,
    padding_mask: Tensor | None = None,
    detach: str = "none",
    bptt_segments: int | None = None,
    **options: Any,
) -> tuple[Tensor, InfiniState]:
    """What a layer calls in place of ``newllm.ops.infini_attention``."""
    only = "over several ranks"
    checks.require(padding_mask is None, "padding_mask", "a mask with padding", f"None {only}")
    if torch.is_grad_enabled():
        checks.require(detach == "none", "detach", repr(detach), f"'none' {only}")
        checks.require(bptt_segments is None, "bptt_segments", bptt_segments, f"None {only}")
    return sequence_attention(q, k, v, beta, **options)
