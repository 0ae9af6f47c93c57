"""``newllm bench`` as it measures: rows, gate, floors, turns, on shapes of a moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from source_tree import ROOT
from torch import Tensor

from newllm.cli import main
from newllm.files import replace_file
from newllm.measuring import (
    SUITES,
    __main__ as module,
    peers,
    profiling,
    session,
    suites,
    sweeping,
    tables,
)
from newllm.measuring.entries import COMPILED, OURS, REFERENCE, Prepared, call_of
from newllm.measuring.loops import segment_loop
from newllm.measuring.ours import layer_inputs
from newllm.measuring.rows import read_rows, write_rows
from newllm.measuring.shapes import DECODES, LAYERS
from newllm.measuring.timing import Clock
from newllm.measuring.work import BOTH, FORWARD, Ceilings, Work, attention, layer, memory, token, write
from newllm.reference import infini
from newllm.reference.context import sequential_sweep
from newllm.testing import CASES, assert_no_worse, mapped
from tests.bench_rows import CPU, FIELDS, SITE, TINY, measured, row, shrink


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Suites of a moment."""
    shrink(monkeypatch)


# Rows


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_writes_its_rows(tiny: None, tmp_path: Path, suite: str) -> None:
    found = measured(suite, tmp_path, commit="0123abcd")
    lines = (tmp_path / f"{suite}.jsonl").read_text(encoding="utf-8").splitlines()
    assert read_rows(tmp_path / f"{suite}.jsonl") == found.rows
    assert len(lines) == len(found.rows) > 0
    for line in map(json.loads, lines):
        assert line.keys() >= FIELDS
        assert line["suite"] == suite
        assert line["commit"] == "0123abcd"
        assert line["error"] is None
        assert line["ms"] > 0
        assert line["floor_ms"] > 0
        assert line["rounds"] == 2
    assert len({(each.run, each.date, each.device) for each in found.rows}) == 1
    assert len({each.key for each in found.rows}) == len(found.rows)
    assert {each.op for each in found.rows} >= set(suites.SUITES[suite].ops)


def test_layer_rows_on_a_cpu_say_what_is_left_out(tiny: None, tmp_path: Path) -> None:
    found = measured("layer", tmp_path)
    own = [each for each in found.rows if each.impl in OURS]
    variants = {"linear", "linear continued", "delta", "delta continued"}
    assert {(each.variant, each.impl) for each in own} == {
        *((variant, REFERENCE) for variant in variants),
        ("linear", COMPILED),
    }
    assert {each.impl for each in found.rows} - {*OURS} == {"SDPA", "segment loop"}
    assert {each.direction for each in found.rows} == {FORWARD, BOTH}
    assert {each.detail for each in found.rows if each.impl == "SDPA"} <= {"FLASH_ATTENTION", "MATH"}
    assert found.left_out == [
        "infini_attention, fused: there is no fused implementation for device type 'cpu'",
        *(f"{title}: needs a cuda device" for title in ("FlexAttention", "FA4", "fla linear attention")),
        *(f"{title}: needs a cuda device" for title in ("fla delta rule", "compiled segment loop")),
    ]


def test_peers_that_are_not_installed_are_named() -> None:
    missing = peers.PEERS["fa4"]._replace(device=None, module="no_such_package.inner")
    assert peers.refusal(missing, CPU) == "FA4: no_such_package.inner is not installed"
    assert peers.refusal(peers.PEERS["sdpa"], CPU) is None
    with pytest.raises(ValueError, match=r"peers must be all, none or some of flex, .*; got 'flux'"):
        peers.chosen("flux", ("flex",))
    assert peers.chosen("flex, sdpa", ("flex", "fa4", "sdpa")) == ("flex", "sdpa")


def test_a_peer_that_fails_leaves_a_row_with_its_error(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_: Any) -> None:
        raise TypeError("no kernel\nfor this size")

    monkeypatch.setattr(peers, "segment_loop", broken)
    found = measured("layer", tmp_path)
    failed = [each for each in found.rows if each.error is not None]
    assert {each.impl for each in failed} == {"segment loop"}
    assert {(each.ms, each.error) for each in failed} == {(None, "TypeError: no kernel for this size")}
    assert all(each.ms for each in found.rows if each not in failed)
    assert "failed: infini_attention, linear, tiny fwd, segment loop: TypeError" in "\n".join(
        tables.notes(found)
    )


def test_shapes_and_variants_can_be_picked(tiny: None, tmp_path: Path) -> None:
    found = measured("layer", tmp_path, peers="none", variants=["delta"])
    assert {each.variant for each in found.rows} == {"delta"}
    with pytest.raises(ValueError, match="shapes must be some of tiny; got 8B"):
        measured("layer", tmp_path, shapes=["8B"])
    with pytest.raises(ValueError, match=r"variants must be some of delta, .*; got gamma"):
        measured("layer", tmp_path, variants=["gamma"])
    with pytest.raises(ValueError, match=r"suite must be one of layer, .*; got 'later'"):
        measured("later", tmp_path)


