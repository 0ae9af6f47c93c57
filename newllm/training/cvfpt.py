"""CVFPT: phrases repeated until the context repeats with them.

A phrase is a row of token ids; its cycle length k is their number, whatever words they spell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from newllm.models import ContextLMConfig, ContextLMForCausalLM

CONVERGED = 0.01
"""A phrase has converged when its convergence loss is below this."""

_ADJECTIVES = ("red", "big", "old", "hot", "new")
_NOUNS = ("cat", "dog", "sun", "car", "book")
_VERBS = ("runs", "sees", "likes")
_WORDS = (*_ADJECTIVES, *_NOUNS, *_VERBS)
_PHRASES = 10


@dataclass
class CvfptConfig:
    """How repetitions are trained.

    Args:
        max_stage: stages, of as many words a phrase.
        epochs_per_stage: passes over a stage's phrases.
        repetitions: of a phrase in a sequence.
        max_length: tokens of a sequence at most.
        batch_size: sequences of a batch.
        learning_rate: of Adam.
        convergence_weight: of the distance of contexts one cycle apart.
        token_weight: of the next token's loss. At 0 a context that never moves is a solution.
        gradient_clip: largest norm of gradients.
        seed: of weights and order.
    """

    max_stage: int = 3
    epochs_per_stage: int = 10
    repetitions: int = 100
    max_length: int = 512
    batch_size: int = 8
    learning_rate: float = 1e-3
    convergence_weight: float = 1.0
    token_weight: float = 0.01
    gradient_clip: float = 1.0
    seed: int = 42

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for values out of range, and for a token weight that lets contexts die."""
        if self.token_weight <= 0:
            raise ValueError(
                f"token_weight must be above 0, got {self.token_weight}: without the next token's loss a "
                "context that never moves is a solution"
            )
        if self.repetitions < 2 or self.batch_size < 1 or self.max_stage < 1 or self.epochs_per_stage < 1:
            raise ValueError(
                "repetitions must be at least 2, batch_size, max_stage and epochs_per_stage at least 1"
            )


class Convergence(NamedTuple):
    """``loss`` is the mean squared distance of contexts a cycle apart, ``distance`` its norm's mean.

    ``change`` is the mean norm of what a single token changes.
    """

    loss: float
    distance: float
    change: float

    @property
    def converged(self) -> bool:
        """Whether the loss is below 0.01."""
        return self.loss < CONVERGED


