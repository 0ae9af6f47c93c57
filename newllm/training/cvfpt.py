"""CVFPT: phrases repeated until the context repeats with them.

A phrase is a row of token ids; its cycle length k is their number, whatever words they spell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from newllm.models import ContextLMForCausalLM
from newllm.training.phase_config import CvfptConfig

CONVERGED = 0.01
"""A phrase has converged when its convergence loss is below this."""

_ADJECTIVES = ("red", "big", "old", "hot", "new")
_NOUNS = ("cat", "dog", "sun", "car", "book")
_VERBS = ("runs", "sees", "likes")
_WORDS = (*_ADJECTIVES, *_NOUNS, *_VERBS)
_PHRASES = 10


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
    *,
    cycle: int | None = None,
) -> list[dict[str, float]]:
    """Train on repetitions of ``phrases`` (rows of ids); losses of every epoch.

    Contexts are compared one phrase apart, or ``cycle`` tokens apart: 1 is the documents' stability loss.

    Raises ``RuntimeError`` for a loss or a gradient that is not finite.
    """
    rows = [repeated(phrase, config.repetitions, config.max_length) for phrase in phrases]
    history = []
    for epoch in range(1, epochs + 1):
        model.train()
        sums = torch.zeros(2)
        for start in range(0, len(rows), config.batch_size):
            part = range(start, min(start + config.batch_size, len(rows)))
            cycles = [cycle or len(phrases[i]) for i in part]
            near, tokens = losses(model, [rows[i] for i in part], cycles)
            loss = config.convergence_weight * near + config.token_weight * tokens
            if not torch.isfinite(loss):
                raise RuntimeError(f"the loss of epoch {epoch} is {loss.item()}")
            _step(model, loss, optimizer, config.gradient_clip, epoch)
            sums += len(part) * torch.stack([near.detach(), tokens.detach()]).cpu()
        convergence, token = (sums / len(rows)).tolist()
        history.append({"epoch": epoch, "convergence_loss": convergence, "token_loss": token})
    return history


def _step(
    model: ContextLMForCausalLM, loss: Tensor, optimizer: torch.optim.Optimizer, clip: float, epoch: int
) -> None:
    """One clipped step.

    A norm that overflows would clip every gradient to zero, and the model would stand still unnoticed.
    """
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    if not torch.isfinite(norm):
        raise RuntimeError(f"the norm of the gradients of epoch {epoch} is {norm.item()}")
    optimizer.step()


def losses(model: ContextLMForCausalLM, rows: list[Tensor], cycles: list[int]) -> tuple[Tensor, Tensor]:
    """Mean convergence and token losses of rows ``[T]`` of any lengths, each with its cycle."""
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
