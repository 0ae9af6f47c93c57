"""Parameter rows without end: every operator's case tables, drawn with sizes, dtypes, widths and seeds.

A group of rows shares what a kernel is compiled for (operator, option, dtype, widths); its rows differ in
lengths, heads, batch and seed. The same number draws the same group everywhere.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from newllm import ops
from newllm.reference.context import jacobi_sweep
from newllm.testing import CASES, Draw, Inputs, OpCase, error_and_bar, largest
from newllm.types import InfiniState
from tests.attention_cases import has_gradients, layer, window
from tests.decode_cases import decode
from tests.memory_cases import VARIANTS, case_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Draws of a row that are judged as one, and of one that does not hold then: a single row's largest errors are
# those of a few numbers, such as one gate's gradient a head, and may be small on either side by luck.
DRAWS, SECOND_LOOK = 3, 12
Sizes = dict[str, int]


class Scale(NamedTuple):
    """How large rows are: for a GPU, or for the interpreter and the reference on a CPU."""

    tokens: int
    segment: int
    widths: tuple[tuple[int, int], ...]
    heads: tuple[tuple[int, int], ...]
    batch: int
    context: int


# 16 heads and more: the gradients of gates and feature maps are one number a head.
LARGE = Scale(
    1100,
    300,
    (
        *((d, d) for d in (16, 32, 48, 64, 80, 96, 112, 128, 192, 256)),
        (64, 128),
        (96, 40),
        (128, 64),
        (34, 7),
    ),
    ((16, 8), (24, 8), (32, 8), (16, 16), (16, 4)),
    3,
    1024,
)
SMALL = Scale(40, 16, ((16, 16), (16, 24), (32, 16), (20, 7)), ((2, 1), (4, 2), (3, 3)), 3, 70)


class Row(NamedTuple):
    """One row: everything that names it."""

    family: str
    option: str
    dtype: torch.dtype
    sizes: Sizes
    seed: int

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes.items())
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.family} [{self.option}] {dtype} {sizes} seed={self.seed}"


@dataclass(frozen=True)
class Family:
    """Rows of one operator: its ``options``, how large, with which case, and how often it is drawn.

    What its kernels are compiled for are ``programs`` among its sizes.
    """

    options: tuple[str, ...]
    sizes: Callable[[random.Random, Scale, str, torch.dtype], Sizes]
    case: Callable[[str], OpCase]
    share: int
    programs: tuple[str, ...] = ("key", "value")


def geometric(choose: random.Random, low: int, high: int) -> int:
    """A whole number from ``low`` to ``high``, its logarithm uniform."""
    drawn = math.exp(choose.uniform(math.log(low), math.log(high + 1)))
    return max(low, min(high, int(drawn)))


def _float16_tokens(key: int) -> int:
    """Beyond as many the float16 reference's own sums leave its range."""
    return 10000 // key


