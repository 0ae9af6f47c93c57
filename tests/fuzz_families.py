"""Fuzz cases: random sizes, dtypes, options and cuts of a stream into calls, each from one seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from newllm import backend, ops
from newllm.testing import CASES, Inputs, OpCase
from newllm.types import MemoryState
from tests.attention_cases import has_gradients, in_calls, layer
from tests.memory_cases import case_of
from tests.row_families import DTYPES, FAMILIES, SECOND_LOOK, SMALL, TURNS, Row, huge, judge_most, share

# What of the layer any split into calls may not change. (How far gradients reach is counted within a call.)
SPLIT = ("", "learned", "no-rope", "tanh", "learned open", "delta", "learned delta", "local", "delta local",
         "no-memory", "clamped", "long")  # fmt: skip
# Without padding, which every call would move to its own end.
SCANS = ("linear", "no guard", "empty, delta", "strides")
HUGE = (
    "",
    "learned tanh",
    "delta",
    "local",
    "no-memory",
    "no-rope",
    "stream",
    "delta padded stream",
    "padded",
)
# How often each kind is drawn. Triton's interpreter takes a second a case, the others a twentieth.
KINDS = {"calls": 40, "steps": 18, "scan": 14, "sweep": 15, "huge": 10, "kernel": 3}
_TURNS = tuple(kind for kind, times in KINDS.items() for _ in range(times))


def drawn(number: int) -> Row:
    """Case ``number``: its family is the kind, its seed draws the numbers and the cuts."""
    choose = random.Random(number)
    kind, dtype = _TURNS[number % len(_TURNS)], choose.choice(DTYPES)
    if kind == "kernel":
        name = choose.choice([name for name in TURNS if name != "context_sweep"])
        option = choose.choice(FAMILIES[name].options)
        sizes = {**FAMILIES[name].sizes(choose, SMALL, option, dtype), "batch": 1}
        return Row(f"kernel {name}", option, dtype, sizes, choose.randrange(2**20))
    name = {"scan": "memory_scan", "sweep": "context_sweep"}.get(kind, "layer")
    option = choose.choice({"scan": SCANS, "sweep": ("context", "gated"), "huge": HUGE}.get(kind, SPLIT))
    if kind in ("calls", "steps") and choose.random() < 0.5:
        option = f"{option} padded".strip()
    if kind == "huge":
        option = f"{option} huge".strip()
    sizes = FAMILIES[name].sizes(choose, SMALL, option, dtype)
    if kind == "huge":
        sizes["batch"] = choose.randint(0, 2)
    return Row(kind, option, dtype, sizes, choose.randrange(2**20))


def judged(row: Row) -> tuple[float, int]:
    """The share of its error bar that a case takes, and in how many looks: at one draw, then at many.

    Raises AssertionError where it does not hold over ``SECOND_LOOK`` draws.
    """
    if row.family == "huge":
        _stays_finite(row)
        return 0.0, 1
    judge = partial(_JUDGES[row.family.split()[0]], row)
    try:
        return judge(1), 1
    except AssertionError:
        return judge(SECOND_LOOK), 2


def cut(seed: int, tokens: int, step: int = 1) -> tuple[int, ...]:
    """Where a stream of ``tokens`` is cut, at multiples of ``step``."""
    choose = random.Random(seed)
    places = range(step, tokens, step)
    return (0, *sorted(choose.sample(places, min(len(places), choose.randint(0, 5)))), tokens)


def _inputs(case: OpCase, row: Row, count: int) -> list[Inputs]:
    return [case.inputs("changed", row.dtype, seed=row.seed + offset, **row.sizes) for offset in range(count)]


def _calls(row: Row, count: int, steps: bool = False) -> float:
    """The layer in calls against the layer whole, gradients through the states between them."""
    case, tokens = layer(row.option), row.sizes["tokens"]
    first, *others = _inputs(case, row, count)
    cuts = (
        (*range(random.Random(row.seed).randint(1, tokens), tokens + 1),) if steps else cut(row.seed, tokens)
    )
    cuts = cuts if cuts[0] == 0 else (0, *cuts)
    function = partial(in_calls, cuts, backend="reference", decode=steps)
    # A single key has no slope: PyTorch's fused attention leaves a rounding of it, the baseline by luck none.
    gradients = not steps and tokens > 1 and has_gradients(first, row.dtype)
    return case.judge(first, row.dtype, function=function, gradients=gradients, others=others)


def _scan(row: Row, count: int) -> float:
    """Segments in several calls against all in one."""
    found = case_of("memory_scan")
    case = replace(found, variants={"changed": found.variants[row.option]})
    cuts = cut(row.seed, row.sizes["tokens"], row.sizes["segment"])

    def function(k: Any, v: Any, state: MemoryState | None = None, **options: Any) -> Any:
        before = []
        for start, end in pairwise(cuts):
            states, state = ops.memory_scan(
                k[:, :, start:end], v[:, :, start:end], state, **options, backend="reference"
            )
            before.append(states)
        counts = [each.count for each in before if each.count is not None]
        whole = MemoryState(
            torch.cat([each.matrix for each in before], 2),
            torch.cat([each.norm for each in before], 2),
            torch.cat(counts, 1) if counts else None,
        )
        return whole, state

    first, *others = _inputs(case, row, count)
    gradients = row.dtype != torch.float16 or "empty" not in row.option
    return case.judge(first, row.dtype, function=function, gradients=gradients, others=others)


def _sweep(row: Row, count: int) -> float:
    """A sweep in several calls, by the native code where there is one, against the reference whole."""
    found = CASES["context_sweep"]
    case = replace(found, variants={"changed": found.variants[row.option]})
    chosen = "fused" if "cpu" in backend.FUSED["context_sweep"] else "reference"

    def function(x: Any, state: Any, **options: Any) -> Any:
        parts = []
        for start, end in pairwise(cut(row.seed, x.shape[1])):
            contexts, state, _ = ops.context_sweep(x[:, start:end], state=state, **options, backend=chosen)
            parts.append(contexts)
        return torch.cat(parts, 1), state

    draws, gradients = _inputs(case, row, count), row.dtype != torch.float16
    if count == SECOND_LOOK:
        return judge_most(case, draws, row.dtype, function, gradients)
    return case.judge(draws[0], row.dtype, function=function, gradients=gradients)


def _kernel(row: Row, count: int) -> float:
    """A kernel, in Triton's interpreter where there is no GPU."""
    return share(row._replace(family=row.family.removeprefix("kernel ")), "cpu", count=count)


def _stays_finite(row: Row) -> None:
    case = huge(layer(row.option.removesuffix("huge")))
    (inputs,) = _inputs(case, row, 1)
    function = partial(case.public, backend="reference")
    case.stays_finite(inputs, function=function, gradients=row.dtype != torch.float16)


_JUDGES: dict[str, Callable[[Row, int], float]] = {
    "calls": _calls,
    "steps": partial(_calls, steps=True),
    "scan": _scan,
    "sweep": _sweep,
    "kernel": _kernel,
}
