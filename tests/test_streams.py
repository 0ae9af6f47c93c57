"""Streams stepped at fixed addresses: compiled steps, many sessions at once, models of every kind."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from newllm import Session
from newllm.models import (
    ContextKVConfig,
    ContextKVForCausalLM,
    ContextLMConfig,
    ContextLMForCausalLM,
    session_input,
)
from newllm.models.sampling import Sampling
from newllm.models.session_batch import SessionBatch
from newllm.models.stepping import Replay
from newllm.models.streams import Streams
from tests.tiny_models import SIZES, VOCABULARY, random_tokens, tiny_senri

CONTEXT: dict[str, Any] = {"vocab_size": VOCABULARY, "embed_dim": 8, "eos_token_id": None}


def context_lm(**options: Any) -> ContextLMForCausalLM:
    sizes = {**CONTEXT, "hidden_dim": 12, "context_dim": 6, "initializer_range": 0.5}
    return ContextLMForCausalLM(ContextLMConfig(**{**sizes, **options})).eval()


def context_kv(**options: Any) -> ContextKVForCausalLM:
    sizes = {"context_dims": [6], "chunk_size": 4, "num_attention_heads": 2, "intermediate_size": 16}
    return ContextKVForCausalLM(ContextKVConfig(**{**CONTEXT, **sizes, **options})).eval()


MODELS: dict[str, Any] = {
    "senri": tiny_senri,
    "delta": partial(tiny_senri, rule="delta"),
    "segments alone": partial(tiny_senri, sliding_window=None),
    "gated": partial(context_lm, num_hidden_layers=2),
    "context block": partial(context_lm, cell="context", input_tokens=3),
    "context-kv": context_kv,
    "bounded context-kv": partial(context_kv, max_contexts=3),
}
COMPILED = [name for name in MODELS if "kv" not in name]
every_model = pytest.mark.parametrize("name", MODELS)


def made(name: str) -> Any:
    return MODELS[name]().double()


def said(session: Session, tokens: int = 12, **options: Any) -> list[int]:
    (row,) = session.generate(max_new_tokens=tokens, **options)
    return row  # type: ignore[return-value]


def read(model: Any, tokens: int) -> Session:
    session = Session(model)
    session.feed(random_tokens(tokens))
    return session


def addresses(session: Session) -> list[int]:
    streams = session._streams
    held = [tensor for state in streams.states for tensor in state or () if tensor is not None]
    return [tensor.data_ptr() for tensor in (*held, streams.hidden, streams.pending, streams.recent)]


# Every kind of model


@every_model
def test_session_says_what_the_model_says_after_the_whole_text(name: str) -> None:
    model, ids = made(name), random_tokens(1, 25)
    session = Session(model, chunk=7)
    session.feed(ids[:, :11])
    session.feed(ids[:, 11:])
    expected = []
    for _ in range(12):
        with torch.no_grad():
            last = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        expected.append(int(last))
        ids = torch.cat([ids, last], 1)
    assert said(session) == expected


@every_model
def test_session_of_any_model_is_kept_in_a_file(name: str, tmp_path: Any) -> None:
    model = made(name)
    session = read(model, 25)
    session.save(tmp_path / "session")
    again = Session(model)
    again.load(tmp_path / "session")
    assert again.tokens == [25]
    assert said(again) == said(session)
    other = MODELS[name]().double()
    with pytest.raises(ValueError, match="session is of another model: weights must be"):
        Session(other).load(tmp_path / "session")


@every_model
def test_fork_of_any_model_in_bfloat16_goes_on_likewise(name: str) -> None:
    session = read(MODELS[name]().bfloat16(), 25)
    said(session, 3)
    assert said(session.fork()) == said(session)


def test_fork_goes_its_own_way() -> None:
    session = read(made("senri"), 25)
    fork = session.fork()
    fork.feed(random_tokens(9))
    expected = said(session.fork())
    assert (session.tokens, fork.tokens) == ([25], [34])
    assert said(session) == expected


def test_text_in_pieces_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are joined to pieces, two whole ones and a rest, each of which takes several passes."""
    from newllm.data.tokenizer import byte_tokenizer

    monkeypatch.setattr(session_input, "_PIECE", 6500)
    tokenizer = byte_tokenizer()
    model = tiny_senri(vocab_size=len(tokenizer)).double()
    text, passes = "It is a truth universally acknowledged.\n" * 400, []
    whole, streamed = Session(model, tokenizer, chunk=900), Session(model, tokenizer, chunk=900)
    whole.feed(text)
    streamed.feed(iter(text.splitlines(keepends=True)), progress=passes.append)
    assert streamed.tokens == whole.tokens == [len(text)]
    assert sum(passes) == len(text) and max(passes) == 900
    assert streamed.generate(max_new_tokens=9) == whole.generate(max_new_tokens=9)
    pieces = Session(model, tokenizer)
    pieces.feed(text[start : start + 1000] for start in range(0, len(text), 1000))
    assert pieces.generate(max_new_tokens=9) == Session(model, tokenizer).generate(text, max_new_tokens=9)


