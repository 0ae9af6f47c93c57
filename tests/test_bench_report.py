"""``newllm bench`` as it tells: bars, tables, the picture, the README, other revisions."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from source_tree import ROOT

from newllm.cli import bench, main
from newllm.measuring import (
    SUITES,
    bars,
    peers,
    report,
    revisions,
    session,
    suites,
    tables,
)
from newllm.measuring.entries import FUSED, Entry
from newllm.measuring.ours import Site
from newllm.measuring.pictures import layer_figure
from newllm.measuring.rows import Row, read_rows, write_rows
from newllm.measuring.sweep_pictures import sweep_figure
from tests.bench_rows import SITE, TINY, layer_rows, row, shrink


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Suites of a moment."""
    shrink(monkeypatch)


# Bars, tables, the picture, the README


def test_bars_are_those_that_were_asked_for() -> None:
    asked = {suite: [(bar.must, bar.aim) for bar in levels] for suite, levels in bars.BARS.items()}
    assert set(asked) == set(SUITES) == set(suites.SUITES)
    assert asked["decode"] == [(8, 5), (1.02, None)]
    assert asked["memory"] == [(0.8, 0.9)]
    assert asked["long"] == [(200, 400)]
    lengths = [(0.98, None), (1.0, 1.5), (3, 10), (8, 20), (1.0, 1.5)]
    assert asked["serve"] == [*lengths, (6, 3), (4, None), (20, None)]
    assert {(9, 13), (4.5, 6), (8, 11), (1.0, None), (None, 1.0), (1.2, 1.0), (1.35, 1.15)} == {
        *asked["layer"]
    }


def test_training_steps_stand_in_a_table() -> None:
    where = {"device": "a GPU", "dtype": "bfloat16", "torch": "2", "triton": "3"}
    shared = {**where, "shape": "tiny", "window": 16, "commit": "0123456789abcdef", "date": "2026-01-02T03"}
    found = {"tokens_per_second": 1234.5, "gib": 1.26, "attention_share": 0.25}
    failed = dict.fromkeys(found)
    rows = [
        {**shared, "impl": "newllm", "tokens": 2048, **found},
        {**shared, "impl": "full", "tokens": 2048, **failed},
        {**shared, "impl": "newllm", "tokens": 4096, **found, "gib": None},
    ]
    _, table, origin = report.training_steps(rows)
    assert table.splitlines()[2:] == ["| 2,048 | 1,234 (1.3 GiB, 25%) |  |", "| 4,096 | 1,234 |  |"]
    assert "commit 0123456789ab, 2026-01-02" in origin


def standing(bar: bars.Bar, own: dict[str, Any], other: dict[str, Any]) -> tuple[float | None, str, str]:
    keys = ("op", "impl", "variant", "shape", "direction")
    rows = {
        key: row(**dict(zip(keys, key, strict=True)), **figures)
        for key, figures in ((bar.other, other), (bar.own, own))
    }
    each = bars.Standing(bar, bar.value(rows))
    return each.value, each.verdict(bar.must), each.verdict(bar.aim)


@pytest.mark.parametrize(
    ("measure", "must", "aim", "own", "other", "found"),
    [
        ("time", 1.0, 0.5, {"ms": 0.75}, {"ms": 1.0}, (0.75, "met", "not met")),
        ("speed", 8, 11, {"ms": 1.0}, {"ms": 4.0}, (4.0, "not met", "not met")),
        ("memory", 1.2, 1.0, {"gib": 2.0}, {"gib": 2.0}, (1.0, "met", "met")),
        ("bandwidth", 0.7, 0.8, {"ms": 4.0, "bytes": 3}, {"ms": 1.0, "bytes": 1}, (0.75, "met", "not met")),
        ("seconds", 6, 3, {"ms": 4500.0}, {"ms": 4500.0}, (4.5, "met", "not met")),
        ("ms", 20, None, {"ms": 21.0}, {"ms": 21.0}, (21.0, "not met", "")),
        ("gib", 4, None, {"gib": 0.5}, {"gib": 0.5}, (0.5, "met", "")),
        ("time", 1.0, None, {"ms": None}, {"ms": 1.0}, (None, "", "")),
    ],
)  # fmt: skip
def test_bars_are_met_or_not(
    measure: str, must: float, aim: float, own: dict[str, Any], other: dict[str, Any], found: object
) -> None:
    first, second = row().key, row(impl="FA4").key
    assert standing(bars.Bar(measure, first, second, must, aim), own, other) == found


