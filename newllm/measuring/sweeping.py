"""The suite of the context sweeps: ours, loops as its documents write them, torch's recurrent layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from newllm import backend as backends
from newllm.measuring import work
from newllm.measuring.entries import FUSED, REFERENCE, Entry, Prepared, judged
from newllm.measuring.ours import Site, Source
from newllm.measuring.shapes import CONVERGENCE, JACOBI, Shape
from newllm.measuring.work import Work
from newllm.reference.context import LAYER_NORM_EPS
from newllm.testing import CASES, Inputs
from newllm.types import ContextParams, SweepInfo

OP = "context_sweep"
Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
# Standard deviation of the weights: that of the documents, and for the suite's last picture others around it,
# as shares of 1 / sqrt(width).
DOCUMENTS_STD = 0.1
# Jacobi's sweeps that are timed at once: the first reads no contexts yet.
SWEEPS = 8
STDS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


def sweep_inputs(shape: Shape, source: Source, std: float = DOCUMENTS_STD) -> Inputs:
    """Normalised inputs, and one context layer with weights of this standard deviation."""
    width = shape.width
    x = F.layer_norm(source.normal(shape.batch, shape.tokens, width), (width,))
    weight_c, weight_x = (source.normal(1, width, width) * std for _ in range(2))
    bias, gain, shift = source.normal(1, width) / 100, x.new_ones(1, width), x.new_zeros(1, width)
    return {"x": x, "params": ContextParams(weight_c, weight_x, bias, gain, shift)}


def sweep_entries(shape: Shape, site: Site) -> Iterator[Entry]:
    """Our methods, and the reference where it is what a machine has."""
    if shape.name == CONVERGENCE:
        yield from _convergence_entries(shape, site)
        return
    if shape.name == JACOBI:
        for impl in (FUSED, REFERENCE):
            yield _entry(shape, site, impl, "jacobi", "jacobi, a sweep", work.DIRECTIONS, sweeps=SWEEPS)
        return
    fused = site.device.type in backends.FUSED[OP]
    methods = ("sequential", "block", "auto") if shape.batch == 1 else ("sequential",)
    found = [(FUSED, method) for method in methods if fused]
    if site.device.type == "cpu":
        found.append((REFERENCE, "sequential"))
    for impl, method in found:
        yield _entry(shape, site, impl, method, method, work.DIRECTIONS)


def _convergence_entries(shape: Shape, site: Site) -> Iterator[Entry]:
    """How many sweeps weights of different size ask for; the detail of their rows says so."""
    for share in STDS:
        std = share / shape.width**0.5
        yield _entry(shape, site, REFERENCE, "jacobi", f"jacobi, std {share:g}", (work.FORWARD,), std)


def _entry(
    shape: Shape,
    site: Site,
    impl: str,
    method: str,
    variant: str,
    directions: tuple[str, ...],
    std: float = DOCUMENTS_STD,
    sweeps: int | None = None,
) -> Entry:
    """``sweeps``: so many of Jacobi's, whatever they change, and the time of one."""
    options: Inputs = {} if sweeps is None else {"sweeps": sweeps, "tol": 0.0}
    public = partial(CASES[OP].public, method=method, backend=impl, **options)
    last: list[SweepInfo] = []

    def sweep(**inputs: Any) -> Any:
        contexts, state, info = public(**inputs)
        last[:] = [info]
        return contexts, state

    def detail() -> str | None:
        if method == "sequential":
            return None
        return f"{last[0].method}, {last[0].sweeps} sweeps, rho {float(last[0].rho):.4f}"

    make = partial(sweep_inputs, std=std)
    judge = judged(
        CASES[OP],
        lambda seed: make(shape._replace(batch=min(shape.batch, 2), tokens=5), site.source(seed)),
        site.dtype,
        public,
        learns=True,
    )
    prepare = lambda: Prepared(  # noqa: E731
        sweep, make(shape, site.source()), repeats=sweeps or 1, detail=detail
    )
    return Entry(OP, impl, variant, shape, prepare, _least(shape, site), directions, judge)


def _least(shape: Shape, site: Site) -> Callable[[str], Work]:
    return partial(work.recurrence, shape, itemsize=site.dtype.itemsize)


