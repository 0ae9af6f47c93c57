"""A run's folder: ``config.yaml``, ``metrics.jsonl``, results and plots under fixed names."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from newllm.files import read_rows, replace_file, writing


class Run:
    """A folder that says what ran, with what, and what came out.

    ``config.yaml`` is written at once, with versions, seed, commit and devices under ``provenance``;
    ``metrics.jsonl`` starts empty, unless the run is to ``resume``. Files of an earlier run under the same
    names are replaced. With ``writes=False``, for all but one of several processes, nothing is written.
    """

    def __init__(
        self,
        out: Path | str,
        config: Mapping[str, Any],
        *,
        seed: int,
        resume: bool = False,
        writes: bool = True,
    ) -> None:
        import yaml

        self.out, self.writes = Path(out), writes
        self.metrics = self.out / "metrics.jsonl"
        if not writes:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump({**config, "provenance": provenance(seed)}, sort_keys=False)
        self.text("config.yaml", text)
        if not (resume and self.metrics.exists()):
            self.text("metrics.jsonl", "")

    def log(self, **row: Any) -> None:
        """Append one line to ``metrics.jsonl``."""
        if not self.writes:
            return
        with writing(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; one that was cut off while it was written is left out."""
        return read_rows(self.metrics, dict) if self.metrics.exists() else []

    def rewind(self, step: int) -> None:
        """Forget the lines of ``metrics.jsonl`` after ``step``, which will be written again."""
        kept = [row for row in self.rows() if row.get("step", 0) <= step]
        self.text("metrics.jsonl", "".join(f"{json.dumps(row)}\n" for row in kept))

    def result(self, name: str, data: Any) -> Path:
        """Write ``data`` as JSON under ``name``."""
        return self.text(name, json.dumps(data, indent=2) + "\n")

    def text(self, name: str, text: str) -> Path:
        """Write ``text`` under ``name``."""
        return self._write(name, lambda path: path.write_text(text, encoding="utf-8"))

    def plot(self, name: str, figure: Any) -> Path:
        """Write a matplotlib ``figure`` as PNG under ``name``."""
        return self._write(name, lambda path: figure.savefig(path, dpi=150, format="png"))

    def _write(self, name: str, write: Callable[[Path], object]) -> Path:
        path = self.out / name
        if self.writes:
            replace_file(path, write)
        return path


def provenance(seed: int) -> dict[str, Any]:
    """Versions, devices, commit, date and seed."""
    from newllm.backend import build_info

    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {**build_info(), "commit": commit(), "date": now, "seed": seed}


def commit() -> str | None:
    """The commit of the checkout that newllm runs from, with a ``+`` for uncommitted changes; else None.

    Rows of results that were added since are no such change: the run before this one wrote them.
    """
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None
    try:
        head = _git(here, "rev-parse", "HEAD")
        sources = (":/", ":(top,exclude)benchmarks/results")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no", "--", *sources)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()
