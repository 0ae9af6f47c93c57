"""Public operator of causal sliding-window attention."""

from __future__ import annotations

from torch import Tensor

from newllm import backend as backends
from newllm.ops import attention_fused as fused, checks
from newllm.ops.support import unsupported
from newllm.reference import window as reference


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    segment: int | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    padding_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal attention of each query to the last ``window`` keys, its own included.

    Args:
        q: ``[B, H, T, K]``. k: ``[B, Hkv, T, K]``. v: ``[B, Hkv, T, V]``; H is a multiple of Hkv.
        window: keys a query sees, W; None attends within segments of ``segment`` tokens instead.
        segment: tokens per segment; needed when ``window`` is None, otherwise checked (at most
            ``window``) and without effect.
        rope: (cos, sin) of shape ``[T, K]`` or ``[B, T, K]``, applied to q and k (rotate-half).
        padding_mask: bool ``[B, T]``, True = real; padding takes no window slot and gives zeros.
        backend: ``reference`` or ``fused``; None chooses.

    Returns:
        ``[B, H, T, V]`` in q's dtype.

    Raises:
        TypeError: for a wrong dtype. ValueError: for a wrong size or choice.
    """
    context, (q, k, v) = checks.without_autocast(q, k, v)
    checks.attention_inputs(q, k, v)
    if window is None:
        checks.require(segment is not None, "segment", "None", "given when window is None")
    checks.segmentation(window, 1 if segment is None else segment)
    checks.rope(rope, k, None)
    checks.padding(padding_mask, k)
    chosen = backends.resolve(
        "window_attention", q.device, backend, unsupported(q.dtype, q.shape[3], v.shape[3])
    )
    run = {"reference": reference.window_attention, "fused": fused.window_attention}[chosen]
    with context:
        return run(q, k, v, window=window, segment=segment, rope=rope, padding_mask=padding_mask)