# Others


def concatenated_loop(x: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """The documents' layer, token by token: one linear map of ``[c ; x]``, ``weight [C, C + E]``."""
    context = x.new_zeros(len(x), len(weight))
    contexts = []
    for token in x.unbind(1):
        change = F.gelu(F.linear(torch.cat([context, token], -1), weight, bias))
        context = F.layer_norm(context + change, gain.shape, gain, shift, LAYER_NORM_EPS)
        contexts.append(context)
    return torch.stack(contexts, 1)


def hoisted_step(context: Tensor, drive: Tensor, weight_c: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """A token of ``hoisted_loop``: ``context [B, C]``, ``drive [B, C]`` what its input adds."""
    change = F.gelu(F.linear(context, weight_c) + drive)
    return F.layer_norm(context + change, gain.shape, gain, shift, LAYER_NORM_EPS)


def hoisted_loop(
    x: Tensor,
    weight_c: Tensor,
    weight_x: Tensor,
    bias: Tensor,
    gain: Tensor,
    shift: Tensor,
    step: Step = hoisted_step,
) -> Tensor:
    """The same with the input's share of all tokens in one product."""
    drive = F.linear(x, weight_x, bias)
    context = x.new_zeros(len(x), len(weight_c))
    contexts = []
    for token in drive.unbind(1):
        context = step(context, token, weight_c, gain, shift)
        contexts.append(context)
    return torch.stack(contexts, 1)


def _loop_inputs(shape: Shape, site: Site, hoisted: bool) -> Inputs:
    inputs = sweep_inputs(shape, site.source())
    weight_c, weight_x, bias, gain, shift = (value[0] for value in inputs["params"])
    weights = {"weight_c": weight_c, "weight_x": weight_x}
    if not hoisted:
        weights = {"weight": torch.cat([weight_c, weight_x], -1)}
    return {"x": inputs["x"], **weights, "bias": bias, "gain": gain, "shift": shift}


def loop_entries(shape: Shape, site: Site, *, hoisted: bool, compiled: bool = False) -> Iterator[Entry]:
    """A Python loop over tokens; ``compiled``: its step compiled and the loop a CUDA graph, forwards."""
    if shape.name == CONVERGENCE or (site.device.type == "cuda" and not _looped(shape)):
        return
    name = "hoisted loop" if hoisted else "eager loop"

    def prepare() -> Prepared:
        function: Any = hoisted_loop if hoisted else concatenated_loop
        inputs = _loop_inputs(shape, site, hoisted)
        return _replayed(inputs) if compiled else Prepared(function, inputs)

    impl = f"compiled {name}" if compiled else name
    directions = (work.FORWARD,) if compiled else work.DIRECTIONS
    yield Entry(OP, impl, "sequential", shape, prepare, _least(shape, site), directions)


def _looped(shape: Shape) -> bool:
    """Whether a GPU times loops: their time hardly depends on the size, and a round takes a second."""
    return shape.width == 768 and shape.batch in (1, 64) and shape.tokens <= 2048


def _replayed(inputs: Inputs) -> Prepared:
    """All tokens as one CUDA graph of compiled steps."""
    function = partial(hoisted_loop, step=torch.compile(hoisted_step, dynamic=False))
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        function(**inputs)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            function(**inputs)
    return Prepared(function, inputs, call=graph.replay)


def layer_of_torch_entries(shape: Shape, site: Site, *, kind: str) -> Iterator[Entry]:
    """``torch.nn.LSTM`` or ``GRU`` of the same width, cuDNN's on a GPU."""
    if shape.name in (CONVERGENCE, JACOBI):
        return

    def prepare() -> Prepared:
        layer = getattr(torch.nn, kind)(shape.width, shape.width, batch_first=True)
        layer = layer.to(site.device, site.dtype)
        weights = {name: value.detach() for name, value in layer.named_parameters()}

        def call(x: Tensor, **given: Tensor) -> Tensor:
            contexts: Tensor = torch.func.functional_call(layer, given, (x,))[0]
            return contexts

        return Prepared(call, {"x": sweep_inputs(shape, site.source())["x"], **weights})

    yield Entry("recurrent layer", kind, "torch.nn", shape, prepare, _least(shape, site))
