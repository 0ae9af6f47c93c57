"""Both phases of a context model, from a text to figures, with an untrained control beside them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from newllm.data.token_cache import Tokens
from newllm.modules.context_health import effective_rank
from newllm.training.phase_cache import PhaseCache, SlotCache, TokenCache, embedded
from newllm.training.phase_checkpoints import PhaseCheckpoints
from newllm.training.phase_config import Phase1Config, Phase2Config
from newllm.training.phase_one import exact_contexts, train_contexts
from newllm.training.phase_two import evaluate, train_tokens

Log = Callable[[dict[str, Any]], None]
Inspect = Callable[[Any, Tensor, Sequence[int]], list[dict[str, Any]]]
_SETS = ("train", "validation")


class Stream(NamedTuple):
    """Token ids ``[N]`` and the positions at which documents begin.

    Embeddings and contexts of the stream are kept where ``ids`` are.
    """

    ids: Tensor
    borders: Tensor

    @classmethod
    def of(cls, tokens: Tokens, limit: int | None = None) -> Stream:
        """The first ``limit`` ids of ``tokens`` (None: all).

        Raises ``ValueError`` for fewer than two.
        """
        ids = torch.from_numpy(tokens.ids[:limit].astype("int64"))
        if len(ids) < 2:
            raise ValueError(f"a stream must hold at least 2 tokens, got {len(ids)}")
        borders = torch.from_numpy(tokens.borders[:-1].astype("int64"))
        return cls(ids, borders[borders < len(ids)])

    def beside(self, model: Any) -> Stream:
        """The same on the device of ``model`` if embeddings and contexts take at most half its memory."""
        if model.device.type == "cpu":
            return self
        config = model.config
        width = getattr(config, "input_tokens", 1) * config.embed_dim + 4 * config.context_dim
        total = torch.cuda.get_device_properties(model.device).total_memory
        fits = len(self.ids) * width * 4 <= total // 2
        return Stream(self.ids.to(model.device), self.borders) if fits else self


def run_phases(
    model: Any,
    train: Stream,
    validation: Stream,
    first: Phase1Config,
    second: Phase2Config,
    *,
    log: Log,
    inspect: Inspect | None = None,
    control: bool = True,
    keep: PhaseCheckpoints | None = None,
) -> dict[str, Any]:
    """Train ``model`` in both phases, and a copy of it in the second alone; the figures of both.

    Each has the effective ranks of its exact contexts in training and validation, and of its best epoch
    loss, perplexity and accuracy in both. Seconds are counted for each phase.

    Args:
        inspect: of the model, ids and each block's sweeps: a dictionary of further figures per block.
        control: train the copy too.
        keep: told of every sweep and epoch; what it holds is not done again.
    """
    other = copy.deepcopy(model) if control else None
    reports = [
        _contexts(model, number, train, validation, first, log, keep) for number in range(len(_blocks(model)))
    ]
    sweeps = [report["sweeps"] for report in reports]
    found = {"trained": {"phase_one": reports}}
    for name, one in (("trained", model), ("untrained", other)):
        if one is None:
            continue

        def logged(row: dict[str, Any], name: str = name) -> None:
            log({"model": name, **row})

        key = "trained" if name == "trained" else "untrained_contexts"
        done = _tokens(one, name, train, validation, second, logged, keep)
        checks = {} if inspect is None else _inspected(one, train, validation, sweeps, inspect)
        found[key] = {**found.get(key, {}), **done, **checks}
    return found


def _blocks(model: Any) -> list[Any]:
    body = model.model
    return list(body.context_blocks) if hasattr(body, "context_blocks") else [body.context_block]


def _finished(keep: PhaseCheckpoints | None, stage: str, name: str, module: Any) -> dict[str, Any] | None:
    """The report of a stage that an earlier run has finished, with ``module`` as it was then."""
    held = None if keep is None else keep.result(stage)
    if held is None:
        return None
    module.load_state_dict(held[name])
    report: dict[str, Any] = held["report"]
    return report


def _contexts(
    model: Any,
    number: int,
    train: Stream,
    validation: Stream,
    config: Phase1Config,
    log: Log,
    keep: PhaseCheckpoints | None,
) -> dict[str, Any]:
    """Phase 1 of one block."""
    block, stage = _blocks(model)[number], f"contexts {number}"
    report = _finished(keep, stage, "block", block)
    if report is not None:
        return report
    state = None if keep is None else keep.begin(stage)
    began = time.perf_counter()
    x, other = (embedded(model, part.ids, block.input_tokens) for part in (train, validation))
    found = train_contexts(
        block,
        x,
        config,
        validation=other,
        log=lambda row: log({"block": number, **row}),
        keep=keep,
        state=state,
    )
    report = {
        "sweeps": found.sweeps,
        "most_sweeps": config.max_iterations,
        "converged": round(found.rate * len(x)),
        "positions": len(x),
        "convergence_rate": found.rate,
        "stopped": found.stopped,
        "seconds": time.perf_counter() - began,
    }
    if keep is not None:
        keep.finish(stage, {"block": block.state_dict(), "report": report})
    return report


def _tokens(
    model: Any,
    name: str,
    train: Stream,
    validation: Stream,
    config: Phase2Config,
    log: Log,
    keep: PhaseCheckpoints | None,
) -> dict[str, Any]:
    """Ranks, caches and phase 2."""
    stage = f"tokens of {name}"
    report = _finished(keep, stage, "model", model)
    if report is not None:
        return report
    state = None if keep is None else keep.begin(stage)
    began = time.perf_counter()
    ranks: dict[str, Any] = {}
    for which, part in zip(_SETS, (train, validation), strict=True):
        ranks[f"{which}_rank"] = [
            effective_rank(exact_contexts(block, embedded(model, part.ids, block.input_tokens)))._asdict()
            for block in _blocks(model)
        ]
    ranked = time.perf_counter()
    cache, other = _cache(model, train), _cache(model, validation)
    cached = time.perf_counter()
    found = train_tokens(model, cache, other, config, log=log, keep=keep, state=state)
    ended = time.perf_counter()
    scores = {which: evaluate(model, one) for which, one in zip(_SETS, (cache, other), strict=True)}
    report = {
        **ranks,
        **scores,
        "best_epoch": found.best_epoch,
        "epochs": config.epochs,
        "loss": found.loss,
        "perplexity": found.perplexity,
        "accuracy": found.accuracy,
        "stopped": found.stopped,
        "rank_seconds": ranked - began,
        "cache_seconds": cached - ranked,
        "phase_two_seconds": ended - cached,
    }
    if keep is not None:
        keep.finish(stage, {"model": model.state_dict(), "report": report})
    return report


def _inspected(
    model: Any, train: Stream, validation: Stream, sweeps: Sequence[int], inspect: Inspect
) -> dict[str, Any]:
    return {
        f"{which}_check": inspect(model, part.ids, sweeps)
        for which, part in zip(_SETS, (train, validation), strict=True)
    }


def _cache(model: Any, stream: Stream) -> PhaseCache:
    if hasattr(model.model, "context_blocks"):
        return SlotCache(model, stream.ids, stream.borders)
    return TokenCache(model, stream.ids)
