"""The memory's kernels under the error rule: in the interpreter here, on the GPU far wider."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from newllm import ops
from newllm.reference import memory as reference
from newllm.reference.infini import _aligned_segments
from newllm.testing import DRAWS, Draw, Inputs, OpCase, leaves, mapped
from newllm.types import FeatureMap, MemoryState, Rule
from tests.contracts import check_contracts
from tests.memory_cases import EVERY, SIZES, VARIANTS, begun, case_of, filled, judge, key_values, learned

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = [F32, BF16, F16]


@pytest.mark.parametrize(
    ("op", "variant", "dtype", "kv_heads"),
    [(*each, DTYPES[i % 2], 2 if i % 4 == 1 or "gamma" in each else 1) for i, each in enumerate(EVERY)],
    ids=str,
)
def test_row_70_fused_memory_obeys_the_error_rule(
    op: str, variant: str, dtype: torch.dtype, kv_heads: int, fused_device: str
) -> None:
    """Every rule, feature map, state, padding and stride: results, states and all gradients."""
    judge(op, variant, dtype, fused_device, kv_heads=kv_heads, draws=DRAWS[dtype])


@pytest.mark.parametrize("op", [*VARIANTS])
def test_fused_memory_multiplies_float16_as_float32(op: str, fused_device: str) -> None:
    judge(op, next(iter(VARIANTS[op])), F16, fused_device, kv_heads=1, tokens=9)


@pytest.mark.parametrize("variant", ["delta", "gamma"])
def test_a_long_update_in_parts_is_one_segment(variant: str, fused_device: str) -> None:
    """Parts of 64 tokens that share the norm before them."""
    sizes = {"batch": 2, "kv_heads": 1, "tokens": 150, "segment": 30}
    judge("memory_update", variant, F32, fused_device, draws=DRAWS[F32], **sizes)


@pytest.mark.parametrize("variant", ["delta", "gamma"])
@pytest.mark.parametrize("op", ["memory_update", "memory_scan"])
def test_widths_beyond_a_tile_go_in_parts(op: str, variant: str, fused_device: str) -> None:
    """Keys wider than the tile of a correction, values wider than that of a fold."""
    sizes = {"kv_heads": 1, "key": 70, "value": 70, "tokens": 9}
    judge(op, variant, F32, fused_device, draws=DRAWS[F32], **sizes)


# What the layer launches: earlier tokens, rows at different phases, whole segments, truncated gradients


def layer_inputs(draw: Draw, rule: str, streaming: bool, reach: int | None) -> Inputs:
    segment, past = draw.sizes["segment"], draw.sizes["segment"] + 2
    inputs = key_values(draw)
    inputs |= begun(draw, count=False) if rule == "gamma" else learned(draw) | filled(draw, count=False)
    end = torch.tensor([draw.sizes["tokens"], draw.sizes["tokens"] - segment + 2], device=draw.device)
    if streaming:
        for name, width in (("past_k", "key"), ("past_v", "value")):
            inputs[name] = draw.normal("batch", "kv_heads", past, width)
        inputs["position"] = torch.tensor([3, 2 * segment - 2], device=draw.device)
    if rule == "linear":
        count = -(-(draw.sizes["tokens"] + (segment - 1) * streaming) // segment)
        inputs["weight"] = draw.normal("batch", count, dtype=draw.state_dtype)
    return inputs | {"length": end, "segment": segment, "rule": rule, "reach": reach}


def layer_reference(
    k: Tensor,
    v: Tensor,
    feature: FeatureMap,
    state: MemoryState,
    length: Tensor,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
    position: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    segment: int,
    rule: Rule,
    reach: int | None,
    compute_dtype: torch.dtype | None = None,
) -> Any:
    past = 0
    if past_k is not None and past_v is not None:
        past, k, v = past_k.shape[2], torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    compute = compute_dtype or reference.state_dtype(k.dtype)
    segments = _aligned_segments(k, v, past, position, length, segment, feature, compute)
    before, last = reference.scan(segments, state, rule=rule, weight=weight, bptt_segments=reach)
    return *before[:2], *last[:2]


class Write(torch.autograd.Function):
    """``kernels.memory.write`` with its gradients."""

    @staticmethod
    def forward(ctx: Any, options: Inputs, *tensors: Any) -> Any:
        from newllm.kernels.memory import correction, write
        from newllm.kernels.memory_layout import Layout

        k, v, scale, bias, matrix, norm, past_k, past_v, weight = tensors
        layout = Layout(options["segment"], options["position"], options["length"], past_k, past_v)
        delta = correction(options["rule"], 1e-6)
        chain = write(k, v, layout, scale, bias, matrix=matrix, norm=norm, weight=weight, delta=delta)
        ctx.save_for_backward(k, v, scale, bias, weight, chain.before, chain.norms)
        ctx.options = layout, delta, options
        return tuple(chain)

    @staticmethod
    def backward(ctx: Any, *outgoing: Any) -> Any:
        from newllm.kernels.memory import Outgoing, weight_gradient, write_backward
        from newllm.kernels.memory_fold_backward import fold_backward

        (k, v, *feature, weight, before, norms), (layout, delta, options) = ctx.saved_tensors, ctx.options
        states = {"before": before, "norms": norms}
        found = write_backward(
            k, layout, before.shape, Outgoing(*outgoing), *feature, **states,
            delta=delta, reach=options["reach"],
        )  # fmt: skip
        novel = options["rule"] == "gamma"
        tokens = fold_backward(k, v, found, layout, *feature, weight=weight, norms=norms, novel=novel)
        initial = found.initial_matrix, found.initial_norm
        weights = None if weight is None else weight_gradient(k, v, found, layout, *feature)
        return None, *tokens[:2], *tokens[4:], *initial, *tokens[2:4], weights


def layer_kernels(
    k: Tensor,
    v: Tensor,
    feature: FeatureMap,
    state: MemoryState,
    length: Tensor,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
    position: Tensor | None = None,
    weight: Tensor | None = None,
    **options: Any,
) -> Any:
    options |= {"position": position, "length": length}
    return Write.apply(options, k, v, *feature[1:3], *state[:2], past_k, past_v, weight)


RULES: tuple[Rule, ...] = ("linear", "delta", "gamma")
LAYER = [(rule, *each) for rule in RULES for each in ((True, None), (True, 2), (False, 1))]


def judge_layer(
    rule: Rule,
    streaming: bool,
    reach: int | None,
    dtype: torch.dtype,
    device: str,
    *,
    draws: int = 1,
    **sizes: int,
) -> None:
    make = partial(layer_inputs, rule=rule, streaming=streaming, reach=reach)
    case = OpCase(layer_kernels, layer_reference, SIZES | sizes, {"layer": make})
    others = (case.inputs("layer", dtype, device=device, seed=seed) for seed in range(draws))
    case.judge(next(others), dtype, others=others)


@pytest.mark.parametrize(("rule", "streaming", "reach"), LAYER)
def test_the_layer_writes_whole_segments_from_any_phase(
    rule: Rule, streaming: bool, reach: int | None, fused_device: str
) -> None:
    """Rows at their own phase and length, an open segment in earlier tokens, gradients cut after reach."""
    judge_layer(rule, streaming, reach, F32, fused_device, draws=DRAWS[F32], kv_heads=1)


@pytest.mark.parametrize("rule", RULES)
def test_programs_share_the_tokens_of_a_segment(
    rule: Rule, fused_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No token counts twice where a program's last tile ends within its tokens."""
    from newllm.kernels import memory_curvature, memory_fold_backward

    for module in (memory_curvature, memory_fold_backward):
        monkeypatch.setattr(module, "CHUNK", 16)
    judge_layer(rule, True, None, F32, fused_device, kv_heads=4, segment=40, tokens=90)


