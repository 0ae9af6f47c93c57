"""Both phases of a context model, from a text to figures, with an untrained control beside them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from newllm.data.token_cache import Tokens
from newllm.modules.context_health import effective_rank
from newllm.training.phase_cache import PhaseCache, SlotCache, TokenCache, embedded
from newllm.training.phase_config import Phase1Config, Phase2Config
from newllm.training.phase_one import exact_contexts, train_contexts
from newllm.training.phase_two import train_tokens

Log = Callable[[dict[str, Any]], None]


class Stream(NamedTuple):
    """Token ids ``[N]`` and the positions at which documents begin."""

    ids: Tensor
    borders: Tensor

    @classmethod
    def of(cls, tokens: Tokens, limit: int | None = None) -> Stream:
        """The first ``limit`` ids of ``tokens`` (None: all)."""
        ids = torch.from_numpy(tokens.ids[:limit].astype("int64"))
        borders = torch.from_numpy(tokens.borders[:-1].astype("int64"))
        return cls(ids, borders[borders < len(ids)])


def run_phases(
    model: Any,
    train: Stream,
    validation: Stream,
    first: Phase1Config,
    second: Phase2Config,
    *,
    log: Log,
) -> dict[str, Any]:
    """Train ``model`` in both phases, and a copy of it in the second alone; the figures of both.

    Each has the effective ranks of its exact contexts in training and validation, and of its best epoch the
    validation's loss, perplexity and accuracy. Seconds are counted for each phase.
    """
    control = copy.deepcopy(model)
    trained = {"phase_one": _contexts(model, train, validation, first, log)}
    trained |= _tokens(model, train, validation, second, lambda row: log({"model": "trained", **row}))
    untrained = _tokens(control, train, validation, second, lambda row: log({"model": "untrained", **row}))
    return {"trained": trained, "untrained_contexts": untrained}


def _blocks(model: Any) -> list[Any]:
    body = model.model
    return list(body.context_blocks) if hasattr(body, "context_blocks") else [body.context_block]


def _contexts(
    model: Any, train: Stream, validation: Stream, config: Phase1Config, log: Log
) -> list[dict[str, Any]]:
    """Phase 1 of every block, one after the other."""
    reports = []
    for number, block in enumerate(_blocks(model)):
        began = time.perf_counter()
        x, held = (embedded(model, part.ids, block.input_tokens) for part in (train, validation))
        found = train_contexts(
            block,
            x,
            config,
            validation=held,
            log=lambda row, n=number: log({"block": n, **row}),  # type: ignore[misc]
        )
        reports.append(
            {
                "sweeps": found.sweeps,
                "most_sweeps": config.max_iterations,
                "converged": round(found.rate * len(x)),
                "positions": len(x),
                "convergence_rate": found.rate,
                "stopped": found.stopped,
                "seconds": time.perf_counter() - began,
            }
        )
    return reports


def _tokens(model: Any, train: Stream, validation: Stream, config: Phase2Config, log: Log) -> dict[str, Any]:
    """Ranks, caches and phase 2."""
    began = time.perf_counter()
    ranks: dict[str, Any] = {}
    for name, part in (("train", train), ("validation", validation)):
        ranks[f"{name}_rank"] = [
            effective_rank(exact_contexts(block, embedded(model, part.ids, block.input_tokens)))._asdict()
            for block in _blocks(model)
        ]
    cached = time.perf_counter()
    found = train_tokens(model, _cache(model, train), _cache(model, validation), config, log=log)
    return {
        **ranks,
        "best_epoch": found.best_epoch,
        "loss": found.loss,
        "perplexity": found.perplexity,
        "accuracy": found.accuracy,
        "stopped": found.stopped,
        "rank_seconds": cached - began,
        "phase_two_seconds": time.perf_counter() - cached,
    }


def _cache(model: Any, stream: Stream) -> PhaseCache:
    if hasattr(model.model, "context_blocks"):
        return SlotCache(model, stream.ids, stream.borders)
    return TokenCache(model, stream.ids)
