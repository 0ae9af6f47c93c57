"""TensorMemory: what is kept, mixed, cleaned, frozen and carried over."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from newllm.modules.gate import MemoryFeature
from newllm.modules.tensor_memory import TensorMemory
from newllm.ops import memory_retrieve, memory_update
from newllm.reference.features import feature_map
from newllm.testing import assert_rounding
from newllm.types import MemoryState

B, H, GROUPS, T, K, V = 2, 2, 2, 6, 4, 3


def tokens(
    batch: int = B, length: int = T, dtype: torch.dtype = torch.float64, heads: int = H
) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, heads, length, K, dtype=dtype), torch.randn(
        batch, heads, length, V, dtype=dtype
    )


def queries(batch: int = B, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, H * GROUPS, T, K, dtype=dtype)


def memory(batch: int = B, dtype: torch.dtype = torch.float64, **options: Any) -> TensorMemory:
    made = TensorMemory(H, K, V, **options)
    made.reset(batch, dtype=dtype)
    return made


def assert_close(actual: Tensor, expected: Tensor, length: int = T) -> None:
    """Equal but for rounding: sums over tokens, features and two divisions, of terms like the largest."""
    magnitude = float(expected.detach().abs().max())
    assert_rounding(actual, expected, additions=K * V * (length + 2), magnitude=magnitude)


def assert_same_state(actual: MemoryState, expected: MemoryState, length: int = T) -> None:
    assert_close(actual.matrix, expected.matrix, length)
    assert_close(actual.norm, expected.norm, length)
    assert actual.count is not None and expected.count is not None
    assert torch.equal(actual.count, expected.count)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.update(*tokens()),
        lambda m: m.retrieve(queries()),
        lambda m: m.states,
        lambda m: m.freeze(0),
        lambda m: m.detach_(),
        lambda m: m.svd_cleaning(),
        lambda m: m.health(),
        lambda m: m.export_state(),
    ],
)
def test_nothing_works_before_reset(call: Any) -> None:
    with pytest.raises(RuntimeError, match="call reset first"):
        call(TensorMemory(H, K, V))


def test_memory_alone_keeps_its_state_until_reset() -> None:
    kept = memory()
    runs = [tokens() for _ in range(3)]
    q = queries()
    expected = None
    for k, v in runs:
        expected = memory_update(k, v, expected, feature=kept.feature())
        kept.update(k, v)
        kept.retrieve(q)
        kept.eval()
        kept.retrieve(q)
        kept.train()
    assert expected is not None
    assert_same_state(kept.states[0], expected)
    assert torch.equal(kept.retrieve(q), memory_retrieve(q, kept.states[0], feature=kept.feature()))
    kept.reset(B + 1, dtype=torch.float64)
    assert torch.equal(
        kept.retrieve(queries(B + 1)), torch.zeros(B + 1, H * GROUPS, T, V, dtype=torch.float64)
    )
    assert kept.states[0].count is not None and kept.states[0].count.tolist() == [0] * (B + 1)


@pytest.mark.parametrize("rule", ["linear", "delta", "gamma"])
@pytest.mark.parametrize(
    "feature", [MemoryFeature(H), MemoryFeature(H, scale=1.0, bias=0.0), MemoryFeature(H, "dpfp")]
)
def test_rule_and_feature_are_the_operators(rule: Any, feature: MemoryFeature) -> None:
    kept = memory(rule=rule, feature=feature)
    expected = None
    mask = torch.tensor([[True] * T, [False] * 2 + [True] * (T - 2)])
    for _ in range(2):
        k, v = tokens()
        kept.update(k, v, mask)
        expected = memory_update(k, v, expected, rule=rule, feature=feature(), padding_mask=mask)
    assert expected is not None
    assert_same_state(kept.states[0], expected)


def test_content_is_no_weight_and_feature_parameters_are() -> None:
    kept = memory()
    kept.update(*tokens())
    assert set(kept.state_dict()) == {"feature.scale", "feature.bias"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_state_is_never_rounded(dtype: torch.dtype) -> None:
    kept = memory(dtype=dtype)
    kept.update(*tokens(dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16):
        kept.update(*tokens(dtype=dtype))
        kept.svd_cleaning()
    assert {part.dtype for part in kept.states[0][:2]} == {torch.float32}
    assert kept.retrieve(queries(dtype=dtype)).dtype == dtype


def test_gradients_flow_until_detached() -> None:
    kept = memory(slots=2)
    early, late = tokens(), tokens()
    for part in (*early, *late):
        part.requires_grad_()
    kept.update(*early)
    kept.detach_()
    kept.update(*late)
    kept.retrieve(queries()).square().sum().backward()
    assert [part.grad is None for part in (*early, *late)] == [True, True, False, False]
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in kept.parameters())


@pytest.mark.parametrize(
    ("scale", "divisor"),
    [("none", lambda n, row: 1), ("1/T", lambda n, row: n[row]), ("1/(B*T)", lambda n, row: n.sum())],
)
def test_row_77_scale_divides_matrix_and_norm_alike(scale: str, divisor: Any) -> None:
    kept = memory(scale=scale)
    k, v = tokens()
    mask = torch.tensor([[True] * T, [False] * 2 + [True] * (T - 2)])
    kept.update(k, v, mask)
    phi = feature_map(k, kept.feature()) * mask[:, None, :, None]
    shares = torch.tensor([1 / float(divisor(mask.sum(1), row)) for row in range(B)], dtype=torch.float64)
    assert_close(kept.states[0].matrix, (phi.mT @ v) * shares[:, None, None, None])
    assert_close(kept.states[0].norm, phi.sum(2) * shares[:, None, None])


def by_row(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """All rows' tokens as one row, by a loop."""
    k, v = (torch.cat([x[row] for row in range(x.shape[0])], 1)[None] for x in (k, v))
    return k, v


