"""The Infini layer against loops over tokens, and what must leave its results alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from newllm.ops import infini_attention, infini_decode
from newllm.reference.infini import empty_state
from newllm.testing import assert_rounding, largest, leaves, mapped
from newllm.types import FeatureMap, InfiniState
from tests.infini_cases import Plan, assert_equals_loop, draw, loop, plans, run, table

ALL = ((True,) * 12,)


def plan(**options: Any) -> Plan:
    """Twelve tokens, three segments of four, seen through a window of five."""
    calls = ((0, 12, "none"),)
    return replace(Plan(1, 2, 2, 4, 3, 5, 4, ALL, calls, rope="shared", feature="learned"), **options)


def same(a: InfiniState, b: InfiniState) -> bool:
    return all(torch.equal(x, y) for (_, x), (_, y) in zip(leaves(a), leaves(b), strict=True))


@given(plans())
@settings(max_examples=150)
def test_row_71_any_split_padding_and_phase_equals_the_loop(plan: Plan) -> None:
    out, state = run(plan)
    assert_equals_loop(plan, out, state, loop(plan))


@given(plans())
@settings(max_examples=40)
def test_any_split_gives_the_same_as_one_call(plan: Plan) -> None:
    whole = run(replace(plan, calls=((0, plan.tokens, "none"),)))
    assert_equals_loop(plan, *run(plan), loop(plan)._replace(out=whole[0], state=whole[1]))


@given(plans())
@settings(max_examples=40)
def test_decoding_equals_prefill_whatever_rows_are_active(plan: Plan) -> None:
    """From the first token on, by columns of the mask as ``active``."""
    steps = replace(plan, calls=tuple((t, t + 1, "decode") for t in range(plan.tokens)))
    assert_equals_loop(plan, *run(steps), loop(plan))


@given(plans())
@settings(max_examples=30)
def test_what_stands_in_padding_does_not_matter(plan: Plan) -> None:
    drawn = draw(plan)
    out, state = run(plan, drawn)
    padding = ~plan.real()[:, None, :, None]
    q, k, v = (x.masked_fill(padding, 1e30) for x in (drawn.q, drawn.k, drawn.v))
    garbage, garbage_state = run(plan, drawn._replace(q=q, k=k, v=v))
    assert torch.equal(garbage, out)
    assert same(garbage_state, state)
    assert not out.masked_select(padding).any()


@given(plans(batch=3, rope=None, mask=((True,) * 14,) * 3, calls=((0, 14, "none"),)))
@settings(max_examples=20)
def test_batch_mates_and_left_padding_change_nothing(plan: Plan) -> None:
    drawn, expected = draw(plan), loop(plan)
    q, k, v = (F.pad(x[1:2], (0, 0, 4, 0)) for x in (drawn.q, drawn.k, drawn.v))
    alone = drawn._replace(q=q, k=k, v=v)
    shifted = replace(
        plan,
        batch=1,
        mask=((False,) * 4 + (True,) * 14,),
        calls=((0, 3, "none"), (3, 9, "prefill"), (9, 18, "prefill")),
    )
    out, state = run(shifted, alone)
    assert not out[:, :, :4].any()
    row = expected._replace(out=expected.out[1:2], state=mapped(lambda x: x[1:2], expected.state))
    assert_equals_loop(plan, out[:, :, 4:], state, row)


@pytest.mark.parametrize("rule", ["linear", "delta", "gamma"])
@pytest.mark.parametrize("cut", [12, 6])
def test_row_71_the_future_has_no_effect(rule: str, cut: int) -> None:
    p = plan(rule=rule, calls=((0, cut, "none"), (cut, 12, "prefill"))[: 1 + (cut < 12)])
    drawn = draw(p)
    out, _ = run(p, drawn)
    for t in range(12):
        q, k, v = (x.clone() for x in (drawn.q, drawn.k, drawn.v))
        for x in (q, k, v):
            x[:, :, t] += 1
        changed, _ = run(p, drawn._replace(q=q, k=k, v=v))
        assert torch.equal(changed[:, :, :t], out[:, :, :t])
        assert not torch.equal(changed[:, :, t], out[:, :, t])


@pytest.mark.parametrize(
    "calls", [((0, 12, "none"),), ((0, 7, "none"), (7, 8, "decode"), (8, 12, "prefill"))]
)
def test_row_69_without_memory_a_token_reaches_exactly_the_window(calls: tuple[Any, ...]) -> None:
    p = plan(memory=False, calls=calls)
    drawn = draw(p)
    out, state = run(p, drawn)
    assert state.matrix is None
    for t in range(12):
        k, v = drawn.k.clone(), drawn.v.clone()
        k[:, :, t], v[:, :, t] = 5, -5
        changed, _ = run(p, drawn._replace(k=k, v=v))
        differs = (changed != out).any(-1).any(1)[0]
        assert differs.nonzero().flatten().tolist() == list(range(t, min(t + 5, 12)))


def test_memory_carries_a_token_beyond_the_window() -> None:
    drawn = draw(plan())
    k, v = drawn.k.clone(), drawn.v.clone()
    v[:, :, 0] += 1
    out, changed = run(plan(), drawn)[0], run(plan(), drawn._replace(k=k, v=v))[0]
    assert (changed[:, :, 8:] != out[:, :, 8:]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_72_shut_gate_equals_base_attention(dtype: torch.dtype) -> None:
    """tanh(0) within one window: the bits of ordinary attention, and a gradient that is alive."""
    q, k, v = (x.to(dtype) for x in draw(plan())[:3])
    beta = torch.zeros(4, requires_grad=True)
    cos, sin = (x.to(dtype) for x in table(torch.arange(12.0), 4))

    def rotate(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., 2:], x[..., :2]], -1) * sin

    out, _ = infini_attention(q, k, v, beta, window=12, segment=4, gate="tanh", rope=(cos, sin))
    base = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
    assert torch.equal(out, base)
    assert (torch.autograd.grad(out.sum(), beta)[0] != 0).all()


def test_row_72_memory_is_nope_and_window_is_rope() -> None:
    """Another frequency changes what the window answers, and nothing of what the memory holds or answers."""
    q, k, v = draw(plan())[:3]
    slow, fast = (table(torch.arange(12.0, dtype=torch.float64) * rate, 4) for rate in (1, 2))
    sizes: dict[str, Any] = {"window": 4, "segment": 4}
    wide_open, shut = torch.full((4,), 50.0).double(), torch.full((4,), -50.0).double()
    (a, state), (b, other) = (infini_attention(q, k, v, wide_open, rope=r, **sizes) for r in (slow, fast))
    assert_rounding(a, b, additions=4, magnitude=largest(v))
    assert same(state, other)
    (a, _), (b, _) = (infini_attention(q, k, v, shut, rope=r, **sizes) for r in (slow, fast))
    assert (a[:, :, 1:] != b[:, :, 1:]).any(-1).all()


def test_row_72_a_gate_per_head_mixes_the_two_answers() -> None:
    q, k, v = draw(plan())[:3]
    sizes: dict[str, Any] = {"window": 4, "segment": 4}
    gates = torch.tensor([0.0, 50.0, -50.0, 1.0], dtype=torch.float64)
    out, _ = infini_attention(q, k, v, gates, **sizes)
    memory, _ = infini_attention(q, k, v, torch.full_like(gates, 50), **sizes)
    local, _ = infini_attention(q, k, v, None, **sizes)
    assert torch.equal(out[:, 1], memory[:, 1])
    half = (memory[:, 0] + local[:, 0]) / 2
    assert_rounding(out[:, 0], half, additions=3, magnitude=largest(v))
    assert_rounding(out[:, 2], local[:, 2], additions=3, magnitude=largest(v))
    assert not memory[:, :, :4].any()


def test_row_72_grouped_heads_equal_repeated_ones() -> None:
    """One state per key/value head serves its query heads."""
    drawn = draw(plan())
    assert drawn.feature is not None
    assert drawn.feature.scale is not None
    assert drawn.feature.bias is not None
    feature = FeatureMap(
        scale=drawn.feature.scale.repeat_interleave(2), bias=drawn.feature.bias.repeat_interleave(2)
    )
    repeated = drawn._replace(
        k=drawn.k.repeat_interleave(2, 1), v=drawn.v.repeat_interleave(2, 1), feature=feature
    )
    out, state = run(plan(), drawn)
    each, states = run(plan(kv_heads=4, group=1), repeated)
    assert_rounding(each, out, additions=12 * 7, magnitude=loop(plan(), drawn).magnitude)
    assert state.matrix is not None
    assert states.matrix is not None
    assert state.matrix.shape == (1, 2, 4, 3)
    assert torch.equal(states.matrix, state.matrix.repeat_interleave(2, 1))


def test_permuting_the_batch_permutes_the_results() -> None:
    p = plan(batch=3, mask=((True,) * 12, (True, False) * 6, (False,) * 12))
    drawn, order = draw(p), torch.tensor([2, 0, 1])
    out, state = run(p, drawn)
    mixed = replace(p, mask=tuple(p.mask[i] for i in order))
    other, other_state = run(mixed, drawn._replace(q=drawn.q[order], k=drawn.k[order], v=drawn.v[order]))
    assert torch.equal(other, out[order])
    assert same(other_state, mapped(lambda x: x[order], state))


def test_a_row_whose_state_is_zeroed_starts_again() -> None:
    """Row 1 is reset at a call border; its ring may keep what it held."""
    p = plan(batch=2, mask=ALL * 2, calls=((0, 12, "none"),), rope=None)
    drawn = draw(p)
    _, state = run(p, drawn)
    row = torch.tensor([True, False])
    assert state.matrix is not None
    assert state.norm is not None
    reset = state._replace(
        matrix=state.matrix * row[:, None, None, None],
        norm=state.norm * row[:, None, None],
        position=state.position * row,
    )
    options = p.layer() | {"feature": drawn.feature}
    out, after = infini_attention(drawn.q, drawn.k, drawn.v, drawn.beta, state=reset, **options)
    fresh, fresh_state = run(p, drawn)
    bound = {"additions": 12 * 7, "magnitude": loop(p).magnitude}
    assert_rounding(out[1], fresh[1], **bound)
    assert_rounding(after.keys[1], fresh_state.keys[1], **bound)
    tokens = [x[:, :, :1] for x in (drawn.q, drawn.k, drawn.v)]
    reset = mapped(Tensor.clone, reset)
    assert_rounding(infini_decode(*tokens, drawn.beta, reset, **options)[1], fresh[1, :, :1], **bound)
    assert reset.position.tolist() == [13, 1]


def test_decode_writes_into_the_state_it_is_given() -> None:
    p = plan(rope=None)
    drawn = draw(p)
    state = empty_state(drawn.k, drawn.v, ring=5, memory=True)
    before = [x.data_ptr() for _, x in leaves(state)]
    for t in range(4):
        tokens = (x[:, :, t : t + 1] for x in (drawn.q, drawn.k, drawn.v))
        infini_decode(*tokens, drawn.beta, state, window=5, segment=4)
        assert state.norm is not None
        assert bool(state.norm.any()) == (t == 3), "folded as soon as the segment is complete"
    assert [x.data_ptr() for _, x in leaves(state)] == before


def test_decode_reads_no_slot_that_no_token_has_reached() -> None:
    drawn = draw(plan(rope=None))
    clean = empty_state(drawn.k, drawn.v, ring=8, memory=True)
    spoilt = mapped(Tensor.clone, clean)
    for ring in (spoilt.keys, spoilt.values):
        ring.fill_(torch.nan)
    for t in range(12):
        tokens = [x[:, :, t : t + 1] for x in (drawn.q, drawn.k, drawn.v)]
        found = [infini_decode(*tokens, drawn.beta, state, window=8, segment=4) for state in (clean, spoilt)]
        assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_states_are_float32_and_rings_keep_the_inputs_dtype(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in draw(plan())[:3])
    out, state = infini_attention(q, k, v, torch.zeros(4), window=5, segment=4)
    assert state.matrix is not None
    assert state.norm is not None
    assert (out.dtype, state.matrix.dtype, state.norm.dtype) == (dtype, torch.float32, torch.float32)
    assert (state.keys.dtype, state.values.dtype, state.position.dtype) == (dtype, dtype, torch.int64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_row_77_no_nan_at_100k_tokens(dtype: torch.dtype, rule: str) -> None:
    """Readouts stay below the largest value although the norm outgrows float16."""
    window, chunk, state = 256, 8192, None
    beta, seen = torch.full((1,), 50.0), 0
    while seen < 100_000:
        q, k, v = torch.randn(3, 1, 1, chunk, 4).to(dtype)
        out, state = infini_attention(
            q, k, v.clamp(-1, 1), beta, window=window, segment=window, rule=rule, state=state
        )
        seen += chunk
        assert out.isfinite().all()
        assert largest(out) <= 1
    assert state is not None
    assert state.norm is not None
    assert largest(state.norm) > torch.finfo(torch.float16).max
