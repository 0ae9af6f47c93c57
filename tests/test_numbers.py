"""Samples of the long checks of numbers, and inputs at the ends of what may come."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from newllm import ops
from newllm.testing import CASES
from tests import number_parts
from tests.fuzz_families import KINDS, cut, drawn
from tests.number_parts import CASES_A_PART, FUZZ, judge_case, look
from tests.reliability_parts import Options, Verdict, in_parts, judges, summary
from tests.row_families import FAMILIES, LARGE, SMALL, TURNS, Row, Sizes, group, huge, share

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32

# The interpreter takes a minute for all of them, a GPU seconds.
FULL = () if torch.cuda.is_available() else (pytest.mark.slow,)


# Rows and cases


# The last four once failed.
@pytest.mark.parametrize(
    "number", [100, 101, 102, 140, 141, 158, 159, 172, 173, 187, 188, 197, 7322, 9280, 3797, 6199]
)
def test_fuzz_cases_hold(number: int, fused_device: str) -> None:
    """A sample of each kind; the cases are the same everywhere."""
    verdict = judge_case(number)
    assert verdict.failure is None, verdict


@pytest.mark.slow
@pytest.mark.parametrize("part", range(FUZZ // CASES_A_PART))
def test_all_fuzz_cases_hold(part: int, fused_device: str) -> None:
    found = [judge_case(number) for number in range(part * CASES_A_PART, (part + 1) * CASES_A_PART)]
    assert [verdict for verdict in found if verdict.failure] == []


def test_every_kind_of_case_is_drawn_in_every_hundred() -> None:
    kinds = [drawn(number).family.split()[0] for number in range(300, 400)]
    assert {kind: kinds.count(kind) for kind in KINDS} == KINDS
    assert str(drawn(7)) == str(drawn(7)) != str(drawn(107))


def test_cuts_are_within_the_stream() -> None:
    for seed in range(50):
        places = cut(seed, 20, 4)
        assert places[0] == 0 and places[-1] == 20 and sorted(set(places)) == list(places)
        assert all(place % 4 == 0 for place in places)
    assert cut(0, 1) == (0, 1)


def test_groups_cover_every_option_in_every_dtype() -> None:
    rows = [row for number in range(1920) for row in group(number, LARGE, 1)]
    found = {(row.family, row.option, row.dtype) for row in rows}
    wanted = {(name, option, dtype) for name, family in FAMILIES.items() for option in family.options
              for dtype in (F32, BF16, F16)}  # fmt: skip
    assert found == wanted
    assert {row.sizes["key"] for row in rows if row.family == "layer"} >= {16, 32, 64, 80, 96, 128, 256}
    lengths = {row.sizes["tokens"] for row in rows if "tokens" in row.sizes}
    assert any(length % 16 for length in lengths) and 1 in lengths


def test_rows_of_a_group_are_one_program_and_differ() -> None:
    rows = group(3, LARGE, 8)
    assert len({(row.option, row.dtype, row.sizes["key"], row.sizes["value"]) for row in rows}) == 1
    assert len({str(row) for row in rows}) == 8
    assert list(map(str, rows)) == list(map(str, group(3, LARGE, 8)))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=FULL if name in ("layer", "window") else ()) for name in FAMILIES]
)
def test_rows_of_every_operator_hold(name: str, fused_device: str) -> None:
    """The first row of each, tiny, in the interpreter where there is no GPU."""
    (row,) = group(TURNS.index(name), SMALL, 1)
    row = row._replace(sizes={**row.sizes, "batch": 1, "tokens": min(row.sizes.get("tokens", 1), 12)})
    assert look(row, fused_device if name != "context_sweep" else "cpu").failure is None


def test_gradients_behind_a_small_norm_hold(fused_device: str) -> None:
    """After ten tokens a segment's correction is large: products of it in float32 took up to 1.3 bars."""
    sizes = {"batch": 1, "heads": 2, "kv_heads": 1, "key": 64, "value": 64, "tokens": 80, "before": 10}
    row = Row("layer", "delta stream", F32, {**sizes, "segment": 39, "window": 39}, 1)
    assert share(row, fused_device) < 1


