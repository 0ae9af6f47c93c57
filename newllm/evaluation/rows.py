"""Results as lines of JSON that several runs append to; a cell that is there is not measured again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from newllm.files import read_rows, replace_file

Row = dict[str, Any]
IDENTITY = (
    "suite", "model", "weights", "memory", "length", "depth", "samples", "seed",
    "text", "text_sha256", "tokenizer", "window", "segment", "key_length", "autocast",
)  # fmt: skip
"""What makes two rows the same measurement; what neither of them names is alike."""


class RowFile:
    """The rows of ``path``, which need not exist; a last line that was cut off counts for none."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        exists = self.path.exists()
        self.rows: list[Row] = read_rows(self.path, dict) if exists else []
        self._cut_off = exists and _is_cut_off(self.path)

    def find(self, identity: Mapping[str, Any]) -> Row | None:
        """The last row that agrees with ``identity`` in all that it names."""
        wanted = dict(identity).items()
        return next(
            (row for row in reversed(self.rows) if all(row.get(key) == value for key, value in wanted)), None
        )

    def append(self, row: Row) -> None:
        """Add ``row`` to the file at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._cut_off:
            whole, self._cut_off = "".join(f"{json.dumps(old)}\n" for old in self.rows), False
            replace_file(self.path, lambda path: path.write_text(whole, encoding="utf-8"))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)


def _is_cut_off(path: Path) -> bool:
    """Whether the last line lacks its end."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1))
        return file.read() not in (b"", b"\n")


def weights_digest(model: nn.Module) -> str:
    """Twelve hexadecimal digits that tell the weights of ``model`` from others."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