@pytest.mark.parametrize("rule", RULES)
def test_without_reach_nothing_flows_back(rule: Rule, fused_device: str) -> None:
    draw = Draw(SIZES | {"kv_heads": 1}, F32, fused_device, 0)
    inputs = layer_inputs(draw, rule, True, 0)
    learning = [x.requires_grad_() for _, x in leaves(inputs) if x.is_floating_point()]
    results = layer_kernels(**inputs)
    slopes = torch.autograd.grad(results, learning, [torch.ones_like(x) for x in results])
    assert not any(x.any() for x in slopes)


# The contract


CONTRACTS = [
    ("memory_update", "delta"),
    ("memory_scan", "weights"),
    ("memory_scan", "gamma"),
    ("memory_retrieve", "learned"),
]


@pytest.mark.parametrize(("op", "variant"), CONTRACTS)
def test_contracts_hold(op: str, variant: str, fused_device: str) -> None:
    """Schema, fake and autograd registration of what the public operator calls, forward and backward."""
    case = case_of(op)
    inputs = case.inputs(variant, F32, device=fused_device, kv_heads=1, tokens=5)
    check_contracts(op, case, inputs)


@pytest.mark.parametrize("op", [*VARIANTS])
def test_fused_memory_compiles_whole(op: str, fused_device: str) -> None:
    case = case_of(op)
    variant = "learned" if op == "memory_retrieve" else "delta"
    inputs = case.inputs(variant, F32, device=fused_device, kv_heads=1, tokens=9)
    function = partial(case.public, backend="fused")
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = case.results(partial(case.call, function=compiled), inputs)
    wanted = case.results(partial(case.call, function=function), inputs)
    assert all(torch.equal(x, wanted[name]) for name, x in found.items())


