"""An associative memory that keeps its state: a convenience over ``newllm.ops.memory_update``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from newllm.modules.gate import MemoryFeature
from newllm.modules.memory_health import MemoryHealth, SVDCleaningStats, clean, measure
from newllm.modules.memory_slots import Slot, Turns, empty_slot, one_row, read_slots, write_slot
from newllm.ops import checks
from newllm.ops.memory import RULES, SCALES
from newllm.reference.features import feature_width
from newllm.reference.memory import state_dtype
from newllm.types import MemoryState, Rule

DTYPES = {
    "matrix": (torch.float32, torch.float64),
    "norm": (torch.float32, torch.float64),
    "count": (torch.int64,),
    "weight": (torch.float64,),
}
EXPORTED = (*DTYPES, "head_dim", "shared", "frozen", "next_slot")


class TensorMemory(nn.Module):
    """A memory that is written and read by calls and keeps its content until ``reset``.

    Infini-attention's memory (Munkhdalai et al. 2024, arXiv 2404.07143, eq. 3-5) in ``slots`` copies of
    matrix ``[B, H, F, V]`` and norm ``[B, H, F]``, float32 (float64 when reset so). The content is no
    part of ``state_dict`` and does not move with ``.to()``: use ``reset``, ``export_state``,
    ``import_state``. Gradients flow through everything written; ``detach_`` cuts them.

    With several slots, writes go round robin over those that are not frozen, and each query reads the
    softmax mixture of ``memory_slots.slot_shares``. Its score, sigma(q) . mean key feature, is that query's
    own and does not grow with what was written: an average over the sequence would let a token see later
    ones, and a sum would favour the fullest slot.

    Args:
        num_heads: heads H of keys and values; queries may have a multiple of them.
        head_dim: width K of keys and queries.
        value_dim: width V of values; None is ``head_dim``.
        slots: number of memories.
        shared: one memory for the whole batch (B = 1 in the state): the tokens of all rows are written
            to it as one segment and all rows read it. Calls may then differ in batch size.
        rule: ``linear``, ``delta`` or ``gamma``, see ``newllm.ops.memory_update``.
        feature: feature map of keys and queries; None is ``MemoryFeature(num_heads)``.
        scale: divisor of all that a call adds: ``none``; ``1/T`` the row's real tokens (of a shared
            memory: the rows' mean number of real tokens); ``1/(B*T)`` the real tokens of the batch.
        eps: least denominator when reading.

    Raises:
        ValueError: for a wrong size or choice. TypeError: for a wrong dtype. RuntimeError: when used
            before ``reset`` or ``import_state``.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        slots: int = 1,
        shared: bool = False,
        rule: Rule = "linear",
        feature: MemoryFeature | None = None,
        scale: str = "none",
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {"num_heads": num_heads, "head_dim": head_dim, "value_dim": value_dim, "slots": slots}
        for name, size in sizes.items():
            checks.require(size >= 1, name, size, "at least 1")
        checks.choice("rule", rule, RULES)
        checks.choice("scale", scale, SCALES)
        self.num_heads, self.head_dim, self.value_dim = num_heads, head_dim, value_dim
        self.slots, self.shared = slots, shared
        self.rule, self.scale, self.eps = rule, scale, eps
        self.feature = MemoryFeature(num_heads) if feature is None else feature
        per_head = self.feature().scale
        if per_head is not None:
            checks.shape("feature's scale", per_head, (num_heads,))
        self._slots: list[Slot] = []
        self._turns = Turns(slots)

    @property
    def states(self) -> tuple[MemoryState, ...]:
        """Each slot's memory, as ``newllm.ops`` takes it."""
        return tuple(slot.memory for slot in self._ready())

    @property
    def frozen(self) -> tuple[int, ...]:
        """The frozen slots."""
        return tuple(sorted(self._turns.frozen))

    def reset(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Empty all slots, unfreeze them and start again at slot 0.

        Args:
            batch_size: rows of the calls to come; a shared memory has one row whatever it is.
            device: None is the feature parameters'.
            dtype: dtype of the calls to come; the state is float32, or float64 for float64.
        """
        checks.require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        sizes, kind = self._sizes(batch_size), state_dtype(dtype or torch.float32)
        self._slots = [empty_slot(sizes, kind, device or self._device()) for _ in range(self.slots)]
        self._turns = Turns(self.slots)

    def update(
        self, k: Tensor, v: Tensor, padding_mask: Tensor | None = None, *, slot: int | None = None
    ) -> None:
        """Write a run of tokens into one slot.

        Args:
            k: keys ``[B, H, T, K]``, raw projections, float16 to float64. v: values ``[B, H, T, V]``.
            padding_mask: bool ``[B, T]``, True = real token; padding is not written.
            slot: the slot to write; None is the next in turn that is not frozen.

        Raises:
            RuntimeError: when the slot, or without one every slot, is frozen.
        """
        slots = self._ready()
        index = self._turns.unfrozen()[0] if slot is None else self._turns.writable(slot)
        self._check("k", k, self.num_heads, self.head_dim)
        self._check("v", v, self.num_heads, self.value_dim)
        rows, _, tokens, _ = k.shape
        if padding_mask is not None:
            checks.shape("padding_mask", padding_mask, (rows, tokens))
        if self.shared:
            k, v = one_row(k), one_row(v)
            padding_mask = None if padding_mask is None else padding_mask.reshape(1, -1)
        slots[index] = write_slot(
            slots[index],
            k,
            v,
            padding_mask,
            rule=self.rule,
            feature=self.feature(),
            scale=self.scale,
            # The one long row of a shared memory is divided by B*T where "1/T" wants T.
            factor=rows if self.shared and self.scale == "1/T" else 1,
        )
        if slot is None:
            self._turns.next_slot = (index + 1) % self.slots

    def retrieve(self, q: Tensor) -> Tensor:
        """Read queries ``q [B, Hq, T, K]``: ``[B, Hq, T, V]`` in q's dtype, zeros from an empty memory."""
        slots = self._ready()
        grouped = q.ndim == 4 and q.shape[1] % self.num_heads == 0
        allowed = f"of shape [B, Hq, T, K] with Hq a multiple of {self.num_heads}"
        checks.require(grouped, "q", list(q.shape), allowed)
        self._check("q", q, q.shape[1], self.head_dim)
        feature = self.feature()
        if not self.shared:
            return read_slots(q, slots, feature=feature, eps=self.eps)
        answer = read_slots(one_row(q), slots, feature=feature, eps=self.eps)
        return answer[0].unflatten(1, (q.shape[0], q.shape[2])).transpose(0, 1)

    def freeze(self, slot: int) -> None:
        """Keep a slot's tensors as they are: no update and no cleaning touches them."""
        self._ready()
        self._turns.frozen.add(self._turns.existing(slot))

    def unfreeze(self, slot: int) -> None:
        """Let a slot be written and cleaned again."""
        self._ready()
        self._turns.frozen.discard(self._turns.existing(slot))

    def detach_(self) -> TensorMemory:
        """Cut all slots from the graph of gradients, as between two training steps; returns itself."""
        self._ready()
        self._slots = self._detached()
        return self

    def svd_cleaning(self, energy_threshold: float = 0.95, max_rank: int | None = None) -> SVDCleaningStats:
        """Drop the weakest singular directions of all slots that are not frozen.

        One batched decomposition, O(F V min(F, V)) a head, row and slot: call it when idle. The result
        carries no gradient. ``memory_health.clean`` says what is kept and what becomes of the norm.

        Args:
            energy_threshold: share of the squared singular values to keep, above 0 and at most 1.
            max_rank: keep exactly so many instead.

        Raises:
            RuntimeError: when every slot is frozen.
        """
        checks.require(
            0 < energy_threshold <= 1, "energy_threshold", energy_threshold, "above 0 and at most 1"
        )
        checks.require(max_rank is None or max_rank >= 1, "max_rank", max_rank, "at least 1 or None")
        slots = self._ready()
        indices = sorted(self._turns.unfrozen())
        matrices, norms, stats = clean(
            torch.stack([slots[index].matrix for index in indices]),
            torch.stack([slots[index].norm for index in indices]),
            energy_threshold=energy_threshold,
            max_rank=max_rank,
            eps=self.eps,
        )
        for index, matrix, norm in zip(indices, matrices, norms, strict=True):
            slots[index] = slots[index]._replace(matrix=matrix, norm=norm)
        return stats

    def health(self, *, clean_above: float = 0.85, warn_above: float = 0.68) -> MemoryHealth:
        """How full the slots are that cleaning may change; ``needs_cleaning`` above ``clean_above``.

        Raises:
            RuntimeError: when every slot is frozen.
        """
        slots = self._ready()
        indices = self._turns.unfrozen()
        return measure(
            torch.stack([slots[index].matrix for index in indices]),
            torch.stack([slots[index].norm for index in indices]),
            clean_above=clean_above,
            warn_above=warn_above,
        )

    def maybe_clean(
        self, energy_threshold: float = 0.95, max_rank: int | None = None, *, clean_above: float = 0.85
    ) -> SVDCleaningStats | None:
        """Clean if ``health`` says so; None if it does not."""
        if not self.health(clean_above=clean_above).needs_cleaning:
            return None
        return self.svd_cleaning(energy_threshold, max_rank)

    def export_state(self) -> dict[str, Any]:
        """The content, detached and copied.

        ``matrix [S, B, H, F, V]``, ``norm [S, B, H, F]``, ``count [S, B]`` (int64), ``weight [S, B]``
        (float64) of S slots, and plain ``head_dim``, ``shared``, ``frozen`` (list of slots) and
        ``next_slot``.
        """
        parts = zip(DTYPES, zip(*self._ready(), strict=True), strict=True)
        return {
            **{name: torch.stack(tensors).detach() for name, tensors in parts},
            "head_dim": self.head_dim,
            "shared": self.shared,
            "frozen": list(self.frozen),
            "next_slot": self._turns.next_slot,
        }

    def import_state(self, state: Mapping[str, Any]) -> None:
        """Take over what ``export_state`` gave, of any batch size, copied to the feature parameters' device.

        Raises:
            ValueError: when keys or sizes do not fit; the memory then stays as it was.
        """
        checks.require(
            set(state) == set(EXPORTED), "state's keys", ", ".join(sorted(state)), ", ".join(sorted(EXPORTED))
        )
        # head_dim too: with it, the features' width tells which feature map the content was written by.
        for name, fits in (("head_dim", self.head_dim), ("shared", self.shared)):
            checks.require(state[name] == fits, f"state's {name}", state[name], str(fits))
        matrix = state["matrix"]
        sizes = (self.slots, *self._sizes(matrix.shape[1] if matrix.ndim == 5 else 1))
        expected = {"matrix": sizes, "norm": sizes[:4], "count": sizes[:2], "weight": sizes[:2]}
        for name, dtypes in DTYPES.items():
            checks.shape(f"state's {name}", state[name], expected[name])
            if state[name].dtype not in dtypes:
                raise TypeError(f"state's {name} must be {dtypes[0]}, got {state[name].dtype}")
        turns = Turns(self.slots, state["next_slot"], state["frozen"])
        device = self._device()
        parts = (state[name].detach().to(device, copy=True) for name in DTYPES)
        self._slots = [Slot(*slot) for slot in zip(*parts, strict=True)]
        self._turns = turns

    def extra_repr(self) -> str:
        """Sizes and choices, for ``print``."""
        names = ("num_heads", "head_dim", "value_dim", "slots", "shared", "rule", "scale")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: all but the graph of gradients, which can be neither."""
        return {**self.__dict__, "_slots": self._detached()}

    def _detached(self) -> list[Slot]:
        return [Slot(*(part.detach() for part in slot)) for slot in self._slots]

    def _ready(self) -> list[Slot]:
        if not self._slots:
            raise RuntimeError("the memory holds no state yet, call reset first")
        return self._slots

    def _device(self) -> torch.device:
        parameter = next(self.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def _sizes(self, batch: int) -> tuple[int, int, int, int]:
        """Sizes of a slot's matrix for calls of ``batch`` rows."""
        features = feature_width(self.feature(), self.head_dim)
        return 1 if self.shared else batch, self.num_heads, features, self.value_dim

    def _check(self, name: str, x: Tensor, heads: int, width: int) -> None:
        checks.require(x.ndim == 4, name, list(x.shape), "of shape [B, H, T, D]")
        batch = x.shape[0] if self.shared else self._slots[0].count.shape[0]
        checks.shape(name, x, (batch, heads, x.shape[2], width))