def _lengths(choose: random.Random, scale: Scale, dtype: torch.dtype, key: int) -> Sizes:
    """Tokens, window, segment, tokens before; multiples of 16 are other programs to a compiler."""
    most = min(scale.tokens, _float16_tokens(key)) if dtype == torch.float16 else scale.tokens
    step = choose.choice([1, 1, 16])
    tokens = -(-geometric(choose, 1, most) // step) * step
    segment = min(most, max(geometric(choose, 1, scale.segment), -(-tokens // 24)))
    reach = segment + choose.choice([0, choose.randint(0, scale.segment)])
    before = geometric(choose, 1, min(most, 2 * segment + 9))
    return {"tokens": tokens, "segment": segment, "window": reach, "before": before}


def _attention(choose: random.Random, scale: Scale, option: str, dtype: torch.dtype) -> Sizes:
    (key, value), (heads, kv_heads) = choose.choice(scale.widths), choose.choice(scale.heads)
    if "no-rope" not in option:
        key += key % 2
    sizes = {"batch": choose.randint(1, scale.batch), "heads": heads, "kv_heads": kv_heads}
    return {**sizes, "key": key, "value": value, **_lengths(choose, scale, dtype, key)}


def _memory(choose: random.Random, scale: Scale, option: str, dtype: torch.dtype) -> Sizes:
    sizes = _attention(choose, scale, "no-rope", dtype)
    # The delta rule has nothing to correct within one segment of an empty memory.
    return {name: size for name, size in sizes.items() if name not in ("window", "before")}


def _decode(choose: random.Random, scale: Scale, option: str, dtype: torch.dtype) -> Sizes:
    sizes = _attention(choose, scale, "no-rope" if "no rope" in option else "", dtype)
    limit = 64 if dtype == torch.float16 else scale.tokens
    for name in ("window", "segment"):
        sizes[name] = min(sizes[name], limit)
    if "local" in option:
        sizes["window"] = sizes["segment"]
    # Row b has seen tokens - batch + b tokens.
    sizes["tokens"] = min(limit, sizes["tokens"]) + sizes["batch"]
    return {name: size for name, size in sizes.items() if name != "before"}


def _sweep(choose: random.Random, scale: Scale, option: str, dtype: torch.dtype) -> Sizes:
    # A layer norm of two or three numbers that happen to be close multiplies any error without bound.
    width = geometric(choose, 8, scale.context)
    # A single hidden unit has no room beside a wide context: the kernels decline it.
    hidden = {"hidden": geometric(choose, 2, scale.context)} if option == "gated" else {}
    layers = choose.randint(0, 3) if option == "gated" else choose.choice([1, 1, 2, 3])
    sizes = {"batch": geometric(choose, 1, 40), "tokens": geometric(choose, 1, min(64, scale.tokens))}
    return {**sizes, "input": choose.choice([5, 16]), "width": width, **hidden, "layers": layers}


def _vectors(choose: random.Random, scale: Scale, option: str, dtype: torch.dtype) -> Sizes:
    sizes = {name: geometric(choose, 1, scale.context) for name in ("query", "key", "value")}
    few = 4 if dtype == torch.float32 else 16
    return {**sizes, "batch": choose.randint(1, few), "width": geometric(choose, 1, 4 * scale.context)}


JACOBI = replace(
    CASES["context_sweep"],
    public=partial(ops.context_sweep, method="jacobi"),
    reference=jacobi_sweep,
    variants={
        "changed": lambda draw: {
            **CASES["context_sweep"].variants["context"](draw),
            "tol": 0.0,
            "sweeps": draw.sizes.get("sweeps", 3),
        }
    },
)


def _swept(option: str) -> OpCase:
    if option == "jacobi":
        return JACOBI
    case = CASES["context_sweep"]
    return replace(case, variants={"changed": case.variants[option]})


def _remembered(op: str) -> Callable[[str], OpCase]:
    def case(option: str) -> OpCase:
        found = case_of(op)
        return replace(found, variants={"changed": found.variants[option]})

    return case


def _multiplied(option: str) -> OpCase:
    """Without gradients, which its kernels do not make."""
    case = CASES["gemv"]
    fixed = ("x", "weights", "norm", "residual")
    return replace(case, variants={"changed": case.variants[option]}, constants=fixed)


LAYER = (
    "", "learned", "no-rope", "tanh", "learned open", "delta", "learned delta", "local", "no-memory",
    "weights", "cut", "full", "two", "delta cut", "delta full", "delta two", "padded", "apart", "stream",
    "delta stream", "local stream", "two stream weights", "long", "long padded stream", "clamped stream",
    "learned tanh padded", "no-memory padded stream", "learned delta padded stream",
    "learned tanh apart padded stream by-row", "gamma", "gamma two padded stream",
)  # fmt: skip
WINDOW = ("", "local", "padded", "local padded", "no-rope", "apart", "apart padded by-row", "long")
DECODE = (*(f"{variant}/{change}" for variant, change in product(
    ("linear", "delta", "active"), ("plain", "tanh", "bias", "local", "no memory", "no rope", "rope by row"),
) if (variant, change) != ("delta", "no memory")), "gamma/plain", "gamma/local")  # fmt: skip
# A memory's sizes and its ring's, which one model has once.
_RING = ("heads", "kv_heads", "window", "segment")
FAMILIES: dict[str, Family] = {
    "layer": Family(LAYER, _attention, layer, 8),
    "window": Family(WINDOW, _attention, window, 3),
    "memory_update": Family((*VARIANTS["memory_update"],), _memory, _remembered("memory_update"), 2),
    "memory_scan": Family((*VARIANTS["memory_scan"],), _memory, _remembered("memory_scan"), 2),
    "memory_retrieve": Family((*VARIANTS["memory_retrieve"],), _memory, _remembered("memory_retrieve"), 1),
    "decode": Family(DECODE, _decode, lambda option: decode(*option.split("/")), 3, ("key", "value", *_RING)),
    "context_sweep": Family(("context", "gated"), _sweep, _swept, 3),
    "gemv": Family((*CASES["gemv"].variants,), _vectors, _multiplied, 2, ("batch", "width")),
}


def huge(case: OpCase) -> OpCase:
    """The same case with queries, keys, values and inputs up to 1e4, those of its state's ring too."""

    def make(draw: Draw, variant: Callable[[Draw], Inputs]) -> Inputs:
        inputs = variant(draw)
        changed: Inputs = {name: stretched(inputs[name]) for name in ("q", "k", "v", "x") if name in inputs}
        state = inputs.get("state")
        if isinstance(state, InfiniState):
            changed["state"] = state._replace(keys=stretched(state.keys), values=stretched(state.values))
        return {**inputs, **changed}

    variants = {name: partial(make, variant=variant) for name, variant in case.variants.items()}
    return replace(case, variants=variants)


def stretched(x: Tensor) -> Tensor:
    """``x`` scaled to a largest value of 1e4."""
    return x * (1e4 / max(1.0, largest(x)))


# Whose turn it is to be drawn.
TURNS = tuple(name for name, family in FAMILIES.items() for _ in range(family.share))


def group(number: int, scale: Scale, rows: int) -> list[Row]:
    """``rows`` rows that share operator, option, dtype and widths; a family's options take turns."""
    choose = random.Random(number)
    rounds, place = divmod(number, len(TURNS))
    name = TURNS[place]
    family = FAMILIES[name]
    turn = rounds * family.share + TURNS[:place].count(name)
    option = family.options[turn % len(family.options)]
    dtype = DTYPES[turn // len(family.options) % len(DTYPES)]
    first = family.sizes(choose, scale, option, dtype)
    program = {size: first[size] for size in family.programs if size in first}
    lengths = [first, *(family.sizes(choose, scale, option, dtype) for _ in range(rows - 1))]
    return [
        Row(name, option, dtype, _summable({**sizes, **program}, dtype), choose.randrange(2**20))
        for sizes in lengths
    ]


def _summable(sizes: Sizes, dtype: torch.dtype) -> Sizes:
    """Lengths that were drawn with other widths, within what a float16 reference can sum up."""
    if dtype != torch.float16 or "key" not in sizes:
        return sizes
    most = _float16_tokens(sizes["key"])
    return {name: min(size, most) if name in ("tokens", "before") else size for name, size in sizes.items()}


def draws(row: Row, device: str, count: int) -> Iterator[Inputs]:
    """The inputs of ``count`` draws of a row."""
    case = FAMILIES[row.family].case(row.option)
    for offset in range(count):
        yield case.inputs("changed", row.dtype, device=device, seed=row.seed + offset, **row.sizes)


def share(row: Row, device: str, backend: str = "fused", count: int = DRAWS) -> float:
    """What a row takes of its error bar, over ``count`` draws; of a recurrence's, at a second look, most.

    Raises AssertionError where it takes more.
    """
    case = FAMILIES[row.family].case(row.option)
    first, *others = draws(row, device, count)
    function, gradients = partial(case.public, backend=backend), judged_gradients(row, first)
    if row.family == "context_sweep" and count == SECOND_LOOK:
        return judge_most(case, [first, *others], row.dtype, function, gradients)
    return case.judge(first, row.dtype, function=function, gradients=gradients, others=others)


def judge_most(
    case: OpCase, drawn: list[Inputs], dtype: torch.dtype, function: Callable[..., Any], gradients: bool
) -> float:
    """Hold most of the draws, each by itself, to the error rule: the largest of the results' medians.

    For a recurrence that some draws make chaotic. There either side's errors grow by luck, and the largest of
    all draws would compare no more than two such numbers.
    """
    found = [case.compared(each, function, gradients, dtype) for each in drawn]
    medians = {}
    for name in found[0]:
        pairs = [error_and_bar(*each[name], name) for each in found]
        assert all(error < math.inf for error, _ in pairs), f"{name}: NaN or infinite"
        medians[name] = statistics.median(error / bar if bar else float(error > 0) for error, bar in pairs)
    worst = max(medians, key=lambda name: medians[name])
    assert medians[worst] <= 1, f"{worst}: {medians[worst]:.3g} times what is allowed, median of draws"
    return medians[worst]


def judge_recurrence(
    case: OpCase,
    dtype: torch.dtype,
    draw: Callable[[int], Inputs],
    function: Callable[..., Any],
    gradients: bool,
) -> None:
    """Hold a few draws as one to the error rule, or, since chaos may decide there, most of many."""
    first, *others = (draw(seed) for seed in range(DRAWS))
    try:
        case.judge(first, dtype, function=function, gradients=gradients, others=others)
    except AssertionError:
        judge_most(case, [draw(seed) for seed in range(SECOND_LOOK)], dtype, function, gradients)


def judged_gradients(row: Row, inputs: Inputs) -> bool:
    """Whether the error rule can judge gradients: a float16 reference's overflow where it divides by eps."""
    if row.family in ("layer", "window"):
        return has_gradients(inputs, row.dtype)
    overflow = "empty" in row.option or row.family == "context_sweep"
    return row.dtype != torch.float16 or not overflow
