"""The passkey task at token level: a key early in real text, asked for at its end.

Sizes: N tokens of filler, B samples, K digits of the key.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from newllm.data.tokenizer import KEY_TOKEN, QUESTION_TOKEN, byte_ids, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIGITS = "0123456789"
_MASK = "#"  # stands in the filler where digits stood, so that the only digits are the key's


class PasskeyTask(NamedTuple):
    """What the samples are made of, all as token ids.

    ``filler [N]`` (int64) is real text without any of ``symbols``, the ten digits. The needle is
    ``prefix``, ``key_length`` digits, ``suffix``; ``question`` ends the prompt.
    """

    filler: Tensor
    prefix: tuple[int, ...]
    question: tuple[int, ...]
    symbols: tuple[int, ...]
    key_length: int
    suffix: tuple[int, ...] = ()

    @property
    def needle_length(self) -> int:
        """Tokens in the needle."""
        return len(self.prefix) + self.key_length + len(self.suffix)

    def last_start(self, length: int, reach: int = 0) -> int:
        """The last place of the needle's first token in a prompt of ``length`` tokens.

        ``reach`` is how many tokens back the question can see without memory (layers * window):
        no needle token comes that near. Raises ValueError where nothing fits.
        """
        last = length - len(self.question) - self.needle_length - reach
        if last < 0:
            raise ValueError(
                f"length {length} is too short for a passkey prompt: needle ({self.needle_length}), "
                f"question ({len(self.question)}) and reach ({reach}) need at least {length - last} tokens"
            )
        return last


class PasskeyBatch(NamedTuple):
    """``input_ids [B, length + K - 1]``, ``answers [B, K]`` and ``key_start [B]``, all int64.

    The inputs are the prompt and the answer but its last token, so the last K logits predict
    ``answers``: all of them right under argmax is the same as greedy decoding being right.
    ``key_start`` is the place of the needle's first token, ``needle_length`` its size.
    """

    input_ids: Tensor
    answers: Tensor
    key_start: Tensor
    needle_length: int

    def needle_segments(self, segment: int) -> Tensor:
        """Which segments hold a piece of the needle: bool ``[B, ceil(tokens / segment)]``."""
        first = torch.arange(0, self.input_ids.shape[1], segment, device=self.input_ids.device)
        start = self.key_start[:, None]
        return (first < start + self.needle_length) & (first + segment > start)


def batch(
    task: PasskeyTask,
    *,
    length: int,
    samples: int,
    generator: torch.Generator,
    depth: float | Tensor | None = None,
    reach: int = 0,
) -> PasskeyBatch:
    """``samples`` prompts of exactly ``length`` tokens, with their answers.

    ``depth`` d in [0, 1] puts the needle's first token at round(d * (length - question - needle -
    reach)), ``reach`` being layers * window: every depth lies beyond what stacked windows can see.
    An int64 tensor ``[B]`` gives the places themselves, ``None`` draws them uniformly. The filler
    is read in a circle from a random place. Raises ValueError for a prompt too short or a depth
    outside its range.
    """
    last = task.last_start(length, reach)
    if depth is None:
        start = _integers(last + 1, samples, generator)
    elif isinstance(depth, Tensor):
        start = _checked_places(depth, samples, last)
    elif 0 <= depth <= 1:
        start = torch.full((samples,), round(depth * last))
    else:
        raise ValueError(f"depth is {depth}, expected a number from 0 to 1")
    return _compose(task, length, start, generator)


def training_batch(
    task: PasskeyTask,
    *,
    length: int,
    samples: int,
    segment: int,
    generator: torch.Generator,
    edge: float = 0.15,
    straddle: float = 0.15,
    near: float = 0.0,
) -> PasskeyBatch:
    """``samples`` prompts of ``length`` tokens with the needle anywhere before the question.

    A share ``edge`` of the samples has it at the very first token, a share ``straddle`` across a
    border of ``segment`` tokens, and a share ``near`` within two segments of the question, the nearer
    the likelier: chance alone shows a model too few of any. Raises ValueError for shares that exceed
    one together, and where no border can be crossed.
    """
    if min(edge, straddle, near) < 0 or edge + straddle + near > 1:
        raise ValueError(
            f"edge {edge}, straddle {straddle} and near {near} must be shares that sum to at most 1"
        )
    last = task.last_start(length)
    start = _integers(last + 1, samples, generator)
    lot = torch.rand(samples, generator=generator, device=generator.device)
    start = torch.where(lot < edge, 0, start)
    if straddle > 0:
        crossing = _crossing_places(task.needle_length, last, segment).to(start.device)
        chosen = crossing[_integers(len(crossing), samples, generator)]
        start = torch.where((lot >= edge) & (lot < edge + straddle), chosen, start)
    if near > 0:
        distance = _log_uniform(2 * segment, samples, generator)
        start = torch.where(lot >= 1 - near, (last - distance).clamp(min=0), start)
    return _compose(task, length, start, generator)


def byte_passkey(text: str, key_length: int = 3) -> PasskeyTask:
    """The task for :func:`newllm.data.tokenizer.byte_tokenizer`: one marker token before the key, one to ask.

    Digits of ``text`` are replaced by ``#``. Raises ValueError for an empty text or ``key_length`` < 1.
    """
    return _checked(
        PasskeyTask(
            filler=byte_ids(_without_digits(text)),
            prefix=(KEY_TOKEN,),
            question=(QUESTION_TOKEN,),
            symbols=tuple(DIGITS.encode()),
            key_length=key_length,
        )
    )


def text_passkey(tokenizer: PreTrainedTokenizerBase, text: str, key_length: int = 5) -> PasskeyTask:
    """The task in English sentences for ``tokenizer``, which must give each digit a token of its own.

    Digits of ``text`` are replaced by ``#``. Raises ValueError for a tokenizer that joins digits
    (or a digit with its neighbour), an empty text or ``key_length`` < 1.
    """
    before, after = "\nThe pass key is ", ". Remember it.\n"
    prefix = _ids(tokenizer, before)
    symbols = _ids(tokenizer, before + DIGITS)[len(prefix) :]
    suffix = _ids(tokenizer, before + DIGITS + after)[len(prefix) + len(DIGITS) :]
    mirrored = _ids(tokenizer, before + DIGITS[::-1] + after)
    if len(set(symbols)) != len(DIGITS) or mirrored != prefix + symbols[::-1] + suffix:
        raise ValueError(f"tokenizer must give each digit its own token, but {DIGITS!r} became {symbols}")
    return _checked(
        PasskeyTask(
            filler=encode(tokenizer, _without_digits(text)),
            prefix=prefix,
            question=_ids(tokenizer, "\nWhat is the pass key? The pass key is "),
            symbols=symbols,
            key_length=key_length,
            suffix=suffix,
        )
    )


def _compose(task: PasskeyTask, length: int, start: Tensor, generator: torch.Generator) -> PasskeyBatch:
    """Filler around the needle at ``start [B]``, then question and answer."""
    device, samples = task.filler.device, len(start)
    start = start.to(device)
    symbols = torch.tensor(task.symbols, device=device)
    answers = symbols[_integers(len(symbols), (samples, task.key_length), generator).to(device)]
    needle = torch.cat([_rows(task.prefix, answers), answers, _rows(task.suffix, answers)], 1)
    tail = torch.cat([_rows(task.question, answers), answers[:, :-1]], 1)

    place = torch.arange(length - len(task.question), device=device)
    text = place - task.needle_length * (place >= start[:, None] + task.needle_length)
    offset = _integers(len(task.filler), (samples, 1), generator).to(device)
    body = task.filler[(offset + text) % len(task.filler)]
    body.scatter_(1, start[:, None] + torch.arange(task.needle_length, device=device), needle)
    return PasskeyBatch(torch.cat([body, tail], 1), answers, start, task.needle_length)


def _rows(ids: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=like.device).expand(like.shape[0], -1)


def _integers(high: int, shape: int | tuple[int, ...], generator: torch.Generator) -> Tensor:
    size = (shape,) if isinstance(shape, int) else shape
    return torch.randint(high, size, generator=generator, device=generator.device)


def _log_uniform(high: int, samples: int, generator: torch.Generator) -> Tensor:
    """Numbers n from 0 to ``high - 2``, each octave of n + 1 as likely as the next."""
    lot = torch.rand(samples, generator=generator, device=generator.device, dtype=torch.float64)
    return (high**lot).long() - 1


def _crossing_places(needle_length: int, last: int, segment: int) -> Tensor:
    """All places from 0 to ``last`` from which a needle crosses a segment border."""
    start = torch.arange(last + 1)
    crossing = start[start // segment != (start + needle_length - 1) // segment]
    if len(crossing) == 0:
        raise ValueError(
            f"straddle needs a segment border to cross: a needle of {needle_length} tokens that begins "
            f"at most at {last} crosses none with segment {segment}"
        )
    return crossing


def _checked_places(places: Tensor, samples: int, last: int) -> Tensor:
    if places.dtype != torch.int64 or places.shape != (samples,):
        raise ValueError(
            f"depth is a {places.dtype} tensor {list(places.shape)}, expected torch.int64 [{samples}]"
        )
    if ((places < 0) | (places > last)).any():
        raise ValueError(f"depth holds places outside 0 to {last}")
    return places


def _checked(task: PasskeyTask) -> PasskeyTask:
    if task.key_length < 1:
        raise ValueError(f"key_length is {task.key_length}, expected at least 1")
    if len(task.filler) == 0:
        raise ValueError("text is empty, expected some words to hide the key in")
    if torch.isin(task.filler, torch.tensor(task.symbols)).any():
        raise ValueError("text holds digit tokens although its digits were replaced")
    return task


def _without_digits(text: str) -> str:
    return re.sub("[0-9]", _MASK, text)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(encode(tokenizer, text).tolist())
