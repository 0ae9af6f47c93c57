"""newllm's own operators as Senri calls them: RoPE tables, GQA, gate, learnable features, states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from newllm import backend as backends
from newllm.measuring import work
from newllm.measuring.entries import COMPILED, FUSED, REFERENCE, Entry, Prepared, judged
from newllm.measuring.shapes import Shape
from newllm.measuring.work import Work
from newllm.modules.rotary import Rotary
from newllm.reference import infini
from newllm.testing import CASES, Inputs, mapped
from newllm.types import FeatureMap, InfiniState, MemoryState, Rule


@dataclass(frozen=True)
class Site:
    """Where inputs are made and in which dtype; equal sites make equal inputs."""

    device: torch.device
    dtype: torch.dtype

    def source(self, seed: int = 0) -> Source:
        """A fresh source of random numbers."""
        return Source(self, torch.Generator(self.device).manual_seed(seed))


@dataclass(frozen=True)
class Source:
    """Random inputs, drawn on the device."""

    site: Site
    generator: torch.Generator

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers, by default in the site's dtype."""
        return torch.randn(
            shape, generator=self.generator, device=self.site.device, dtype=dtype or self.site.dtype
        )

    def heads(self, shape: Shape, heads: int) -> Tensor:
        """``[B, heads, T, D]`` as projections leave it: each token's heads lie side by side."""
        return self.normal(shape.batch, shape.tokens, heads, shape.width).transpose(1, 2)

    def feature(self, shape: Shape) -> FeatureMap:
        """Scale and bias around the (4, -4) that models start from."""
        scale, bias = (self.normal(shape.kv_heads, dtype=torch.float32) / 4 for _ in range(2))
        return FeatureMap(scale=scale + 4, bias=bias - 4)

    def memory(self, shape: Shape) -> MemoryState:
        """A filled memory."""
        matrix = self.normal(shape.batch, shape.kv_heads, shape.width, shape.width, dtype=torch.float32)
        norm = self.normal(shape.batch, shape.kv_heads, shape.width, dtype=torch.float32)
        return MemoryState(matrix, norm.exp())


def qkv(shape: Shape, source: Source) -> Inputs:
    """q, k and v in the layout of projections."""
    heads = {"q": shape.heads, "k": shape.kv_heads, "v": shape.kv_heads}
    return {name: source.heads(shape, count) for name, count in heads.items()}


