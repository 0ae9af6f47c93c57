"""Files that are written whole or not at all, and read to the end or refused in one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
# Options are flat: what is nested more deeply was made to exhaust its reader.
_DEEPEST = 16
_LONGEST = 300


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file that then takes the place of ``path``: a reader never sees half of it.

    Raises ``OSError`` as ``writing``.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, what: str = "") -> Iterator[None]:
    """Turn the many ways of failing to write ``path``, a full disk above all, into one ``OSError``."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(f"{what} {path} could not be written: {one_line(error)}".lstrip()) from error


class reading:
    """Turn the many ways of failing to read ``path`` into one ``ValueError`` that names it.

    Decoders raise what they like at damaged bytes: AttributeError, struct.error, bare Exceptions and panics
    of compiled libraries. All of them count as the file's fault but a missing package, and an ``OSError``
    that names its file itself.
    """

    def __init__(self, what: str, path: Path | str, hint: str = "") -> None:
        self._what, self._hint = f"{what} {path}".lstrip(), hint

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        named = isinstance(error, OSError) and error.filename is not None
        said = isinstance(error, ValueError) and str(error).startswith(self._what)
        damage = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if error is None or named or said or not damage or isinstance(error, ImportError):
            return
        raise ValueError(f"{self._what} cannot be read: {one_line(error)}{self._hint}") from error


def one_line(error: BaseException) -> str:
    """What ``error`` says, on one line and not too long."""
    said = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    said = f"it lacks {said}" if isinstance(error, KeyError) else said
    return " ".join(said[: 2 * _LONGEST].split())[:_LONGEST]


def read_json(path: Path, what: str = "the file") -> Any:
    """What ``path`` says in JSON. Raises ``FileNotFoundError``, or ``ValueError`` naming it."""
    with reading(what, path):
        return json.loads(path.read_text(encoding="utf-8"))


def read_rows(path: Path, kind: type[T]) -> list[T]:
    """The JSON values of the lines of ``path``; a last line without its end was cut off and counts for none.

    Raises ``FileNotFoundError``, or ``ValueError`` naming the line that is not of ``kind``.
    """
    with reading("the file", path):
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [read_row(line, f"{path}, line {number}", kind) for number, line in enumerate(lines, 1)]


def read_row(line: str, where: str, kind: type[T]) -> T:
    """The JSON value of one line. Raises ``ValueError`` naming ``where`` unless it is of ``kind``."""
    with reading("", where):
        row = json.loads(line)
    if not isinstance(row, kind):
        raise ValueError(f"{where} must hold a {kind.__name__}, got a {type(row).__name__}")
    if isinstance(row, str):
        check_unicode(row, where)
    return row


def check_unicode(text: str, where: str) -> None:
    """Raise ``ValueError`` naming ``where`` for half a character (``\\ud800``), which JSON may hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds half a character (a lone surrogate) at {error.start}") from error


def read_yaml(path: Path, what: str) -> Any:
    """What the YAML file ``path`` says: plain values, no aliases (a few lines of them can mean gigabytes).

    Raises ``FileNotFoundError``, or ``ValueError`` naming ``what`` and ``path``.
    """
    import yaml

    with reading(what, path):
        text, depth = path.read_text(encoding="utf-8"), 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("aliases (*name) are not allowed")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise ValueError(f"it is nested more than {_DEEPEST} deep")
        return yaml.safe_load(text)
