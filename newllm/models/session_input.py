"""What a session can be given to read, as rows of token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Characters that are tokenized together when a text comes in pieces.
_PIECE = 2**16

Row = str | Sequence[int] | Tensor
Input = Row | Sequence[Row]


def token_rows(
    text: Input, tokenizer: PreTrainedTokenizerBase | None, batch_size: int, vocab_size: int
) -> list[Tensor]:
    """``batch_size`` rows of ids ``[T]`` int64 on the CPU, from one row or several.

    Raises ``ValueError`` for another number of rows, ids outside the vocabulary, text without a tokenizer or
    with half characters, ``TypeError`` for what is neither text nor ids.
    """
    rows = _rows(text)
    if len(rows) != batch_size:
        raise ValueError(f"text must hold {batch_size} rows, one per stream, got {len(rows)}")
    return [_ids(row, tokenizer, vocab_size - 1) for row in rows]


def _rows(text: Any) -> list[Row]:
    if hasattr(text, "__array__"):
        ids = torch.as_tensor(text)
        return list(ids if ids.ndim > 1 else ids[None])
    listed = isinstance(text, Sequence) and not isinstance(text, bytes | bytearray)
    if listed and (isinstance(text, str) or len(text) == 0 or isinstance(text[0], Integral)):
        return [cast("Row", text)]
    if listed and (isinstance(text[0], Sequence) or hasattr(text[0], "__array__")):
        return list(text)
    got = f"a list of {type(text[0]).__name__}" if listed else type(text).__name__
    hint = ": give its input_ids" if isinstance(text, Mapping) and "input_ids" in text else ""
    raise TypeError(f"text must be a string, token ids, or one of either per row, got {got}{hint}")


def pieces(text: Iterator[str]) -> Iterator[str]:
    """The strings of ``text``, small ones joined.

    Raises ``TypeError`` for anything else among them.
    """
    held: list[str] = []
    length = 0
    for part in text:
        if not isinstance(part, str):
            raise TypeError(f"text must come in strings, got {type(part).__name__}")
        held.append(part)
        length += len(part)
        if length >= _PIECE:
            yield "".join(held)
            held, length = [], 0
    yield "".join(held)


def _ids(row: Row, tokenizer: PreTrainedTokenizerBase | None, last: int) -> Tensor:
    if not isinstance(row, str):
        ids = _numbers(row)
    elif tokenizer is None:
        raise ValueError("tokenizer must be given to read text, got None; token ids need none")
    else:
        _check_characters(row)
        words = tokenizer(row, add_special_tokens=False, verbose=False)
        ids = torch.tensor(words["input_ids"], dtype=torch.int64)
    if ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high > last:
            raise ValueError(f"token ids must lie between 0 and {last}, got {low} to {high}")
    return ids


def _numbers(row: Any) -> Tensor:
    if not hasattr(row, "__array__"):
        for kind in {type(number) for number in row}:
            if not issubclass(kind, Integral | Tensor):
                raise TypeError(f"token ids must be whole numbers, got {kind.__name__}")
        row = torch.as_tensor(row, dtype=torch.int64)
    ids = torch.as_tensor(row)
    if ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"token ids must be whole numbers, got {ids.dtype}")
    if ids.ndim != 1:
        raise ValueError(f"token ids must be of shape [T] in each row, got {list(ids.shape)}")
    return ids.to("cpu", torch.int64)


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = error.start
        raise ValueError(f"text must be of whole characters, got {text[place]!r} at {place}") from None