def stage_texts(stage: int) -> list[str]:
    """Up to ten phrases of ``stage`` words; raises ``ValueError`` for a stage below 1."""
    if stage < 1:
        raise ValueError(f"stage must be at least 1, got {stage}")
    if stage == 1:
        return list(_WORDS[:_PHRASES])
    if stage == 2:
        return [" ".join(pair) for pair in product(_ADJECTIVES, _NOUNS)][:_PHRASES]
    if stage == 3:
        return [" ".join(words) for words in product(_ADJECTIVES[:3], _NOUNS[:3], _VERBS)][:_PHRASES]
    doubled = _WORDS * (1 + stage // len(_WORDS))
    return [" ".join(doubled[start : start + stage]) for start in range(_PHRASES)]


def stage_phrases(tokenizer: Any, stages: int) -> list[list[list[int]]]:
    """The ids of every stage's phrases; a phrase after the first begins as inside a text, with its space."""
    return [
        [tokenizer.encode(f" {text}", add_special_tokens=False) for text in stage_texts(stage)]
        for stage in range(1, stages + 1)
    ]


def repeated(phrase: Sequence[int], repetitions: int, max_length: int) -> Tensor:
    """``phrase`` as often as asked, cut to ``max_length``: ``[T]``.

    Raises ``ValueError`` for an empty phrase, or one that does not fit twice.
    """
    if not phrase or 2 * len(phrase) > max_length:
        raise ValueError(
            f"phrase must hold between 1 and {max_length // 2} ids to repeat in {max_length}, "
            f"got {len(phrase)}"
        )
    return torch.tensor(list(phrase) * repetitions)[:max_length]


def cycle_loss(contexts: Tensor, cycle: int) -> Tensor:
    """Mean squared distance of ``contexts [T, C]`` ``cycle`` apart; ``ValueError`` for T too small."""
    if not 1 <= cycle < len(contexts):
        raise ValueError(f"cycle must be between 1 and {len(contexts) - 1}, got {cycle}")
    return F.mse_loss(contexts[cycle:], contexts[:-cycle])


@torch.no_grad()
def measure(model: ContextLMForCausalLM, ids: Tensor, cycle: int) -> Convergence:
    """How periodic the contexts of ``ids [T]`` are, from a zero context."""
    model.eval()
    contexts = model.model(ids[None].to(model.device), use_cache=False).contexts[0]
    apart = (contexts[cycle:] - contexts[:-cycle]).norm(dim=-1).mean()
    moved = contexts.diff(dim=0).norm(dim=-1).mean()
    return Convergence(cycle_loss(contexts, cycle).item(), apart.item(), moved.item())


def train_phrases(
    model: ContextLMForCausalLM,
    phrases: Sequence[Sequence[int]],
    config: CvfptConfig,
    optimizer: torch.optim.Optimizer,
    epochs: int,
) -> list[dict[str, float]]:
    """Train on repetitions of ``phrases`` (rows of ids); losses of every epoch.

    Raises ``RuntimeError`` for a loss that is not finite.
    """
    rows = [repeated(phrase, config.repetitions, config.max_length) for phrase in phrases]
    history = []
    for epoch in range(1, epochs + 1):
        model.train()
        sums = torch.zeros(2)
        for start in range(0, len(rows), config.batch_size):
            part = range(start, min(start + config.batch_size, len(rows)))
            near, tokens = _losses(model, [rows[i] for i in part], [len(phrases[i]) for i in part])
            loss = config.convergence_weight * near + config.token_weight * tokens
            if not torch.isfinite(loss):
                raise RuntimeError(f"the loss of epoch {epoch} is {loss.item()}")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
            optimizer.step()
            sums += len(part) * torch.stack([near.detach(), tokens.detach()]).cpu()
        convergence, token = (sums / len(rows)).tolist()
        history.append({"epoch": epoch, "convergence_loss": convergence, "token_loss": token})
    return history


def _losses(model: ContextLMForCausalLM, rows: list[Tensor], cycles: list[int]) -> tuple[Tensor, Tensor]:
    """Mean convergence and token losses of rows of any lengths."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100).to(model.device)
    inside = ids.clamp(min=0)
    outputs = model(inside, labels=ids, use_cache=False)
    near = [
        cycle_loss(contexts[: len(row)], cycle)
        for contexts, row, cycle in zip(outputs.contexts, rows, cycles, strict=True)
    ]
    return torch.stack(near).mean(), outputs.token_loss


def train_repetition(
    model: ContextLMForCausalLM,
    stages: Sequence[Sequence[Sequence[int]]],
    config: CvfptConfig,
    *,
    log: Callable[[dict[str, Any]], None] | None = None,
    after_stage: Callable[[int, list[Convergence]], None] | None = None,
) -> list[list[Convergence]]:
    """Train stage after stage with one model and one optimiser; each phrase's figures per stage."""
    optimizer = torch.optim.Adam(model.parameters(), config.learning_rate)
    found = []
    for stage, phrases in enumerate(stages, 1):
        for row in train_phrases(model, phrases, config, optimizer, config.epochs_per_stage):
            if log is not None:
                log({"stage": stage, **row})
        found.append(
            [
                measure(model, repeated(phrase, config.repetitions, config.max_length), len(phrase))
                for phrase in phrases
            ]
        )
        if after_stage is not None:
            after_stage(stage, found[-1])
    return found


def suite_patterns(vocabulary: int, repetitions: int, seed: int = 42) -> dict[str, tuple[list[int], int]]:
    """The validation suite: name -> ids and cycle: one token, two, three, and a random sequence (cycle 1)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(vocabulary, generator=generator)[:6].tolist()
    drawn = torch.randint(vocabulary, (3 * repetitions,), generator=generator).tolist()
    return {
        "single token": (ids[:1] * repetitions, 1),
        "random sequence": (drawn, 1),
        "2-gram": (ids[1:3] * repetitions, 2),
        "3-gram": (ids[3:6] * repetitions, 3),
    }


def validation_suite(
    make_model: Callable[[], ContextLMForCausalLM], config: CvfptConfig, *, epochs: int = 10
) -> dict[str, Convergence]:
    """Train a fresh model on each pattern of :func:`suite_patterns`, with a step an epoch.

    Repeated patterns should end below 0.01, the random sequence above it: a context that never moves would
    pass the first and fail the last.
    """
    found = {}
    for name, (row, cycle) in suite_patterns(make_model().config.vocab_size, config.repetitions).items():
        model = make_model()
        optimizer = torch.optim.Adam(model.parameters(), config.learning_rate)
        ids = torch.tensor(row)[: config.max_length]
        for _ in range(epochs):
            near, tokens = _losses(model, [ids], [cycle])
            optimizer.zero_grad()
            (config.convergence_weight * near + config.token_weight * tokens).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
            optimizer.step()
        found[name] = measure(model, ids, cycle)
    return found


def verdict(found: dict[str, Convergence]) -> bool:
    """Whether every repeated pattern converged and the random sequence did not."""
    return all(one.converged == (name != "random sequence") for name, one in found.items())


def top_k(
    make_model: Callable[[], ContextLMForCausalLM],
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


def small_model(
    vocabulary: int, *, cell: str = "gated", seed: int = 42, **sizes: Any
) -> ContextLMForCausalLM:
    """A model of the validation suite's size: C 128, E 128, H 256, two layers, no dropout."""
    torch.manual_seed(seed)
    fields = {"context_dim": 128, "embed_dim": 128, "hidden_dim": 256, "num_hidden_layers": 2, **sizes}
    return ContextLMForCausalLM(
        ContextLMConfig(vocab_size=vocabulary, cell=cell, dropout=0.0, embed_norm=True, **fields)
    )
