"""Whole models as they are served: decoding, reading, keeping sessions, beside a Llama's static cache."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from newllm import backend as backends
from newllm.measuring import work
from newllm.measuring.entries import FUSED, REFERENCE, Entry, Prepared
from newllm.measuring.models import SIZES, llama, senri
from newllm.measuring.ours import Site
from newllm.measuring.shapes import SERVES, Shape
from newllm.measuring.work import Work
from newllm.testing import assert_no_worse

if TYPE_CHECKING:
    from transformers import StaticCache

    from newllm.models.senri import SenriForCausalLM
    from newllm.models.session import Session
    from newllm.models.streams import Compile


# Most tokens of all rows together that one pass of a prefill reads.
_PASS = 2**15
# Tokens that a Llama's cache can hold in a moment.
_LONGEST_CACHE = 2**17
# Tokens of a prompt, where the size of the context is that of a static cache.
_PROMPT = 16


def serve_entries(shape: Shape, site: Site) -> Iterator[Entry]:
    """Ours at this shape; the first word of its name says what is measured, decoding if nothing else."""
    makers = {"prefill": _prefill_entries, "state": _state_entries, "generate": _generate_entries}
    yield from makers.get(shape.name.split()[0], _decode_entries)(shape, site)


def llama_entries(shape: Shape, site: Site) -> Iterator[Entry]:
    """transformers' Llama of the same sizes: SDPA, static cache, compiled with CUDA graphs on a GPU."""
    kind = shape.name.split()[0]
    if kind == "generate":
        prepare = partial(_generation, shape, site, llama)
        yield _entry(shape, site, "generate", "HF Llama", "static cache", prepare, full=True)
    elif kind not in ("prefill", "state") and shape.tokens <= _LONGEST_CACHE:
        prepare = partial(_llama_steps, shape, site)
        yield _entry(shape, site, "decode", "HF Llama", "static cache", prepare, full=True)


def _compile(site: Site, compile: Compile) -> Compile:
    return compile if site.device.type == "cuda" else "none"


def _entry(
    shape: Shape,
    site: Site,
    op: str,
    impl: str,
    variant: str,
    prepare: Callable[[], Prepared],
    *,
    full: bool = False,
    judge: Callable[[], None] | None = None,
) -> Entry:
    least = partial(_least, shape, site, full) if op in ("decode", "generate") else _nothing
    return Entry(op, impl, variant, shape, prepare, least, (work.FORWARD,), judge)


def _own(site: Site) -> str:
    return FUSED if site.device.type in backends.FUSED["infini_decode"] else REFERENCE


def _least(shape: Shape, site: Site, full: bool, _: str) -> Work:
    """One token of all rows: the weights once, and all layers' windows, or the whole context."""
    sizes, hidden = SIZES[site.device.type], shape.heads * shape.width
    attention = 2 * hidden * (hidden + shape.kv_heads * shape.width)
    weights = sizes.layers * (attention + 3 * hidden * sizes.intermediate) + sizes.vocabulary * hidden
    reach = shape.tokens if full else shape.window
    ring = 2 * shape.batch * shape.kv_heads * reach * shape.width
    products = 2 * shape.batch * weights + 4 * shape.batch * shape.heads * reach * shape.width * sizes.layers
    return Work(products, (weights + ring * sizes.layers) * site.dtype.itemsize)


def _nothing(_: str) -> Work:
    return Work(0, 0)


def _tokens(shape: Shape, site: Site, tokens: int) -> Tensor:
    chance = torch.Generator().manual_seed(0)
    return torch.randint(SIZES[site.device.type].vocabulary, (shape.batch, tokens), generator=chance)


# Ours


def _decode_entries(shape: Shape, site: Site) -> Iterator[Entry]:
    """A session's own loop, tokens on the host as they come."""
    ways: tuple[tuple[str, Compile], ...] = (("Session", "full"), ("Session, not compiled", "graph"))
    shortest = shape.tokens == min(other.tokens for other in SERVES[site.device.type])
    for variant, compile in ways if site.device.type == "cuda" and shortest else ways[:1]:
        prepare = partial(_session_steps, shape, site, compile)
        judge = partial(_judge, shape, site, _compile(site, compile)) if shortest else None
        yield _entry(shape, site, "decode", _own(site), variant, prepare, judge=judge)


