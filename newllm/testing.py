"""What tests and benchmarks share: a case for every operator, and the rules by which results are judged.

Three judgements, none with a tolerance of its own: equality; :func:`assert_rounding`, for float64 against
an independent computation; :func:`assert_no_worse`, for any dtype against the reference in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from newllm import ops
from newllm.reference import context, infini, memory, window
from newllm.types import ContextParams, FeatureMap, GatedParams, InfiniState, MemoryState, SweepInfo

Inputs = dict[str, Any]


# Draws over which a row on a GPU is judged. float32 needs them: there both sides err by a few roundings.
GPU_DRAWS = {torch.float32: 3, torch.bfloat16: 1, torch.float16: 1}


def assert_no_worse(out: Tensor, oracle: Tensor, baseline: Tensor, name: str = "the result") -> float:
    """The error rule: ``max|out - oracle| <= 2 max|baseline - oracle| + tiny``; the share that was taken.

    ``oracle`` is the reference in float64 on the same rounded inputs, ``baseline`` the reference computed
    in the inputs' dtype. ``tiny`` is eps of out's dtype times the largest oracle: what rounding the result
    itself may cost where the baseline is exact by luck. Integers must be equal.

    Raises AssertionError, also for another shape or dtype than the baseline's and for NaN.
    """
    error, allowed = error_and_bar(out, oracle, baseline, name)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    return error / allowed if allowed else 0.0


def error_and_bar(
    out: Tensor, oracle: Tensor, baseline: Tensor, name: str = "the result"
) -> tuple[float, float]:
    """What :func:`assert_no_worse` compares: the error, and what is allowed.

    Raises AssertionError for another shape or dtype than the baseline's, and for other integers.
    """
    assert out.shape == oracle.shape == baseline.shape, f"{name}: {out.shape}, expected {baseline.shape}"
    assert out.dtype == baseline.dtype, f"{name}: {out.dtype}, expected {baseline.dtype}"
    if not out.is_floating_point():
        assert torch.equal(out, oracle), f"{name}: integers differ"
        return 0.0, 0.0
    tiny = torch.finfo(out.dtype).eps * largest(oracle)
    return largest(out.double() - oracle), 2 * largest(baseline.double() - oracle) + tiny


def assert_rounding(out: Tensor, expected: Tensor, *, additions: int, magnitude: float) -> None:
    """Equal but for the rounding of two computations of ``additions`` sums of terms up to ``magnitude``.

    Each side may err by additions * eps / 2 * magnitude (Higham, Accuracy and Stability, sec. 3.1), with
    eps of their common dtype. Raises AssertionError, also for another shape or dtype and for NaN.
    """
    assert out.shape == expected.shape, f"shape {list(out.shape)}, expected {list(expected.shape)}"
    assert out.dtype == expected.dtype, f"{out.dtype}, expected {expected.dtype}"
    error, allowed = largest(out - expected), additions * torch.finfo(out.dtype).eps * magnitude
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def largest(x: Tensor) -> float:
    """The largest absolute value, 0 of nothing, NaN if there is one."""
    return x.detach().abs().max().item() if x.numel() else 0.0


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
        found = self.compared([inputs, *others], function, gradients, rounding or dtype)
        return max(assert_no_worse(*three, name) for name, three in found.items())

    def compared(
        self, draws: list[Inputs], function: Callable[..., Any] | None, gradients: bool, rounding: torch.dtype
    ) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """What the function, the oracle and the baseline give, by the names of the results."""
        found = self._stacked(partial(self.call, function=function), draws, gradients)
        oracle = self._stacked(self._referred(None), [mapped(_double, draw) for draw in draws], gradients)
        baseline = self._stacked(self._referred(rounding), draws, gradients)
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

    def _stacked(
        self, function: Callable[[Inputs], Any], draws: list[Inputs], gradients: bool
    ) -> dict[str, Tensor]:
        """The results for all draws, by name."""
        found = [self.results(function, draw, gradients) for draw in draws]
        return {name: torch.stack([each[name] for each in found]) for name in found[0]}

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


# Inputs


def _qkv(draw: Draw) -> Inputs:
    return {
        "q": draw.normal("batch", "heads", "tokens", "key"),
        "k": draw.normal("batch", "kv_heads", "tokens", "key"),
        "v": draw.normal("batch", "kv_heads", "tokens", "value"),
    }


def _kv(draw: Draw) -> Inputs:
    return {name: x for name, x in _qkv(draw).items() if name != "q"}


def _window(draw: Draw) -> Inputs:
    return _qkv(draw) | {"window": draw.sizes["window"]}


def _padding(draw: Draw) -> Inputs:
    return {"padding_mask": draw.mask("batch", "tokens")}


def _gamma(draw: Draw) -> Inputs:
    feature = FeatureMap("dpfp", order=2)
    return {"rule": "gamma", "feature": feature, "state": _memory(draw, feature)}


def _feature(draw: Draw) -> FeatureMap:
    return FeatureMap(scale=draw.normal("kv_heads") + 2, bias=draw.normal("kv_heads"))


def _weighed(draw: Draw) -> Inputs:
    """A write gate and a decay, which no kernel has."""
    gate = draw.normal("kv_heads", "key"), draw.normal("kv_heads")
    feature = _feature(draw)._replace(write=gate[0], write_bias=gate[1])
    return {"feature": feature, "decay": draw.normal("kv_heads").sigmoid()}


def _memory(draw: Draw, feature: FeatureMap | None = None) -> MemoryState:
    """The memory after three earlier tokens a sample."""
    k, v = draw.normal("batch", "kv_heads", 3, "key"), draw.normal("batch", "kv_heads", 3, "value")
    return mapped(Tensor.detach, memory.memory_update(k, v, feature=feature))


def _rope(draw: Draw, rows: int) -> tuple[Tensor, Tensor]:
    """cos and sin ``[rows, K]`` of positions 0 .. rows - 1, base 10000."""
    half = torch.arange(draw.sizes["key"] // 2, dtype=torch.float64) * 2 / draw.sizes["key"]
    angles = torch.outer(torch.arange(rows, dtype=torch.float64), 10000**-half).repeat(1, 2)
    return angles.cos().to(draw.device, draw.dtype), angles.sin().to(draw.device, draw.dtype)


def _infini(draw: Draw, **options: Any) -> Inputs:
    sizes = {"window": draw.sizes["window"], "segment": draw.sizes["segment"]}
    rope = _rope(draw, draw.sizes["tokens"])
    return {**_qkv(draw), "beta": draw.normal("heads"), "rope": rope, **sizes, **options}


def _stream(draw: Draw, **options: Any) -> tuple[Inputs, InfiniState]:
    """Inputs of a call that continues a stream, and its state after rows of different lengths."""
    tokens, ring = draw.sizes["tokens"], draw.sizes["window"]
    inputs = _infini(draw, **options)
    before: Inputs = {name: draw.normal(*x.shape) for name, x in _qkv(draw).items()}
    kept = {name: inputs[name] for name in ("beta", "window", "segment")}
    feature, rule = options.get("feature"), options.get("rule", "linear")
    lengths = torch.arange(draw.sizes["batch"])[:, None] + tokens - draw.sizes["batch"]
    mask = (torch.arange(tokens) < lengths).to(draw.device)
    decay = options.get("decay")
    _, state = infini.infini_attention(
        **before, **kept, feature=feature, rule=rule, decay=decay, padding_mask=mask
    )
    return {**inputs, "rope": _rope(draw, tokens + ring - 1)}, mapped(Tensor.detach, state)


def _continued(draw: Draw) -> Inputs:
    inputs, state = _stream(draw, feature=_feature(draw), gate="tanh")
    return inputs | _padding(draw) | {"state": state}


def _token(draw: Draw, **options: Any) -> Inputs:
    inputs, state = _stream(draw, **options)
    token = {name: inputs[name][:, :, -1:] for name in ("q", "k", "v")}
    return {**inputs, **token, "state": state}


def _context(draw: Draw) -> Inputs:
    weights = draw.scaled("layers", "width", "width"), draw.scaled("layers", "width", "input")
    vectors = [draw.normal("layers", "width") for _ in range(3)]
    params = ContextParams(*weights, *vectors)
    start = draw.normal("batch", "width", dtype=draw.state_dtype)
    return {"x": draw.normal("batch", "tokens", "input"), "params": params, "state": start}


def _gated(draw: Draw) -> Inputs:
    network = draw.scaled("hidden", "input"), draw.scaled("hidden", "width"), draw.normal("hidden")
    deeper = draw.scaled("layers", "hidden", "hidden"), draw.normal("layers", "hidden")
    gates = [draw.scaled("width", "hidden") for _ in range(3)]
    vectors = [draw.normal("width") for _ in range(5)]
    params = GatedParams._make([*network, *deeper, *gates, *vectors, None])
    start = draw.normal("batch", "width", dtype=draw.state_dtype)
    return {"x": draw.normal("batch", "tokens", "input"), "params": params, "state": start, "cell": "gated"}


# References that take the operator's own arguments


def _decode(state: InfiniState, active: Tensor | None = None, **inputs: Any) -> Any:
    mask = None if active is None else active[:, None]
    with torch.no_grad():
        return infini.infini_attention(**inputs, state=state, padding_mask=mask)


def _sweep(cell: str = "context", **inputs: Any) -> Any:
    assert isinstance(inputs["params"], {"context": ContextParams, "gated": GatedParams}[cell])
    return context.sequential_sweep(**inputs)


_HEADS = {"batch": 2, "heads": 4, "kv_heads": 2, "tokens": 11, "key": 6, "value": 5}
_SIZES = {**_HEADS, "window": 5, "segment": 4}

CASES: dict[str, OpCase] = {
    "memory_update": OpCase(
        ops.memory_update,
        memory.memory_update,
        _SIZES,
        {
            "linear": _kv,
            "scaled": lambda draw: _kv(draw) | _padding(draw) | {"scale": "1/T"},
            "delta": lambda draw: _kv(draw) | {"rule": "delta", "state": _memory(draw)},
            "gamma": lambda draw: _kv(draw) | _gamma(draw),
        },
    ),
    "memory_retrieve": OpCase(
        ops.memory_retrieve,
        memory.memory_retrieve,
        _SIZES,
        {
            "paper": lambda draw: {"q": _qkv(draw)["q"], "state": _memory(draw)},
            "learned": lambda draw: {"q": _qkv(draw)["q"], "state": _memory(draw), "feature": _feature(draw)},
        },
    ),
    "memory_scan": OpCase(
        ops.memory_scan,
        memory.memory_scan,
        _SIZES,
        {
            "linear": lambda draw: _kv(draw) | {"segment": draw.sizes["segment"], "feature": _feature(draw)},
            "delta": lambda draw: (
                _kv(draw)
                | _padding(draw)
                | {"segment": draw.sizes["segment"], "rule": "delta", "state": _memory(draw)}
            ),
            "gated": lambda draw: _kv(draw) | {"segment": draw.sizes["segment"]} | _weighed(draw),
        },
    ),
    "window_attention": OpCase(
        ops.window_attention,
        window.window_attention,
        _SIZES,
        {
            "window": lambda draw: _window(draw) | {"rope": _rope(draw, draw.sizes["tokens"])},
            "whole": lambda draw: _window(draw) | {"window": draw.sizes["tokens"]},
            "segments": lambda draw: _window(draw) | {"window": None, "segment": draw.sizes["segment"]},
            "padded": lambda draw: _window(draw) | _padding(draw),
        },
        constants=("rope",),
    ),
    "infini_attention": OpCase(
        ops.infini_attention,
        infini.infini_attention,
        _SIZES,
        {
            "linear": _infini,
            "delta": lambda draw: _infini(draw, rule="delta", feature=_feature(draw)),
            "segments": lambda draw: _infini(draw, window=None),
            "continued": _continued,
            "gated": lambda draw: _infini(draw, **_weighed(draw)),
            "no memory": lambda draw: _infini(draw, beta=None),
        },
        constants=("rope",),
    ),
    "infini_decode": OpCase(
        ops.infini_decode,
        _decode,
        _SIZES,
        {
            "linear": _token,
            "delta": lambda draw: _token(draw, rule="delta", feature=_feature(draw)),
            "gated": lambda draw: _token(draw, **_weighed(draw)),
            "active": lambda draw: _token(draw) | {"active": draw.mask("batch")},
        },
        mutates="state",
    ),
    "context_sweep": OpCase(
        ops.context_sweep,
        _sweep,
        {"batch": 2, "tokens": 5, "input": 3, "width": 4, "hidden": 6, "layers": 2},
        {"context": _context, "gated": _gated},
    ),
}
