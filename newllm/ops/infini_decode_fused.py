"""``infini_decode`` by the Triton kernels: what they offer, and their contract with PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from newllm.ops.support import DTYPES, unsupported
from newllm.types import FeatureMap, InfiniState


def declined(
    q: Tensor,
    v: Tensor,
    state: InfiniState,
    feature: FeatureMap | None,
    decay: Tensor | None = None,
) -> str | None:
    """Why the kernels cannot take this call; None if they can."""
    reason = unsupported(q.dtype, q.shape[3], v.shape[3], feature=feature, decay=decay)
    if reason is not None:
        return reason
    for ring in (state.keys, state.values):
        if ring.dtype not in DTYPES:
            return f"its kernels take rings of float16, bfloat16 and float32, got {ring.dtype}"
    if state.matrix is not None and state.norm is not None:
        for memory in (state.matrix, state.norm):
            if memory.dtype != torch.float32:
                return f"its kernels take a memory in float32, got {memory.dtype}"
    written = (state.matrix, state.norm, state.keys, state.values)
    if any(x is not None and x.stride(-1) != 1 for x in written):
        return "its kernels take states whose last dimension is contiguous"
    return None


@torch.library.custom_op(
    "newllm::infini_decode", mutates_args=("matrix", "norm", "keys", "values", "position")
)
def infini_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    matrix: Tensor | None,
    norm: Tensor | None,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    feature_scale: Tensor | None,
    feature_bias: Tensor | None,
    active: Tensor | None,
    local: bool,
    segment: int,
    tanh: bool,
    rule: str,
    eps: float,
) -> Tensor:
    """See ``newllm.kernels.infini_decode.infini_decode``."""
    from newllm.kernels.infini_decode import infini_decode as launch

    return launch(
        q,
        k,
        v,
        beta,
        matrix,
        norm,
        keys,
        values,
        position,
        cos,
        sin,
        feature_scale,
        feature_bias,
        active,
        local=local,
        segment=segment,
        tanh=tanh,
        rule=rule,
        eps=eps,
    )


@infini_decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])
