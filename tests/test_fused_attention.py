"""The fused layer and window attention in the interpreter; test_fused_attention_gpu.py goes far wider."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from newllm.ops.attention_fused import attention
from newllm.testing import CASES, DRAWS, Inputs, OpCase, mapped
from newllm.types import FeatureMap
from tests.attention_cases import SIZES, Launches, in_calls, judge, layer, window
from tests.contracts import Looking, check_contracts

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


CASE_ROWS = [
    (op, variant, BF16 if op == "infini_attention" else F32)
    for op in ("window_attention", "infini_attention")
    for variant in CASES[op].variants
    if variant != "gated"
]


@pytest.mark.parametrize(("op", "variant", "dtype"), CASE_ROWS, ids=str)
def test_every_variant_obeys_the_error_rule(
    op: str, variant: str, dtype: torch.dtype, fused_device: str
) -> None:
    case = replace(CASES[op], sizes={**SIZES, "batch": 2 if variant in ("padded", "continued") else 1})
    inputs = case.inputs(variant, dtype, device=fused_device, tokens=14, segment=9, window=11)
    case.judge(inputs, dtype, function=partial(case.public, backend="fused"))


# Sizes of one judged case beside those of attention_cases.
BATCH, SHORT = {"batch": 2}, {"tokens": 20, "segment": 5, "window": 9}
# Seeds with which the gradients of two gates and one feature map, three numbers, are not exact by luck.
LAYER: list[tuple[str, torch.dtype, dict[str, int]]] = [
    # Several tiles a segment and a window beyond a tile.
    ("learned", F32, {"tokens": 70, "segment": 40, "window": 45, "seed": 1}),
    ("delta learned stream", F32, {"tokens": 60, "segment": 40, "window": 45, "seed": 1}),
    # Groups of three.
    ("", BF16, {"heads": 3, "tokens": 12, "segment": 9, "seed": 2}),
    ("learned tanh padded apart stream by-row", BF16, {**BATCH, "tokens": 20}),
    ("stream", F16, {"tokens": 20}),
    # Exponents with and without a bound.
    ("long", F32, {"tokens": 70, "heads": 8, "kv_heads": 4}),
    ("long no-memory", F16, {"tokens": 70}),
    ("long stream", BF16, {"tokens": 70}),
    ("clamped stream", F32, {"tokens": 40}),
    ("local stream", BF16, {**BATCH, "tokens": 20, "seed": 2}),
    ("no-memory padded stream", BF16, {**BATCH, "tokens": 20, "seed": 2}),
    ("weights cut", F32, {**SHORT, "seed": 1}),
    ("weights", BF16, SHORT),
    ("full", F32, {**SHORT, "seed": 1}),
    ("two", F32, SHORT),
    ("delta two", F32, {**SHORT, "heads": 8, "kv_heads": 4}),
    ("gamma", F32, {**SHORT, "heads": 8, "kv_heads": 4}),
    ("gamma stream", F32, {"tokens": 60, "segment": 40, "window": 45}),
    ("gamma padded apart stream", BF16, {**BATCH, "tokens": 20, "segment": 9, "window": 11}),
    ("gamma two", F32, {**SHORT, "heads": 8, "kv_heads": 4}),
    ("gamma cut tanh", F32, {**SHORT, "heads": 8, "kv_heads": 4}),
    ("gamma local stream", F16, {"tokens": 20}),
    ("gamma clamped padded", F32, {**BATCH, **SHORT, "heads": 8, "kv_heads": 4}),
    ("gamma", F32, {"key": 80, "value": 96, "tokens": 20, "segment": 7}),
    ("learned open", BF16, {}),
    # Single keys: the gate's gradient is small beside the rounding of out.
    ("open", F32, {"tokens": 20, "window": 1, "segment": 1, "seed": 2}),
    ("delta stream", F32, {"tokens": 1}),
    ("", F32, {"tokens": 1}),
    ("", F32, {"tokens": 11, "seed": 1}),
    ("learned", F32, {"key": 80, "value": 96, "tokens": 20}),
    ("", F32, {"key": 96, "value": 7, "tokens": 20}),
    ("no-rope", F32, {"key": 35, "value": 80, "tokens": 20, "seed": 2}),
]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_nothing_that_is_kept_is_left_unwritten(dtype: torch.dtype, fused_device: str) -> None:
    """Of padding neither: what the backward does with all rows of a result reads it."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 45, 16, generator=generator).to(fused_device, dtype) for n in (2, 1, 1))
    beta, length = torch.zeros(2).to(q), torch.tensor([45, 9], device=fused_device)
    tensors = (q, k, v, beta, *(None,) * 5, length, None, None, None)
    results = attention(*tensors, 16, 16, "sigmoid", "delta", 1e-6, None)
    assert not any(x.isnan().any() for x in results)