@pytest.mark.parametrize("rule", ["linear", "delta", "gamma"])
def test_row_79_shared_memory_holds_and_answers_all_rows(rule: Any) -> None:
    kept = memory(shared=True, rule=rule)
    expected = None
    for batch in (2, 3):
        k, v = tokens(batch)
        kept.update(k, v)
        expected = memory_update(*by_row(k, v), expected, rule=rule, feature=kept.feature())
    assert expected is not None
    assert kept.states[0].matrix.shape == (1, H, K, V)
    assert_same_state(kept.states[0], expected, length=5 * T)
    q = queries(4)
    expanded = MemoryState(expected.matrix.expand(4, -1, -1, -1), expected.norm.expand(4, -1, -1))
    assert_close(kept.retrieve(q), memory_retrieve(q, expanded, feature=kept.feature()), length=5 * T)


@pytest.mark.parametrize(("scale", "divisor"), [("none", 1), ("1/T", T - 1), ("1/(B*T)", 2 * (T - 1))])
def test_row_79_shared_memory_scales_by_the_sizes_of_the_call(scale: str, divisor: int) -> None:
    kept, plain = (memory(shared=True, scale=s) for s in (scale, "none"))
    k, v = tokens()
    mask = torch.tensor([[False] + [True] * (T - 1), [True] * (T - 1) + [False]])
    for _ in range(2):
        kept.update(k, v, mask)
        plain.update(k, v, mask)
    assert_close(kept.states[0].matrix * divisor, plain.states[0].matrix, length=4 * T)
    assert_close(kept.states[0].norm * divisor, plain.states[0].norm, length=4 * T)


def test_row_79_writes_go_round_robin_over_unfrozen_slots() -> None:
    kept = memory(slots=3)

    def counts() -> list[int]:
        return [int(state.count[0]) for state in kept.states]

    for expected in ([T, 0, 0], [T, T, 0], [T, T, T]):
        kept.update(*tokens())
        assert counts() == expected
    kept.freeze(0)
    for expected in ([T, 2 * T, T], [T, 2 * T, 2 * T], [T, 3 * T, 2 * T]):
        kept.update(*tokens())
        assert counts() == expected
    kept.unfreeze(0)
    kept.update(*tokens(), slot=0)
    assert counts() == [2 * T, 3 * T, 2 * T]
    kept.update(*tokens())
    assert counts() == [2 * T, 3 * T, 3 * T]