def test_a_wrong_kernel_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that is off in its fourth digit."""

    def wrong(*args: Any, **options: Any) -> Any:
        contexts, state, info = ops.context_sweep(*args, **{**options, "backend": "reference"})
        return contexts * 1.0003, state, info

    family = FAMILIES["context_sweep"]
    monkeypatch.setitem(CASES, "context_sweep", replace(CASES["context_sweep"], public=wrong))
    row = Row("context_sweep", "context", F32, {"batch": 3, "tokens": 4, "width": 20, "layers": 1}, 5)
    verdict = look(row, "cpu")
    assert family.case("context").public is wrong
    assert verdict.looks == 2 and verdict.failure is not None and "times what is allowed" in verdict.failure


# Parts


def _parts(tmp_path: Path, **changes: Any) -> Options:
    return Options("cpu", 9.0, 1, None, None, tmp_path)._replace(**changes)


def test_parts_go_on_where_they_stopped(tmp_path: Path) -> None:
    ran: list[str] = []

    def run(part: str) -> dict[str, Any]:
        ran.append(part)
        return {"failures": ["no"] if part == "2/3" and len(ran) < 3 else []}

    options = _parts(tmp_path)
    assert not in_parts("trial", ["1/3", "2/3"], run, options)
    assert in_parts("trial", options.parts(3), run, options)
    assert ran == ["1/3", "2/3", "2/3", "3/3"]
    rows = [json.loads(line) for line in (tmp_path / "trial.jsonl").read_text().splitlines()]
    assert [row["part"] for row in rows] == ran
    assert {"device", "torch", "triton", "commit", "date", "seconds"} <= rows[0].keys()


def test_parts_side_by_side_are_all_written(tmp_path: Path) -> None:
    together = threading.Barrier(2)

    def run(part: str) -> dict[str, Any]:
        together.wait(60)
        return {"failures": []}

    options = _parts(tmp_path)
    assert in_parts("trial", options.parts(4), run, options, at_once=2)
    rows = [json.loads(line) for line in (tmp_path / "trial.jsonl").read_text().splitlines()]
    assert sorted(row["part"] for row in rows) == options.parts(4)


def test_after_a_part_that_raises_none_is_begun(tmp_path: Path) -> None:
    ran: list[str] = []

    def run(part: str) -> dict[str, Any]:
        ran.append(part)
        raise RuntimeError("no such tool")

    options = _parts(tmp_path)
    with pytest.raises(RuntimeError, match="no such tool"):
        in_parts("trial", options.parts(9), run, options)
    assert len(ran) < 9


def test_no_part_is_begun_that_would_end_late(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = _parts(tmp_path, minutes=0.0)
    assert in_parts("trial", options.parts(3), lambda part: {"failures": []}, options)
    assert "trial: 2 parts left" in capsys.readouterr().out


def test_a_worker_that_raises_is_a_failure(tmp_path: Path) -> None:
    with judges("cpu", 1) as judged:
        (found,) = judged(_raises, ["a task"])
    assert found == [Verdict("a task", "broken", 0.0, 0, "ZeroDivisionError: division by zero")]
    told = summary([*found, Verdict("a row", "layer", 0.5, 2)])
    assert told["failures"] == ["a task: ZeroDivisionError: division by zero"]
    assert (told["rows"], told["worst_share"], told["second_looks"]) == (2, 0.5, ["a row"])


def _raises(task: str) -> list[Verdict]:
    raise ZeroDivisionError("division by zero")


def test_a_worker_that_raised_judges_nothing_more() -> None:
    """A fault of a kernel costs a process its device, and a process may be gone altogether."""
    with judges("cpu", 1) as judged:
        told = [verdict for found in judged(_process, ["a", "raises", "b", "dies", "c"]) for verdict in found]
    first, raised, second, died, third = told
    assert (raised.failure, died.family) == ("ZeroDivisionError: division by zero", "broken")
    assert died.failure is not None
    assert "BrokenProcessPool" in died.failure
    assert len({first.row, second.row, third.row}) == 3


def _process(task: str) -> list[Verdict]:
    if task == "raises":
        return _raises(task)
    if task == "dies":
        os._exit(1)
    return [Verdict(f"process {os.getpid()}", task, 0.0, 1)]


def test_part_names_are_checked() -> None:
    assert number_parts._mine("2/3", 10) == range(3, 6)
    with pytest.raises(ValueError, match="part must be K/N with K from 1 to N, got 4/3"):
        number_parts._mine("4/3", 10)


# The ends of what may come

TINY: Sizes = {"batch": 2, "heads": 2, "kv_heads": 1, "key": 16, "value": 16, "tokens": 6, "window": 4,
               "segment": 3, "before": 4}  # fmt: skip
NONE: Sizes = {"batch": 0}
LARGE_INPUTS: list[tuple[str, str]] = [
    ("layer", "learned"), ("layer", "delta padded stream"), ("layer", "local tanh"), ("window", ""),
    ("window", "no-rope padded"), ("memory_update", "delta"), ("memory_update", "1/T"),
    ("memory_scan", "delta"), ("memory_retrieve", "learned"), ("decode", "linear/plain"),
    ("decode", "delta/local"), ("context_sweep", "context"), ("context_sweep", "gated"),
]  # fmt: skip


def sizes_of(name: str, option: str, **changes: int) -> Sizes:
    if name == "context_sweep":
        return {"batch": 3, "tokens": 5, "width": 20, "layers": 2, **changes}
    sizes = {**TINY, "window": 3} if "/local" in option else TINY
    return {**sizes, **changes}


@pytest.mark.parametrize("backend", ["reference", pytest.param("fused", marks=FULL)])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("name", "option"), LARGE_INPUTS)
def test_inputs_up_to_1e4_give_no_nan(
    name: str, option: str, dtype: torch.dtype, backend: str, fused_device: str
) -> None:
    """Results, states and gradients; float16 cannot hold gradients of such inputs."""
    device = fused_device if name != "context_sweep" else "cpu"
    case = huge(FAMILIES[name].case(option))
    inputs = case.inputs("changed", dtype, device=device, **sizes_of(name, option))
    function = partial(case.public, backend=backend)
    case.stays_finite(inputs, function=function, gradients=dtype != F16)


# A batch of no rows; all rows masked; a stream, a segment, a call and a window of one token.
ENDS: list[tuple[str, str, Sizes]] = [
    *(("layer", option, NONE) for option in ("learned", "delta padded", "stream", "local padded stream")),
    *(("window", option, NONE) for option in ("", "local padded")),
    *((op, option, NONE) for op, option in (("memory_update", "1/T"), ("memory_update", "delta"))),
    *(("memory_scan", option, NONE) for option in ("weights", "delta")),
    *(("memory_retrieve", option, NONE) for option in ("learned", "strides")),
    *(("decode", option, NONE) for option in ("linear/plain", "active/tanh")),
    *(("layer", option, {"batch": 1}) for option in ("delta padded stream", "no-memory padded")),
    ("memory_scan", "delta", {"batch": 1}),
    ("memory_update", "1/(B*T), delta", {"batch": 1}),
    ("layer", "stream", {"before": 1}),
    ("layer", "", {"segment": 1, "tokens": 2}),
    ("window", "local", {"segment": 1, "tokens": 3}),
    ("decode", "linear/plain", {"segment": 1, "window": 1, "tokens": 3}),
]  # fmt: skip
MORE_ENDS: list[tuple[str, str, Sizes]] = [
    *(("layer", option, {"before": 1}) for option in ("delta stream", "local padded stream")),
    ("layer", "delta stream", {"segment": 1, "tokens": 4}),
    *(("layer", option, {"segment": 1, "tokens": 1, "window": 1}) for option in ("", "delta stream")),
]


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize(
    ("name", "option", "changes"), [*ENDS, *(pytest.param(*each, marks=FULL) for each in MORE_ENDS)], ids=str
)
def test_ends_of_what_may_come(
    name: str, option: str, changes: Sizes, backend: str, fused_device: str
) -> None:
    case = FAMILIES[name].case(option)
    inputs = case.inputs("changed", F32, device=fused_device, **sizes_of(name, option, **changes))
    function = partial(case.public, backend=backend)
    case.stays_finite(inputs, function=function)
    # The gradients of so few numbers may be exact by luck on either side.
    case.judge(inputs, F32, function=function, gradients=False)


@pytest.mark.parametrize("cell", ["context", "gated"])
def test_a_sweep_of_no_rows_is_refused(cell: str) -> None:
    inputs = CASES["context_sweep"].inputs(cell, F32, batch=0)
    with pytest.raises(ValueError, match=r"^x must be .* with B and T at least 1, got \[0, 5, 3\]"):
        ops.context_sweep(**inputs)


def _spoilt(value: float, **inputs: Any) -> Any:
    return ops.memory_retrieve(**inputs) + value


def test_what_is_not_finite_is_noticed() -> None:
    case = CASES["memory_retrieve"]
    inputs = case.inputs("paper", F32)
    for value, name in ((torch.nan, "NaN"), (torch.inf, "infinite")):
        with pytest.raises(AssertionError, match=f"out: {name}"):
            case.stays_finite(
                inputs, function=lambda value=value, **given: ops.memory_retrieve(**given) + value
            )
