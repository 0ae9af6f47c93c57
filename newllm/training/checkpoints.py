"""Checkpoints that appear whole or not at all, and that are looked over before they are trusted."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from newllm.files import read_json

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_STAGING = ".saving"


class Checkpoints:
    """The folder of a run's checkpoints, ``checkpoint-<step>``, each with the hashes of its files.

    Args:
        folder: where they lie.
        keep: how many intact ones stay.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder, self.keep = folder, keep

    @property
    def staging(self) -> Path:
        """The folder in which the next checkpoint is written."""
        return self.folder / _STAGING

    def steps(self) -> list[int]:
        """Steps of all checkpoints, intact or not, in order."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of ``step``."""
        return self.folder / f"checkpoint-{step}"

    def commit(self, step: int) -> Path:
        """Give what was written in ``staging/checkpoint-<step>`` its place, and drop the oldest.

        Every file is on the disk before its name is.
        """
        written = self.staging / f"checkpoint-{step}"
        hashes = {str(path.relative_to(written)): _hash(path) for path in _files(written)}
        manifest = written / MANIFEST
        manifest.write_text(json.dumps({"step": step, "sha256": hashes}, indent=1), encoding="utf-8")
        for path in (*_files(written), written):
            _to_disk(path)
        target = self.path(step)
        replace_folder(written, target)
        _to_disk(self.folder)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old), ignore_errors=True)
        return target

    def clear_staging(self) -> None:
        """Remove what an interrupted writer left."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def clear(self) -> None:
        """Remove all checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest intact checkpoint, and one sentence for each newer one that is not."""
        complaints: list[str] = []
        for step in reversed(self.steps()):
            wrong = _damage(self.path(step))
            if wrong is None:
                return self.path(step), complaints
            complaints.append(f"the checkpoint {self.path(step)} is passed over: {wrong}")
        return None, complaints


def step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was made."""
    return int(checkpoint.name.rpartition("-")[2])


def replace_folder(new: Path, target: Path) -> None:
    """Give the folder ``new`` the name ``target``, whatever had it."""
    replaced = target.with_name(f".{target.name}-replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        os.replace(target, replaced)
    os.replace(new, target)
    shutil.rmtree(replaced, ignore_errors=True)


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing is."""
    try:
        hashes = read_json(folder / MANIFEST, "")["sha256"]
        names = {str(path.relative_to(folder)) for path in _files(folder)} - {MANIFEST}
        for name in sorted(names | hashes.keys()):
            if name not in hashes:
                return f"{name} is not of it"
            if name not in names:
                return f"{name} is missing"
            if _hash(folder / name) != hashes[name]:
                return f"{name} is damaged"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
