"""GPU profiles and scaling rules, and the one configuration that drives converter and trainer."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from newllm.cli import main
from newllm.cli.presets import preset_path
from newllm.data.tokenizer import byte_tokenizer
from newllm.models.files import load_senri
from newllm.training.profiles import PROFILES, find_profile, rate_for_rows, rate_for_size, rows_for_length
from tests.tiny_models import tiny_base

Captured = pytest.CaptureFixture[str]


# Rules


def test_row_62_profiles_are_the_documents() -> None:
    table = {name: (p.rows, p.lr, p.layers, p.context) for name, p in PROFILES.items()}
    assert table == {
        "cpu": (16, 1e-4, 11, 512),
        "t4": (512, 1e-4, 11, 512),
        "l4": (2048, 8e-4, 11, 512),
        "a100": (4096, 1.1e-3, 11, 512),
        "advanced-l4": (2048, 4e-4, 12, 512),
        "advanced-a100": (4096, 6e-4, 12, 512),
        "h100": (8192, 1.6e-3, 11, 512),
    }
    assert [PROFILES[name].lm_rows for name in ("t4", "l4", "a100")] == [32, 128, 512]
    assert all(p.rows >= 512 for name, p in PROFILES.items() if name != "cpu")


def test_row_62_rate_follows_batch_and_size() -> None:
    assert rate_for_rows(1e-4, 2048) == pytest.approx(8e-4)
    assert round(rate_for_rows(1e-4, 4096), 5) == 1.13e-3
    # The rule steps down where its halves meet.
    assert round(rate_for_rows(1.0, 255), 2) == 7.97
    assert round(rate_for_rows(1.0, 256), 2) == 2.83
    assert rate_for_rows(1e-4, 32) == 1e-4
    assert round(1 / rate_for_size(1.0, round(1.77 * 2_740_000)), 2) == 1.33
    assert rate_for_size(8e-4, 2_740_000) == 8e-4


def test_row_62_profile_is_found_by_memory() -> None:
    found = [find_profile("auto", memory)[0] for memory in (0, 11, 15.8, 23.6, 42.4, 85.0, 150.0)]
    assert found == ["cpu", "cpu", "t4", "l4", "a100", "h100", "h100"]
    assert find_profile("advanced-l4", 0)[1] is PROFILES["advanced-l4"]
    with pytest.raises(ValueError, match=r"profile must be auto or one of cpu, t4, .*, got 'v100'"):
        find_profile("v100", 0)
    assert [rows_for_length(PROFILES["t4"], length) for length in (256, 2048, 100_000)] == [32, 4, 1]


# One configuration


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 60)
    return tmp_path


def trained(folder: Path, *words: str, family: str = "senri") -> int:
    short = ["--train.steps", "3", "--stream.length", "32", "--train.log-steps", "1"]
    # Last, so that no configuration file among the words takes their place.
    place = ["--data", str(folder / "text.txt"), "--out", str(folder / "out")]
    return main(["train", family, *short, *words, *place])


def written(folder: Path) -> Any:
    return yaml.safe_load((folder / "out" / "config.yaml").read_text())


def llama(folder: Path) -> str:
    tiny_base("smollm", vocab_size=264).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    return str(folder / "base")


def test_row_83_configuration_drives_converter_and_trainer(folder: Path, capsys: Captured) -> None:
    """YAML over defaults, flags over YAML, one schema; the same keys convert and train."""
    file = folder / "run.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "convert": {"window": 16, "segment": 8, "memory_layers": [1, 2]},
                "train": {"lr": 3e-4, "seed": 7},
                "stream": {"rows": 2},
            }
        )
    )
    words = ["--base", llama(folder), "--config", str(file), "--train.seed", "8", "--stream.rows", "3"]
    assert trained(folder, *words) == 0
    made = load_senri(folder / "out" / "last").config
    assert (made.sliding_window, made.segment, made.memory_layers) == (16, 8, [1, 2])
    config = written(folder)
    assert (config["train"]["lr"], config["train"]["seed"], config["stream"]["rows"]) == (3e-4, 8, 3)
    assert "3 rows of 32 tokens, lr 0.0003" in capsys.readouterr().out
    flat = folder / "convert.yaml"
    flat.write_text(yaml.safe_dump({"window": 16, "segment": 8, "memory_layers": [1, 2]}))
    assert main(["convert", str(folder / "base"), "--config", str(flat), "--out", str(folder / "senri")]) == 0
    same = load_senri(folder / "senri").config
    assert (same.sliding_window, same.segment, same.memory_layers) == (16, 8, [1, 2])


def test_row_83_profile_sets_what_is_left_open(folder: Path, capsys: Captured) -> None:
    assert trained(folder, "--profile", "t4", "--train.lr", "null", "--model.hidden-size", "16") == 0
    out = capsys.readouterr().out
    parameters = int(out.split("model: senri, ")[1].split(" parameters")[0].replace(",", ""))
    rate = rate_for_size(PROFILES["t4"].lr, parameters)
    assert f"profile t4: 256 rows of 32 tokens, lr {rate:g}" in out
    assert written(folder)["profile_used"] == "t4"


def test_row_83_printed_configuration_is_a_configuration(folder: Path, capsys: Captured) -> None:
    assert main(["train", "senri", "--preset", "quick", "--print_config"]) == 0
    printed = folder / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    content = yaml.safe_load(printed.read_text())
    preset = yaml.safe_load(preset_path("quick", "newllm train senri").read_text())
    for group, values in preset.items():
        assert {key: content[group][key] for key in values} == values
    again = ["--config", str(printed), "--train.steps", "2", "--stream.rows", "2", "--stream.length", "64"]
    assert trained(folder, *again) == 0


def test_hf_models_are_trained_as_they_are(folder: Path, capsys: Captured) -> None:
    base = llama(folder)
    assert trained(folder, base, "--train.lr", "1e-3", "--train.eval-steps", "2", family="hf") == 0
    assert json.loads((folder / "out" / "best" / "config.json").read_text())["model_type"] == "llama"
    assert {path.name for path in (folder / "out").iterdir()} == {
        "best", "last", "checkpoints", "config.yaml", "metrics.jsonl", "training_curves.png", "summary.md",
    }  # fmt: skip
    assert main(["train", "hf", base, "--stream.kind", "ordered", "--out", str(folder / "o")]) == 2
    assert "stream.kind 'ordered' needs a model with a state of its own" in capsys.readouterr().err


def test_new_models_take_any_tokenizer_and_kind(folder: Path, capsys: Captured) -> None:
    small = ["--model.hidden-size", "16", "--overwrite"]
    assert trained(folder, "--tokenizer", "bpe:300", "--stream.length", "96", *small) == 0
    assert load_senri(folder / "out" / "last").config.vocab_size <= 304
    assert (
        trained(
            folder, "--stream.kind", "needles", "--task.lengths", "[16,32]", "--task.max-rows", "4", *small
        )
        == 0
    )
    said = capsys.readouterr().out
    assert f"data: {folder / 'text.txt'}: training 1 documents" in said
    assert "coverage tokens 1.0" in said


def refused(capsys: Captured, *words: str) -> str:
    capsys.readouterr()
    assert main(["train", *words]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_training_refuses_in_one_sentence(folder: Path, capsys: Captured) -> None:
    out = ["--out", str(folder / "out")]
    assert refused(capsys, "senri", "--train.stepz", "3").endswith("did you mean '--train.steps'?")
    assert "no file or folder none.txt" in refused(capsys, "senri", "--data", "none.txt", *out)
    bad = folder / "bad.yaml"
    bad.write_text("train:\n  steps: many\n")
    assert "train.steps" in refused(capsys, "senri", "--config", str(bad), *out)
    bad.write_text("train:\n  stops: 3\n")
    assert "unknown key 'train.stops'; did you mean 'train.steps'?" in refused(
        capsys, "senri", "--config", str(bad)
    )
    rows = folder / "rows.jsonl"
    rows.write_text('{"body": "x"}\n')
    message = refused(capsys, "senri", "--data", str(rows), *out)
    assert "rows.jsonl:1 lacks the column 'text' with a text; it has body" in message
    assert "validation must not be 'auto_split'" in refused(
        capsys, "senri", "--data", "sentences", "--source.validation", "auto_split", *out
    )
    (folder / "short.txt").write_text("A line.\n" * 20)
    short = ["--data", str(folder / "short.txt"), "--stream.length", "40", "--train.eval-steps", "1"]
    assert "the validation text is too short: length 40 needs 41" in refused(capsys, "senri", *short, *out)
    assert refused(capsys, "senri", "--launch", "0", *out).endswith("launch must be at least 1, got 0")
    assert "train.patience must be at least 1 and needs train.eval_steps" in refused(
        capsys, "senri", "--train.patience", "3", *out
    )
    assert refused(capsys, "senri", "--tokenizer", "words:40", "--data", "sentences", *out).endswith(
        "--stream.needles 0 trains without needles"
    )


def test_an_unfinished_run_is_not_overwritten(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    small = ("--model.hidden-size", "16", "--train.save-steps", "1")
    assert trained(folder, *small) == 0
    (folder / "out" / "last").rename(folder / "gone")
    capsys.readouterr()
    assert trained(folder, *small) == 2
    assert "holds an unfinished run at step 3: --resume goes on from it, --overwrite begins anew" in (
        capsys.readouterr().err
    )
    assert trained(folder, *small, "--resume", "--model.layers", "3") == 2
    assert "resume needs the same model.layers as before, which was 2, got 3" in capsys.readouterr().err
    (folder / "text.txt").write_text("another text altogether.\n" * 100)
    assert trained(folder, *small, "--resume") == 2
    assert "resume needs the same train text as before" in capsys.readouterr().err
    assert trained(folder, *small, "--overwrite") == 0
    assert trained(folder, *small, "--resume") == 0
    assert "is finished: its model is in" in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nexit\n"))
    assert main(["chat", str(folder / "out" / "last"), "--max-new-tokens", "4"]) == 0
