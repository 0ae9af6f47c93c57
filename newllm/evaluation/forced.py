"""Logits of forced answers behind prompts of any length, and free ones, by a state of constant size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

if TYPE_CHECKING:
    from newllm.distributed.sequence_parallel import Mesh


@torch.inference_mode()
def last_logits(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    keep: int,
    chunk: int,
    before_answer: Callable[[Cache], object] | None = None,
    on_tokens: Callable[[int], object] = lambda tokens: None,
    mesh: Mesh | None = None,
) -> Tensor:
    """The logits ``[B, keep, vocabulary]`` after the last ``keep`` tokens of ``ids [B, T]``.

    At most ``max(chunk, keep)`` tokens of a row are read at once, through the model's cache;
    ``on_tokens`` hears of each piece. ``before_answer`` may change the cache before those last tokens are
    read. Ranks of a ``mesh`` share what comes before those, see :func:`newllm.distributed.prefill.prefill`.
    """
    if mesh is None:
        answer = 0 if before_answer is None else keep
        pieces = _pieces(ids.shape[1] - answer, max(chunk, keep)) + [answer] * (answer > 0)
        # Without a cache nothing need be kept of prompts that one pass reads.
        cache: Cache | None = DynamicCache(config=model.config) if len(pieces) > 1 else None
    else:
        cache = _read_together(model, ids[:, :-keep], chunk, on_tokens, mesh)
        ids, pieces = ids[:, -keep:], [keep]
    for number, part in enumerate(ids.split(pieces, 1)):
        if before_answer is not None and cache is not None and number == len(pieces) - 1:
            before_answer(cache)
        out = model(
            part.to(model.device), past_key_values=cache, use_cache=cache is not None, logits_to_keep=keep
        )
        on_tokens(part.numel())
    logits: Tensor = out.logits
    return logits


def _read_together(
    model: Any, ids: Tensor, chunk: int, on_tokens: Callable[[int], object], mesh: Mesh
) -> Cache:
    """The cache after ``ids [B, T]``, read in slices by the ranks of ``mesh``."""
    from newllm.distributed.prefill import cache_of, prefill
    from newllm.models.session import Session

    session = Session(model, batch_size=len(ids), chunk=chunk)
    prefill(session, ids, mesh=mesh, progress=lambda tokens: on_tokens(tokens * len(ids)))
    return cache_of(session.snapshot())


@torch.inference_mode()
def greedy_tokens(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    tokens: int,
    chunk: int,
    before_answer: Callable[[Cache], object] | None = None,
) -> Tensor:
    """The ``[B, tokens]`` likeliest tokens one by one after ``ids [B, T]``, read ``chunk`` of a row at once.

    ``before_answer`` may change the cache before the last of ``ids`` is read.
    """
    cache = DynamicCache(config=model.config)
    for part in ids[:, :-1].split(_pieces(ids.shape[1] - 1, chunk), 1):
        model(part.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    if before_answer is not None:
        before_answer(cache)
    last, found = ids[:, -1:].to(model.device), []
    for _ in range(tokens):
        last = model(last, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        found.append(last)
    return torch.cat(found, 1)


def _pieces(tokens: int, chunk: int) -> list[int]:
    """Sizes of pieces; the odd one comes first, so that the last one holds the whole answer."""
    whole, odd = divmod(tokens, chunk)
    return [odd] * (odd > 0) + [chunk] * whole


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """``model`` in evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
