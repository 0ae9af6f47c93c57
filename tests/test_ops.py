"""The contract of the public operators: checks, backends, autocast, compilation, and the case table."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from newllm import backend, ops
from newllm.testing import CASES, assert_no_worse, assert_rounding, leaves, mapped
from newllm.types import FeatureMap
from tests.wrong_inputs import INFINI, WRONG, good, memory, qkv, stream, tables

ALL = [(op, variant) for op, case in CASES.items() for variant in case.variants]


def test_every_operator_has_a_case() -> None:
    assert set(CASES) == set(ops.__all__) == set(backend.FUSED) - {"context_jacobi"}  # a method of a sweep
    assert all(case.public is getattr(ops, op) for op, case in CASES.items())


@pytest.mark.parametrize(
    ("op", "wrong", "error", "message"), WRONG, ids=[f"{w.op}: {w.message}" for w in WRONG]
)
def test_wrong_input_is_named(op: str, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    CASES[op].public(**good(op))
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        CASES[op].public(**{**good(op), **wrong})


@pytest.mark.parametrize(
    ("op", "wrong", "message"),
    [
        ("infini_attention", {"q": [1.0]}, "q must be a tensor, got list"),
        ("infini_attention", {"k": np.zeros((2, 2, 6, 4))}, "k must be a tensor, got ndarray"),
        ("infini_attention", {"v": None}, "v must be a tensor, got NoneType"),
        ("infini_attention", {"beta": 0.5}, "beta must be a tensor, got float"),
        ("infini_attention", {"window": "4"}, "window must be a whole number or None, got '4'"),
        ("infini_attention", {"segment": 2.0}, "segment must be a whole number, got 2.0"),
        ("infini_attention", {"segment": None}, "segment must be a whole number, got None"),
        ("infini_attention", {"segment": True}, "segment must be a whole number, got True"),
        ("infini_attention", {"rope": 3}, "rope must be the tables (cos, sin), got int"),
        ("infini_attention", {"rope": tables(6, 4)[:1]}, "rope must be the tables (cos, sin), got 1 of them"),
        ("infini_attention", {"state": memory()}, "state must be an InfiniState, got MemoryState"),
        ("infini_attention", {"feature": "elu1"}, "feature must be a FeatureMap, got str"),
        ("infini_attention", {"padding_mask": [True]}, "padding_mask must be a tensor, got list"),
        ("infini_decode", {"state": None}, "state must be an InfiniState, got NoneType"),
        ("memory_update", {"state": (1, 2)}, "state must be a MemoryState, got tuple"),
        ("memory_retrieve", {"state": None}, "state must be a MemoryState, got NoneType"),
        ("window_attention", {"segment": 1.5}, "segment must be a whole number, got 1.5"),
        ("gemv", {"x": 1}, "x must be a tensor, got int"),
    ],
)
def test_another_kind_of_argument_is_named(op: str, wrong: dict[str, Any], message: str) -> None:
    with torch.no_grad(), pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        CASES[op].public(**{**good(op), **wrong})


@pytest.mark.parametrize("op", ["infini_attention", "infini_decode", "memory_retrieve"])
def test_a_denominator_of_nothing_is_refused(op: str) -> None:
    """An empty memory would read NaN."""
    with torch.no_grad(), pytest.raises(ValueError, match=r"^eps must be above 0, got 0.0$"):
        CASES[op].public(**good(op), eps=0.0)


@pytest.mark.parametrize(
    "op", ["infini_attention", "window_attention", "memory_update", "memory_scan", "memory_retrieve"]
)
def test_runs_without_numbers(op: str) -> None:
    """On the meta device, where sizes are found out without memory."""
    inputs = good(op)
    bare = mapped(lambda x: x.to("meta"), inputs)
    with torch.no_grad():
        wanted, found = (dict(leaves(CASES[op].public(**given))) for given in (inputs, bare))
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in wanted.items()}


@pytest.mark.parametrize("name", ["q", "v", "beta", "state.matrix", "feature.scale", "feature.write"])
def test_decode_refuses_to_be_differentiated(name: str) -> None:
    feature = FeatureMap(scale=torch.ones(2), write=torch.ones(2, 4), write_bias=torch.ones(2))
    arguments = good("infini_decode") | {"beta": torch.zeros(4), "feature": feature}
    dict(leaves(arguments))[name].requires_grad_()
    sentence = "infini_decode writes into its state and has no gradient: use torch.no_grad()"
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        ops.infini_decode(**arguments)
    with torch.no_grad():
        assert ops.infini_decode(**arguments).isfinite().all()


def test_a_window_of_one_token_takes_longer_tables_with_a_state() -> None:
    """Its ring reaches no token back, so one row is enough and more are allowed."""
    sizes: dict[str, Any] = {"window": 1, "segment": 1, "beta": None}
    _, state = ops.infini_attention(**qkv(), **sizes)
    out = ops.infini_decode(**qkv(1), **sizes, state=state, rope=tables(3, 4))
    assert out.shape == (2, 4, 1, 3)


@pytest.mark.parametrize("op", [op for op in CASES if "cpu" not in backend.FUSED[op]])
def test_fused_is_refused_where_there_is_none(op: str) -> None:
    case = CASES[op]
    inputs = case.inputs(next(iter(case.variants)), torch.float32)
    sentence = f"backend 'fused' cannot run: {op} has no fused implementation for device type 'cpu'"
    with torch.no_grad(), pytest.raises(RuntimeError, match=re.escape(sentence)):
        case.public(**inputs, backend="fused")
    with (
        torch.no_grad(),
        backend.use_backend("fused"),
        pytest.raises(RuntimeError, match=re.escape(sentence)),
    ):
        case.public(**inputs)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="backend must be one of reference, fused; got 'cuda'"),
    ):
        case.public(**inputs, backend="cuda")


@pytest.mark.parametrize(("op", "variant"), ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_are_no_worse_than_the_reference(op: str, variant: str, dtype: torch.dtype) -> None:
    """The rule that a fused implementation has to pass, on what runs here."""
    case = CASES[op]
    case.judge(case.inputs(variant, dtype), dtype, gradients=dtype != torch.float16)


@pytest.mark.parametrize(("op", "variant"), ALL)
def test_inputs_are_left_alone_and_results_are_new(op: str, variant: str) -> None:
    case = CASES[op]
    inputs = case.inputs(variant, torch.float32)
    before = mapped(Tensor.clone, inputs)
    results = case.call(inputs)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(leaves(inputs), leaves(before), strict=True))
    owned = {x.untyped_storage().data_ptr() for _, x in leaves(inputs)}
    assert not owned & {x.untyped_storage().data_ptr() for _, x in leaves(results)}


@pytest.mark.parametrize(
    ("compiler", "op", "variant"),
    [("eager", *each) for each in ALL] + [("aot_eager", op, next(iter(CASES[op].variants))) for op in CASES],
)
def test_compiles_whole_and_agrees(compiler: str, op: str, variant: str) -> None:
    """Every variant as a graph, one of each operator also through ahead-of-time autograd."""
    case = CASES[op]
    inputs = case.inputs(variant, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(case.public, fullgraph=True, backend=compiler)
    found = case.results(lambda given: case.call(given, compiled), inputs)
    wanted = case.results(case.call, inputs)
    assert found.keys() == wanted.keys()
    for name, out in found.items():
        oracle = wanted[name].double() if out.is_floating_point() else wanted[name]
        assert_no_worse(out, oracle, wanted[name], name)


def test_compiled_decode_writes_at_static_addresses() -> None:
    """One graph serves every token, completed segments included, and equals eager decoding."""
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(ops.infini_decode, fullgraph=True, backend=frames)
    options = INFINI | {"rope": tables(4, 4), "rule": "delta"}
    mine, eager = stream(), stream()
    addresses = [x.data_ptr() for _, x in leaves(mine)]
    with torch.no_grad():
        for _ in range(7):
            token = qkv(1)
            active = torch.tensor([True, bool(torch.rand(()) > 0.5)])
            out = compiled(**token, **options, state=mine, active=active)
            assert torch.equal(out, ops.infini_decode(**token, **options, state=eager, active=active))
    assert [x.data_ptr() for _, x in leaves(mine)] == addresses
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(leaves(mine), leaves(eager), strict=True))
    assert mine.norm is not None
    assert mine.norm.any()
    assert frames.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_projections_but_not_the_state(dtype: torch.dtype) -> None:
    """Also where some projection already has autocast's dtype and another is float32."""
    inputs = qkv() | INFINI | {"state": stream(norm=torch.full((2, 2, 4), 1 / 3))}
    low = {name: inputs[name].to(dtype) for name in ("q", "k", "v")}
    with torch.autocast("cpu", dtype):
        out, state = ops.infini_attention(**inputs)
        mixed, _ = ops.infini_attention(**{**inputs, "v": low["v"]})
        assert torch.is_autocast_enabled("cpu")
    wanted, wanted_state = ops.infini_attention(**{**inputs, **low})
    assert out.dtype == dtype
    assert torch.equal(out, wanted)
    assert torch.equal(mixed, wanted)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(leaves(state), leaves(wanted_state), strict=True))
    assert state.norm is not None
    assert state.norm.dtype == torch.float32


