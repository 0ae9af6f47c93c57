"""Tokenizers by name: bytes, any of transformers, and ones trained on the text itself and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from newllm.data.corpora import default_cache_dir
from newllm.data.documents import Documents
from newllm.files import reading, replace_file
from newllm.hub import hub_id, model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTES_NAME = "bytes"
_SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")


class Kind(NamedTuple):
    """A kind of vocabulary that is trained: its usual ``size`` and what makes backend and trainer."""

    size: int
    make: Callable[[int], tuple[Any, Any]]


def _bpe(size: int) -> tuple[Any, Any]:
    """Byte-pair encoding over bytes, digits apart: decoding gives the text back, whatever it holds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    # Digits of their own, so that keys of digits can be hidden in the text.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, special_tokens=list(_SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    return backend, trainer


def _words(size: int) -> tuple[Any, Any]:
    """Lower-case words and punctuation; rare ones are <unk>."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend, trainers.WordLevelTrainer(
        vocab_size=size, special_tokens=list(_SPECIAL), show_progress=False
    )


KINDS: dict[str, Kind] = {"bpe": Kind(10_000, _bpe), "words": Kind(1000, _words)}
"""Vocabularies that are trained: ``bpe``, ``bpe:4096``, ``words``, ``words:500``."""


def open_tokenizer(
    name: str, text: Documents | None = None, *, cache_dir: Path | str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer ``name``: ``bytes``, ``bpe[:SIZE]`` or ``words[:SIZE]`` of ``text``, a folder or hub id.

    A trained one is kept under the hash of its text: a second call trains nothing. Its ids 0 to 3 are
    padding, unknown, begin and end of text.

    Raises ``ValueError`` for a size that is no number above the special tokens, or no text to train on;
    ``FileNotFoundError`` for a folder or hub id without a tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    from newllm.data.tokenizer import byte_tokenizer

    kind, _, size = name.partition(":")
    if name == BYTES_NAME:
        return byte_tokenizer()
    if kind in KINDS:
        if text is None:
            raise ValueError(f"tokenizer {name!r} needs a text to be trained on")
        file = _trained(kind, _checked_size(name, kind, size), text, cache_dir)
        pad, unk, bos, eos = _SPECIAL
        with reading("the vocabulary", file, ": delete it"):
            made = PreTrainedTokenizerFast(
                tokenizer_file=str(file), pad_token=pad, unk_token=unk, bos_token=bos, eos_token=eos,
                clean_up_tokenization_spaces=False,
            )  # fmt: skip
            if sorted(made.get_vocab().values()) != list(range(len(made))):
                raise ValueError(f"its ids must be 0 to {len(made) - 1}")
        return made
    return _of_folder(name)


def _of_folder(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    folder = Path(name)
    if not folder.is_dir():
        if hub_id(name) is None:
            raise FileNotFoundError(
                f"tokenizer must be {BYTES_NAME}, {', '.join(KINDS)}, a folder or a hub id (owner/name), "
                f"got {name!r}"
            )
        folder = model_folder(name)
    with reading("the tokenizer", name):
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    return found


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{type(tokenizer).__name__}\n{described}".encode()).hexdigest()


def _checked_size(name: str, kind: str, size: str) -> int:
    if not size and ":" not in name:
        return KINDS[kind].size
    if not size.isdecimal() or int(size) <= len(_SPECIAL):
        raise ValueError(f"tokenizer {name!r}: the size must be a number above {len(_SPECIAL)}, got {size!r}")
    return int(size)


def _trained(kind: str, size: int, text: Documents, cache_dir: Path | str | None) -> Path:
    from filelock import FileLock

    folder = (Path(cache_dir) if cache_dir is not None else default_cache_dir()) / "tokenizers"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{kind}-{size}-{text.sha256[:32]}.json"
    with FileLock(f"{file}.lock"):
        if not file.is_file():
            backend, trainer = KINDS[kind].make(size)
            backend.train_from_iterator(text.texts, trainer, length=len(text.texts))
            # As text: the library's own writing raises bare Exceptions where the disk is full.
            learnt = backend.to_str(pretty=True)
            replace_file(file, lambda place: place.write_text(learnt, encoding="utf-8"))
    return file
