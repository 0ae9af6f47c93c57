"""Gradients of the operators: right, and reaching as far back as they are told to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from newllm.ops import infini_attention, memory_update
from newllm.reference.features import feature_map
from newllm.testing import CASES, assert_rounding, largest, leaves, mapped
from newllm.types import FeatureMap, InfiniState

F64 = torch.float64
SEGMENT, SEGMENTS = 3, 5
# ARMT's novelty is not differentiated, on purpose, so it has no numerical counterpart.
DIFFERENTIABLE = [
    (op, variant)
    for op, case in CASES.items()
    for variant in case.variants
    if case.mutates is None and variant != "gamma"
]


@pytest.mark.parametrize(("op", "variant"), DIFFERENTIABLE)
def test_gradients_equal_differences(op: str, variant: str) -> None:
    """Of all outputs and states, by all inputs and states, at doubled precision."""
    case = CASES[op]
    inputs = mapped(Tensor.detach, case.inputs(variant, F64))
    free = {
        n: x for n, x in leaves(inputs) if x.is_floating_point() and n.split(".")[0] not in case.constants
    }

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(map(id, free.values()), values, strict=True))
        results = case.public(**mapped(lambda x: given.get(id(x), x), inputs))
        return tuple(x for _, x in leaves(results) if x.requires_grad)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in free.values()], fast_mode=True)


def test_gamma_takes_the_novelty_as_a_constant() -> None:
    inputs = CASES["memory_update"].inputs("gamma", F64)
    inputs["k"].requires_grad_()
    found = torch.autograd.grad(memory_update(**inputs).norm.sum(), inputs["k"])[0]
    features = feature_map(inputs["k"], inputs["feature"])
    overlap = (features * inputs["state"].norm[:, :, None]).sum(-1) / features.square().sum(-1)
    wanted = torch.autograd.grad(
        ((1 - overlap).clamp(min=0).detach()[..., None] * features).sum(), inputs["k"]
    )
    assert_rounding(found, wanted[0], additions=found.numel(), magnitude=largest(wanted[0]))


def segments(x: Tensor) -> list[int]:
    """The segments in which a gradient ``[B, H, T, D]`` is not zero."""
    return x.unflatten(2, (-1, SEGMENT)).any(-1).any(-1)[0, 0].nonzero().flatten().tolist()


def qkv() -> list[Tensor]:
    return [torch.randn(1, 1, SEGMENT * SEGMENTS, 4, dtype=F64, requires_grad=True) for _ in range(3)]


OPEN = torch.full((1,), 50.0, dtype=F64)  # sigmoid(50) is 1: the memory alone answers
LAYER: dict[str, Any] = {"window": SEGMENT, "segment": SEGMENT}


@pytest.mark.parametrize("rule", ["linear", "delta"])
@pytest.mark.parametrize(
    ("options", "reached"),
    [
        ({}, [0, 1, 2, 3]),
        ({"detach": "none"}, [0, 1, 2, 3]),
        ({"detach": "segment"}, [3]),
        ({"detach": "full"}, []),
        *[({"bptt_segments": k}, list(range(max(0, 4 - k), 4))) for k in range(6)],
    ],
    ids=str,
)
def test_row_74_gradient_reaches_so_many_segments_back(
    rule: str, options: dict[str, Any], reached: list[int]
) -> None:
    """From the last of five segments, through the memory alone."""
    q, k, v = qkv()
    out, _ = infini_attention(q, k, v, OPEN, rule=rule, **LAYER, **options)
    gradients = torch.autograd.grad(out[:, :, -SEGMENT:].sum(), (q, k, v))
    assert segments(gradients[0]) == [4]
    # The open gate leaves no trace of the window: its gradient is multiplied by 1 - g = 0.
    assert segments(gradients[1]) == reached
    assert segments(gradients[2]) == reached


@pytest.mark.parametrize(
    "options", [{"detach": "segment"}, {"detach": "full"}, {"bptt_segments": 2}], ids=str
)
@pytest.mark.parametrize("rule", ["linear", "delta", "gamma"])
def test_row_74_values_do_not_depend_on_the_reach(rule: str, options: dict[str, Any]) -> None:
    q, k, v = (x.detach() for x in qkv())
    out, state = infini_attention(q, k, v, OPEN / 50, rule=rule, **LAYER)
    cut, cut_state = infini_attention(q, k, v, OPEN / 50, rule=rule, **LAYER, **options)
    assert torch.equal(cut, out)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(leaves(cut_state), leaves(state), strict=True))


@pytest.mark.parametrize(("detach", "reached"), [("none", [0, 1, 2, 3]), ("segment", [3]), ("full", [])])
@pytest.mark.parametrize("cut", [1, 9, 10, 11, 12, 13, 14])
def test_row_74_reach_does_not_depend_on_how_the_stream_is_cut(
    detach: Any, reached: list[int], cut: int
) -> None:
    """The state hands on the gradient of the last whole segment, also past an open one."""
    q, k, v = qkv()
    _, state = infini_attention(*(x[:, :, :cut] for x in (q, k, v)), OPEN, detach=detach, **LAYER)
    out, _ = infini_attention(*(x[:, :, cut:] for x in (q, k, v)), OPEN, state=state, detach=detach, **LAYER)
    last = out[:, :, max(0, SEGMENT * (SEGMENTS - 1) - cut) :]
    gradient = torch.autograd.grad(last.sum(), v, allow_unused=True)[0]
    assert segments(torch.zeros_like(v) if gradient is None else gradient) == reached


def test_row_74_full_detach_still_trains_the_window() -> None:
    q, k, v = qkv()
    out, _ = infini_attention(q, k, v, -OPEN, detach="full", **LAYER)
    assert segments(torch.autograd.grad(out[:, :, -1].sum(), v)[0]) == [4]


def test_gradient_reaches_the_initial_state_and_the_feature_map() -> None:
    q, k, v = qkv()
    _, start = infini_attention(q.detach(), k.detach(), v.detach(), OPEN, **LAYER)
    state = InfiniState(*(x.requires_grad_() if x.is_floating_point() else x for _, x in leaves(start)))
    feature = FeatureMap(scale=torch.ones(1, requires_grad=True), bias=torch.zeros(1, requires_grad=True))
    out, _ = infini_attention(q, k, v, OPEN / 50, state=state, feature=feature, **LAYER)
    wanted = (state.matrix, state.norm, state.keys, state.values, feature.scale, feature.bias)
    assert all(g.any() for g in torch.autograd.grad(out.sum(), wanted))  # type: ignore[arg-type]


@pytest.mark.parametrize("weight", [1, 3])
def test_segment_weight_equals_reading_the_filler_so_often(weight: int) -> None:
    """Memory's answers in the segment after a filler that counts, or stands there, ``weight`` times."""
    q, k, v = (x.detach() for x in qkv())
    weights = torch.ones(1, SEGMENTS, dtype=F64)
    weights[0, 1] = weight
    out, state = infini_attention(q, k, v, OPEN, segment_weight=weights, **LAYER)
    filler = torch.arange(SEGMENT, 2 * SEGMENT).repeat(weight - 1)
    often = torch.cat([torch.arange(2 * SEGMENT), filler, torch.arange(2 * SEGMENT, SEGMENT * SEGMENTS)])
    repeated, other = infini_attention(q[:, :, often], k[:, :, often], v[:, :, often], OPEN, **LAYER)
    additions = len(often) * 4
    tail = repeated[:, :, -3 * SEGMENT :]
    assert_rounding(out[:, :, -3 * SEGMENT :], tail, additions=additions, magnitude=2 * largest(v))
    assert state.matrix is not None
    assert other.matrix is not None
    assert_rounding(state.matrix, other.matrix, additions=additions, magnitude=additions * largest(v))