@pytest.mark.parametrize(("changes", "dtype", "sizes"), LAYER, ids=str)
def test_the_layer_obeys_the_error_rule(
    changes: str, dtype: torch.dtype, sizes: dict[str, int], fused_device: str
) -> None:
    """Rules, gates, detach modes, streams, padding, strides, widths: outputs, states and all gradients."""
    judge(layer(changes), dtype, fused_device, **sizes)


WINDOW: list[tuple[str, torch.dtype, dict[str, int]]] = [
    ("", F32, {"tokens": 70, "window": 35, "key": 64, "value": 32}),
    ("apart padded by-row", F32, BATCH),
    ("local", BF16, {}),
    ("", F32, {"tokens": 1}),
]


@pytest.mark.parametrize(("changes", "dtype", "sizes"), WINDOW, ids=str)
def test_the_window_obeys_the_error_rule(
    changes: str, dtype: torch.dtype, sizes: dict[str, int], fused_device: str
) -> None:
    judge(window(changes), dtype, fused_device, **sizes)


@pytest.mark.parametrize(("factor", "window"), [(1 / 8, 2), (1 / 8, 3), (32, 2)])
def test_slopes_of_few_keys_cancel(factor: float, window: int, fused_device: str) -> None:
    """Where memory is most of the output: rounding that would not show where q and k are of one length.

    The gradient of the shorter one is the window's, times the longer one.
    """
    case = layer("")
    sizes = {"heads": 4, "kv_heads": 2, "tokens": 12, "segment": 2, "window": window}
    inputs = case.inputs("changed", F32, device=fused_device, **sizes)
    inputs |= {"q": inputs["q"] * factor, "k": inputs["k"] / factor}
    inputs |= {"beta": torch.full_like(inputs["beta"], 3)}
    case.judge(inputs, F32, function=partial(case.public, backend="fused"))


@pytest.mark.parametrize("changes", ["", "no-rope"])
def test_a_lone_key_weighs_one(changes: str, fused_device: str) -> None:
    """To the bit, though its score is summed up in another order for its gradient than for the output."""
    case = window(changes)
    sizes = {"heads": 16, "kv_heads": 8, "tokens": 40, "segment": 1, "window": 1}
    inputs = case.inputs("changed", F32, device=fused_device, **sizes)
    values = inputs["v"].requires_grad_()
    out = case.call(inputs, partial(case.public, backend="fused"))
    gradient = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, values, gradient)
    assert torch.equal(out, values.repeat_interleave(2, 1))
    assert torch.equal(found, gradient[:, ::2] + gradient[:, 1::2])


# What a call may not depend on


@pytest.mark.parametrize(
    ("rule", "cut", "tokens", "segment", "window"),
    # The last: a call shorter than a segment and than a tile that a border crosses.
    [("linear", 9, 20, 5, 11), ("delta", 9, 20, 5, 11), ("gamma", 9, 20, 5, 11), ("linear", 66, 76, 70, 75)],
)
def test_any_split_is_one_call(
    rule: str, cut: int, tokens: int, segment: int, window: int, fused_device: str
) -> None:
    """Calls that continue each other, with gradients through their states, and the reference of the whole."""
    case = layer(f"{'' if rule == 'linear' else rule} padded")
    sizes = {"batch": 2, "tokens": tokens, "segment": segment, "window": window}
    draws = [case.inputs("changed", F32, device=fused_device, seed=2 + i, **sizes) for i in range(DRAWS[F32])]
    for inputs in draws:
        inputs["padding_mask"][0] = True
        inputs["padding_mask"][1, ::2] = True
    case.judge(draws[0], F32, function=partial(in_calls, (0, cut, tokens)), others=draws[1:])


