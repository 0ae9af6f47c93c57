"""Processes that slice sequences over gloo: what each of them computes, and what one process makes of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from newllm.distributed.context import sequence_sweep
from newllm.distributed.line import Line, line_of
from newllm.distributed.prefill import prefill
from newllm.distributed.sequence_parallel import sequence_attention, slice_bounds
from newllm.models.session import Session
from newllm.reference import infini, slices
from newllm.testing import Draw, Inputs, mapped
from newllm.types import ContextParams, FeatureMap, InfiniState
from tests.tiny_models import tiny_senri

ALONE = Line("", 0, 1)
SIZES = {"batch": 2, "heads": 8, "kv_heads": 4, "tokens": 48, "key": 6, "value": 5, "segment": 4}
TIMEOUT = 60
LEARNED = ("q", "k", "v", "beta", "scale", "bias", "segment_weight")
# Where a tensor's tokens or segments lie; other tensors belong to all ranks.
SLICED = {"q": 2, "k": 2, "v": 2, "segment_weight": 1}


def _feature(draw: Draw) -> Inputs:
    return {"scale": draw.normal("kv_heads") + 2, "bias": draw.normal("kv_heads")}


_TANH = {"gate": "tanh"}

# Name -> dtype, window and options of a layer.
CASES: dict[str, tuple[torch.dtype, int | None, Callable[[Draw], Inputs]]] = {
    "linear": (torch.float32, 4, lambda draw: _feature(draw)),
    "linear wide": (torch.float32, 7, lambda draw: {"segment_weight": draw.normal("batch", 12), **_TANH}),
    "linear bfloat16": (torch.bfloat16, 8, lambda draw: {}),
    "segments": (torch.float32, None, lambda draw: {}),
    "no memory": (torch.float32, 6, lambda draw: {"beta": None}),
    "delta": (torch.float32, 8, lambda draw: {"rule": "delta", **_feature(draw)}),
    "delta wide": (torch.float32, 7, lambda draw: {"rule": "delta", **_TANH}),
}  # fmt: skip


def inputs(name: str) -> Inputs:
    """Inputs of a whole sequence: tables have the window's rows before the first token."""
    dtype, window, more = CASES[name]
    # A seed with which the gradients of gates and feature maps are not exact by luck.
    draw = Draw(SIZES, dtype, "cpu", 8)
    qkv = {x: draw.normal("batch", heads, "tokens", width) for x, heads, width in _QKV}
    rows = torch.arange(-(window or 0), SIZES["tokens"], dtype=torch.float64)
    angles = torch.outer(rows, 10000.0 ** -(torch.arange(3) / 3)).repeat(1, 2)
    rope = angles.cos().to(dtype), angles.sin().to(dtype)
    fixed = {"window": window, "segment": SIZES["segment"], "rope": rope}
    return {
        **qkv,
        "beta": draw.normal("heads", dtype=torch.promote_types(dtype, torch.float32)),
        **fixed,
        **more(draw),
    }


_QKV = (("q", "heads", "key"), ("k", "kv_heads", "key"), ("v", "kv_heads", "value"))


def called(function: Callable[..., Any], given: Inputs, **options: Any) -> tuple[Tensor, InfiniState]:
    """``function`` of a layer's inputs, with scale and bias as its feature map."""
    given = dict(given)
    scale, bias = given.pop("scale", None), given.pop("bias", None)
    feature = None if scale is None else FeatureMap(scale=scale, bias=bias)
    return function(**given, feature=feature, **options)