# Fixed addresses


@pytest.mark.parametrize("name", COMPILED)
def test_states_never_move(name: str) -> None:
    model = made(name)
    session = read(model, 3)
    before = addresses(session)
    said(session, 20)
    session.feed(random_tokens(40))
    snapshot = session.snapshot()
    session.reset()
    assert session.tokens == [0]
    session.feed(random_tokens(5))
    session.restore(snapshot)
    assert addresses(session) == before
    assert session.tokens == [63]


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_steps_are_one_graph_and_say_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    model, ids, more = made(name), random_tokens(1, 13), random_tokens(1, 30)
    plain, compiled = Session(model), Session(model, compile="full")
    texts = []
    for session in (plain, compiled):
        session.feed(ids)
        turns = [said(session, 20)]
        session.feed(more)
        turns.append(said(session, 20, sampling=Sampling(1.0, repetition_penalty=1.2), generator=seeded()))
        kept = session.snapshot()
        session.reset()
        session.feed(more)
        turns.append(said(session))
        session.restore(kept)
        turns.append(said(session))
        texts.append(turns)
    assert texts[0] == texts[1]
    assert counter.frame_count == 1


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_steps_that_cannot_be_compiled_are_refused() -> None:
    for model, compile, message in (
        (tiny_senri(), "graph", "compile='graph' needs a CUDA device, got a model on cpu"),
        (tiny_senri(), "fast", "compile must be one of none, graph, full, got 'fast'"),
        (context_kv(), "full", "compile must be 'none' for Context-KV, whose slots grow, got 'full'"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            Session(model, compile=compile)  # type: ignore[arg-type]


# Many sessions


WAYS = (
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(temperature=0.8, top_k=5, repetition_penalty=1.3),
    Sampling(temperature=1.2, top_p=0.7),
)


@every_model
@settings(max_examples=2, deadline=None)
@example(
    starts=[
        (0, 3, 2, WAYS[0]),
        (0, 20, 9, WAYS[1]),
        (1, 9, 6, WAYS[2]),
        (2, 14, 5, WAYS[3]),
        (2, 1, 4, WAYS[0]),
    ]
)
@given(
    starts=st.lists(
        st.tuples(st.integers(0, 12), st.integers(1, 30), st.integers(1, 14), st.sampled_from(WAYS)),
        min_size=2,
        max_size=6,
    )
)
def test_sessions_say_together_what_each_says_alone(
    name: str, starts: list[tuple[int, int, int, Sampling]]
) -> None:
    """They come when others have begun, take the slots of those that have ended, and end on their own."""
    model = made(name)
    snapshots = [read(model, tokens).snapshot() for _, tokens, _, _ in starts]
    alone, kept = [], []
    for seed, ((_, _, length, sampling), snapshot) in enumerate(zip(starts, snapshots, strict=True)):
        session = Session(model)
        session.restore(snapshot)
        alone.append(said(session, length, sampling=sampling, generator=seeded(seed)))
        kept.append(session.snapshot())
    batch = SessionBatch(model, 3)
    together, left, slots = [[] for _ in starts], {}, {}
    waiting = sorted(range(len(starts)), key=lambda index: starts[index][0])
    for moment in range(100):
        while waiting and batch.free and (starts[waiting[0]][0] <= moment or not slots):
            index = waiting.pop(0)
            slots[batch.admit(snapshots[index], starts[index][3], seed=index)] = index
        if not slots:
            break
        last = {slot for slot, index in slots.items() if len(together[index]) + 1 == starts[index][2]}
        for slot, token in batch.step(last).items():
            together[slots[slot]].append(token)
            if slot in last:
                left[slots.pop(slot)] = batch.evict(slot)
    assert together == alone
    for index, expected in enumerate(kept):
        assert left[index].pending.tolist() == expected.pending.tolist()
        assert torch.equal(left[index].recent, expected.recent)
        again = Session(model)
        again.restore(left[index])
        other = Session(model)
        other.restore(expected)
        assert again.tokens == other.tokens
        assert said(again) == said(other)


def test_session_that_ends_keeps_its_last_word_and_rests() -> None:
    model = made("senri")
    first, second = read(model, 9), read(model, 14)
    expected, mate = said(first.fork(), 10), said(second.fork(), 30)
    model.generation_config.eos_token_id = expected[4]
    batch = SessionBatch(model, 2)
    slot, other = batch.admit(first.snapshot()), batch.admit(second.snapshot())
    heard: dict[int, list[int]] = {slot: [], other: []}
    for _ in range(12):
        for place, token in batch.step().items():
            heard[place].append(token)
    assert heard[slot] == expected[: expected.index(expected[4]) + 1]
    assert heard[other] == until(mate, expected[4])[:12]
    ended = batch.evict(slot)
    assert ended.pending.tolist() == [expected[4]]
    assert batch.free == 1
    assert batch.state_bytes == first.state_bytes


def until(text: list[int], end: int) -> list[int]:
    return text[: text.index(end) + 1] if end in text else text


def test_sessions_that_cannot_be_admitted() -> None:
    model = made("senri")
    batch = SessionBatch(model, 1)
    assert batch.step() == {}
    talked = read(model, 5)
    said(talked, 2)
    for snapshot, message in (
        (Session(model).snapshot(), "snapshot must be of a session that has read a token, got an empty one"),
        (talked.snapshot(), "snapshot must have no pending token, got "),
        (Session(made("gated")).snapshot(), "snapshot must hold 3 layers, got 1"),
        (
            read(tiny_senri(memory_layers=[1]).double(), 5).snapshot(),
            "snapshot must be of a model of this shape: it lacks 0.matrix",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            batch.admit(snapshot)
    assert batch.free == 1
    batch.admit(read(model, 5).snapshot())
    with pytest.raises(ValueError, match=r"^at most 1 sessions can speak at a time: evict one first$"):
        batch.admit(read(model, 5).snapshot())
    with pytest.raises(ValueError, match=r"^ticket must be of a session that is here, got 7$"):
        batch.evict(7)
    with pytest.raises(ValueError, match=r"^slots must be at least 1, got 0$"):
        SessionBatch(model, 0)


@pytest.mark.parametrize("place", ["put", "logits"])
def test_session_that_fails_to_be_admitted_is_not_there(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("senri")
    first, second = read(model, 9), read(model, 14)
    batch = SessionBatch(model, 2)
    mine = batch.admit(first.snapshot())

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(Streams, place, full)
        with pytest.raises(torch.OutOfMemoryError):
            batch.admit(second.snapshot())
    assert batch.free == 1
    heard = [batch.step() for _ in range(3)]
    other = batch.admit(second.snapshot())
    heard += [batch.step() for _ in range(3)]
    text, mate = said(first, 6), said(second, 3)
    assert heard == [{mine: token} for token in text[:3]] + [
        {mine: token, other: word} for token, word in zip(text[3:], mate, strict=True)
    ]


def test_compiled_batch_is_one_graph_whoever_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    model = made("senri")
    batches = [SessionBatch(model, 2), SessionBatch(model, 2, compile="full")]
    snapshots = [read(model, tokens).snapshot() for tokens in (3, 40, 9)]
    texts = []
    for batch in batches:
        first = batch.admit(snapshots[0])
        text = [batch.step() for _ in range(3)]
        batch.admit(snapshots[1], Sampling(temperature=1.0), seed=1)
        text += [batch.step() for _ in range(9)]
        batch.evict(first)
        batch.admit(snapshots[2])
        texts.append(text + [batch.step() for _ in range(9)])
    assert texts[0] == texts[1]
    assert counter.frame_count == 1


def test_state_of_a_session_is_of_constant_size() -> None:
    model = tiny_senri()
    batch = SessionBatch(model, 4)
    assert batch.state_bytes == 0
    for tokens in (1, 200):
        batch.admit(read(model, tokens).snapshot())
        assert batch.state_bytes == 3 * (2 * 2 * 8 * 8 * 4 + 8) + 2 * (2 * (8 * 8 + 8) * 4)
    assert SIZES["num_hidden_layers"] == 3


class _NoStream:
    """What recording a graph needs of a device, where there is none."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *raised: object) -> None:
        pass


def test_a_graph_keeps_all_that_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, _NoStream)
    factor = torch.ones(1)
    left = weakref.ref(factor)
    replay = Replay(partial(torch.mul, factor), (torch.ones(1),))
    del factor
    gc.collect()
    assert left() is not None, "the graph would read where something else lies"
    del replay
    gc.collect()
    assert left() is None
