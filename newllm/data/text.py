"""Texts that lie on this machine, by name: embedded, generated, fetched, files and folders."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from newllm.data.corpora import corpus_path, is_fetched
from newllm.data.documents import Documents, documents, numbered
from newllm.data.readers import READERS, read_corpus
from newllm.data.sentences import sentences
from newllm.files import check_unicode, reading
from newllm.spelling import did_you_mean

EMBEDDED, SENTENCES = "embedded", "sentences"
LOCAL = (EMBEDDED, SENTENCES, *READERS)
"""Names of texts that need no hub."""


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
    return load_text(EMBEDDED)


def load_text(source: str, *, cache_dir: Path | str | None = None) -> Text:
    """All of :func:`load_documents` as one text, an empty line between two documents."""
    text = load_documents(source, cache_dir=cache_dir).joined()
    return Text(source, text, hashlib.sha256(text.encode("utf-8")).hexdigest())


def load_documents(source: str, *, column: str = "text", cache_dir: Path | str | None = None) -> Documents:
    """The documents named ``source``.

    ``source`` is ``"embedded"`` (the interpreter's language reference), ``"sentences"`` (500 generated
    ones), a fetched corpus (``"austen"``, ``"shakespeare"``, ``"kjv"``, ``"chitchat"``), one text of it
    (``"austen:northangerabbey"``), a text file, a JSONL file whose lines have ``column``, or a folder of
    ``*.txt`` and ``*.jsonl`` files. Files are UTF-8. ``cache_dir`` is where corpora were fetched to.
    Raises ValueError for an unknown name, a file that is not text or a line without the column,
    FileNotFoundError for a file that is not there or a corpus that is not fetched.
    """
    corpus, colon, part = source.partition(":")
    if source == EMBEDDED:
        return _embedded()
    if source == SENTENCES:
        return numbered(source, [sentence for _, sentence in sentences()])
    if corpus in READERS:
        return _from_corpus(source, corpus, part if colon else None, cache_dir)
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(source, path, column)
    if path.is_file():
        return documents(source, *zip(*_from_file(path, column), strict=True))
    raise unknown(source, LOCAL)


def _embedded() -> Documents:
    try:
        from pydoc_data import topics
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            "this Python was packaged without its language reference (pydoc_data.topics); name another text, "
            "for example a file, or 'austen' after 'newllm data get austen'"
        ) from error
    names = sorted(topics.topics)
    return documents(EMBEDDED, names, (topics.topics[name] for name in names))


def _from_corpus(source: str, corpus: str, part: str | None, cache_dir: Path | str | None) -> Documents:
    if not is_fetched(corpus, cache_dir=cache_dir):
        raise FileNotFoundError(f"the text {corpus!r} is not fetched yet: newllm data get {corpus}")
    texts = read_corpus(corpus, corpus_path(corpus, cache_dir=cache_dir))
    if part is None:
        return documents(source, texts, texts.values())
    if part not in texts:
        raise ValueError(f"{corpus!r} has no text {part!r}{did_you_mean(part, texts)}")
    return documents(source, [part], [texts[part]])


def _from_folder(source: str, folder: Path, column: str) -> Documents:
    files = sorted(file for file in folder.iterdir() if file.suffix in (".txt", ".jsonl") and file.is_file())
    if not files:
        raise FileNotFoundError(f"the folder {folder} holds no .txt file and no .jsonl file")
    found = [pair for file in files for pair in _from_file(file, column)]
    return documents(source, *zip(*found, strict=True))


def _from_file(path: Path, column: str) -> list[tuple[str, str]]:
    """Title and text of each document in a file."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the file {path} is not UTF-8 text (byte {error.start})") from error
    if path.suffix != ".jsonl":
        return [(path.name, text)]
    lines = [(f"{path.name}:{n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"the file {path} holds no line")
    return [(title, _column(path, title, line, column)) for title, line in lines]


def _column(path: Path, title: str, line: str, column: str) -> str:
    where = f"{path.parent / title}"
    with reading("", where):
        row = json.loads(line)
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        has = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where} lacks the column {column!r} with a text; it has {ascii(has)[1:-1][:200]}")
    check_unicode(row[column], where)
    return str(row[column])


def unknown(source: str, known: tuple[str, ...]) -> Exception:
    """What to raise for a ``source`` that is neither a known name nor a file."""
    if "/" in source or Path(source).suffix:
        return FileNotFoundError(f"there is no file or folder {source}")
    hint = did_you_mean(source.partition(":")[0], known)
    return ValueError(
        f"source {source!r} is no text, file or folder: it must be one, or one of {', '.join(known)}{hint}"
    )
