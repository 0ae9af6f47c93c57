"""Texts by name: the embedded corpus, fetched corpora, files and folders."""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path
from typing import NamedTuple

from newllm.data.corpora import corpus_path, is_fetched
from newllm.data.readers import READERS, read_corpus

EMBEDDED = "embedded"
_SEPARATOR = "\n\n"


class Text(NamedTuple):
    """A text, the ``name`` it was asked for by and the SHA-256 of its UTF-8 bytes."""

    name: str
    text: str
    sha256: str


def embedded_corpus() -> Text:
    """The Python language reference that comes with the interpreter, about 465,000 characters.

    The topics of ``pydoc_data.topics`` in the order of their names, an empty line between two. The
    text differs between Python versions: record ``sha256`` beside results. Raises FileNotFoundError
    where the interpreter was packaged without it.
    """
    try:
        from pydoc_data import topics
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            "this Python was packaged without its language reference (pydoc_data.topics); name another text, "
            "for example a file, or 'austen' after 'newllm data get austen'"
        ) from error
    return _text(EMBEDDED, _SEPARATOR.join(topics.topics[name] for name in sorted(topics.topics)))


def load_text(source: str, *, cache_dir: Path | str | None = None) -> Text:
    """The text named ``source``.

    ``source`` is ``"embedded"``, a fetched corpus (``"austen"``, ``"shakespeare"``, ``"kjv"``,
    ``"chitchat"``: all its texts, an empty line between two), one text of it
    (``"austen:northangerabbey"``), a text file, or a folder whose ``*.txt`` files are joined in the
    order of their names. Files are UTF-8. ``cache_dir`` is where corpora were fetched to.
    Raises ValueError for an unknown name or a file that is not text, FileNotFoundError for a file
    that is not there or a corpus that is not fetched.
    """
    corpus, colon, part = source.partition(":")
    if source == EMBEDDED:
        return embedded_corpus()
    if corpus in READERS:
        return _text(source, _from_corpus(corpus, part if colon else None, cache_dir))
    path = Path(source).expanduser()
    if path.is_dir():
        return _text(source, _from_folder(path))
    if path.is_file():
        return _text(source, _from_file(path))
    raise _unknown(source, corpus)


def _text(name: str, text: str) -> Text:
    return Text(name, text, hashlib.sha256(text.encode("utf-8")).hexdigest())


def _from_corpus(corpus: str, part: str | None, cache_dir: Path | str | None) -> str:
    if not is_fetched(corpus, cache_dir=cache_dir):
        raise FileNotFoundError(f"the text {corpus!r} is not fetched yet: newllm data get {corpus}")
    texts = read_corpus(corpus, corpus_path(corpus, cache_dir=cache_dir))
    if part is None:
        return _SEPARATOR.join(texts.values())
    if part not in texts:
        raise ValueError(f"{corpus!r} has no text {part!r}; the nearest is {_nearest(part, list(texts))!r}")
    return texts[part]


def _from_folder(folder: Path) -> str:
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise FileNotFoundError(f"the folder {folder} holds no .txt file")
    return _SEPARATOR.join(_from_file(file) for file in files)


def _from_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the file {path} is not UTF-8 text (byte {error.start})") from error


def _unknown(source: str, corpus: str) -> Exception:
    if "/" in source or Path(source).suffix:
        return FileNotFoundError(f"there is no file or folder {source}")
    known = [EMBEDDED, *READERS]
    return ValueError(
        f"source {source!r} is no text, file or folder; the nearest name is {_nearest(corpus, known)!r} "
        f"among {', '.join(known)}"
    )


def _nearest(name: str, known: list[str]) -> str:
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
