"""The steps of ``newllm.reference.slices`` by the Triton kernels, which are imported when a step runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newllm.reference.slices import Begun, Call, Chain, Read, Slice, Slopes


def _inputs(x: Slice, call: Call) -> Any:
    from newllm.kernels.infini_attention import Inputs

    # Any border of segments behind the P earlier tokens: they hold keys, and the slice begins at one.
    border = -(-x.past // call.segment) * call.segment
    position = None if x.past == 0 else torch.full((len(x.q),), border, device=x.q.device)
    given = x.q, x.k, x.v, x.beta, x.rope, None, None, position, None, x.scale, x.bias, x.weight
    return Inputs(*given, aligned=True)


def _call(call: Call) -> Any:
    from newllm.ops.attention_fused import Call as KernelCall

    return KernelCall(call.window, call.segment, call.gate, call.rule, call.eps, None)


def _learned(x: Slice) -> tuple[Tensor | None, Tensor | None]:
    from newllm.kernels.attention_layout import learned

    return learned(x.scale, x.bias)


def added(x: Slice, call: Call) -> tuple[Tensor, Tensor]:
    """What each segment adds, in float32."""
    from newllm.kernels.memory_fold import fold
    from newllm.kernels.memory_layout import Layout

    return fold(*x.new(), Layout(call.segment), *_learned(x))


def chain(
    x: Slice,
    matrix: Tensor,
    norm: Tensor,
    start: Tensor | None,
    start_norm: Tensor | None,
    *,
    reverse: bool = False,
) -> Chain:
    """Segments added from one end to the other; matrices before each in the dtype of products."""
    from newllm.kernels.common import memory_dtype
    from newllm.kernels.memory_scan import scan, scan_backward

    dtype, first = memory_dtype(x.q.dtype), (start, start_norm)
    if reverse:
        found = scan_backward(matrix.shape, matrix, norm, *first, dtype=dtype)
    else:
        found = scan(matrix, norm, *first, weight=x.weight, states=dtype)
    assert found.before is not None
    return Chain(found.before, *found[1:])


def norm_chain(norm: Tensor, start: Tensor | None, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """The same of norms alone."""
    from newllm.kernels.memory_scan import scan_norms

    return scan_norms(norm.shape, norm, start, reverse=reverse)


def corrections(x: Slice, call: Call, norms: Tensor) -> Tensor:
    """What the delta rule takes away of each segment's memory."""
    from newllm.kernels.memory_fold import fold_correction
    from newllm.kernels.memory_layout import Layout

    return fold_correction(x.new()[0], norms, Layout(call.segment), *_learned(x), eps=call.eps)


def delta_chain(
    x: Slice, corrections: Tensor, steps: Tensor | None, start: Tensor | None, *, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """The delta rule from segment to segment; matrices before each in the dtype of products."""
    from newllm.kernels.common import memory_dtype
    from newllm.kernels.memory_scan import scan_delta

    columns = (steps if start is None else start).shape[-1]  # type: ignore[union-attr]
    shape = torch.Size([*corrections.shape[:4], columns])
    before, last = scan_delta(
        shape, corrections, steps, start, states=memory_dtype(x.q.dtype), reverse=reverse, inputs=x.q.dtype
    )
    assert before is not None
    return before, last


def near(x: Slice, call: Call) -> Any:
    """Rotated keys: what can be done before the memory is there."""
    from newllm.kernels.rotate import measured_keys

    return measured_keys(x.k, x.rope)


def read(
    x: Slice, call: Call, near: Any, matrix: Tensor | None, norm: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Window and memory in one kernel: the output and the softmax's log2-sum-exp2."""
    from newllm.kernels import infini_attention as kernels

    return kernels.read(_inputs(x, call), _call(call), near, matrix, norm)


def begin_backward(
    x: Slice, call: Call, out: Tensor, lse: Tensor, matrix: Tensor | None, norm: Tensor | None, do: Tensor
) -> Begun:
    """Gradients of the memories that ``read`` read."""
    from newllm.kernels import infini_attention as kernels

    saved = kernels.Saved(out, lse, matrix, norm)
    found = kernels.begin_backward(_inputs(x, call), _call(call), saved, do)
    return Begun(found.before, found.norms, (saved, found))


def finish_backward(x: Slice, call: Call, begun: Begun) -> Read:
    """Gradients of all else that ``read`` read."""
    from newllm.kernels import infini_attention as kernels

    found = kernels.finish_backward(_inputs(x, call), _call(call), *begun.rest)
    own = found.inputs
    return Read(Slopes(own.q, own.k, own.v, own.beta), found)


def norm_slopes(x: Slice, call: Call, matrix: Tensor, norm: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the norms through the delta rule, and the curvature for :func:`added_backward`."""
    from newllm.kernels.memory_curvature import curvature, norm_gradients
    from newllm.kernels.memory_layout import Layout

    k = x.new()[0]
    curvatures = curvature(after, matrix, k.dtype)
    layout = Layout(call.segment)
    return norm_gradients(k, curvatures, norm, layout, *_learned(x), eps=call.eps), curvatures


def added_backward(
    x: Slice, call: Call, norm: Tensor, after: Tensor, after_norm: Tensor, rest: Any, found: Read
) -> Slopes:
    """``found`` with what reaches the slice through what its segments added."""
    from newllm.kernels import infini_attention as kernels
    from newllm.kernels.memory_fold_backward import Gradients

    # What reaches the memory before the slice is the chain's own result.
    unused = after_norm[:, :, 0]
    gradients = Gradients(after, after_norm, unused, unused, rest)
    norms = None if rest is None else norm
    told = kernels.through_memory(
        _inputs(x, call), _call(call), norms, gradients, found.rest, x.weight is not None
    )
    return Slopes(told.q, told.k, told.v, told.beta, told.scale, told.bias, told.weight)
