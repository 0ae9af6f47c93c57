"""An operator with all that is needed to call it, and where its inputs come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from newllm.testing.rule import errors_of, share_of
from newllm.types import SweepInfo

Inputs = dict[str, Any]

# Draws over which a row is judged. float32 needs them: there both sides err by a few roundings.
DRAWS = {torch.float32: 3, torch.bfloat16: 1, torch.float16: 1}


class Draw:
    """A source of inputs of the given ``sizes``: the same numbers for every dtype and device, but rounded."""

    def __init__(self, sizes: Mapping[str, int], dtype: torch.dtype, device: str, seed: int) -> None:
        self.sizes, self.dtype, self.device = sizes, dtype, device
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *names: str | int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers; each of ``names`` is a size or the name of one."""
        shape = [self.sizes[name] if isinstance(name, str) else name for name in names]
        drawn = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return drawn.to(self.device, dtype or self.dtype)

    def scaled(self, *names: str) -> Tensor:
        """Weights whose sums over the last axis stay as small at every size: recurrences must not explode."""
        weights = self.normal(*names, dtype=torch.float64) * (self.sizes[names[-1]] ** -0.5 / 2)
        return weights.to(self.dtype)

    def mask(self, *names: str) -> Tensor:
        """Bool, about two thirds True, False throughout the last row."""
        real = self.normal(*names, dtype=torch.float64) > -0.4
        real[-1:] = False
        return real

    @property
    def state_dtype(self) -> torch.dtype:
        """float32, or float64 with float64 inputs."""
        return torch.promote_types(self.dtype, torch.float32)


@dataclass(frozen=True)
class OpCase:
    """An operator with what is needed to call it, to judge it and to time it.

    ``variants`` make its inputs; ``reference`` takes them too, and ``compute_dtype``. ``mutates`` names an
    argument that the operator writes into and that counts as a result; such an operator has no gradient.
    ``constants`` are inputs without a gradient. ``sizes`` are small; :meth:`inputs` takes others.
    """

    public: Callable[..., Any]
    reference: Callable[..., Any]
    sizes: Mapping[str, int]
    variants: Mapping[str, Callable[[Draw], Inputs]]
    constants: tuple[str, ...] = ()
    mutates: str | None = None

    def inputs(
        self, variant: str, dtype: torch.dtype, *, device: str = "cpu", seed: int = 0, **sizes: int
    ) -> Inputs:
        """Keyword arguments of the operator."""
        return self.variants[variant](Draw({**self.sizes, **sizes}, dtype, device, seed))

    def call(self, inputs: Inputs, function: Callable[..., Any] | None = None) -> Any:
        """The results of ``function`` (None: the operator); inputs stay as they are."""
        function = function or self.public
        if self.mutates is None:
            return function(**inputs)
        inputs = {**inputs, self.mutates: mapped(Tensor.clone, inputs[self.mutates])}
        with torch.no_grad():
            return function(**inputs), inputs[self.mutates]

    def judge(
        self,
        inputs: Inputs,
        dtype: torch.dtype,
        *,
        function: Callable[..., Any] | None = None,
        gradients: bool = True,
        others: Iterable[Inputs] = (),
        rounding: torch.dtype | None = None,
    ) -> float:
        """Hold ``function`` (None: the operator) with ``inputs`` of this ``dtype`` to the error rule.

        ``others`` are further draws of the inputs, judged as one with the first: the largest of a few
        errors is luck, on either side. The baseline's gradient overflows where float16 divides by eps,
        that is reads an empty memory; ``rounding`` is the dtype that it rounds to instead (None: ``dtype``).
        Returns the largest share of what the rule allows that any result took.
        """
        taken: dict[str, list[tuple[float, float, float]]] = {}
        for draw in chain([inputs], others):  # One after the other, in the memory of one.
            for name, three in self.compared(draw, function, gradients, rounding or dtype).items():
                taken.setdefault(name, []).append(errors_of(*three, name))
        return max(share_of(errors, name) for name, errors in taken.items())

    def compared(
        self, inputs: Inputs, function: Callable[..., Any] | None, gradients: bool, rounding: torch.dtype
    ) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """What the function, the oracle and the baseline give, by the names of the results."""
        # The largest first, while nothing else is held.
        oracle = self.results(self._referred(None), mapped(_double, inputs), gradients)
        found = self.results(partial(self.call, function=function), inputs, gradients)
        baseline = self.results(self._referred(rounding), inputs, gradients)
        assert found.keys() == oracle.keys() == baseline.keys()
        return {name: (out, oracle[name], baseline[name]) for name, out in found.items()}

    def stays_finite(
        self, inputs: Inputs, *, function: Callable[..., Any] | None = None, gradients: bool = True
    ) -> None:
        """Assert that nothing is NaN, nor infinite where the reference in float64 is within the dtype."""
        found = self.results(partial(self.call, function=function), inputs, gradients)
        oracle = self.results(self._referred(None), mapped(_double, inputs), gradients)
        for name, out in found.items():
            assert not out.isnan().any(), f"{name}: NaN"
            if out.is_floating_point():
                inside = oracle[name].abs() < torch.finfo(out.dtype).max / 2
                assert out[inside].isfinite().all(), f"{name}: infinite"

    def _referred(self, compute_dtype: torch.dtype | None) -> Callable[[Inputs], Any]:
        return lambda inputs: self.reference(**inputs, compute_dtype=compute_dtype)

    def results(
        self, function: Callable[[Inputs], Any], inputs: Inputs, gradients: bool = True
    ) -> dict[str, Tensor]:
        """What ``function(inputs)`` returns, by name, and the gradients of a fixed combination of it."""
        inputs = mapped(Tensor.detach, inputs)
        learned = {
            f"gradient of {name}": x.requires_grad_()
            for name, x in leaves(inputs)
            if gradients and self.mutates is None
            if x.is_floating_point() and name.split(".")[0] not in self.constants
        }
        found = dict(leaves(function(inputs), "out"))
        if learned:
            # Drawn for all: one function may know more of its results to be constant than another.
            outputs = [out for out in found.values() if out.is_floating_point()]
            drawn = zip(outputs, _cotangents(outputs), strict=True)
            pairs = [(out, cotangent) for out, cotangent in drawn if out.requires_grad]
            slopes = torch.autograd.grad(
                [out for out, _ in pairs], [*learned.values()], [x for _, x in pairs], materialize_grads=True
            )
            found |= zip(learned, slopes, strict=True)
        return {name: x.detach() for name, x in found.items()}


def mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with ``change`` applied to every tensor in its dicts and tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(change, each) for key, each in value.items()}
    if isinstance(value, tuple):
        items = [mapped(change, each) for each in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in dicts and tuples with their dotted names; what describes a computation is left out."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict | tuple) and not isinstance(value, SweepInfo):
        if isinstance(value, tuple):
            value = dict(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
        for key, each in value.items():
            yield from leaves(each, f"{name}.{key}".lstrip("."))


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _cotangents(outputs: list[Tensor]) -> list[Tensor]:
    """Eighths from -1 to 1, which every dtype holds exactly."""
    generator = torch.Generator().manual_seed(len(outputs))
    return [torch.randint(-8, 9, out.shape, generator=generator).to(out) / 8 for out in outputs]
