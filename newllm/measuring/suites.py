"""The suites: which computations meet, at which shapes, for how long."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from itertools import chain, groupby
from typing import NamedTuple

import torch

from newllm.measuring import ours, shapes, work
from newllm.measuring.decoding import decode_entries, full_attention_entries
from newllm.measuring.entries import Entry, Prepared
from newllm.measuring.ours import Site
from newllm.measuring.serving import serve_entries
from newllm.measuring.shapes import Shape, Shapes
from newllm.measuring.sweeping import sweep_entries

Maker = Callable[[Shape, Site], Iterator[Entry]]


class Suite(NamedTuple):
    """Operators of newllm (``ops``) and ``peers`` that suit them, at ``shapes`` by device type.

    All entries of a shape and direction take turns; where ``together``, also those of its neighbours whose
    names begin with the same word.
    ``seconds`` and ``rounds`` (least, most) bound the time of each such group; before it each is called
    ``warm_calls`` times, and once more to see the memory it takes.
    """

    ops: tuple[str, ...]
    shapes: Shapes
    makers: tuple[Maker, ...]
    peers: tuple[str, ...] = ()
    together: bool = False
    seconds: float = 6.0
    rounds: tuple[int, int] = (7, 50)
    warm_calls: int = 2


def _long(shape: Shape, site: Site) -> Iterator[Entry]:
    """The linear layer alone: at a million tokens the inputs of every further entry fill a GPU."""
    found = ours.layer_entries(shape, site, (work.FORWARD,))
    return (entry for entry in found if entry.variant == "linear")


def _copies(shape: Shape, site: Site) -> Iterator[Entry]:
    """A device copy that reads and writes as many bytes as ``memory_update`` must."""
    moved = work.write(shape, work.FORWARD, site.dtype.itemsize).bytes

    def prepare() -> Prepared:
        source = torch.zeros(int(moved) // 2, dtype=torch.uint8, device=site.device)
        target = torch.empty_like(source)
        return Prepared(target.copy_, {}, call=lambda: target.copy_(source))

    least = work.Work(0, moved)
    yield Entry(
        "copy", "device copy", "bytes of memory_update", shape, prepare, lambda _: least, (work.FORWARD,)
    )


_LAYER_PEERS = ("flex", "fa4", "sdpa", "fla-linear", "fla-delta", "loop", "compiled-loop")
_ATTENTION_PEERS = ("flex", "fa4")

SUITES = {
    "layer": Suite(("infini_attention",), shapes.LAYERS, (ours.layer_entries,), _LAYER_PEERS),
    "window": Suite(("window_attention",), shapes.LAYERS, (ours.window_entries,), _ATTENTION_PEERS),
    "memory": Suite(
        ("memory_update", "memory_scan", "memory_retrieve"),
        shapes.LAYERS,
        (ours.memory_entries, _copies),
    ),
    "decode": Suite(
        ("infini_decode",), shapes.DECODES, (decode_entries, full_attention_entries), together=True
    ),
    "sweep": Suite(
        ("context_sweep",),
        shapes.SWEEPS,
        (sweep_entries,),
        ("eager-loop", "hoisted-loop", "graph-loop", "lstm", "gru"),
        seconds=10,
        rounds=(5, 50),
        warm_calls=1,
    ),
    "serve": Suite(
        (), shapes.SERVES, (serve_entries,), ("hf-llama",), together=True, rounds=(3, 20), warm_calls=1
    ),
    "long": Suite(
        ("infini_attention",), shapes.LONG, (_long,), ("sdpa",), seconds=2, rounds=(1, 20), warm_calls=0
    ),
}


def groups(
    suite: Suite, site: Site, peers: dict[str, Maker], only_shapes: Collection[str] = ()
) -> list[tuple[str, list[Entry]]]:
    """(direction, entries that take turns), for each shape, or for those of ``only_shapes``.

    Raises ValueError when none of the suite's shapes has such a name.
    """
    offered = suite.shapes[site.device.type]
    wanted = [shape for shape in offered if not only_shapes or shape.name in only_shapes]
    if not wanted:
        names = ", ".join(shape.name for shape in offered)
        raise ValueError(f"shapes must be some of {names}; got {', '.join(only_shapes)}")
    makers = (*suite.makers, *peers.values())
    entries = [[*chain.from_iterable(make(shape, site) for make in makers)] for shape in wanted]
    if suite.together:
        alike = groupby(zip(wanted, entries, strict=True), key=lambda pair: pair[0].name.split()[0])
        entries = [[*chain.from_iterable(found for _, found in pairs)] for _, pairs in alike]
    found = [
        (direction, [entry for entry in group if direction in entry.directions])
        for group in entries
        for direction in work.DIRECTIONS
    ]
    return [(direction, group) for direction, group in found if group]
