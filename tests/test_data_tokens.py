"""Tokenizers by name, trained once; token caches that are shared, whole, and never left locked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from newllm.data import token_cache, vocabularies
from newllm.data.documents import numbered
from newllm.data.token_cache import cached_tokens
from newllm.data.tokenizer import byte_tokenizer
from newllm.data.vocabularies import Kind, fingerprint, open_tokenizer

TEXT = numbered("x", ["The cat sat.\n", "the dog, the cat & the Katze: Grüße!", "the end"])


def test_row_59_tokenizers_are_trained_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bpe = open_tokenizer("bpe:300", TEXT, cache_dir=tmp_path)
    words = open_tokenizer("words:20", TEXT, cache_dir=tmp_path)
    for name, kind in vocabularies.KINDS.items():
        failing = Kind(kind.size, lambda size: pytest.fail("trained twice"))
        monkeypatch.setitem(vocabularies.KINDS, name, failing)
    assert fingerprint(open_tokenizer("bpe:300", TEXT, cache_dir=tmp_path)) == fingerprint(bpe)
    assert fingerprint(open_tokenizer("words:20", TEXT, cache_dir=tmp_path)) == fingerprint(words)
    assert fingerprint(bpe) != fingerprint(words)
    for made in (bpe, words):
        assert (made.pad_token_id, made.unk_token_id, made.bos_token_id, made.eos_token_id) == (0, 1, 2, 3)
    assert bpe.decode(bpe(TEXT.texts[1])["input_ids"]) == TEXT.texts[1]
    assert len(bpe) <= 300 and len(words) <= 20
    assert words.tokenize("The CAT, zebra") == ["the", "cat", ",", "<unk>"]


def test_row_59_any_tokenizer_of_transformers(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "own")
    assert fingerprint(open_tokenizer(str(tmp_path / "own"))) == fingerprint(open_tokenizer("bytes"))
    with pytest.raises(FileNotFoundError, match="tokenizer must be bytes, bpe, words, a folder or a hub id"):
        open_tokenizer(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="'bpe' needs a text"):
        open_tokenizer("bpe")
    with pytest.raises(ValueError, match="the size must be a number above 4, got 'x'"):
        open_tokenizer("bpe:x", TEXT, cache_dir=tmp_path)


def test_cache_keeps_borders_and_ids(tmp_path: Path) -> None:
    made = byte_tokenizer()
    tokens = cached_tokens(TEXT, made, cache_dir=tmp_path)
    assert isinstance(tokens.ids, np.memmap)
    assert tokens.ids.dtype == np.uint16
    for place, text in enumerate(TEXT.texts):
        assert tokens.document(place).tolist() == [*text.encode(), made.eos_token_id]
    bare = cached_tokens(TEXT, made, end_of_text=False, cache_dir=tmp_path)
    assert bare.ids.tolist() == [*"".join(TEXT.texts).encode()]
    assert bare.documents == 3


def test_cache_is_made_once_per_text_and_tokenizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from newllm.data import token_cache

    made = []
    make = token_cache._make
    monkeypatch.setattr(
        token_cache, "_make", lambda folder, *rest: made.append(folder) or make(folder, *rest)
    )
    other = numbered("x", [*TEXT.texts, "more"])
    bpe = open_tokenizer("bpe:300", TEXT, cache_dir=tmp_path)
    for text in (TEXT, other):
        for tokenizer in (byte_tokenizer(), bpe):
            for _ in range(2):
                cached_tokens(text, tokenizer, cache_dir=tmp_path)
    assert len(made) == len(set(made)) == 4


class Failing:
    """A tokenizer that fails after a while."""

    def __init__(self) -> None:
        self.inner = byte_tokenizer()
        self.backend_tokenizer, self.eos_token_id = self.inner.backend_tokenizer, 258
        self.vocab_size = 264

    def __len__(self) -> int:
        return 264

    def __call__(self, texts: list[str], **_: object) -> dict[str, Iterator[list[int]]]:
        def rows() -> Iterator[list[int]]:
            yield [1, 2]
            raise RuntimeError("out of luck")

        return {"input_ids": rows()}


def test_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of luck"):
        cached_tokens(TEXT, Failing(), cache_dir=tmp_path)  # type: ignore[arg-type]
    assert [path.name for path in (tmp_path / "tokens").iterdir() if not path.name.endswith(".lock")] == []
    with pytest.raises(ValueError, match="the text x has no token"):
        cached_tokens(numbered("x", [""]), byte_tokenizer(), end_of_text=False, cache_dir=tmp_path)


def test_damaged_cache_is_named(tmp_path: Path) -> None:
    cached_tokens(TEXT, byte_tokenizer(), cache_dir=tmp_path)
    (file,) = (tmp_path / "tokens").glob("*/tokens.npy")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(
        ValueError, match=f"the token cache {file.parent} cannot be read: tokens.npy is damaged: delete it"
    ):
        cached_tokens(TEXT, byte_tokenizer(), cache_dir=tmp_path)
    (file.parent / "about.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{file.parent} cannot be read: it lacks 'files': delete it"):
        cached_tokens(TEXT, byte_tokenizer(), cache_dir=tmp_path)


def test_cache_of_another_layout_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = cached_tokens(TEXT, byte_tokenizer(), cache_dir=tmp_path)
    monkeypatch.setattr(token_cache, "_LAYOUT", "another")
    for about in (tmp_path / "tokens").glob("*/about.json"):
        about.write_text("{}")
    found = cached_tokens(TEXT, byte_tokenizer(), cache_dir=tmp_path)
    assert np.array_equal(found.ids, expected.ids)


def _worker(folder: str) -> tuple[int, int]:
    tokens = cached_tokens(TEXT, byte_tokenizer(), cache_dir=folder, progress=False)
    return os.stat(next(Path(folder, "tokens").glob("*/tokens.npy"))).st_ino, len(tokens.ids)


def test_processes_share_one_cache(tmp_path: Path) -> None:
    with get_context("fork").Pool(3) as pool:
        found = pool.map(_worker, [str(tmp_path)] * 3, chunksize=1)
    assert len(set(found)) == 1


def test_lock_ends_with_its_process(tmp_path: Path) -> None:
    """Killed while it holds the lock, a process leaves nobody waiting."""
    script = f"""
import sys, time
from newllm.data import token_cache
from tests.test_data_tokens import TEXT, byte_tokenizer
def hang(*_):
    print("locked", flush=True)
    time.sleep(60)
token_cache._make = hang
token_cache.cached_tokens(TEXT, byte_tokenizer(), cache_dir={str(tmp_path)!r})
"""
    root = Path(__file__).resolve().parent.parent
    with subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"locked\n"
        process.send_signal(signal.SIGKILL)
    assert cached_tokens(TEXT, byte_tokenizer(), cache_dir=tmp_path).documents == 3