def slopes(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the output, the last matrix and the last norm."""
    draw = Draw(SIZES, torch.float64, "cpu", 4)
    shapes = ("heads", "tokens", "value"), ("kv_heads", "key", "value"), ("kv_heads", "key")
    return tuple(draw.normal("batch", *shape) for shape in shapes)  # type: ignore[return-value]


def differentiated(
    function: Callable[..., Any], given: Inputs, wanted: tuple[Tensor | None, ...], **options: Any
) -> dict[str, Tensor]:
    """Output, memory and all gradients; ``wanted`` are the slopes of out, matrix and norm (None: unused)."""
    given = mapped(Tensor.detach, given)
    learned = {x: given[x].requires_grad_() for x in LEARNED if isinstance(given.get(x), Tensor)}
    out, state = called(function, given, **options)
    pairs = [
        (result, slope.to(result.dtype))
        for result, slope in zip((out, state.matrix, state.norm), wanted, strict=True)
        if result is not None and slope is not None
    ]
    found = torch.autograd.grad([a for a, _ in pairs], [*learned.values()], [b for _, b in pairs])
    named = {f"gradient of {x}": slope for x, slope in zip(learned, found, strict=True)}
    memory = {} if state.matrix is None else {"matrix": state.matrix, "norm": state.norm}
    return {x: y.detach() for x, y in {"out": out, **memory, **named}.items() if y is not None}


def one_process(name: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The same by the reference of the whole layer: in float64, or computed in ``dtype``."""
    given = inputs(name)
    rope = tuple(table[given["window"] or 0 :] for table in given["rope"])
    if dtype is None:
        given = mapped(lambda x: x.double(), given)
        rope = mapped(lambda x: x.double(), rope)
    return differentiated(infini.infini_attention, {**given, "rope": rope}, slopes(name), compute_dtype=dtype)


def one_slice(name: str, line: Line, bounds: tuple[int, int]) -> dict[str, Tensor]:
    """What one rank computes of ``name``."""
    given, (first, end), segment = inputs(name), bounds, SIZES["segment"]
    for x, axis in sliced(given):
        step = segment if x == "segment_weight" else 1
        given[x] = given[x].narrow(axis, first // step, (end - first) // step)
    window = given["window"] or 0
    given["rope"] = tuple(table[first : end + window] for table in given["rope"])
    wanted = slopes(name)
    last = wanted[1:] if line.last else (None, None)
    return differentiated(
        sequence_attention, given, (wanted[0][:, :, first:end], *last), mesh=line, start=first
    )


def sliced(given: Inputs) -> list[tuple[str, int]]:
    """Those of SLICED that are there, with their axis."""
    return [(x, axis) for x, axis in SLICED.items() if isinstance(given.get(x), Tensor)]


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The ranks' results as those of one process."""
    axes = {"out": 2} | {f"gradient of {x}": axis for x, axis in SLICED.items()}
    whole = {}
    for name in parts[0]:
        each = [part[name] for part in parts]
        if name in ("matrix", "norm"):
            whole[name] = each[-1]
        else:
            whole[name] = torch.cat(each, axes[name]) if name in axes else sum(each[1:], each[0])
    return whole


@contextmanager
def meeting(rank: int, size: int, folder: str, timeout: float = TIMEOUT) -> Iterator[Line]:
    """A gloo group of ``size`` processes that meet in ``folder``."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size,
        timeout=timedelta(seconds=timeout),
    )  # fmt: skip
    assert dist.group.WORLD is not None
    yield Line(dist.group.WORLD.group_name, rank, size)
    dist.destroy_process_group()


def every_case(rank: int, size: int, folder: str) -> None:
    """All cases, over even and over uneven slices, and what was sent for sequences of two lengths."""
    with meeting(rank, size, folder) as line:
        found: dict[Any, Any] = {}
        for name in CASES:
            for kind, bounds in cuts(size).items():
                found[name, kind] = one_slice(name, line, bounds[rank])
        found["bytes"] = [sent(line, tokens) for tokens in (48, 96)]
        others = dist.new_group([*range(1, size)])
        try:
            line_of(others)
        except ValueError as error:
            found["outside"] = str(error)
        torch.save(found, f"{folder}/{rank}.pt")


def cuts(size: int) -> dict[str, list[tuple[int, int]]]:
    """Borders of slices: as even as can be, and the first as short as can be."""
    tokens, segment = SIZES["tokens"], SIZES["segment"]
    even = slice_bounds(tokens, size, segment=segment, window=8)
    rest = slice_bounds(tokens - 8, size - 1, segment=segment, window=8) if size > 1 else []
    return {"even": even, "uneven": [(0, 8), *((a + 8, b + 8) for a, b in rest)] if rest else even}


def sent(line: Line, tokens: int) -> dict[str, int]:
    """Bytes that this rank hands to ``torch.distributed`` in a forward and in a backward pass."""
    counted = 0
    post = dist.batch_isend_irecv

    def counting(posted: list[dist.P2POp]) -> Any:
        nonlocal counted
        counted += sum(each.tensor.nbytes for each in posted if each.op is dist.isend)
        return post(posted)

    own = tokens // line.size
    q, k, v = (torch.randn(1, heads, own, 8, requires_grad=True) for heads in (4, 2, 2))
    beta = torch.zeros(4, requires_grad=True)
    dist.batch_isend_irecv = counting
    out, _ = sequence_attention(q, k, v, beta, mesh=line, window=8, segment=4)
    forward = counted
    out.sum().backward()
    dist.batch_isend_irecv = post
    return {"forward": forward, "backward": counted - forward}


def lost(rank: int, size: int, folder: str, how: str) -> None:
    """One layer together, then rank 1 ends or hangs; what the others then say goes into ``<rank>.pt``."""
    parts = [torch.randn(1, 2, 8, 4) for _ in "qkv"]
    with meeting(rank, size, folder):
        group = dist.new_group(timeout=timedelta(seconds=PATIENCE))
        options = {"mesh": group, "window": 4, "segment": 4}
        sequence_attention(*parts, torch.zeros(2), **options)
        session = Session(tiny_senri())
        began, said = time.perf_counter(), ""
        if rank == 1:
            torch.save(None, f"{folder}/{rank}.pt")
            others = [Path(folder, f"{other}.pt") for other in range(size)]
            while how == "hangs" and not all(path.exists() for path in others):
                time.sleep(0.1)
            os._exit(0)
        try:
            for _ in range(3):
                if how == "ends before a prompt":
                    prefill(session, torch.ones(64, dtype=torch.int64), mesh=group)
                else:
                    sequence_attention(*parts, torch.zeros(2), **options)
        except RuntimeError as error:
            said = str(error)
        torch.save((said, time.perf_counter() - began), f"{folder}/{rank}.pt")
        os._exit(0)


# Seconds that a rank waits for a lost neighbour, that a message takes, and that the window's part takes.
PATIENCE, HOP, WORK = 4.0, 0.4, 0.8
LAYERS = 3


class Late:
    """What :data:`HOP` seconds from now is sent; its sender does not wait."""

    def __init__(self, post: Callable[..., Any], posted: list[dist.P2POp]) -> None:
        # Kept: a message whose work is forgotten is lost.
        self.works: list[dist.Work] = []
        self.timer = Timer(HOP, lambda: self.works.extend(post(posted)))
        self.timer.start()

    def wait(self) -> None:
        """The message is on its way."""


def overlapped(rank: int, size: int, folder: str) -> None:
    """Seconds of a layer forwards, backwards, and of LAYERS, whose memories and steps take HOP and WORK."""
    post, whole = (
        dist.batch_isend_irecv,
        {name: getattr(slices, name) for name in ("near", "finish_backward", "read")},
    )
    late: list[Late] = []

    def slowly(name: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            time.sleep(WORK)
            return whole[name](*args)

        return run

    def posting(posted: list[dist.P2POp]) -> Any:
        # The memory is sent alone; keys and values are shifted, and arrive at once.
        if [each.op for each in posted] != [dist.isend] or posted[0].tag == 0:
            return post(posted)
        late.append(Late(post, posted))
        return late[-1:]

    def timed(run: Callable[[], Any]) -> tuple[float, Any]:
        dist.barrier()
        began = time.perf_counter()
        found = run()
        return time.perf_counter() - began, found

    with meeting(rank, size, folder) as line:
        q, k, v = (torch.randn(1, 2, 8, 5, requires_grad=True) for _ in "qkv")
        given = q, k, v, torch.zeros(2, requires_grad=True)

        def forward() -> Tensor:
            return sequence_attention(*given, mesh=line, window=4, segment=4)[0].sum()

        torch.autograd.grad(forward(), given)
        dist.batch_isend_irecv = posting
        slices.near, slices.finish_backward = slowly("near"), slowly("finish_backward")
        first, out = timed(forward)
        second, _ = timed(lambda: torch.autograd.grad(out, given))
        slices.near, slices.read = whole["near"], slowly("read")
        third, _ = timed(lambda: [forward() for _ in range(LAYERS)])
        for message in late:
            message.timer.join()
        dist.barrier()
        torch.save([first, second, third], f"{folder}/{rank}.pt")


def context_inputs(scale: float) -> tuple[Tensor, Any]:
    """Inputs ``[2, 60, 3]`` and params in float64; contexts forget the faster the smaller ``scale`` is."""
    draw = Draw(
        {"batch": 2, "tokens": 60, "input": 3, "width": 4, "hidden": 6, "layers": 2}, torch.float64, "cpu", 5
    )
    weights = draw.scaled("layers", "width", "width") * scale, draw.scaled("layers", "width", "input")
    vectors = [draw.normal("layers", "width") for _ in range(3)]
    return draw.normal("batch", "tokens", "input"), ContextParams(*weights, *vectors)


def swept(x: Tensor, params: Any, sweep: Callable[..., Any], slope: Tensor) -> tuple[dict[str, Tensor], Any]:
    """Contexts, state, their gradients, and how it was done."""
    x, state = x.detach().requires_grad_(), torch.full((2, 4), 0.5, dtype=x.dtype, requires_grad=True)
    params = mapped(lambda y: y.detach().requires_grad_(), params)
    contexts, last, info = sweep(x, params, state=state)
    found = torch.autograd.grad(contexts, [x, state, *params], slope, retain_graph=True)
    names = ("x", "state", *params._fields)
    slopes = {f"gradient of {name}": y for name, y in zip(names, found, strict=True)}
    return {"contexts": contexts.detach(), "last": last.detach(), **slopes}, info


def every_sweep(rank: int, size: int, folder: str) -> None:
    """Sweeps that forget, that do not, and one that may not fall back."""
    with meeting(rank, size, folder) as line:
        found: dict[Any, Any] = {}
        own = slice(rank * 60 // size, (rank + 1) * 60 // size)
        x, params = context_inputs(0.1)
        for tol, sweeps in SWEEPS:
            slope = torch.linspace(-1, 1, x.shape[1], dtype=x.dtype)[own, None].expand(2, -1, 4)
            run = partial(sequence_sweep, mesh=line, tol=tol, sweeps=sweeps)
            found[tol, sweeps] = swept(x[:, own], params, run, slope)
        try:
            sequence_sweep(x[:, own], params, mesh=line, tol=0.0, sweeps=2, fallback=False)
        except RuntimeError as error:
            found["refused"] = str(error)
        torch.save(found, f"{folder}/{rank}.pt")


# Tolerance and most passes: borders that agree, and borders that do not come to, so that ranks take turns.
SWEEPS = ((1e-9, None), (0.0, 2))
