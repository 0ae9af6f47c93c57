"""The associative memory: against loops, and what its rules promise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from newllm.ops import memory_retrieve, memory_scan, memory_update
from newllm.reference.features import feature_map
from newllm.reference.memory import empty_memory
from newllm.testing import assert_rounding, largest, leaves
from newllm.types import FeatureMap, MemoryState
from tests import loops

F64 = torch.float64
LEARNED = FeatureMap(scale=torch.tensor([4.0, 0.5], dtype=F64), bias=torch.tensor([-4.0, 1.0], dtype=F64))
FEATURES: dict[str, tuple[FeatureMap | None, list[loops.Map]]] = {
    "paper": (None, [loops.elu_plus_one()] * 2),
    "learned": (LEARNED, [loops.elu_plus_one(4, -4), loops.elu_plus_one(0.5, 1)]),
    "dpfp1": (FeatureMap("dpfp", order=1), [loops.dpfp(1)] * 2),
    "dpfp3": (FeatureMap("dpfp", order=3), [loops.dpfp(3)] * 2),
}


def key_values(batch: int, tokens: int, key: int = 4, value: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 2, tokens, key, dtype=F64), torch.randn(batch, 2, tokens, value, dtype=F64)


def filled(feature: FeatureMap | None, k: Tensor, v: Tensor, count: bool = True) -> MemoryState:
    """The memory after four other tokens a row."""
    keys, values = (torch.randn(*x.shape[:2], 4, x.shape[3], dtype=F64) for x in (k, v))
    state = memory_update(keys, values, feature=feature)
    return state if count else state._replace(count=None)


def as_loops(state: MemoryState, maps: list[loops.Map], rule: str) -> list[list[loops.Memory]]:
    """One memory of numpy arrays per row and head."""
    return [
        [
            loops.Memory(
                maps[h],
                state.matrix[row, h].numpy().copy(),
                state.norm[row, h].numpy().copy(),
                rule,
                count=0 if state.count is None else int(state.count[row]),
                guarded=state.count is not None,
            )
            for h in range(2)
        ]
        for row in range(state.norm.shape[0])
    ]


def assert_equals_loops(
    state: MemoryState, memories: list[list[loops.Memory]], tokens: int, value: float
) -> None:
    peak = max(value, *(memory.peak for row in memories for memory in row))
    for name, got in (("matrix", state.matrix), ("norm", state.norm)):
        wanted = torch.from_numpy(np.array([[getattr(m, name) for m in row] for row in memories]))
        size = (1 + peak) * max(1.0, largest(wanted))
        # Each write of a correction passes on the errors of all writes before it.
        assert_rounding(got, wanted, additions=(tokens * got.shape[2]) ** 2, magnitude=size)
    if state.count is not None:
        assert state.count.tolist() == [row[0].count for row in memories]


@given(
    st.data(),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from(["linear", "delta", "gamma"]),
    st.sampled_from([*FEATURES]),
    st.sampled_from(["empty", "filled", "unguarded"]),
)
@settings(max_examples=80)
def test_row_70_scan_equals_brute_force(
    data: st.DataObject, batch: int, tokens: int, segment: int, rule: Any, kind: str, start: str
) -> None:
    """Any padding, state, rule and feature map; every state before a segment and the last."""
    real = torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch * tokens, max_size=batch * tokens)))
    real = real.view(batch, tokens)
    feature, maps = FEATURES[kind]
    count = -(-tokens // segment)
    k, v = key_values(batch, tokens)
    state = None if start == "empty" else filled(feature, k, v, start == "filled")
    weight = (
        torch.rand(batch, count, dtype=F64) * 3 if rule == "linear" and data.draw(st.booleans()) else None
    )
    before, last = memory_scan(
        k,
        v,
        state,
        segment=segment,
        rule=rule,
        feature=feature,
        segment_weight=weight,
        padding_mask=real,
        backend="reference",
    )
    memories = as_loops(state or empty_memory(k, v, feature), maps, rule)
    for n in range(count):
        now = MemoryState(
            before.matrix[:, :, n], before.norm[:, :, n], None if before.count is None else before.count[:, n]
        )
        assert_equals_loops(now, memories, tokens + 4, largest(v))
        for row in range(batch):
            mine = real[row].nonzero().flatten()[n * segment : (n + 1) * segment]
            share = 1.0 if weight is None else weight[row, n].item()
            for h in range(2):
                memories[row][h].write([(k[row, h, t].numpy(), v[row, h, t].numpy()) for t in mine], share)
    assert_equals_loops(last, memories, tokens + 4, largest(v))


@pytest.mark.parametrize("kind", [*FEATURES])
@pytest.mark.parametrize("rule", ["linear", "delta", "gamma"])
def test_row_70_update_and_retrieve_equal_brute_force(kind: str, rule: Any) -> None:
    feature, maps = FEATURES[kind]
    k, v = key_values(2, 7)
    real = torch.tensor([[True] * 7, [False, True, True, False, True, False, False]])
    start = filled(feature, k, v)
    state = memory_update(k, v, start, rule=rule, feature=feature, padding_mask=real)
    memories = as_loops(start, maps, rule)
    for row in range(2):
        for h in range(2):
            memories[row][h].write(
                [(k[row, h, t].numpy(), v[row, h, t].numpy()) for t in range(7) if real[row, t]]
            )
    assert_equals_loops(state, memories, 11, largest(v))
    q = torch.randn(2, 6, 5, 4, dtype=F64)
    out = memory_retrieve(q, state, feature=feature)
    for row, head, t in np.ndindex(2, 6, 5):
        memory = memories[row][head // 3]
        wanted = torch.from_numpy(memory.read(q[row, head, t].numpy()))
        size = (1 + memory.peak) * largest(state.matrix)
        assert_rounding(out[row, head, t], wanted, additions=(11 * state.norm.shape[2]) ** 2, magnitude=size)


@pytest.mark.parametrize("kind", [*FEATURES])
def test_row_70_an_empty_memory_reads_exact_zeros(kind: str) -> None:
    feature = FEATURES[kind][0]
    k, v = key_values(2, 3)
    assert not memory_retrieve(k, empty_memory(k, v, feature), feature=feature).any()
    padded = memory_update(
        k, v, rule="delta", feature=feature, padding_mask=torch.zeros(2, 3, dtype=torch.bool)
    )
    assert not any(tensor.any() for _, tensor in leaves(padded))
    assert not memory_retrieve(k, padded, feature=feature).any()


def test_row_70_the_denominator_is_clamped_not_shifted() -> None:
    """Above eps a lone key is answered with exactly its value; below, eps divides."""
    v = torch.ones(1, 1, 1, 1, dtype=F64)
    for x in (-4.0, -8.0):
        k = torch.full_like(v, x)
        weight = math.exp(x) ** 2
        answer = torch.full_like(v, min(1.0, weight / 1e-6))
        assert_rounding(memory_retrieve(k, memory_update(k, v)), answer, additions=8, magnitude=1)
        halved = memory_retrieve(k, memory_update(k, v), eps=2 * weight)
        assert_rounding(halved, v / 2, additions=8, magnitude=1)


def test_row_70_feature_map_keeps_its_digits_below_zero() -> None:
    """ELU + 1 in float32 at x = -12 loses three digits when computed as F.elu(x) + 1."""
    x = torch.tensor([-12.0, -5.0, -1e-3, 0.0, 1e-3, 12.0])[None, None, :, None]
    wanted = torch.tensor([math.exp(u) if u < 0 else u + 1 for u in x.flatten().tolist()], dtype=F64)
    got = feature_map(x, None).flatten().double()
    assert largest((got - wanted) / wanted) <= torch.finfo(torch.float32).eps
    cancelled = (torch.nn.functional.elu(x).flatten() + 1).double()
    assert largest((cancelled - wanted) / wanted) > 1000 * torch.finfo(torch.float32).eps


def test_learned_scale_and_bias_follow_the_key_value_head() -> None:
    q = torch.randn(1, 6, 3, 4, dtype=F64)
    by_hand = torch.cat([feature_map(q[:, :3] * 4 - 4, None), feature_map(q[:, 3:] * 0.5 + 1, None)], 1)
    assert torch.equal(feature_map(q, LEARNED), by_hand)


def test_row_71_scan_equals_one_update_after_the_other() -> None:
    k, v = key_values(2, 10)
    for rule in ("linear", "delta", "gamma"):
        before, last = memory_scan(k, v, segment=4, rule=rule)
        state = None
        for n in range(3):
            part = slice(4 * n, 4 * n + 4)
            if state is not None:
                assert all(
                    torch.equal(a[:, :, n] if a.ndim > 2 else a[:, n], b)
                    for a, b in zip(before, state, strict=True)
                )
            state = memory_update(k[:, :, part], v[:, :, part], state, rule=rule)
        assert state is not None
        assert all(torch.equal(a, b) for a, b in zip(last, state, strict=True))


def test_segment_weight_equals_writing_the_segment_so_often() -> None:
    k, v = key_values(1, 6)
    weight = torch.tensor([[1.0, 5.0, 1.0]])
    weighted = memory_scan(k, v, segment=2, segment_weight=weight)[1]
    often = torch.tensor([0, 1] + [2, 3] * 5 + [4, 5])
    repeated = memory_scan(k[:, :, often], v[:, :, often], segment=2)[1]
    for a, b in zip(weighted[:2], repeated[:2], strict=True):
        assert_rounding(a, b, additions=14, magnitude=14 * largest(b))


@pytest.mark.parametrize("rule", ["delta", "gamma"])
def test_row_75_a_repeated_pair_is_stored_once(rule: Any) -> None:
    k, v = key_values(1, 1)
    once = memory_update(k, v, rule=rule)
    twice = memory_update(k, v, once, rule=rule)
    assert_rounding(twice.matrix, once.matrix, additions=12, magnitude=largest(once.matrix))
    linear = memory_update(k, v, memory_update(k, v))
    assert torch.equal(linear.matrix, once.matrix * 2)
    norm = once.norm if rule == "gamma" else once.norm * 2
    assert_rounding(twice.norm, norm, additions=12, magnitude=largest(norm))
    # The paper's norm grows with every write; ARMT's does not, so the answer keeps its size.
    answer = v if rule == "gamma" else v / 2
    assert_rounding(memory_retrieve(k, twice), answer, additions=24, magnitude=largest(v))


def test_row_75_a_one_token_first_segment_survives() -> None:
    """Then 65 tokens at once: a 65th of the correction is written, the whole of it without a count."""
    k, v = key_values(1, 66)
    first = memory_update(k[:, :, :1], v[:, :, :1], rule="delta")
    last = memory_update(k[:, :, 1:], v[:, :, 1:], first, rule="delta")
    assert torch.equal(last.count, torch.tensor([66]))
    assert largest(memory_retrieve(k, last)) <= 2 * largest(v)
    growth = ((last.norm - first.norm) / first.norm).max().item()
    kept, lost = (retained(s, k[:, :, 1:]) for s in (first, first._replace(count=None)))
    assert kept.min() >= 1 - growth / 65
    assert lost.min() < -10


def retained(state: MemoryState, k: Tensor) -> Tensor:
    """Eigenvalues of what writing ``k`` with the delta rule leaves of the old content: of M -> A M."""
    basis = torch.eye(k.shape[3], dtype=F64).expand(1, 2, -1, -1)
    matrix = memory_update(k, torch.zeros_like(k), state._replace(matrix=basis), rule="delta").matrix
    return torch.linalg.eigvals(matrix).real


def test_row_75_the_guard_never_inverts_old_content() -> None:
    """64 tokens, then 2048 that repeat them: 32 times too much would be subtracted, eigenvalue 1 - 32."""
    k, v = key_values(1, 64)
    state = memory_update(k, v, rule="delta")
    again = k.repeat(1, 1, 32, 1)
    rounding = 2048 * 4 * torch.finfo(F64).eps * 32
    guarded, unguarded = retained(state, again), retained(state._replace(count=None), again)
    assert guarded.min() >= -rounding
    assert guarded.max() <= 1 + rounding
    assert (unguarded.min() + 31).abs() <= rounding


def test_row_75_the_readout_stays_bounded() -> None:
    k, v = key_values(1, 64)
    state = memory_update(k, v, rule="delta")
    for update in range(1, 9):
        k, v = key_values(1, 2048)
        state = memory_update(k, v.clamp(-1, 1), state, rule="delta")
        assert largest(memory_retrieve(k, state)) <= 1 + update


@pytest.mark.parametrize("rule", ["linear", "delta", "gamma"])
def test_row_77_scaling_divides_matrix_and_norm(rule: Any) -> None:
    """By the row's real tokens or the batch's; what is read keeps its size."""
    k, v = key_values(2, 5)
    real = torch.tensor([[True] * 5, [True, False, True, False, False]])
    plain = memory_update(k, v, rule=rule, padding_mask=real)
    for scale, shares in (("1/T", [5, 2]), ("1/(B*T)", [7, 7])):
        scaled = memory_update(k, v, rule=rule, scale=scale, padding_mask=real)
        share = torch.tensor(shares, dtype=F64)
        wanted = plain.matrix / share[:, None, None, None], plain.norm / share[:, None, None]
        for got, expected in zip(scaled[:2], wanted, strict=True):
            assert_rounding(got, expected, additions=4, magnitude=largest(expected))
        assert torch.equal(scaled.count, plain.count)
        readouts = (memory_retrieve(k, s) for s in (scaled, plain))
        assert_rounding(*readouts, additions=16, magnitude=largest(v))


def test_row_77_scaling_a_batch_of_padding_changes_nothing() -> None:
    k, v = key_values(2, 3)
    start = memory_update(k, v)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for scale in ("none", "1/T", "1/(B*T)"):
        after = memory_update(k, v, start, scale=scale, padding_mask=nothing)
        assert all(torch.equal(a, b) for a, b in zip(after, start, strict=True))


@pytest.mark.parametrize("rule", ["linear", "delta", "gamma"])
def test_row_77_padding_is_ignored(rule: Any) -> None:
    """What stands in padding has no effect, and leaving it out gives the same."""
    k, v = key_values(1, 6)
    real = torch.tensor([[True, False, True, True, False, True]])
    hidden = ~real[:, None, :, None]
    state = memory_update(k, v, rule=rule, padding_mask=real)
    nan = float("nan")
    garbage = memory_update(
        k.masked_fill(hidden, nan), v.masked_fill(hidden, nan), rule=rule, padding_mask=real
    )
    assert all(torch.equal(a, b) for a, b in zip(garbage, state, strict=True))
    short = memory_update(k[:, :, real[0]], v[:, :, real[0]], rule=rule)
    for a, b in zip(state[:2], short[:2], strict=True):
        assert_rounding(a, b, additions=6, magnitude=6 * largest(b))
    assert torch.equal(state.count, short.count)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", ["none", "1/T"])
def test_row_77_state_is_float32_and_finite_after_100k_tokens(dtype: torch.dtype, scale: str) -> None:
    state = None
    for _ in range(4):
        k, v = torch.randn(2, 1, 2, 25_000, 4).to(dtype).unbind(0)
        state = memory_update(k, v, state, rule="delta", scale=scale)
        assert all(tensor.isfinite().all() for _, tensor in leaves(state))
    assert state is not None
    assert (state.matrix.dtype, state.norm.dtype) == (torch.float32, torch.float32)
    assert state.count.tolist() == [100_000]
    out = memory_retrieve(k, state)
    assert out.dtype == dtype
    assert out.isfinite().all()
