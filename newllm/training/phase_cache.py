"""What phase 2 reads of a stream: exact contexts, computed once.

N tokens of the stream, of which the last has no successor; n chosen positions.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from newllm.models import ContextKVForCausalLM, ContextLMForCausalLM
from newllm.models.context_lm.modeling import contexts_before
from newllm.training.phase_one import exact_contexts

_AT_ONCE = 65536


class PhaseCache(Protocol):
    """Contexts of a stream, and the token ids ``[N]`` they belong to."""

    ids: Tensor

    def features(self, model: Any, positions: Tensor) -> Tensor:
        """What the head of ``model`` reads at ``positions [n]``: ``[n, E]``, with gradients."""
        ...


@torch.no_grad()
def embedded(model: Any, ids: Tensor, input_tokens: int = 1) -> Tensor:
    """What a ContextBlock reads of a stream ``ids [N]``: ``[N, input_tokens * E]``, where ``ids`` are."""
    device = model.device
    parts = [model.model.embed(part.to(device)).to(ids.device) for part in ids.split(_AT_ONCE)]
    windows = _windows(torch.arange(len(ids), device=ids.device), input_tokens)
    joined = torch.cat(parts)
    return _gathered(joined, windows)


class TokenCache:
    """The contexts that the TokenBlock of a two-phase ``model`` reads at every position of ``ids [N]``.

    ``contexts`` holds ``TokenBlock.reads`` tensors ``[N, C]``, exact, without noise, where ``ids`` are.

    Raises ``ValueError`` for another kind of model, or fewer than two tokens.
    """

    def __init__(self, model: ContextLMForCausalLM, ids: Tensor) -> None:
        if model.config.cell != "context":
            raise ValueError(f"model must have the cell 'context', got {model.config.cell!r}")
        _check(ids)
        body, self.ids = model.model, ids.long()
        self._kept = model.config.input_tokens
        x = embedded(model, self.ids, self._kept)
        final = exact_contexts(body.context_block, x)
        before = contexts_before(final[None], None)[0]
        parts = zip(x.split(_AT_ONCE), before.split(_AT_ONCE), final.split(_AT_ONCE), strict=True)
        chosen = [self._chosen(body, *part) for part in parts]
        self.contexts: list[Tensor] = [torch.cat(pieces) for pieces in zip(*chosen, strict=True)]

    @staticmethod
    @torch.no_grad()
    def _chosen(body: Any, x: Tensor, before: Tensor, final: Tensor) -> list[Tensor]:
        outputs = [final]
        if len(body.context_block.layers) > 1:
            device = body.device
            made = body.context_block.step(before.to(device), x.to(device))
            outputs = [one.to(final.device) for one in made]
        chosen: list[Tensor] = body.token_block.choose(outputs, before)
        return chosen

    def features(self, model: Any, positions: Tensor) -> Tensor:
        """As :class:`PhaseCache`."""
        device, positions = model.device, positions.to(self.ids.device)
        windows = _windows(positions, self._kept)
        embeddings = model.model.embed(self.ids[windows.clamp(min=0)].to(device))
        x = embeddings.masked_fill((windows < 0)[..., None].to(device), 0).flatten(1)
        made: Tensor = model.model.token_block(x, [one[positions].to(device) for one in self.contexts])
        return made


class SlotCache:
    """The contexts of a Context-KV ``model`` at every position of ``ids [N]``, and where documents begin.

    Slots restart at ``borders``, the positions where documents begin (the first is 0).

    Raises ``ValueError`` for fewer than two tokens, or borders that are none.
    """

    def __init__(self, model: ContextKVForCausalLM, ids: Tensor, borders: Tensor) -> None:
        _check(ids)
        ids, borders = ids.cpu(), borders.cpu()
        inside = len(borders) > 0 and int(borders[0]) == 0 and int(borders[-1]) < len(ids)
        if not inside or not bool((borders.diff() > 0).all()):
            raise ValueError("borders must rise from 0 and lie inside ids")
        self.ids, self.rule = ids.long(), model.config.rule
        x = embedded(model, self.ids)
        blocks: Any = model.model.context_blocks
        self.contexts = torch.cat([exact_contexts(block, x) for block in blocks], -1)
        lengths = torch.cat([borders, torch.tensor([len(ids)])]).diff()
        self.document = torch.repeat_interleave(torch.arange(len(borders)), lengths)
        self.local = torch.arange(len(ids)) - borders[self.document]

    def slots(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Stream positions ``[M]`` of all slots that any of ``positions [n]`` sees, and who sees which."""
        first = positions - self.local[positions]
        reach = self.rule.capacity
        if self.rule.kind == "interval" and reach is not None:
            first = torch.maximum(first, positions - reach)
        candidates = self._between(first, positions)
        candidates = candidates[self.rule.stores(self.local[candidates])]
        visible = self.rule.visible(self.local[candidates], self.local[positions])
        visible &= self.document[candidates] == self.document[positions][:, None]
        used = visible.any(0)
        return candidates[used], visible[:, used]

    def _between(self, first: Tensor, last: Tensor) -> Tensor:
        """All positions that lie in any of the ranges ``first`` to ``last``."""
        marks = torch.zeros(len(self.ids) + 1, dtype=torch.int32)
        marks.index_add_(0, first, torch.ones_like(first, dtype=torch.int32))
        marks.index_add_(0, last + 1, -torch.ones_like(last, dtype=torch.int32))
        return torch.nonzero(marks.cumsum(0)[:-1] > 0)[:, 0]

    def features(self, model: Any, positions: Tensor) -> Tensor:
        """As :class:`PhaseCache`; keys and values of a slot are projected once for the batch."""
        device, body = model.device, model.model
        positions = positions.cpu()
        slots, visible = self.slots(positions)
        x = body.embed(self.ids[positions].to(device))[None]
        own = body.attention.project(self.contexts[positions].to(device)[None])
        bank = body.attention.project(self.contexts[slots].to(device)[None])
        made: Tensor = body.feed_forward(body.attention(x, own, bank, visible[None].to(device)))[0]
        return made


def _check(ids: Tensor) -> None:
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(f"ids must be a stream [N] of at least 2 tokens, got shape {list(ids.shape)}")


def _windows(positions: Tensor, count: int) -> Tensor:
    """The ``count`` positions up to each, ``[n, count]``, oldest first; below 0 there is nothing."""
    return positions[:, None] + torch.arange(1 - count, 1, device=positions.device)


def _gathered(x: Tensor, windows: Tensor) -> Tensor:
    if windows.shape[1] == 1:
        return x
    return x[windows.clamp(min=0)].masked_fill((windows < 0)[..., None], 0).flatten(1)
