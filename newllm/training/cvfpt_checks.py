"""What repetition training must show: its validation suite, single tokens, a pair of updaters.

C context width, E embedding width, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median_low
from typing import Any, NamedTuple

import torch
from torch import Tensor

from newllm.models import ContextLMConfig, ContextLMForCausalLM
from newllm.training.cvfpt import Convergence, measure, repeated, train_phrases
from newllm.training.phase_config import CvfptConfig

Make = Callable[[], ContextLMForCausalLM]
RANDOM = "random sequence"
VOCABULARY = 1000
"""Token ids of the models that are made to be judged."""

_EPOCHS, _REPETITIONS, _INITIAL_STD, _SEEDS = 5, 30, 0.08, 5
_PAIR_TOKENS, _PAIR_EPOCHS = 10, 30


class SuiteRow(NamedTuple):
    """``still``: how far a context moves in a token; ``cycle``: how far it is from itself a phrase ago.

    Both are of the model with the median loss; ``losses`` are all models' in a token, the smallest first.
    """

    still: Convergence
    cycle: Convergence
    losses: tuple[float, ...]


def small_model(
    vocabulary: int, *, cell: str = "gated", seed: int = 42, **fields: Any
) -> ContextLMForCausalLM:
    """A model of the validation suite's size: C 128, E 128, H 256, two layers, no dropout.

    ``fields`` are other fields of ``ContextLMConfig``.
    """
    torch.manual_seed(seed)
    sizes = {"context_dim": 128, "embed_dim": 128, "hidden_dim": 256, "num_hidden_layers": 2}
    config = {**sizes, "dropout": 0.0, "embed_norm": True, **fields}
    return ContextLMForCausalLM(ContextLMConfig(vocab_size=vocabulary, cell=cell, **config))


def suite_patterns(vocabulary: int, repetitions: int, seed: int = 42) -> dict[str, list[int]]:
    """The validation suite's phrases of one, two and three ids, and a random sequence.

    Raises ``ValueError`` for a vocabulary below 6.
    """
    if vocabulary < 6:
        raise ValueError(f"vocabulary must be at least 6, got {vocabulary}")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(vocabulary, generator=generator)[:6].tolist()
    drawn = torch.randint(vocabulary, (3 * repetitions,), generator=generator).tolist()
    return {"single token": ids[:1], "2-gram": ids[1:3], "3-gram": ids[3:6], RANDOM: drawn}


def validation_suite(
    vocabulary: int = VOCABULARY,
    *,
    cell: str = "gated",
    seed: int = 42,
    seeds: int = _SEEDS,
    epochs: int = _EPOCHS,
    repetitions: int = _REPETITIONS,
    initializer_range: float = _INITIAL_STD,
) -> dict[str, SuiteRow]:
    """Train fresh models to stand still on each repeated phrase, with a step an epoch, and measure them.

    What the updaters differ in is how fast they learn it, so the steps are few, and one model's figures move
    by more than the updaters differ: the median over ``seeds`` models from ``seed`` on counts. The random
    sequence is read by all models of a seed and the lowest figure counts: a context that never moves would be
    still there too.
    """
    config = CvfptConfig(repetitions=repetitions, batch_size=1)
    patterns = suite_patterns(vocabulary, repetitions)
    drawn = torch.tensor(patterns.pop(RANDOM))
    found: dict[str, list[tuple[Convergence, Convergence]]] = {name: [] for name in (*patterns, RANDOM)}
    for each in range(seed, seed + seeds):
        moved = []
        for name, phrase in patterns.items():
            model = small_model(vocabulary, cell=cell, seed=each, initializer_range=initializer_range)
            optimizer = torch.optim.Adam(model.parameters(), config.learning_rate)
            train_phrases(model, [phrase], config, optimizer, epochs, cycle=1)
            ids = repeated(phrase, repetitions, config.max_length)
            found[name].append((measure(model, ids, 1), measure(model, ids, len(phrase))))
            moved.append(measure(model, drawn, 1))
        found[RANDOM].append((min(moved), min(moved)))
    return {
        name: SuiteRow(*median_low(sorted(rows)), tuple(sorted(still.loss for still, _ in rows)))
        for name, rows in found.items()
    }


def verdict(found: dict[str, SuiteRow]) -> bool:
    """Whether contexts stand still on every repeated phrase, and not on the random sequence."""
    return all(row.still.converged == (name != RANDOM) for name, row in found.items())


def updater_pair(cell: str, *, seed: int = 42) -> tuple[ContextLMForCausalLM, Tensor]:
    """A model of 1000 ids that has read ten of them again and again, and 50 ids that it has not: ``[50]``.

    Its embeddings are small and have no layer norm: behind one, neither updater loses the tokens. C and E are
    256, H 1024, one layer.
    """
    model = small_model(
        VOCABULARY, cell=cell, seed=seed, context_dim=256, embed_dim=256, hidden_dim=1024,
        num_hidden_layers=1, embed_norm=False, initializer_range=0.01,
    )  # fmt: skip
    config = CvfptConfig(repetitions=10, token_weight=0.05)
    optimizer = torch.optim.Adam(model.parameters(), config.learning_rate)
    train_phrases(model, [[token] for token in range(_PAIR_TOKENS)], config, optimizer, _PAIR_EPOCHS)
    others = torch.randperm(VOCABULARY - _PAIR_TOKENS, generator=torch.Generator().manual_seed(42))[:50]
    return model, others + _PAIR_TOKENS


def top_k(
    make_model: Make,
    tokens: Sequence[int],
    config: CvfptConfig,
    *,
    epochs: int = 10,
    fair: bool = True,
) -> dict[str, Any]:
    """Convergence of single tokens: ``fair`` is one model for all in turns, otherwise a new one for each.

    Returns what ``cvfpt_performance_topk_fair.json`` holds: per token the curve of losses and the figures
    before and after.
    """
    groups = [list(tokens)] if fair else [[token] for token in tokens]
    rows: list[dict[str, Any]] = []
    for group in groups:
        model = make_model()
        optimizer = torch.optim.Adam(model.parameters(), config.learning_rate)
        ids = {token: repeated([token], config.repetitions, config.max_length) for token in group}
        curves = {token: [measure(model, ids[token], 1)] for token in group}
        for _ in range(epochs):
            for token in group:
                train_phrases(model, [[token]], config, optimizer, 1)
            for token in group:
                curves[token].append(measure(model, ids[token], 1))
        rows += [_curve(token, curve) for token, curve in curves.items()]
    return {
        "mode": "fair" if fair else "biased",
        "epochs": epochs,
        "converged": sum(row["converged"] for row in rows),
        "tokens": rows,
    }


def _curve(token: int, curve: list[Convergence]) -> dict[str, Any]:
    first, last = curve[0], curve[-1]
    return {
        "token": token,
        "initial_loss": first.loss,
        "final_loss": last.loss,
        "improvement": first.loss - last.loss,
        "initial_change": first.change,
        "final_change": last.change,
        "converged": last.converged,
        "losses": [one.loss for one in curve],
    }
