"""What takes part in a measurement: a computation, how it is called, and how it is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from newllm.measuring.shapes import Shape
from newllm.measuring.timing import Call
from newllm.measuring.work import BOTH, DIRECTIONS, Work
from newllm.testing import DRAWS, Inputs, OpCase, leaves, mapped

# What newllm's own rows are called; every other implementation is a peer.
FUSED, REFERENCE, COMPILED = "fused", "reference", "compiled reference"
OURS = (FUSED, REFERENCE, COMPILED)


@dataclass
class Prepared:
    """A computation with its inputs on the device.

    ``constants`` are inputs without a gradient. ``call``, where given, replaces ``function(**inputs)`` and
    does the work ``repeats`` times. ``detail`` says what a row should: a version, the backend that ran.
    """

    function: Callable[..., Any]
    inputs: Inputs
    constants: tuple[str, ...] = ()
    call: Call | None = None
    repeats: int = 1
    detail: Callable[[], str | None] = field(default=lambda: None)


@dataclass(frozen=True)
class Entry:
    """One row's computation. ``judge`` raises where the results are wrong; it is run before any timing."""

    op: str
    impl: str
    variant: str
    shape: Shape
    prepare: Callable[[], Prepared]
    work: Callable[[str], Work]
    directions: tuple[str, ...] = DIRECTIONS
    judge: Callable[[], object] | None = None

    @property
    def name(self) -> str:
        """Unique within a suite, the direction apart."""
        return f"{self.op}, {self.variant}, {self.impl}, {self.shape.name}"


class Attempt:
    """A block whose failure is a result: ``error`` keeps the exception as one line.

    For computations that may refuse, by whoever wrote them, and whose row has to say so.
    """

    error: str | None = None

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self.error = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
        return True


def trained(inputs: Inputs, constants: tuple[str, ...]) -> list[Tensor]:
    """The inputs that have a gradient: all floating-point ones but ``constants``, told so."""
    return [
        x.requires_grad_()
        for name, x in leaves(inputs)
        if x.is_floating_point() and name.split(".")[0] not in constants
    ]


def call_of(prepared: Prepared, direction: str) -> Call:
    """The forward pass without autograd, or forward and backward to every input that has a gradient."""
    if prepared.call is not None:
        return prepared.call
    function, inputs = prepared.function, prepared.inputs
    if direction != BOTH:

        def forward() -> Any:
            with torch.no_grad():
                return function(**inputs)

        return forward
    inputs = mapped(Tensor.detach, inputs)
    learned = trained(inputs, prepared.constants)
    slopes: list[Tensor] = []

    def both() -> Any:
        outputs = [out for _, out in leaves(function(**inputs)) if out.requires_grad]
        if not slopes:
            slopes.extend(torch.randn_like(out) for out in outputs)
        return torch.autograd.grad(outputs, learned, slopes, allow_unused=True)

    return both


def judged(
    case: OpCase,
    draw: Callable[[int], Inputs],
    dtype: torch.dtype,
    function: Callable[..., Any],
    learns: bool,
) -> Callable[[], object]:
    """A judgement of ``function`` on the inputs of ``draw(seed)``, by the error rule of ``newllm.testing``.

    Over as many seeds as its tests take in this dtype: one draw's largest errors are luck, on either side.
    """

    def judge() -> float:
        draws = map(draw, range(DRAWS[dtype]))
        return case.judge(next(draws), dtype, function=function, gradients=learns, others=draws)

    return judge
