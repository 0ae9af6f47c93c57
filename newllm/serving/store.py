"""Sessions kept by their ids, one file each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from newllm.files import replace_file
from newllm.models.session_file import read_snapshot, tokens_in, write_snapshot
from newllm.models.streams import Model, Snapshot

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SUFFIX = ".safetensors"


class Kept(NamedTuple):
    """A session on disk: bytes of its file, tokens read, time of its last turn in seconds since the epoch.

    ``tokens`` is None of a damaged file, which can still be deleted.
    """

    id: str
    bytes: int
    tokens: int | None
    used: float


class SessionStore:
    """Sessions of ``model`` in ``folder``, at most ``most`` of them.

    Files are replaced whole, so that whatever stops the process leaves each session as it was saved last.
    """

    def __init__(self, folder: Path, model: Model, *, most: int) -> None:
        if most < 0:
            raise ValueError(f"most must be 0 or more, got {most}")
        self.folder, self.model, self.most = folder, model, most
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, name: str) -> Snapshot | None:
        """The session, or None if there is none yet. Raises ``ValueError`` for a bad id or a damaged file."""
        path = self._path(name)
        return read_snapshot(path, self.model) if path.is_file() else None

    def save(self, name: str, snapshot: Snapshot) -> None:
        """Keep ``snapshot`` under ``name``. Raises ``ValueError`` as ``check``."""
        self.check(name)
        write_snapshot(snapshot, self.model, self._path(name))

    def check(self, name: str) -> None:
        """Raise ``ValueError`` for a bad id, or a new one where no more sessions can be kept."""
        if not self._path(name).is_file() and len(self.names()) >= self.most:
            raise ValueError(f"at most {self.most} sessions can be kept: delete one first")

    def copy(self, name: str, to: str) -> None:
        """Fork: ``to`` goes on from where ``name`` is. Raises ``KeyError``, ``ValueError`` as ``check``."""
        source = self._existing(name)
        self.check(to)
        content = source.read_bytes()
        replace_file(self._path(to), lambda path: path.write_bytes(content))

    def delete(self, name: str) -> None:
        """Forget the session. Raises ``KeyError`` where there is none."""
        self._existing(name).unlink()

    def names(self) -> list[str]:
        """The ids."""
        return sorted(path.name.removesuffix(_SUFFIX) for path in self.folder.glob(f"[!.]*{_SUFFIX}"))

    def about(self, name: str) -> Kept:
        """What is known of a session without loading it. Raises ``KeyError`` where there is none."""
        path = self._existing(name)
        status = path.stat()
        try:
            tokens = tokens_in(path)
        except ValueError:
            tokens = None
        return Kept(name, status.st_size, tokens, status.st_mtime)

    def _path(self, name: str) -> Path:
        if not _ID.fullmatch(name):
            raise ValueError(
                f"session must be 1 to 64 letters, digits, - and _, the first a letter or digit; got {name!r}"
            )
        return self.folder / f"{name}{_SUFFIX}"

    def _existing(self, name: str) -> Path:
        path = self._path(name)
        if not path.is_file():
            raise KeyError(name)
        return path
