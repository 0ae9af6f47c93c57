"""How the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RECENT_TOKENS = 50


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 takes the likeliest token; otherwise the best ``top_k``, the likeliest ``top_p``.

    ``repetition_penalty`` (1 is none) makes the last 50 tokens less likely (arXiv 1909.05858).

    Raises:
        ValueError: for values out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, value, allowed, ok in (
            ("temperature", self.temperature, "0 or more", self.temperature >= 0),
            ("top_k", self.top_k, "1 or more", self.top_k is None or self.top_k >= 1),
            ("top_p", self.top_p, "above 0 and at most 1", self.top_p is None or 0 < self.top_p <= 1),
            ("repetition_penalty", self.repetition_penalty, "above 0", self.repetition_penalty > 0),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value}")


def generator(seed: int | None, device: torch.device) -> torch.Generator:
    """A source of random numbers on ``device``, another one each time when ``seed`` is None."""
    made = torch.Generator(device)
    if seed is None:
        made.seed()
    else:
        made.manual_seed(seed)
    return made


def next_token(
    logits: Tensor, recent: Tensor, sampling: Sampling, generator: torch.Generator | None = None
) -> Tensor:
    """Tokens ``[B]`` int64 from ``logits [B, vocabulary]`` of float32 or more.

    ``recent [B, N]`` are the last tokens read, -1 standing for none.
    """
    from transformers import generation

    scores = _penalised(logits, recent, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return scores.argmax(-1)
    steps = generation.LogitsProcessorList([generation.TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k is not None:
        steps.append(generation.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        steps.append(generation.TopPLogitsWarper(sampling.top_p))
    return torch.multinomial(steps(recent, scores).softmax(-1), 1, generator=generator)[:, 0]


def _penalised(logits: Tensor, recent: Tensor, penalty: float) -> Tensor:
    if penalty == 1.0:
        return logits
    # One column more than the vocabulary takes the places where nothing was said yet.
    used = torch.zeros(len(logits), logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
    used = used.scatter(1, recent % used.shape[1], True)[:, :-1]
    return torch.where(used, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
