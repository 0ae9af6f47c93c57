"""A scripted conversation by ``newllm chat``."""

from __future__ import annotations

import io
import sys

import pytest

from newllm.cli import main

Captured = pytest.CaptureFixture[str]


def chatted(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, model: str, *lines: str
) -> tuple[list[str], str]:
    """The replies to ``lines``, one a line, and what was said on stderr."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert main(["chat", model, "--max-new-tokens", "8", "--temperature", "0"]) == 0
    said = capsys.readouterr()
    return said.out.splitlines(), said.err