def test_a_shape_measured_apart_leaves_the_others(tiny: None, tmp_path: Path) -> None:
    once = partial(measured, "window", tmp_path, peers="none", seconds=0)
    path = once().path
    write_rows(path, [replace(row, shape="other") for row in read_rows(path)])
    once(shapes=["tiny"])
    assert {row.shape for row in read_rows(path)} == {"other", "tiny"}
    once()
    assert {row.shape for row in read_rows(path)} == {"tiny"}


def test_rows_with_other_fields_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "layer.jsonl"
    path.write_text(json.dumps({**asdict(row()), "speed": 1}) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: fields that are missing or unknown: speed"):
        read_rows(path)


def test_rows_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "layer.jsonl"
    write_rows(path, [row(ms=1.0)])

    def interrupted(file: Path) -> None:
        file.write_text("half a", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(path, interrupted)
    assert [each.ms for each in read_rows(path)] == [1.0]
    assert list(path.parent.iterdir()) == [path]


def test_the_loops_compute_the_recurrence() -> None:
    params = sweeping.sweep_inputs(TINY, SITE.source())
    expected, _, _ = sequential_sweep(**mapped(Tensor.double, params))
    baseline, _, _ = sequential_sweep(**params)
    for loop, hoisted in ((sweeping.concatenated_loop, False), (sweeping.hoisted_loop, True)):
        assert_no_worse(loop(**sweeping._loop_inputs(TINY, SITE, hoisted)), expected, baseline)


# The gate


def test_a_red_gate_prints_no_number(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = CASES["window_attention"]

    def wrong(*arguments: Any, **options: Any) -> Any:
        return right.public(*arguments, **options) * 1.01

    monkeypatch.setitem(CASES, "window_attention", replace(right, public=wrong))
    monkeypatch.setattr(Clock, "race", lambda *_, **__: pytest.fail("something was timed"))
    out = tmp_path / "out"
    assert main(["bench", "window", "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert "results are wrong, so nothing is timed: window_attention, window, reference, tiny:" in said.err
    assert " ms" not in said.out
    assert not out.exists()
    assert module.main(["window", "--out", str(out)]) == 2


def test_the_gate_judges_gradients(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = CASES["memory_retrieve"]

    def wrong(**options: Any) -> Any:
        return right.public(**{**options, "q": options["q"] * 2 - options["q"].detach()})

    monkeypatch.setitem(CASES, "memory_retrieve", replace(right, public=wrong))
    with pytest.raises(session.RedGate, match="gradient of q"):
        measured("memory", tmp_path)


def test_the_benchmarks_refuse_to_time_a_wrong_operator(tmp_path: Path) -> None:
    broken = """
from dataclasses import replace
from newllm.testing import CASES
right = CASES["memory_retrieve"]
wrong = lambda **options: right.public(**options) * 1.01
CASES["memory_retrieve"] = replace(right, public=wrong)
"""
    (tmp_path / "broken.py").write_text(broken, encoding="utf-8")
    chosen = ["-p", "broken", "-k", "memory_retrieve and not compiled"]
    words = [*chosen, "-p", "no:cacheprovider", "--benchmark-only", "-q", "benchmarks"]
    # A worker of several would pass on that it is one, and benchmarks refuse to run in those.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    assert "memory_retrieve, paper: the results are wrong, so nothing is timed: out: error" in done.stdout
    assert "2 failed" in done.stdout
    assert "Median" not in done.stdout


def test_the_gate_sees_the_borders_of_every_shape() -> None:
    for shape in (*LAYERS["cuda"], *LAYERS["cpu"]):
        judged = shape.slice()
        assert judged.tokens > 2 * shape.window
        assert judged.tokens % shape.segment
        assert judged._replace(batch=shape.batch, tokens=shape.tokens) == shape


# Floors and ceilings


def test_floors_are_the_larger_of_both_ceilings() -> None:
    ceilings = Ceilings(flops=1e12, bandwidth=1e11)
    assert ceilings.floor_ms(Work(2e9, 1e7)) == 2.0
    assert ceilings.floor_ms(Work(2e8, 1e9)) == 10.0


def test_work_counts_what_a_computation_touches() -> None:
    """Pairs and elements counted one by one."""
    shape = TINY
    distance = torch.arange(21)[:, None] - torch.arange(21)
    pairs = int(((distance >= 0) & (distance < 8)).sum())
    window = attention(shape, FORWARD, 8, 4)
    assert window.flops == 2 * 4 * pairs * 2 * 2 * 8
    assert window.bytes == 4 * 21 * 8 * 2 * (4 + 2 + 2 + 4)
    assert attention(shape, FORWARD, None, 4).flops == 2 * 4 * (21 * 22 // 2) * 2 * 2 * 8
    assert attention(shape, BOTH, 8, 4).flops == 3.5 * window.flops
    read = memory(shape, FORWARD, filled=False, itemsize=4).flops - write(shape, FORWARD, 4).flops
    assert read == 2 * 4 * (21 - 8) * 2 * 8 * 8
    assert layer(shape, FORWARD, filled=True, itemsize=4).bytes == window.bytes
    assert token(DECODES["cuda"][0], 2).bytes == token(DECODES["cuda"][1], 2).bytes


def test_the_memory_adds_reading_and_writing_to_the_window() -> None:
    """Every query head reads; writing is shared by four."""
    shape = LAYERS["cuda"][0]
    window = attention(shape, FORWARD, shape.window, 2)
    assert abs(window.flops / 0.55e12 - 1) < 0.02
    added = layer(shape, FORWARD, filled=True, itemsize=2).flops - window.flops
    assert added == 2 * 128 * 128 * 32768 * (32 + 8)


# Turns


def test_calls_take_turns() -> None:
    order: list[str] = []
    calls = {name: partial(order.append, name) for name in "abc"}
    timed = Clock(CPU).race(calls, seconds=0, rounds=(3, 9))
    assert "".join(order) == "abcabcabc"
    assert {name: each.rounds for name, each in timed.items()} == {"a": 3, "b": 3, "c": 3}


def test_rounds_end_with_the_time_or_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    Clock(CPU).race({"a": lambda: order.append("a")}, seconds=60, rounds=(1, 4))
    assert len(order) == 4


def test_the_median_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([5.0, 1.0, 100.0, 2.0, 3.0])
    monkeypatch.setattr(Clock, "once", lambda self, call: (next(times), 0.5))
    (timed,) = Clock(CPU).race({"a": lambda: None}, seconds=0, rounds=(5, 5)).values()
    assert (timed.ms, timed.low, timed.high, timed.host_ms) == (3.0, 2.0, 5.0, 0.5)


def test_backward_reaches_every_input_but_constants() -> None:
    inputs = layer_inputs(TINY, SITE.source(), rule="linear", continued=True)
    case = CASES["infini_attention"]
    slopes = call_of(Prepared(case.public, inputs, ("rope",)), BOTH)()
    learned = ("q", "k", "v", "beta", "scale", "bias", "matrix", "norm", "keys", "values")
    assert len(slopes) == len(learned)
    assert all(slope is not None and slope.any() for slope in slopes)
    out, state = call_of(Prepared(case.public, inputs, ("rope",)), FORWARD)()
    assert not out.requires_grad
    assert state.position.tolist() == [2 * 8 + 2 + 21] * 2


def test_the_segment_loop_computes_the_layer() -> None:
    inputs = layer_inputs(TINY, SITE.source(), rule="linear", continued=False)
    loop = peers._loop_inputs(TINY, SITE)
    baseline, _ = infini.infini_attention(**inputs)
    wide = {name: x.double() if torch.is_tensor(x) else x for name, x in loop.items()}
    oracle = segment_loop(**wide, window=8, segment=8)
    assert_no_worse(baseline, oracle, segment_loop(**loop, window=8, segment=8))


# Profiles


def test_a_profile_says_where_time_goes_and_writes_nothing(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profiling, "_CALLS", (2, 2))
    assert module.main(["layer", "--peers", "sdpa", "--variants", "delta", "--profile"]) == 0
    told = capsys.readouterr().out.splitlines()
    titles = [line for line in told if line.endswith(("every kernel", "every function"))]
    assert [*dict.fromkeys(title.rpartition(":")[0] for title in titles)] == [
        f"{what}, tiny, {direction}"
        for direction in (FORWARD, BOTH)
        for what in ("infini_attention, delta, reference", "full attention, causal, SDPA")
    ]
    head = told.index("full attention, causal, SDPA, tiny, fwd: every kernel")
    name, times, each, whole = told[head + 2].split()
    assert name.startswith("aten::") and float(times) >= 1 and 0 < float(each) <= float(whole)
    # What is printed is rounded to a tenth.
    assert float(times) * float(each) == pytest.approx(float(whole), abs=0.05 * float(times) + 0.1)
    everything = next(line for line in told[head:] if line.startswith("all "))
    assert float(whole) <= float(everything.split()[-1])
    assert any("infini.py" in line for line in told) and not list(tmp_path.iterdir())


def test_a_profile_of_what_there_is_not_is_refused(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert module.main(["layer", "--shapes", "9B", "--profile"]) == 2
    assert "shapes must be some of tiny; got 9B" in capsys.readouterr().err
