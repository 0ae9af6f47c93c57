"""Several associative memories side by side: whose turn it is to be written, and reading a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from newllm.ops import checks, memory_retrieve, memory_update
from newllm.reference.features import feature_map
from newllm.reference.memory import state_dtype
from newllm.types import FeatureMap, MemoryState, Rule


class Slot(NamedTuple):
    """One memory: ``matrix [B, H, F, V]``, ``norm [B, H, F]``, ``count [B]`` real tokens (int64).

    ``weight [B]`` (float64) is what those tokens weigh in the norm: their number, unless scaled.
    """

    matrix: Tensor
    norm: Tensor
    count: Tensor  # type: ignore[assignment] # shadows tuple.count
    weight: Tensor

    @property
    def memory(self) -> MemoryState:
        """The memory as the operators take it."""
        return MemoryState(self.matrix, self.norm, self.count)


class Turns:
    """Round robin over the slots that are not frozen."""

    def __init__(self, slots: int, next_slot: int = 0, frozen: Sequence[int] = ()) -> None:
        self.slots = slots
        self.next_slot = self.existing(next_slot, "next_slot")
        self.frozen = {self.existing(slot, "frozen slot") for slot in frozen}

    def existing(self, slot: int, name: str = "slot") -> int:
        """The slot, or ``ValueError`` if there is none such."""
        checks.require(0 <= slot < self.slots, name, slot, f"from 0 to {self.slots - 1}")
        return slot

    def writable(self, slot: int) -> int:
        """The slot, or ``RuntimeError`` if it is frozen."""
        if self.existing(slot) in self.frozen:
            raise RuntimeError(f"slot {slot} is frozen, call unfreeze({slot}) first")
        return slot

    def unfrozen(self) -> list[int]:
        """All slots that are not frozen, those to come first in front; none is a ``RuntimeError``."""
        turns = [turn % self.slots for turn in range(self.next_slot, self.next_slot + self.slots)]
        slots = [slot for slot in turns if slot not in self.frozen]
        if not slots:
            raise RuntimeError(f"all {self.slots} slots are frozen, call unfreeze first")
        return slots


def empty_slot(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str | None
) -> Slot:
    """An empty memory of ``sizes`` (B, H, F, V)."""
    return Slot(
        torch.zeros(sizes, dtype=dtype, device=device),
        torch.zeros(sizes[:3], dtype=dtype, device=device),
        torch.zeros(sizes[0], dtype=torch.int64, device=device),
        torch.zeros(sizes[0], dtype=torch.float64, device=device),
    )


def one_row(x: Tensor) -> Tensor:
    """The tokens of all rows as one row: ``[B, H, T, D]`` to ``[1, H, B * T, D]``."""
    return x.transpose(0, 1).flatten(1, 2)[None]


def write_slot(
    slot: Slot,
    k: Tensor,
    v: Tensor,
    padding_mask: Tensor | None,
    *,
    rule: Rule,
    feature: FeatureMap,
    scale: str,
    factor: int = 1,
) -> Slot:
    """``memory_update`` of a slot, with ``factor`` times what it adds."""
    after = memory_update(
        k, v, slot.memory, rule=rule, feature=feature, scale=scale, padding_mask=padding_mask
    )
    matrix, norm = after.matrix, after.norm
    if factor > 1:
        matrix = slot.matrix + factor * (matrix - slot.matrix)
        norm = slot.norm + factor * (norm - slot.norm)
    tokens = torch.full_like(slot.count, k.shape[2]) if padding_mask is None else padding_mask.sum(1)
    total = tokens.sum().clamp(min=1)
    added = {"none": tokens, "1/T": tokens.clamp(max=1), "1/(B*T)": tokens.double() / total}[scale]
    return Slot(matrix, norm, slot.count + tokens, slot.weight + factor * added)


def read_slots(q: Tensor, slots: Sequence[Slot], *, feature: FeatureMap, eps: float) -> Tensor:
    """Read ``q [B, H, T, K]`` from every slot, mixed per query by ``slot_shares``: ``[B, H, T, V]``.

    One slot is read plainly; empty slots give exact zeros.
    """
    context, (q,) = checks.without_autocast(q)
    with context:
        answers = [memory_retrieve(q, slot.memory, feature=feature, eps=eps) for slot in slots]
        if len(answers) == 1:
            return answers[0]
        shares = slot_shares(q, slots, feature)
        return (shares[..., None] * torch.stack(answers)).sum(0).to(q.dtype)


def slot_shares(q: Tensor, slots: Sequence[Slot], feature: FeatureMap) -> Tensor:
    """Shares ``[S, B, H, T]`` of S slots in each query's answer; an empty slot has none.

    Softmax over slots of sigma(q_t) . landmark, where the landmark is the mean key feature norm / weight.
    The score of a query depends neither on other queries nor on how much a slot holds.
    """
    features = feature_map(q.to(state_dtype(q.dtype)), feature)
    weights = torch.stack([slot.weight for slot in slots])
    norms = torch.stack([slot.norm for slot in slots])
    empty = weights == 0
    landmarks = norms / weights.masked_fill(empty, 1).to(norms.dtype)[..., None, None]
    landmarks = landmarks.repeat_interleave(q.shape[1] // norms.shape[2], 2).to(features.dtype)
    scores = (features @ landmarks[..., None]).squeeze(-1)
    # Where all slots are empty any shares will do: each answers zero.
    hidden = empty & ~empty.all(0)
    return scores.masked_fill(hidden[..., None, None], -torch.inf).softmax(0)
