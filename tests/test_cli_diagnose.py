"""``newllm diagnose`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from newllm.cli import main
from newllm.data.tokenizer import byte_tokenizer
from newllm.models.files import save_model
from tests.test_phase_two import slots, tiny
from tests.tiny_models import tiny_base

PNG = b"\x89PNG"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name, model in (
        ("lm", tiny(vocab_size=264)),
        ("kv", slots(vocab_size=264)),
        ("gated", tiny(vocab_size=264, cell="gated")),
    ):
        save_model(model.float(), byte_tokenizer(), tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("model", ["lm", "kv", "gated"])
@pytest.mark.parametrize("check", ["rank", "identity", "convergence"])
def test_checks_of_streams(check: str, model: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out"
    assert main(["diagnose", check, model, "--tokens", "300", "--out", str(out)]) in (0, 1)
    rows = json.loads((out / "results.json").read_text())
    said = capsys.readouterr().out
    assert "train, " in said and "validation, " in said
    assert {row.get("set", "train") for row in rows} == {"train", "validation"}
    assert len({row["recurrence"] for row in rows}) == (2 if model == "kv" else 1)
    if check != "identity":
        assert (out / f"{check}.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("check", ["attractor", "fixed-point"])
def test_checks_of_repeated_tokens(check: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out"
    words = ["--model", "gated"] if check == "attractor" else ["gated"]
    assert main(["diagnose", check, *words, "--tokens", "12", "--out", str(out)]) == 0
    rows = json.loads((out / "results.json").read_text())
    arrays: Any = np.load(out / ("points.npz" if check == "attractor" else "contexts.npz"))
    if check == "attractor":
        assert rows[0]["tokens"] == 12 and arrays["gated"].shape == (12, 6)
    else:
        assert len(rows) == 12 and arrays["contexts"].shape == (12, 50, 6)
        assert "share of L2 squared" in (out / "report.md").read_text()
    assert all(path.read_bytes().startswith(PNG) for path in out.glob("*.png"))
    assert len(list(out.glob("*.png"))) == (1 if check == "attractor" else 2)
    assert capsys.readouterr().out


def test_other_models_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tiny_base("llama"), byte_tokenizer(), folder / "llama")
    assert main(["diagnose", "rank", "llama"]) == 2
    assert "model must be a context_lm or context_kv, got 'llama'" in capsys.readouterr().err
