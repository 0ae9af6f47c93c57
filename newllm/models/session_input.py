"""What a session can be given to read, as rows of token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

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

    Raises ``ValueError`` for another number of rows, ids outside the vocabulary, or text without a tokenizer.
    """
    if isinstance(text, str) or len(text) == 0 or isinstance(text[0], int):
        rows: list[Row] = [cast("Row", text)]
    elif isinstance(text, Tensor):
        rows = list(text if text.ndim == 2 else text[None])
    else:
        rows = list(cast("Sequence[Row]", text))
    if len(rows) != batch_size:
        raise ValueError(f"text must hold {batch_size} rows, one per stream, got {len(rows)}")
    return [_ids(row, tokenizer, vocab_size - 1) for row in rows]


def pieces(text: Iterator[str]) -> Iterator[str]:
    """The strings of ``text``, small ones joined."""
    held: list[str] = []
    length = 0
    for part in text:
        held.append(part)
        length += len(part)
        if length >= _PIECE:
            yield "".join(held)
            held, length = [], 0
    yield "".join(held)


def _ids(row: Row, tokenizer: PreTrainedTokenizerBase | None, last: int) -> Tensor:
    if not isinstance(row, str):
        ids = torch.as_tensor(row, dtype=torch.int64).cpu()
    elif tokenizer is None:
        raise ValueError("tokenizer must be given to read text, got None; token ids need none")
    else:
        words = tokenizer(row, add_special_tokens=False, verbose=False)
        ids = torch.tensor(words["input_ids"], dtype=torch.int64)
    if ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high > last:
            raise ValueError(f"token ids must lie between 0 and {last}, got {low} to {high}")
    return ids
