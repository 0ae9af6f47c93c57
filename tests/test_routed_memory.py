"""Memories by direction: every slot is reached, and routing is a token's own affair."""

from __future__ import annotations

import pytest
import torch

from newllm import ops
from newllm.modules.routed_memory import RoutedMemory, orthogonal_directions, route
from newllm.testing import assert_rounding, largest
from newllm.types import MemoryState

HEADS, WIDTH, SLOTS = 2, 16, 16


def tokens(count: int, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = (torch.randn(rows, HEADS, count, WIDTH, dtype=torch.float64) for _ in "kv")
    return k, v


def memory(**options: int) -> RoutedMemory:
    return RoutedMemory(HEADS, WIDTH, **{"slots": SLOTS, **options}).double()


def test_row_78_orthogonal_routing_reaches_every_slot() -> None:
    routed = memory()
    exact = orthogonal_directions(HEADS, SLOTS, WIDTH)
    eye = torch.eye(SLOTS).expand(HEADS, -1, -1)
    assert_rounding(exact @ exact.mT, eye, additions=2 * WIDTH, magnitude=1.0)
    # A direction's own key goes to its slot, and random keys reach all of them about equally often.
    own = route(routed.directions[None], routed.directions)[0, :, :, 0]
    assert torch.equal(own, torch.arange(SLOTS).expand(HEADS, -1))
    k, v = tokens(4000, rows=1)
    counts = torch.stack([head.bincount(minlength=SLOTS) for head in route(k, routed.directions)[0, :, :, 0]])
    assert int(counts.min()) > 4000 / SLOTS / 2
    state = routed.update(k, v)
    assert bool((state.norm.sum(-1) > 0).all())
    with pytest.raises(ValueError, match="slots must be from 1 to the key width, 16, got 17"):
        orthogonal_directions(HEADS, WIDTH + 1, WIDTH)


def test_row_78_routing_is_the_same_for_a_token_and_a_sequence() -> None:
    """Any split of a stream, down to single tokens, writes the same memories and reads the same answers."""
    routed = memory(top=2)
    k, v = tokens(12)
    whole, state = routed.update(k, v), routed.empty(2, WIDTH)
    for step in range(12):
        state = routed.update(k[:, :, step : step + 1], v[:, :, step : step + 1], state)
    for one, other in zip(state, whole, strict=True):
        assert_rounding(one, other, additions=12, magnitude=largest(other) * 12)
    alone = torch.cat([routed.retrieve(part, whole) for part in k.split(1, 2)], 2)
    assert_rounding(alone, routed.retrieve(k, whole), additions=WIDTH * SLOTS, magnitude=largest(v) * WIDTH)


def test_reading_all_slots_is_one_memory() -> None:
    routed = memory(top=SLOTS)
    (k, v), (q, _) = tokens(20), tokens(5)
    feature = routed.feature()
    state = routed.update(k, v)
    plain = ops.memory_update(k, v, feature=feature)
    expected = ops.memory_retrieve(q, plain, feature=feature)
    assert_rounding(routed.retrieve(q, state), expected, additions=20 * WIDTH, magnitude=largest(v) * 20)
    total = MemoryState(state.matrix.sum(2), state.norm.sum(2))
    assert_rounding(total.matrix, plain.matrix, additions=20, magnitude=largest(plain.matrix) * 20)


def test_slots_keep_more_pairs_apart_than_one_memory() -> None:
    routed, single = memory(), memory(slots=1)
    k, v = tokens(128, rows=8)

    def found(made: RoutedMemory) -> float:
        read = made.retrieve(k, made.update(k, v))
        alike = torch.nn.functional.normalize(read, dim=-1) @ torch.nn.functional.normalize(v, dim=-1).mT
        return float((alike.argmax(-1) == torch.arange(128)).double().mean())

    assert found(routed) > 2 * found(single)


def test_padding_is_not_written_and_gradients_flow() -> None:
    routed = memory()
    k, v = tokens(6)
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    state = routed.update(k, v, padding_mask=mask)
    short = routed.update(k[1:, :, :2], v[1:, :, :2])
    assert torch.equal(state.norm[1:], short.norm)
    k.requires_grad_()
    routed.retrieve(k, routed.update(k, v)).sum().backward()
    assert k.grad is not None
    assert routed.feature.scale.grad is not None
    with pytest.raises(ValueError, match="top"):
        memory(top=17)