@pytest.mark.parametrize("changes", ["learned delta", "gamma", "local"])
def test_no_token_sees_a_later_one(changes: str, fused_device: str) -> None:
    """Bit by bit, and no gradient of an output reaches a later token."""
    case, now = layer(changes), 18
    inputs = case.inputs("changed", F32, device=fused_device, heads=1)
    qkv = {name: inputs.pop(name).requires_grad_() for name in ("q", "k", "v")}
    later = {name: torch.cat([x[:, :, :now], x[:, :, now:] + 1], 2) for name, x in qkv.items()}
    out, _ = case.public(**qkv, **inputs, backend="fused")
    changed, _ = case.public(**later, **inputs, backend="fused")
    assert torch.equal(out[:, :, :now], changed[:, :, :now])
    for slope in torch.autograd.grad(out[:, :, :now].sum(), [*qkv.values()]):
        assert slope[:, :, :now].any()
        assert not slope[:, :, now:].any()


def test_padding_is_as_if_it_were_not_there(fused_device: str) -> None:
    """Rows padded on the left, on the right and between, against each row by itself."""
    case = layer("learned")
    inputs = case.inputs("changed", F32, device=fused_device, batch=3, segment=6, window=9, tokens=21)
    mask = torch.ones(3, 21, dtype=torch.bool, device=fused_device)
    mask[0, :8] = mask[1, 15:] = mask[2, 2:12:3] = False
    out, state = case.public(**inputs, padding_mask=mask, backend="fused")
    assert not out.mT[:, 0].mT[~mask].any()
    for row, real in enumerate(mask):
        alone = {name: inputs[name][row : row + 1, :, real] for name in ("q", "k", "v")}
        alone["rope"] = tuple(table[: int(real.sum())] for table in inputs["rope"])
        expected, last = case.public(**{**inputs, **alone}, backend="fused")
        assert torch.equal(out[row : row + 1, :, real], expected)
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(state[:5], last[:5], strict=True))


@pytest.mark.parametrize("op", ["window_attention", "infini_attention"])
def test_autocast_is_a_call_in_its_dtype(op: str, fused_device: str) -> None:
    case: OpCase = {"window_attention": window, "infini_attention": layer}[op]("")
    inputs = case.inputs("changed", F32, device=fused_device, tokens=5)
    lower = {name: inputs[name].to(BF16) for name in ("q", "k", "v")}
    expected = case.public(**{**inputs, **lower}, backend="fused")
    with torch.autocast(fused_device, dtype=BF16):
        found = case.public(**inputs, backend="fused")
    found, expected = (x if isinstance(x, Tensor) else x[0] for x in (found, expected))
    assert found.dtype == BF16
    assert torch.equal(found, expected)


# The contract

PARTS = ["forward", "backward_prepare", "backward_slopes", "backward_keys", "backward_queries"]
ATTENTION = {f"_infini_attention_{part}_kernel" for part in PARTS}
MEMORY = {"_memory_fold_forward_kernel", "_memory_fold_backward_kernel"}
MEMORY |= {"_infini_attention_backward_recall_kernel"}
LINEAR, DELTA = {"_memory_scan_linear_kernel"}, {"_memory_scan_delta_kernel"}
GAMMA = {"_memory_scan_gamma_kernel"}
RUNS: list[tuple[str, str, set[str]]] = [
    ("window_attention", "", {"_rotate_kernel"}),
    ("window_attention", "local padded no-rope", {"_rotate_kernel"}),
    ("infini_attention", "no-memory stream", {"_rotate_kernel"}),
    ("infini_attention", "learned tanh weights padded", {"_rotate_kernel"} | MEMORY | LINEAR),
    ("infini_attention", "delta local stream", {"_rotate_kernel"} | MEMORY | DELTA),
    ("infini_attention", "gamma padded stream", {"_rotate_kernel"} | MEMORY | DELTA | GAMMA),
]