def test_results_share_no_memory_with_inputs(fused_device: str) -> None:
    for op, variants in VARIANTS.items():
        case = case_of(op)
        inputs = case.inputs([*variants][1], F32, device=fused_device, kv_heads=1, tokens=5)
        before = mapped(Tensor.clone, inputs)
        results = case.public(**inputs, backend="fused")
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(leaves(inputs), leaves(before), strict=True))
        owned = {x.untyped_storage().data_ptr() for _, x in leaves(inputs)}
        assert not owned & {x.untyped_storage().data_ptr() for _, x in leaves(results)}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"k": torch.zeros(1, 1, 3, 4, dtype=torch.float64)}, "float16, bfloat16 and float32"),
        ({"feature": FeatureMap("dpfp", order=1)}, "'dpfp'"),
    ],
)
def test_what_kernels_do_not_offer_is_said(changes: Inputs, reason: str, fused_device: str) -> None:
    inputs = {"k": torch.zeros(1, 1, 3, 4), "v": torch.zeros(1, 1, 3, 4)} | changes
    inputs = {name: x.to(fused_device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    inputs["v"] = inputs["v"].to(inputs["k"].dtype)
    with pytest.raises(ValueError, match=f"backend 'fused' cannot run memory_update: .*{reason}"):
        ops.memory_update(**inputs, backend="fused")


def test_the_linear_scan_adds_from_left_to_right(fused_device: str) -> None:
    """Bit by bit what one segment after the other gives, whatever the order would round to."""
    k, v = (torch.randn(1, 1, 40, 16).to(fused_device) for _ in range(2))
    before, last = ops.memory_scan(k, v, segment=8, backend="fused")
    state = None
    for j in range(5):
        part = k[:, :, 8 * j : 8 * j + 8], v[:, :, 8 * j : 8 * j + 8]
        (_, state) = ops.memory_scan(*part, state, segment=8, backend="fused")
        wanted = last if j == 4 else MemoryState(*(x[:, :, j + 1] for x in before[:2]))
        assert all(torch.equal(a, b) for a, b in zip(state[:2], wanted[:2], strict=True))


# On the GPU

WIDTHS = [(d, d) for d in (16, 32, 64, 80, 96, 128, 256)] + [(64, 128), (96, 40)]
WIDE = [
    (key, value, tokens, dtype)
    for key, value in WIDTHS
    for tokens in (1, 127, 1031, 4096)
    for dtype in DTYPES
]


@pytest.mark.gpu
@pytest.mark.parametrize(("key", "value", "tokens", "dtype"), WIDE)
@pytest.mark.parametrize(("op", "variant"), EVERY)
def test_gpu_fused_memory_obeys_the_error_rule(
    op: str, variant: str, key: int, value: int, tokens: int, dtype: torch.dtype
) -> None:
    if dtype == F16 and "rule" in VARIANTS[op][variant](Draw(SIZES, dtype, "cpu", 0)):
        # With more the reference's denominators, sums of so many products, overflow in float16.
        tokens = min(tokens, 2**15 // key)
    # Eight heads: the gradients of scale and bias are one number a head, and the rule compares the largest.
    sizes = {"key": key, "value": value, "tokens": tokens, "segment": min(tokens, 256)}
    judge(op, variant, dtype, "cuda", draws=DRAWS[dtype], kv_heads=8, heads=16, **sizes)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rule", "streaming", "reach"), [*LAYER, ("linear", True, 3), ("delta", True, 4), ("gamma", True, 3)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("key", "value"), [(64, 64), (80, 96), (128, 128), (256, 256)])
@pytest.mark.parametrize("segment", [64, 250])
def test_gpu_layer_writes_whole_segments(
    rule: Rule, streaming: bool, reach: int | None, dtype: torch.dtype, key: int, value: int, segment: int
) -> None:
    sizes = {"key": key, "value": value, "segment": segment, "tokens": 5 * segment + 7}
    judge_layer(rule, streaming, reach, dtype, "cuda", draws=DRAWS[dtype], kv_heads=8, **sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("op", [*VARIANTS])
def test_gpu_more_heads_than_a_grid_axis_holds(op: str) -> None:
    """As many as programs; the gradients of scale and bias are then eight numbers each."""
    sizes = {"batch": 9000, "kv_heads": 8, "heads": 8, "tokens": 3, "key": 16, "value": 16}
    judge(op, [*VARIANTS[op]][1], F32, "cuda", draws=DRAWS[F32], **sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("op", [*VARIANTS])
def test_gpu_results_repeat_bit_by_bit(op: str) -> None:
    case = case_of(op)
    sizes = {"tokens": 5000, "key": 128, "value": 128, "segment": 512}
    inputs = case.inputs([*VARIANTS[op]][1], BF16, device="cuda", **sizes)
    call = partial(case.call, function=partial(case.public, backend="fused"))
    first, second = case.results(call, inputs), case.results(call, inputs)
    assert all(torch.equal(x, second[name]) for name, x in first.items())