def rope(shape: Shape, like: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Rotary tables as the model makes them."""
    return Rotary.from_theta(shape.width)(rows, like)


def window_inputs(shape: Shape, source: Source) -> Inputs:
    """Arguments of ``window_attention``."""
    inputs = qkv(shape, source)
    return {**inputs, "window": shape.window, "rope": rope(shape, inputs["q"], shape.tokens)}


def layer_inputs(shape: Shape, source: Source, *, rule: Rule, continued: bool) -> Inputs:
    """Arguments of ``infini_attention``: of a stream's first call, or of one that continues it."""
    inputs = qkv(shape, source)
    options = {"window": shape.window, "segment": shape.segment, "rule": rule}
    feature, beta = source.feature(shape), source.normal(shape.heads, dtype=torch.float32)
    inputs |= {"beta": beta, "feature": feature, **options}
    rows = shape.tokens + (shape.window - 1 if continued else 0)
    state = {"state": _stream(shape, source, options, feature)} if continued else {}
    return {**inputs, **state, "rope": rope(shape, inputs["q"], rows)}


def _stream(shape: Shape, source: Source, options: Inputs, feature: FeatureMap) -> InfiniState:
    """The state after two segments and a third of one."""
    past = shape._replace(tokens=2 * shape.segment + shape.segment // 3, heads=shape.kv_heads)
    beta = source.normal(shape.kv_heads, dtype=torch.float32)
    with torch.no_grad():
        _, state = infini.infini_attention(**qkv(past, source), beta=beta, feature=feature, **options)
    return mapped(Tensor.detach, state)


def token_inputs(shape: Shape, source: Source) -> Inputs:
    """Arguments of ``infini_decode`` for the token after ``shape.tokens`` others."""
    inputs = qkv(shape._replace(tokens=1), source)
    keys, values = source.normal(2, shape.batch, shape.kv_heads, shape.window, shape.width)
    matrix, norm, _ = source.memory(shape)
    position = torch.full((shape.batch,), shape.tokens, device=source.site.device)
    return {
        **inputs,
        "beta": source.normal(shape.heads, dtype=torch.float32),
        "state": InfiniState(matrix, norm, keys, values, position),
        "window": shape.window,
        "segment": shape.segment,
        "rope": rope(shape, inputs["q"], shape.window),
        "feature": source.feature(shape),
    }


def update_inputs(shape: Shape, source: Source) -> Inputs:
    """Arguments of ``memory_update``."""
    inputs = qkv(shape, source)
    return {"k": inputs["k"], "v": inputs["v"], "feature": source.feature(shape)}


def scan_inputs(shape: Shape, source: Source, *, rule: Rule) -> Inputs:
    """Arguments of ``memory_scan``."""
    return {**update_inputs(shape, source), "segment": shape.segment, "rule": rule}


def retrieve_inputs(shape: Shape, source: Source) -> Inputs:
    """Arguments of ``memory_retrieve``."""
    q = source.heads(shape, shape.heads)
    return {"q": q, "state": source.memory(shape), "feature": source.feature(shape)}


def implementations(op: str, device: torch.device, compiles: bool) -> dict[str, Callable[..., Any]]:
    """The fused operator where the device has one; on a CPU the reference, as it is and to be compiled."""
    public = CASES[op].public
    found: dict[str, Callable[..., Any]] = {}
    if device.type in backends.FUSED[op]:
        found[FUSED] = partial(public, backend="fused")
    if device.type == "cpu":
        reference = partial(public, backend="reference")
        found[REFERENCE] = reference
        if compiles:
            found[COMPILED] = reference
    return found


def entries(
    op: str,
    variant: str,
    shape: Shape,
    site: Site,
    make: Callable[[Shape, Source], Inputs],
    least: Callable[[str], Work],
    *,
    directions: tuple[str, ...] = work.DIRECTIONS,
    compiles: bool = True,
    returns: Callable[[Any], Any] = lambda results: results,
) -> Iterator[Entry]:
    """An entry for each implementation; ``returns`` picks the results that a loss reaches.

    What torch.compile makes of the reference is not judged: it may add in another order, and is not ours.
    """
    case = replace(CASES[op], constants=("rope",))
    for impl, function in implementations(op, site.device, compiles).items():

        def prepare(impl: str = impl, function: Callable[..., Any] = function) -> Prepared:
            chosen = torch.compile(function, dynamic=False) if impl == COMPILED else function
            picked = lambda **inputs: returns(chosen(**inputs))  # noqa: E731
            return Prepared(picked, make(shape, site.source()), case.constants)

        sliced = lambda seed: make(shape.slice(), site.source(seed))  # noqa: E731
        judge = judged(case, sliced, site.dtype, function, learns=work.BOTH in directions)
        entry = Entry(op, impl, variant, shape, prepare, least, directions)
        yield entry if impl == COMPILED else replace(entry, judge=judge)


def layer_entries(shape: Shape, site: Site, directions: tuple[str, ...] = work.DIRECTIONS) -> Iterator[Entry]:
    """The whole layer: linear and delta, from an empty state and from a filled one.

    As in training, the loss of a first call reaches the output alone, that of a call within a stream the
    state too.
    """
    rules: tuple[Rule, ...] = ("linear", "delta")
    for rule in rules:
        for continued in (False, True):
            yield from entries(
                "infini_attention",
                f"{rule} continued" if continued else rule,
                shape,
                site,
                partial(layer_inputs, rule=rule, continued=continued),
                partial(work.layer, shape, filled=continued, itemsize=site.dtype.itemsize),
                directions=directions,
                compiles=rule == "linear" and not continued,
                returns=(lambda results: results) if continued else (lambda results: results[0]),
            )


def window_entries(shape: Shape, site: Site) -> Iterator[Entry]:
    """The window alone, rotating inside."""
    least = partial(work.attention, shape, reach=shape.window, itemsize=site.dtype.itemsize)
    yield from entries("window_attention", "window", shape, site, window_inputs, least)


def memory_entries(shape: Shape, site: Site) -> Iterator[Entry]:
    """One update with all tokens, the scan by segments, one retrieval."""
    size = site.dtype.itemsize
    written = partial(work.write, shape, itemsize=size)
    yield from entries("memory_update", "linear", shape, site, update_inputs, written)
    segments = -(-shape.tokens // shape.segment)
    scanned = partial(work.write, shape, itemsize=size, states=segments)
    rules: tuple[Rule, ...] = ("linear", "delta")
    for rule in rules:
        make = partial(scan_inputs, rule=rule)
        yield from entries("memory_scan", rule, shape, site, make, scanned, compiles=rule == "linear")
    yield from entries(
        "memory_retrieve", "learned", shape, site, retrieve_inputs, partial(work.read, shape, itemsize=size)
    )


def absent(op: str, device: torch.device) -> str | None:
    """Why ``op`` has no fused row on ``device``; None where it has one."""
    if device.type in backends.FUSED[op]:
        return None
    return f"{op}, fused: there is no fused implementation for device type {device.type!r}"
