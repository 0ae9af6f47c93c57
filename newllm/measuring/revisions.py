"""The same suite at another revision of the checkout, in a throwaway worktree and a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from newllm.measuring.entries import OURS
from newllm.measuring.rows import Row, read_rows
from newllm.measuring.tables import Grid, milliseconds

ROOT = Path(__file__).resolve().parent.parent.parent


def rows_at(revision: str, suite: str, options: Sequence[str] = (), *, root: Path = ROOT) -> list[Row]:
    """The rows of newllm's own implementations at ``revision`` of the checkout ``root``.

    ``options`` are further words of ``python -m newllm.measuring``. Raises ValueError where there is no
    such revision, RuntimeError where its measurement fails, with what it said last.
    """
    with _worktree(revision, root) as tree:
        out = tree.parent / "results"
        words = ["-m", "newllm.measuring", suite, "--peers", "none", "--out", str(out), *options]
        done = subprocess.run([sys.executable, *words], cwd=tree, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise RuntimeError(
                f"{suite!r} cannot be measured at {revision}: {said[-1] if said else 'silence'}"
            )
        return read_rows(out / f"{suite}.jsonl")


@contextmanager
def _worktree(revision: str, root: Path) -> Iterator[Path]:
    commit = _git(root, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    with TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        _git(root, "worktree", "add", "--detach", str(tree), commit)
        try:
            yield tree
        finally:
            _git(root, "worktree", "remove", "--force", str(tree))


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(
            f"git {' '.join(words)} failed in {root}: {done.stderr.strip() or 'no such revision'}"
        )
    return done.stdout.strip()


def comparison(rows: Sequence[Row], base: Sequence[Row], revision: str) -> Grid:
    """Both revisions side by side, for all that both have timed."""
    before = {row.key: row.ms for row in base}
    lines: list[tuple[str, ...]] = []
    for row in rows:
        past = before.get(row.key)
        if row.impl in OURS and row.ms is not None and past is not None:
            what = f"{row.op}, {row.variant}, {row.shape} {row.direction}"
            figures = milliseconds(row.ms), milliseconds(past), f"{row.ms / past:.3f}"
            lines.append((what, f"newllm {row.impl}", *figures))
    return Grid(f"beside {revision}", ("what", "by", "ms", f"ms at {revision}", "ratio"), lines)