@functools.lru_cache(maxsize=2)
def _session(shape: Shape, site: Site, compile: Compile) -> Session:
    """One session for all lengths: what differs between them is what it remembers, not where."""
    from newllm.models.session import Session

    chunk = max(1, _PASS // shape.batch)
    return Session(senri(shape, site), batch_size=shape.batch, chunk=chunk, compile=_compile(site, compile))


def _read_session(shape: Shape, site: Site, compile: Compile = "none") -> Session:
    """A session that has read the shape's tokens."""
    session = _session(shape._replace(name="", tokens=0), site, compile)
    session.reset()
    session.feed(_tokens(shape, site, shape.tokens))
    return session


def _session_steps(shape: Shape, site: Site, compile: Compile) -> Prepared:
    """The steps after the shape's tokens; each call restores what was remembered then."""
    session, steps = _read_session(shape, site, compile), SIZES[site.device.type].steps
    start = session.snapshot()

    def call() -> None:
        session.restore(start)
        session.generate(max_new_tokens=steps)

    detail = lambda: f"state {session.state_bytes // shape.batch:,} bytes a session"  # noqa: E731
    return Prepared(call, {}, call=call, repeats=steps, detail=detail)


def _prefill_entries(shape: Shape, site: Site) -> Iterator[Entry]:
    """A session from nothing to the shape's tokens."""
    from newllm.models.session import Session

    def prepare() -> Prepared:
        session, ids = Session(senri(shape, site), chunk=_PASS), _tokens(shape, site, shape.tokens)

        def call() -> None:
            session.reset()
            session.feed(ids)

        return Prepared(call, {}, call=call)

    yield _entry(shape, site, "prefill", _own(site), "Session.feed", prepare)


def _state_entries(shape: Shape, site: Site) -> Iterator[Entry]:
    """A session's snapshot and restoration, in memory and through a file."""

    def in_memory() -> Prepared:
        session = _read_session(shape, site)
        call = lambda: session.restore(session.snapshot())  # noqa: E731
        detail = lambda: f"state {session.state_bytes:,} bytes"  # noqa: E731
        return Prepared(call, {}, call=call, detail=detail)

    def in_file() -> Prepared:
        session, folder = _read_session(shape, site), tempfile.TemporaryDirectory()

        def file() -> Path:
            # By way of the folder, which is removed when nobody holds it.
            return Path(folder.name) / "session.safetensors"

        def call() -> None:
            session.save(file())
            session.load(file())

        return Prepared(call, {}, call=call, detail=lambda: f"file {file().stat().st_size:,} bytes")

    yield _entry(shape, site, "snapshot and restore", _own(site), "in memory", in_memory)
    yield _entry(shape, site, "save and load", _own(site), "in a file", in_file)


def _generate_entries(shape: Shape, site: Site) -> Iterator[Entry]:
    prepare = partial(_generation, shape, site, senri)
    yield _entry(shape, site, "generate", _own(site), "static cache", prepare)


def _judge(shape: Shape, site: Site, compile: Compile) -> None:
    """Logits of a few steps after two windows and a half, as a session makes them, by the error rule."""
    small = shape.slice()._replace(tokens=2 * shape.window + shape.window // 2 + 3)
    model = senri(small._replace(batch=1), site, layers=2)
    ids = _tokens(small, site, small.tokens + 5).to(site.device)
    out = _teacher_forced(model, ids, compile)
    with backends.use_backend("reference"):
        baseline = _teacher_forced(model, ids, "none")
        oracle = _teacher_forced(copy.deepcopy(model).double(), ids, "none")
    assert_no_worse(out, oracle, baseline, "the logits")


def _teacher_forced(model: SenriForCausalLM, ids: Tensor, compile: Compile) -> Tensor:
    """Logits ``[B, 5, vocabulary]`` of the last five of ``ids``, read step by step."""
    from newllm.models.streams import Streams

    streams = Streams(model, len(ids), compile=compile)
    streams.read(ids[:, :-5], torch.ones_like(ids[:, :-5], dtype=torch.bool))
    active = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    return torch.stack([streams.step(token, active).clone() for token in ids[:, -5:].unbind(1)], 1)


# Others


def _llama_steps(shape: Shape, site: Site) -> Prepared:
    """Steps of a compiled Llama over a full cache of random keys; nothing is fetched to the host."""
    model, steps = llama(shape, site), SIZES[site.device.type].steps
    cache = _cache(model, shape, steps)
    compiled: Any = model
    if site.device.type == "cuda":
        compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False)
    token = torch.zeros(shape.batch, 1, dtype=torch.int64, device=site.device)
    with torch.no_grad():
        model(input_ids=token, past_key_values=cache)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()

    @torch.no_grad()
    def call() -> None:
        token = torch.zeros(shape.batch, 1, dtype=torch.int64, device=site.device)
        for layer in cache.layers:
            layer.cumulative_length.fill_(shape.tokens)
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            token = compiled(input_ids=token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)

    return Prepared(call, {}, call=call, repeats=steps, detail=_transformers)


def _generation(shape: Shape, site: Site, make: Callable[[Shape, Site], Any]) -> Prepared:
    """``generate()`` with a static cache of the shape's tokens, which transformers compiles on a GPU."""
    model, steps = make(shape, site), 4 * SIZES[site.device.type].steps
    cache, prompt = _cache(model, shape, steps), _tokens(shape, site, _PROMPT).to(site.device)
    chosen = {"do_sample": False, "max_new_tokens": steps, "pad_token_id": 0}

    def call() -> None:
        cache.reset()
        model.generate(prompt, past_key_values=cache, **chosen)

    return Prepared(call, {}, call=call, repeats=steps, detail=_transformers)


def _cache(model: Any, shape: Shape, steps: int) -> StaticCache:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=shape.tokens + steps + _PROMPT)


def _transformers() -> str:
    return f"transformers {backends.version_of('transformers')}"