def test_row_79_frozen_slot_is_unchanged() -> None:
    kept = memory(slots=2)
    kept.update(*tokens())
    kept.freeze(0)
    before = [part.clone() for part in kept.states[0]]
    for _ in range(3):
        kept.update(*tokens())
    kept.svd_cleaning(max_rank=1)
    assert kept.frozen == (0,)
    assert all(torch.equal(*pair) for pair in zip(before, kept.states[0], strict=True))
    assert torch.linalg.matrix_rank(kept.states[1].matrix).unique().tolist() == [1]
    with pytest.raises(RuntimeError, match=r"slot 0 is frozen, call unfreeze\(0\) first"):
        kept.update(*tokens(), slot=0)
    kept.freeze(1)
    for call in (lambda: kept.update(*tokens()), kept.svd_cleaning, kept.health):
        with pytest.raises(RuntimeError, match="all 2 slots are frozen"):
            call()
    kept.reset(B)
    assert kept.frozen == ()


def mixture(q: Tensor, kept: TensorMemory, means: list[Tensor]) -> Tensor:
    """Answers by a loop over queries, from the mean key features ``[B, H, F]`` of each slot."""
    answers = [memory_retrieve(q, state, feature=kept.feature()) for state in kept.states]
    out = torch.zeros_like(answers[0])
    phi = feature_map(q, kept.feature())
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            for t in range(q.shape[2]):
                scores = torch.stack([phi[row, head, t] @ mean[row, head // GROUPS] for mean in means])
                shares = scores.exp() / scores.exp().sum()
                out[row, head, t] = sum(a[row, head, t] * s for a, s in zip(answers, shares, strict=True))
    return out


@pytest.mark.parametrize("scale", ["none", "1/T", "1/(B*T)"])
def test_row_79_slots_are_mixed_per_query_by_their_mean_key_feature(scale: str) -> None:
    kept = memory(slots=3, scale=scale)
    runs = [tokens() for _ in range(3)]
    for run in runs:
        kept.update(*run)
    means = [feature_map(k, kept.feature()).mean(2) for k, _ in runs]
    q = queries()
    out = kept.retrieve(q)
    assert_close(out, mixture(q, kept, means))
    later = q.clone()
    later[:, :, 3:] = torch.randn_like(later[:, :, 3:])
    assert torch.equal(kept.retrieve(later)[:, :, :3], out[:, :, :3])


@pytest.mark.parametrize("shared", [False, True])
def test_row_79_share_of_a_slot_does_not_grow_with_what_it_holds(shared: bool) -> None:
    kept = memory(slots=2, shared=shared)
    first, second = tokens(), tokens()
    kept.update(*first, slot=0)
    kept.update(*second, slot=1)
    q = queries()
    once = kept.retrieve(q)
    for _ in range(7):
        kept.update(*second, slot=1)
    assert_close(kept.retrieve(q), once, length=8 * B * T)


def test_row_79_empty_slots_have_no_share() -> None:
    kept, single = memory(slots=3), memory()
    q = queries()
    assert torch.equal(kept.retrieve(q), torch.zeros(B, H * GROUPS, T, V, dtype=torch.float64))
    k, v = tokens()
    only_first_row = torch.tensor([[True] * T, [False] * T])
    kept.update(k, v, only_first_row)
    single.update(k, v, only_first_row)
    assert torch.equal(kept.retrieve(q), single.retrieve(q))
    kept.update(k, v, ~only_first_row)
    single.update(k, v, ~only_first_row)
    assert torch.equal(kept.retrieve(q), single.retrieve(q))


def test_row_79_export_and_import_carry_everything() -> None:
    kept = memory(slots=3, rule="delta")
    for _ in range(4):
        kept.update(*tokens())
    kept.freeze(2)
    state = kept.export_state()
    copy = {name: part.clone() if isinstance(part, Tensor) else part for name, part in state.items()}
    other = memory(batch=1, dtype=torch.float32, slots=3, rule="delta")
    other.import_state(state)
    q = queries()
    assert torch.equal(other.retrieve(q), kept.retrieve(q))
    assert other.frozen == (2,)
    k, v = tokens()
    for each in (kept, other):
        each.update(k, v)
        each.update(k, v)
    for mine, theirs in zip(kept.states, other.states, strict=True):
        assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))
    assert all(torch.equal(state[n], part) for n, part in copy.items() if isinstance(part, Tensor))
    assert not state["matrix"].requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, r"state's matrix must be of shape \[2, 2, 3, 4, 3\], got \[2, 2, 2, 4, 3\]"),
        ({"head_dim": 8}, "state's head_dim must be 8, got 4"),
        ({"value_dim": 5}, r"state's matrix must be of shape \[2, 2, 2, 4, 5\], got \[2, 2, 2, 4, 3\]"),
        ({"slots": 1}, r"state's matrix must be of shape \[1, 2, 2, 4, 3\], got \[2, 2, 2, 4, 3\]"),
        ({"shared": True}, "state's shared must be True, got False"),
        (
            {"feature": MemoryFeature(H, "dpfp")},
            r"state's matrix must be of shape \[2, 2, 2, 8, 3\], got \[2, 2, 2, 4, 3\]",
        ),
    ],
)
def test_row_79_import_says_which_sizes_fit(options: dict[str, Any], message: str) -> None:
    kept = memory(slots=2)
    kept.update(*tokens())
    sizes = {"num_heads": H, "head_dim": K, "value_dim": V, "slots": 2} | options
    other = TensorMemory(**sizes)
    with pytest.raises(ValueError, match=message):
        other.import_state(kept.export_state())
    with pytest.raises(RuntimeError, match="call reset first"):
        other.states  # noqa: B018


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"count": torch.zeros(1, 3, dtype=torch.int64)}, ValueError, "state's count must be of shape"),
        ({"matrix": torch.zeros(1, B, H, K, V).half()}, TypeError, "state's matrix must be torch.float32"),
        ({"next_slot": 1}, ValueError, "next_slot must be from 0 to 0, got 1"),
        ({"frozen": [2]}, ValueError, "frozen slot must be from 0 to 0, got 2"),
        ({"surplus": 1}, ValueError, "state's keys must be .*, got .*surplus"),
    ],
)
def test_broken_export_is_refused(change: dict[str, Any], error: Any, message: str) -> None:
    kept = memory()
    kept.update(*tokens())
    before = kept.states
    with pytest.raises(error, match=message):
        kept.import_state(kept.export_state() | change)
    assert kept.states == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TensorMemory(0, K), "num_heads must be at least 1, got 0"),
        (lambda: TensorMemory(H, K, slots=0), "slots must be at least 1, got 0"),
        (lambda: TensorMemory(H, K, rule="sum"), "rule must be one of .*, got 'sum'"),
        (lambda: TensorMemory(H, K, scale="1/B"), "scale must be one of .*, got '1/B'"),
        (lambda: TensorMemory(H, K, feature=MemoryFeature(3)), r"feature's scale must be of shape \[2\]"),
        (lambda: memory().reset(0), "batch_size must be at least 1, got 0"),
        (lambda: memory().update(*tokens(B + 1)), r"k must be of shape \[2, 2, 6, 4\], got \[3, 2, 6, 4\]"),
        (lambda: memory().update(tokens()[0], tokens()[0]), r"v must be of shape \[2, 2, 6, 3\]"),
        (lambda: memory().update(*tokens(), slot=1), "slot must be from 0 to 0, got 1"),
        (
            lambda: memory(shared=True).update(*tokens(), torch.ones(T, B, dtype=torch.bool)),
            r"padding_mask must be of shape \[2, 6\], got \[6, 2\]",
        ),
        (lambda: memory().retrieve(torch.zeros(B, 3, T, K)), "with Hq a multiple of 2, got"),
        (lambda: memory().retrieve(torch.zeros(T, K)), r"q must be of shape \[B, Hq, T, K\]"),
        (lambda: memory().svd_cleaning(0.0), "energy_threshold must be above 0 and at most 1, got 0.0"),
        (lambda: memory().svd_cleaning(max_rank=0), "max_rank must be at least 1 or None, got 0"),
    ],
)
def test_wrong_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_copies_hold_what_was_written_under_gradients(again: Callable[[TensorMemory], TensorMemory]) -> None:
    """As an average of weights takes them in the middle of a training."""
    made, q = memory(slots=2), queries()
    made.update(*tokens())
    same = again(made)
    assert torch.equal(same.retrieve(q), made.retrieve(q))
    assert not any(state.matrix.requires_grad for state in same.states)
    made.retrieve(q).sum().backward()
    assert made.feature.scale.grad is not None