@pytest.mark.parametrize(("op", "changes", "kernels"), RUNS)
def test_only_kernels_run(
    op: str, changes: str, kernels: set[str], fused_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case: OpCase = {"window_attention": window, "infini_attention": layer}[op](changes)
    inputs = case.inputs("changed", F32, device=fused_device, heads=1, tokens=9, window=5, segment=4)
    launches = Launches(monkeypatch)
    case.results(partial(case.call, function=partial(case.public, backend="fused")), inputs)
    assert set(launches.names) >= ATTENTION | kernels


@pytest.mark.parametrize(("wanted", "passes"), [(True, 2), (False, 1)])
def test_weights_take_another_pass_only_for_their_gradient(
    wanted: bool, passes: int, fused_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = layer("weights")
    inputs = case.inputs("changed", F32, device=fused_device, heads=1, tokens=9, window=5, segment=4)
    inputs |= {"segment_weight": inputs["segment_weight"].requires_grad_(wanted)}
    launches = Launches(monkeypatch)
    out, _ = case.public(**{**inputs, "q": inputs["q"].requires_grad_()}, backend="fused")
    out.sum().backward()
    assert launches.names.count("_memory_fold_forward_kernel") == passes
    assert (inputs["segment_weight"].grad is not None) == wanted


@pytest.mark.parametrize("looked_at", [False, True])
def test_gradients_of_gradients_are_refused(looked_at: bool, fused_device: str) -> None:
    inputs = window("").inputs("changed", F32, device=fused_device, heads=1, tokens=5, window=3, segment=3)
    q = inputs["q"].requires_grad_()
    with Looking() if looked_at else nullcontext():
        out = window("").public(**inputs, backend="fused")
        (slope,) = torch.autograd.grad((out * out).sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match=r"differentiate twice|no autograd formula"):
            slope.sum().backward()


def test_the_guard_against_the_reference_works(monkeypatch: pytest.MonkeyPatch) -> None:
    Launches(monkeypatch)
    for case in (window(""), layer("")):
        with pytest.raises(AssertionError, match=r"^the reference's"):
            case.public(**case.inputs("changed", F32), backend="reference")


@pytest.mark.parametrize(
    "changes", ["learned tanh padded stream", "delta stream", "gamma stream", "no-memory", "weights"]
)
def test_contracts_hold(changes: str, fused_device: str) -> None:
    """Schema, fake and autograd registration of what the public operator calls, forward and backward."""
    case = layer(changes)
    inputs = case.inputs("changed", F32, device=fused_device, heads=1, tokens=4, segment=2, window=3)
    check_contracts("attention", case, inputs)


@pytest.mark.parametrize(
    ("op", "changes"), [("window_attention", ""), ("infini_attention", "learned delta stream")]
)
def test_the_operator_compiles_whole(op: str, changes: str, fused_device: str) -> None:
    case: OpCase = {"window_attention": window, "infini_attention": layer}[op](changes)
    inputs = case.inputs("changed", F32, device=fused_device, heads=1, tokens=4, segment=4, window=5)
    function = partial(case.public, backend="fused")
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = case.results(partial(case.call, function=compiled), inputs)
    wanted = case.results(partial(case.call, function=function), inputs)
    assert all(torch.equal(x, wanted[name]) for name, x in found.items())


def declined() -> dict[str, tuple[str, Inputs, str]]:
    """Calls that only the reference takes, each with what the refusal says."""
    plain, wide = (layer("").inputs("changed", F32, key=key, tokens=5) for key in (16, 258))
    double = mapped(lambda x: x.double(), plain)
    bare = {name: x for name, x in double.items() if name != "beta"}
    return {
        "dtype": ("infini_attention", double, "float64"),
        "window's dtype": ("window_attention", bare, "float64"),
        "feature": ("infini_attention", {**plain, "feature": FeatureMap("dpfp", order=1)}, "'dpfp'"),
        "width": ("infini_attention", wide, "258"),
    }


@pytest.mark.parametrize("name", ["dtype", "window's dtype", "feature", "width"])
def test_what_the_kernels_lack_is_the_references(name: str, fused_device: str) -> None:
    op, inputs, message = declined()[name]
    public, inputs = CASES[op].public, mapped(lambda x: x.to(fused_device), inputs)
    found, expected = public(**inputs), public(**inputs, backend="reference")
    found, expected = (x if isinstance(x, Tensor) else x[0] for x in (found, expected))
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=f"^backend 'fused' cannot run {op}: .*{message}"):
        public(**inputs, backend="fused")
