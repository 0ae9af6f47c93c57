"""One token of one layer, replayed from a CUDA graph of as many layers as exceed the L2 cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from newllm import backend as backends
from newllm.measuring import work
from newllm.measuring.entries import FUSED, REFERENCE, Entry, Prepared, judged
from newllm.measuring.ours import Site, token_inputs
from newllm.measuring.shapes import Shape
from newllm.measuring.timing import Call
from newllm.testing import CASES, Inputs, leaves


def decode_entries(shape: Shape, site: Site) -> Iterator[Entry]:
    """Ours, fused under a graph on a GPU, as the reference on a CPU."""
    case = CASES["infini_decode"]
    impl = FUSED if site.device.type in backends.FUSED["infini_decode"] else REFERENCE
    if impl == REFERENCE and site.device.type != "cpu":
        return
    function = partial(case.public, backend=impl)
    yield Entry(
        "infini_decode",
        impl,
        "linear",
        shape,
        lambda: _layers(function, lambda: token_inputs(shape, site.source()), site.device),
        lambda direction: work.token(shape, site.dtype.itemsize),
        (work.FORWARD,),
        judged(case, lambda seed: token_inputs(shape, site.source(seed)), site.dtype, function, learns=False),
    )


def full_attention_entries(shape: Shape, site: Site) -> Iterator[Entry]:
    """SDPA of one query over the keys and values of all tokens."""

    def inputs() -> Inputs:
        source = site.source()
        sizes = {
            "q": (shape.heads, 1),
            "k": (shape.kv_heads, shape.tokens),
            "v": (shape.kv_heads, shape.tokens),
        }
        return {
            name: source.normal(shape.batch, heads, tokens, shape.width)
            for name, (heads, tokens) in sizes.items()
        }

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    least = work.Work(4 * shape.query, 2 * shape.key * site.dtype.itemsize)
    prepare = lambda: _layers(attend, inputs, site.device)  # noqa: E731
    yield Entry("full attention", "SDPA", "decode", shape, prepare, lambda _: least, (work.FORWARD,))


def _layers(function: Callable[..., Any], make: Callable[[], Inputs], device: torch.device) -> Prepared:
    """A replay of enough layers that none finds its state in the L2 cache; on a CPU, one layer."""
    first = make()
    if device.type != "cuda":
        return Prepared(function, first, call=_each(function, [first]))
    size = sum(x.nbytes for x in _tensors(first))
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    layers = [first, *(make() for _ in range(-(-3 * cache // size) - 1))]
    return Prepared(function, first, call=_graph(_each(function, layers)), repeats=len(layers))


def _tensors(inputs: Inputs) -> list[torch.Tensor]:
    return [x for _, x in leaves(inputs)]


def _each(function: Callable[..., Any], layers: list[Inputs]) -> Call:
    def call() -> None:
        with torch.no_grad():
            for inputs in layers:
                function(**inputs)

    return call


def _graph(call: Call) -> Call:
    """``call`` as a CUDA graph, warmed up on a stream of its own as capturing asks."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return partial(_replay, graph, call)


def _replay(graph: torch.cuda.CUDAGraph, held: Call) -> None:
    """Replay what was captured of ``held``, whose tensors the graph reads: it must outlive the graph."""
    graph.replay()
