"""How the next token is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from newllm.ops.checks import whole

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
        if self.top_k is not None:
            whole("top_k", self.top_k)
        for name, value, allowed, ok in (
            ("temperature", self.temperature, "0 or more", self.temperature >= 0),
            ("top_k", self.top_k, "1 or more", self.top_k is None or self.top_k >= 1),
            ("top_p", self.top_p, "above 0 and at most 1", self.top_p is None or 0 < self.top_p <= 1),
            ("repetition_penalty", self.repetition_penalty, "above 0", self.repetition_penalty > 0),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value}")


class Controls(NamedTuple):
    """``Sampling`` of each row as tensors ``[B]``; see ``controls``."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    repetition_penalty: Tensor


def controls(rows: Sequence[Sampling], like: Tensor) -> Controls:
    """The tensors of ``rows``, in the dtype and on the device of ``like``."""
    most = torch.iinfo(torch.int64).max
    columns = (
        [row.temperature for row in rows],
        [most if row.top_k is None else row.top_k for row in rows],
        [1.0 if row.top_p is None else row.top_p for row in rows],
        [row.repetition_penalty for row in rows],
    )
    dtypes = (like.dtype, torch.int64, like.dtype, like.dtype)
    return Controls(*(torch.tensor(c, dtype=d).to(like.device) for c, d in zip(columns, dtypes, strict=True)))


def generator(seed: int | None, device: torch.device) -> torch.Generator:
    """A source of random numbers on ``device``, another one each time when ``seed`` is None."""
    made = torch.Generator(device)
    if seed is None:
        made.seed()
    else:
        made.manual_seed(seed)
    return made


def ends_of(model: Any) -> Tensor:
    """The end-of-text tokens ``[E]`` of ``model``, on its device; none of one that names none."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return torch.tensor(ends, dtype=torch.int64, device=model.device)


class Chooser:
    """How ``rows`` tokens are chosen by one ``sampling``; random numbers come from ``generator``.

    What it needs is made ahead, and numbers are drawn apart: a CUDA graph can do neither.
    """

    def __init__(
        self, sampling: Sampling, rows: int, like: Tensor, generator: torch.Generator | None = None
    ) -> None:
        self.sampling = sampling
        self._controls = controls([sampling] * rows, like)
        self._generator, self._dtype, self._device = generator, like.dtype, like.device

    def draw(self) -> tuple[Tensor, ...]:
        """Numbers ``[B]`` in [0, 1) for the next call, none where nothing is left to chance."""
        if self.sampling.temperature == 0:
            return ()
        device = self._device if self._generator is None else self._generator.device
        uniform = torch.rand(len(self._controls.temperature), generator=self._generator, device=device)
        # Without waiting for the step that the device is at.
        return (uniform.to(self._device, self._dtype, non_blocking=True),)

    def __call__(self, logits: Tensor, recent: Tensor, *drawn: Tensor) -> Tensor:
        """Tokens ``[B]`` int64 from ``logits [B, vocabulary]`` of float32 or more.

        ``recent [B, N]`` are the last tokens read, -1 standing for none; ``drawn`` is what ``draw`` gave.
        """
        if self.sampling.temperature > 0:
            (uniform,) = drawn
            return choose(logits, recent, self._controls, uniform)
        if self.sampling.repetition_penalty != 1:
            logits = penalised(logits, recent, self._controls.repetition_penalty)
        return logits.argmax(-1)


def choose(logits: Tensor, recent: Tensor, controls: Controls, uniform: Tensor) -> Tensor:
    """Tokens ``[B]`` int64, each row by its own controls and its own number of ``uniform [B]`` in [0, 1).

    Of the tokens in order of their probability, the one at which the cumulative probability passes
    ``uniform``; so a row's choice does not depend on its mates.
    """
    scores = penalised(logits, recent, controls.repetition_penalty)
    greedy = scores.argmax(-1)
    # No scalar in torch.where, which copies it from the host: a graph cannot.
    heat = controls.temperature.masked_fill(controls.temperature == 0, 1)[:, None]
    values, order = (scores / heat).sort(descending=True, stable=True)
    ranks = torch.arange(values.shape[1], device=values.device)
    shares = values.masked_fill(ranks >= controls.top_k[:, None], -torch.inf).softmax(-1)
    before = shares.cumsum(-1) - shares
    # The first always stays.
    kept = (before < controls.top_p[:, None]) | (ranks == 0)
    mass = shares.masked_fill(~kept, 0).cumsum(-1)
    place = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True)
    # Rounding may put the drawn number on the total: the last token that has a share is meant.
    place = torch.minimum(place, (mass < mass[:, -1:]).sum(1, keepdim=True))
    return torch.where(controls.temperature > 0, order.gather(1, place)[:, 0], greedy)


def penalised(logits: Tensor, recent: Tensor, penalty: Tensor) -> Tensor:
    """``logits`` with ``recent [B, N]`` tokens made less likely by ``penalty [B]``."""
    # One column more than the vocabulary takes the places where nothing was said yet.
    used = torch.zeros(len(logits), logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
    used = used.scatter(1, recent % used.shape[1], True)[:, :-1]
    factor = penalty[:, None]
    return torch.where(used, torch.where(logits > 0, logits / factor, logits * factor), logits)