def test_every_bar_names_rows_that_a_suite_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt key would leave a bar out in silence."""
    monkeypatch.setattr("newllm.measuring.ours.implementations", lambda *_: {FUSED: None})
    fused = {"infini_decode": {"cuda"}, "context_sweep": {"cuda", "cpu"}}
    monkeypatch.setattr("newllm.measuring.decoding.backends.FUSED", fused)
    sites = Site(torch.device("cuda"), torch.bfloat16), Site(torch.device("cpu"), torch.float32)
    for name, suite in suites.SUITES.items():
        makers = {peer: peers.PEERS[peer].entries for peer in suite.peers}
        made = {
            (entry.op, entry.impl, entry.variant, entry.shape.name, direction)
            for site in sites
            for direction, group in suites.groups(suite, site, makers)
            for entry in group
        }
        assert {key for bar in bars.BARS[name] for key in (bar.own, bar.other)} <= made


def test_tables_show_times_and_bars_last() -> None:
    found = session.Report("layer", layer_rows(), ["fla: fla is not installed"], Path("layer.jsonl"))
    *times, last = tables.grids(found)
    assert [grid.title for grid in times] == ["layer, 8B", "layer, SmolLM"]
    assert times[0].columns == ("what", "by", "fwd ms", "x floor", "GiB", "fwd+bwd ms", "x floor", "GiB")
    assert ("window_attention, window", "FA4", "1.040", "1.30", "1.000", "4.160", "5.20", "1.000") in times[
        0
    ].lines
    flex = ("infini_attention, linear, 8B fwd", "FlexAttention, window alone", "0.833 x the time")
    assert (*flex, "≤ 1", "met", "", "") in last.lines
    fa4 = ("infini_attention, linear, 8B fwd", "FA4, window alone", "1.35 x the time")
    assert (*fa4, "", "", "≤ 1", "not met") in last.lines
    assert "left out: fla: fla is not installed" in tables.notes(found)
    widths = {len(line) for line in last.plain().splitlines()[1:]}
    assert max(widths) < 140
    assert last.markdown().splitlines()[1] == "| --- | --- | ---: | ---: | ---: | ---: | ---: |"


def test_the_picture_shows_every_time(tmp_path: Path) -> None:
    figure = layer_figure(layer_rows())
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == ["8B, fwd", "8B, fwd+bwd", "SmolLM, fwd", "SmolLM, fwd+bwd"]
    first = figure.axes[0]
    assert [text.get_text() for text in first.texts] == [
        "1.040",
        "1.400",
        "1.450",
        "1.600",
        "1.680",
        "14.0",
        "15.6",
    ]
    assert [label.get_text() for label in first.get_yticklabels()][:2] == [
        "FA4: window alone",
        "newllm: Infini layer, linear",
    ]
    bench._draw("layer", tmp_path / "layer.png", layer_rows())
    assert (tmp_path / "layer.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_the_sweeps_has_steps_and_iterations() -> None:
    sizes = {"op": "context_sweep", "tokens": 100, "heads": 1, "kv_heads": 1}
    steps = [
        row(**sizes, variant=variant, shape=f"d{width} B{batch}", width=width, batch=batch, ms=width / 768)
        for variant in ("sequential", "block")
        for width, batch in ((128, 1), (768, 1), (768, 64))
    ]
    loops = [
        row(**sizes, impl="eager loop", variant="sequential", shape="d768 B1", width=768, batch=1, ms=9.0)
    ]
    others = [
        row(
            **sizes,
            impl="reference",
            variant=f"jacobi {k}",
            shape="convergence",
            detail=f"jacobi, {k} sweeps, rho {r}",
        )
        for k, r in ((9, 0.5), (40, 0.9))
    ]
    width, batch, sweeps = sweep_figure(steps + loops + others).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in width.get_lines()}
    assert lines["newllm fused, sequential"] == [[128, 1e3 / 6 / 100], [768, 10.0]]
    assert lines["eager loop"] == [[768, 90.0]]
    assert batch.get_lines()[0].get_xydata().tolist() == [[1, 10.0], [64, 10.0]]
    assert sweeps.get_lines()[0].get_xydata().tolist() == [[0.5, 9.0], [0.9, 40.0]]


def test_report_rewrites_the_block_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    words = ["--results", str(tmp_path), "--readme", str(readme), "--pictures", str(tmp_path)]
    assert main(["bench", "report", *words]) == 0
    assert "No rows have been recorded yet." in readme.read_text(encoding="utf-8")
    write_rows(tmp_path / "layer.jsonl", layer_rows())
    assert main(["bench", "report", *words]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{report.BEGIN}\n| what | by | 8B fwd, ms | 8B fwd+bwd, ms |")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "| window_attention, window | FA4 | 1.040 | 4.160 | 0.3432 | 1.373 |" in text
    assert "`benchmarks/results/layer.jsonl`: a GPU, bfloat16, torch 2.11" in text
    assert (tmp_path / "bench-layer.png").is_file()
    readme.write_text("no markers", encoding="utf-8")
    assert main(["bench", "report", *words]) == 2


def test_the_readme_block_is_made_from_the_rows_on_record() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.partition(f"{report.BEGIN}\n")[2].partition(f"\n{report.END}")[0]
    assert block == report.text(ROOT / "benchmarks" / "results")


# Commands and other revisions


def test_bench_prints_tables_and_draws(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "layer", "--peers", "sdpa", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "layer, tiny" in said
    assert "left out: infini_attention, fused" in said
    assert (tmp_path / "layer.png").is_file()
    assert len({each.impl for each in read_rows(tmp_path / "layer.jsonl")}) == 3


def test_the_module_measures_without_jsonargparse(tmp_path: Path) -> None:
    blocked = "sys.modules.update(dict.fromkeys(('jsonargparse', 'rich', 'transformers', 'matplotlib')))"
    words = ["decode", "--device", "cpu", "--shapes", "small 4K", "--seconds", "0", "--commit", "abc"]
    code = f"import sys; {blocked}; from newllm.measuring.__main__ import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "infini_decode, linear" in done.stdout
    assert {each.commit for each in read_rows(tmp_path / "decode.jsonl")} == {"abc"}


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """A repository whose newllm.measuring writes the rows of its commit; the next commit's is an error."""
    root = tmp_path / "toy"
    package = root / "newllm" / "measuring"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()

    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True)

    def commit(code: str) -> None:
        (package / "__main__.py").write_text(code, encoding="utf-8")
        git("add", ".")
        git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "Change")

    git("init", "-q")
    return commit


