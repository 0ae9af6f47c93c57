"""Results as data: one JSON line per computation and direction."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from newllm.files import replace_file


@dataclass(frozen=True)
class Row:
    """One timed computation, or the ``error`` that kept it from being timed (``ms`` is then None).

    ``ms`` is the median, ``ms_low`` and ``ms_high`` the quartiles; ``host_ms`` the time to issue the call.
    ``gib`` is the peak device memory beyond the inputs, results included (None on a CPU). ``floor_ms`` is
    the larger of ``flops`` and ``bytes`` over the ceilings ``peak_tflops`` and ``peak_gbs`` of the same run.
    ``detail`` names a peer's version or the backend that it took. Rows with one ``run`` shared a process.
    """

    suite: str
    op: str
    impl: str
    variant: str
    direction: str
    shape: str
    batch: int
    heads: int
    kv_heads: int
    tokens: int
    width: int
    window: int
    segment: int
    dtype: str
    ms: float | None
    ms_low: float | None
    ms_high: float | None
    host_ms: float | None
    rounds: int
    gib: float | None
    floor_ms: float
    flops: float
    bytes: float
    peak_tflops: float
    peak_gbs: float
    detail: str | None
    error: str | None
    device: str
    torch: str
    triton: str
    commit: str | None
    date: str
    run: str

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """What is measured: op, impl, variant, shape, direction."""
        return self.op, self.impl, self.variant, self.shape, self.direction


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace ``path`` by ``rows``, one JSON object a line."""
    text = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
    replace_file(path, lambda file: file.write_text(text, encoding="utf-8"))


def read_rows(path: Path) -> list[Row]:
    """The rows in ``path``.

    Raises ValueError where a row lacks one of the fields, or has another.
    """
    names = {field.name for field in fields(Row)}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows, 1):
        if row.keys() != names:
            wrong = ", ".join(sorted(row.keys() ^ names))
            raise ValueError(f"{path}, line {number}: fields that are missing or unknown: {wrong}")
    return [Row(**row) for row in rows]
