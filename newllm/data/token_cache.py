"""Documents as token ids in memory-mapped files that processes share and make once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from newllm.data.corpora import default_cache_dir
from newllm.data.documents import Documents
from newllm.data.fetch import file_sha256
from newllm.data.vocabularies import fingerprint
from newllm.files import one_line, read_json, reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AT_ONCE = 64
_FILES = ("tokens.npy", "borders.npy", "about.json")
# Part of a cache's name: one of another layout is not found, rather than found and not understood.
_LAYOUT = "ids and borders with their hashes"


class Tokens(NamedTuple):
    """``ids [N]`` (uint16 or uint32, maybe memory-mapped) and ``borders [D + 1]`` (int64).

    Document d is ``ids[borders[d]:borders[d + 1]]``, its end-of-text token included where there is one.
    """

    ids: np.ndarray
    borders: np.ndarray

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.borders) - 1

    def document(self, place: int) -> np.ndarray:
        """The ids of one document."""
        return self.ids[self.borders[place] : self.borders[place + 1]]


def cached_tokens(
    text: Documents,
    tokenizer: PreTrainedTokenizerBase,
    *,
    end_of_text: bool = True,
    cache_dir: Path | str | None = None,
    progress: bool = True,
) -> Tokens:
    """The ids of ``text`` by ``tokenizer``, from the cache or made and kept there.

    Each document ends with the tokenizer's end-of-text token if it has one and ``end_of_text`` asks for it.
    The files appear whole or not at all; of several processes one makes them while the others wait. Its lock
    is the operating system's, which ends with the process whatever becomes of it.

    Raises ``ValueError`` for documents without a single token, or cache files that are damaged; ``OSError``
    where they cannot be written.
    """
    from filelock import FileLock

    end = tokenizer.eos_token_id if end_of_text else None
    parts = (_LAYOUT, fingerprint(tokenizer), text.sha256, end)
    key = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:40]
    root = (Path(cache_dir) if cache_dir is not None else default_cache_dir()) / "tokens"
    root.mkdir(parents=True, exist_ok=True)
    folder = root / key
    with FileLock(str(root / f".{key}.lock")):
        # Whoever holds the lock is alone: what else lies here was left by a process that was killed.
        for left in root.glob(f".{key}-*"):
            shutil.rmtree(left, ignore_errors=True)
        if not folder.is_dir():
            _make(folder, text, tokenizer, end, progress)
    return _open(folder, len(text.texts))


def _make(
    folder: Path, text: Documents, tokenizer: PreTrainedTokenizerBase, end: int | None, progress: bool
) -> None:
    kind = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        borders = [0]
        with (scratch / "ids").open("wb") as file:
            for ids in _encoded(text, tokenizer, progress):
                row = np.asarray(ids, dtype=kind)
                row = row if end is None else np.append(row, kind(end))
                row.tofile(file)
                borders.append(borders[-1] + len(row))
        if borders[-1] == 0:
            raise ValueError(f"the text {text.name} has no token")
        raw = np.memmap(scratch / "ids", dtype=kind, mode="r")
        np.save(scratch / _FILES[0], raw)
        np.save(scratch / _FILES[1], np.asarray(borders, dtype=np.int64))
        del raw
        (scratch / "ids").unlink()
        about = {
            "text": text.name,
            "sha256": text.sha256,
            "tokens": borders[-1],
            "documents": len(borders) - 1,
            "files": {name: file_sha256(scratch / name) for name in _FILES[:2]},
        }
        (scratch / _FILES[2]).write_text(json.dumps(about), encoding="utf-8")
        os.replace(scratch, folder)
    except OSError as error:
        raise OSError(f"the token cache {folder} could not be written: {one_line(error)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _encoded(text: Documents, tokenizer: PreTrainedTokenizerBase, progress: bool) -> Iterator[Any]:
    """The ids of each document; bytes take the short way."""
    from tqdm import tqdm

    from newllm.data.tokenizer import encode, is_byte_tokenizer

    short = is_byte_tokenizer(tokenizer)

    with tqdm(
        total=text.characters, desc=f"tokens of {text.name}", unit="char", unit_scale=True,
        disable=not progress, delay=1,
    ) as bar:  # fmt: skip
        for start in range(0, len(text.texts), _AT_ONCE):
            part = list(text.texts[start : start + _AT_ONCE])
            if short:
                yield from (encode(tokenizer, document).numpy() for document in part)
            else:
                found = tokenizer(part, add_special_tokens=False, verbose=False, return_attention_mask=False)
                yield from found["input_ids"]
            bar.update(sum(map(len, part)))


def _open(folder: Path, documents: int) -> Tokens:
    about = folder / _FILES[2]
    with reading("the token cache", folder, ": delete it"):
        hashes = read_json(about)["files"]
        for name in _FILES[:2]:
            if file_sha256(folder / name) != hashes[name]:
                raise ValueError(f"{name} is damaged")
        ids = np.load(folder / _FILES[0], mmap_mode="r", allow_pickle=False)
        borders = np.load(folder / _FILES[1], mmap_mode="r", allow_pickle=False)
        if ids.ndim != 1 or ids.dtype not in (np.uint16, np.uint32):
            raise ValueError(f"{_FILES[0]} must hold uint16 or uint32 [N], got {ids.dtype} {list(ids.shape)}")
        whole = borders.shape == (documents + 1,) and borders.dtype == np.int64
        if not whole or borders[0] != 0 or borders[-1] != len(ids) or np.any(borders[1:] < borders[:-1]):
            raise ValueError(f"{_FILES[1]} does not divide {len(ids)} ids into {documents} documents")
    return Tokens(ids, np.array(borders))