def test_another_revision_is_measured_in_a_worktree(toy: Callable[[str], None], tmp_path: Path) -> None:
    line = json.dumps(asdict(row(ms=2.0)))
    toy(
        "import pathlib, sys\n"
        "assert sys.argv[1:4] == ['layer', '--peers', 'none'] and sys.argv[6:] == ['--seconds=1'], sys.argv\n"
        "out = pathlib.Path(sys.argv[5]); out.mkdir()\n"
        f"(out / 'layer.jsonl').write_text({line!r})\n"
    )
    toy("raise SystemExit('broken today')")
    root = tmp_path / "toy"
    base = revisions.rows_at("HEAD~1", "layer", ["--seconds=1"], root=root)
    assert [each.ms for each in base] == [2.0]
    grid = revisions.comparison([row(ms=1.5), row(impl="FA4")], base, "HEAD~1")
    assert grid.columns == ("what", "by", "ms", "ms at HEAD~1", "ratio")
    assert grid.lines == [("infini_attention, linear, 8B fwd", "newllm fused", "1.500", "2.000", "0.750")]
    with pytest.raises(RuntimeError, match="'layer' cannot be measured at HEAD: broken today"):
        revisions.rows_at("HEAD", "layer", root=root)
    with pytest.raises(ValueError, match="no such revision"):
        revisions.rows_at("nowhere", "layer", root=root)
    trees = subprocess.run(
        ["git", "-C", str(root), "worktree", "list"], capture_output=True, text=True, check=True
    )
    assert len(trees.stdout.splitlines()) == 1


def test_bench_shows_another_revision_beside_this_one(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def earlier(*arguments: Any) -> list[Row]:
        asked.append(arguments)
        return read_rows(tmp_path / "window.jsonl")

    monkeypatch.setattr(revisions, "rows_at", earlier)
    options = ["--base", "main~3", "--seconds", "0", "--device", "cpu"]
    assert main(["bench", "window", "--out", str(tmp_path), *options]) == 0
    assert asked == [("main~3", "window", ["--device=cpu", "--seconds=0.0"])]
    assert "beside main~3" in capsys.readouterr().out


def test_entries_have_names_of_their_own() -> None:
    made: list[Entry] = [*suites.SUITES["layer"].makers[0](TINY, SITE)]
    assert len({entry.name for entry in made}) == len(made)