@pytest.mark.parametrize("op", [*CASES])
def test_autocast_leaves_float64_alone(op: str) -> None:
    case = CASES[op]
    inputs = case.inputs(next(iter(case.variants)), torch.float64)
    plain = case.call(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        casted = case.call(inputs)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(leaves(casted), leaves(plain), strict=True))


@pytest.mark.parametrize(
    ("judge", "broken"),
    [
        (lambda out: assert_no_worse(out, torch.ones(4).double(), torch.ones(4)), lambda x: x + 1e-3),
        (lambda out: assert_no_worse(out, torch.ones(4).double(), torch.ones(4)), lambda x: x * float("nan")),
        (lambda out: assert_no_worse(out, torch.ones(4).double(), torch.ones(4)), lambda x: x[:3]),
        (lambda out: assert_no_worse(out, torch.ones(4).double(), torch.ones(4)), lambda x: x.half()),
        (lambda out: assert_rounding(out, torch.ones(4), additions=8, magnitude=1), lambda x: x + 1e-5),
        (lambda out: assert_rounding(out, torch.ones(4), additions=8, magnitude=1), lambda x: x / 0 * 0),
        (lambda out: assert_rounding(out, torch.ones(4), additions=8, magnitude=1), lambda x: x.double()),
    ],
)
def test_the_rules_can_fail(judge: Callable[[Tensor], None], broken: Callable[[Tensor], Tensor]) -> None:
    judge(torch.ones(4))
    judge(torch.ones(4) + torch.finfo(torch.float32).eps)
    with pytest.raises(AssertionError):
        judge(broken(torch.ones(4)))


def test_the_error_rule_allows_twice_the_baseline() -> None:
    oracle, baseline = torch.zeros(3).double(), torch.tensor([0.0, 1.0, 0.0])
    assert_no_worse(baseline * 2, oracle, baseline)
    with pytest.raises(AssertionError, match=r"^out: error 2\.01, allowed 2$"):
        assert_no_worse(baseline * 2.01, oracle, baseline, "out")
