"""A tokenizer of bytes that needs no files, and token ids as tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTES = 256
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<key>", "<question>", "<spare0>", "<spare1>", "<spare2>")
"""The tokens after the bytes: ids 256, 257, ...; eight of them make the vocabulary 264, a multiple of 8."""

KEY_TOKEN = BYTES + SPECIAL_TOKENS.index("<key>")
QUESTION_TOKEN = BYTES + SPECIAL_TOKENS.index("<question>")


def _byte_symbols() -> list[str]:
    """The visible character that stands for each byte in a byte-level vocabulary (GPT-2's convention).

    Printable Latin-1 characters stand for themselves, the other bytes for characters from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(BYTES, 2 * BYTES))
    return [chr(byte if byte in printable else next(others)) for byte in range(BYTES)]


_SYMBOLS = _byte_symbols()


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A transformers tokenizer whose token ids are the bytes of the UTF-8 text, then :data:`SPECIAL_TOKENS`.

    264 tokens; nothing is added before or after a text. It is saved with a model and comes back
    through ``AutoTokenizer``. Incomplete characters decode to U+FFFD.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bytes_only = models.BPE(vocab={symbol: byte for byte, symbol in enumerate(_SYMBOLS)}, merges=[])
    backend = Tokenizer(bytes_only)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    pad, bos, eos, *extra = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, bos_token=bos, eos_token=eos,
        extra_special_tokens=extra, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def byte_ids(text: str) -> Tensor:
    """The bytes of the UTF-8 ``text`` as token ids ``[N]`` int64; special tokens in it stay bytes."""
    return torch.from_numpy(np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64))


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """The token ids ``[N]`` int64 of ``text``, with no special tokens added.

    The same as ``tokenizer(text, add_special_tokens=False)``, of any length without a warning, and
    without the tokenizer's detour where its tokens are plain bytes.
    """
    if is_byte_tokenizer(tokenizer) and not any(token in text for token in tokenizer.all_special_tokens):
        return byte_ids(text)
    ids = tokenizer(text, add_special_tokens=False, verbose=False, return_attention_mask=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ``tokenizer`` is a :func:`byte_tokenizer`, also one that was saved and loaded."""
    return tokenizer.vocab_size == BYTES and tokenizer.convert_ids_to_tokens(list(range(BYTES))) == _SYMBOLS
