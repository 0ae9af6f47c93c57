"""The page of recall and the harness's rows: figures as measured, failures named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure

from newllm.cli import main
from newllm.cli.eval_harness import harness_rows
from newllm.cli.eval_recall import pictures
from newllm.data.tokenizer import byte_tokenizer
from newllm.evaluation.recall_report import recall_report
from newllm.models.files import save_model
from tests.evaluation_parts import byte_senri

CELL = {
    "suite": "passkey", "model": "m", "memory": "on", "weights": "w", "length": 1024, "depth": 0.5,
    "samples": 10, "score": 1.0, "ci95": [0.72, 1.0], "seed": 0, "commit": "abcdefghij", "window": 16,
    "parameters": 1234,
}  # fmt: skip
FOUND: dict[str, Any] = {
    "results": {"niah_single_1": {"alias": "a", "512,none": 0.75, "512_stderr,none": 0.1, "1024,none": -1.0}},
    "n-samples": {"niah_single_1": {"original": 9, "effective": 4}},
}


def test_page_has_every_cell_and_names_what_failed() -> None:
    worse = {**CELL, "length": 2048, "depth": 1.0, "score": 0.5, "ci95": [0.24, 0.76]}
    second = {**CELL, "seed": 1, "score": 0.9, "ci95": [0.6, 0.98]}
    page = recall_report([CELL, worse, second, {**CELL, "suite": "mqar", "depth": None}], ["rows.jsonl"])
    assert "`rows.jsonl`" in page
    assert "| 1,024 | 0.950 [0.60, 1.00] |  | 20 |" in page
    assert "| 2,048 |  | 0.500 [0.24, 0.76] | 10 |" in page
    assert "1,234 parameters, 16 tokens of window, seeds 0, 1, commit abcdefg." in page
    assert "2 of 3 cells with a memory are below 0.99" in page
    assert "* passkey of m at depth 1: 0.50 (2,048 tokens)" in page
    assert "| mqar | m | on | 1024 | 10 | 1.000 | 0.720 to 1.000 | 0 |" in page
    assert "None of 1 cells" in recall_report([CELL], ["rows.jsonl"])


def test_page_has_ablations_and_capacities_in_tables_of_their_own() -> None:
    whole = {
        **CELL, "variant": "whole", "preset": "quick", "steps": 1500, "model": "recall-quick-whole-0"
    }  # fmt: skip
    worse = {**whole, "variant": "write-gate", "depth": 0.5, "score": 0.5, "ci95": [0.24, 0.76]}
    near = {**worse, "depth": 1.0, "score": 1.0}
    pairs = {
        **CELL,
        "suite": "capacity",
        "memory": "delta",
        "depth": None,
        "width": 128,
        "state_bytes": 66048,
    }
    rows = [
        whole,
        {**worse, "depth": 0.0, "score": 1.0},
        worse,
        near,
        {**pairs, "length": 96, "score": 0.976},
    ]
    page = recall_report(rows, ["rows.jsonl"])
    assert "## By length" not in page
    assert "### Preset quick" in page
    assert "| variant | steps trained | seeds | passkey, memory on, 1,024 |" in page
    assert "| whole | 1,500 | 0 | 1.000 [0.72, 1.00] |" in page
    assert "| write-gate | 1,500 | 0 | 0.750 [0.24, 0.76] |" in page
    assert "| memory | width | bytes | 96 |" in page
    assert "| m, delta | 128 | 66,048 | 0.976 |" in page


def test_eval_report_writes_page_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = {**CELL, "suite": "capacity", "model": "untrained", "depth": None, "width": 8, "state_bytes": 288}
    variant = {**CELL, "variant": "delta", "preset": "quick", "suite": "passkey_border"}
    rows = "".join(f"{json.dumps(row)}\n" for row in (CELL, pairs, variant))
    (tmp_path / "rows.jsonl").write_text(rows)
    words = ["eval", "report", "--out", str(tmp_path / "docs" / "recall.md"), "--rows"]
    assert main([*words, f"[{tmp_path / 'rows.jsonl'}]"]) == 0
    assert "(recall-passkey.png)" in (tmp_path / "docs" / "recall.md").read_text()
    # A variant of the recipe has a line in a table, no picture.
    drawn = {path.name for path in (tmp_path / "docs").glob("*.png")}
    assert drawn == {"recall-passkey.png", "recall-capacity.png"}
    assert all((tmp_path / "docs" / name).read_bytes()[1:4] == b"PNG" for name in drawn)
    assert main([*words, "[none.jsonl]"]) == 2
    assert "rows must name at least one file that exists" in capsys.readouterr().err


def test_pictures_hold_the_mean_of_seeds_and_keep_windows_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def figure(results: dict[str, Any], title: str) -> Figure:
        drawn.append((title, results))
        return Figure()

    monkeypatch.setattr("newllm.evaluation.plots.recall_figure", figure)
    rows = [CELL, {**CELL, "seed": 1, "score": 0.5}, {**CELL, "window": 32}, {**CELL, "suite": "qa1"}]
    names = [Path(path).name for path in pictures(rows, str(tmp_path), "recall-")]
    assert names == ["recall-passkey-16.png", "recall-passkey-32.png", "recall-qa1.png"]
    assert drawn[:2] == [
        ("Recall: passkey", {"window": 16, "recall": {"memory on": {"64": {"0.5": 0.75}}}}),
        ("Recall: passkey", {"window": 32, "recall": {"memory on": {"32": {"0.5": 1.0}}}}),
    ]


def test_harness_rows_leave_out_what_was_not_measured() -> None:
    (row,) = harness_rows(FOUND, {"model": "m"})
    assert (row["suite"], row["length"], row["samples"], row["score"]) == (
        "lm_eval:niah_single_1",
        512,
        4,
        0.75,
    )
    low, high = row["ci95"]
    assert 0.55 < low < 0.56 < 0.94 < high < 0.95


def test_intervals_of_perplexities_go_beyond_one() -> None:
    figures = {
        "perplexity,none": 20.0,
        "perplexity_stderr,none": 0.5,
        "acc,none": 0.9,
        "acc_stderr,none": 0.1,
    }
    found = {
        "results": {"lambada": figures},
        "n-samples": {"lambada": {"effective": 10}},
        "higher_is_better": {"lambada": {"perplexity": False, "acc": True}},
    }
    perplexity, accuracy = harness_rows(found, {"model": "m"})
    assert perplexity["ci95"] == pytest.approx((19.020018, 20.979982))
    assert accuracy["ci95"] == pytest.approx((0.7040036, 1.0))


def test_eval_harness_asks_the_harness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        asked.update(options)
        return FOUND

    monkeypatch.chdir(tmp_path)
    save_model(byte_senri(), byte_tokenizer(), tmp_path / "tiny")
    words = [
        "eval",
        "tiny",
        "--harness",
        "lm_eval",
        "--tasks",
        "niah_single_1,ruler_vt",
        "--lengths",
        "512,1k",
    ]
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(words) == 2
    assert "pip install 'newllm[eval]'" in capsys.readouterr().err
    stand_in = ModuleType("lm_eval")
    stand_in.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    models = SimpleNamespace(HFLM=lambda **options: options)
    monkeypatch.setitem(sys.modules, "lm_eval", stand_in)
    monkeypatch.setitem(sys.modules, "lm_eval.models", ModuleType("lm_eval.models"))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", models)
    assert main([*words, "--limit", "4"]) == 0
    assert (asked["tasks"], asked["limit"]) == (["niah_single_1", "ruler_vt"], 4)
    assert asked["metadata"]["max_seq_lengths"] == [512, 1024]
    assert asked["model"]["max_length"] > 1024
    (row,) = [json.loads(line) for line in (tmp_path / "runs" / "recall.jsonl").read_text().splitlines()]
    assert (row["model"], row["score"]) == ("tiny", 0.75)
