"""Sessions: streams of any length, cut anywhere, kept in files."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor

from newllm import Session
from newllm.data.tokenizer import byte_tokenizer
from newllm.models import SenriForCausalLM
from newllm.models.sampling import Sampling, choose, controls
from newllm.models.session import Snapshot
from newllm.testing import assert_rounding, largest
from tests.tiny_models import ADDITIONS, VOCABULARY, greedy, random_tokens, tiny_base, tiny_senri


def assert_same(out: Tensor, expected: Tensor) -> None:
    """Equal but for the order of sums."""
    assert_rounding(out, expected, additions=ADDITIONS, magnitude=ADDITIONS * largest(expected))


def assert_same_memory(session: Session, expected: Session, row: int = 0) -> None:
    """What ``session`` remembers is what row ``row`` of ``expected`` does."""
    found, whole = session.snapshot(), expected.snapshot()
    assert session.tokens == [expected.tokens[row]]
    assert session.pending == [expected.pending[row]]
    assert torch.equal(found.recent[0], whole.recent[row])
    if found.hidden is not None and whole.hidden is not None:
        assert_same(found.hidden[0], whole.hidden[row])
    for one, other in zip(found.states, whole.states, strict=True):
        if one is not None and other is not None:
            for tensor, other_tensor in zip(one, other, strict=True):
                if tensor is not None and tensor.is_floating_point():
                    assert_same(tensor[0], other_tensor[row])


@functools.cache
def exact_senri() -> SenriForCausalLM:
    """A tiny model in float64; nothing changes it."""
    torch.manual_seed(0)
    return tiny_senri().double()


def ending_senri(ids: Tensor) -> tuple[SenriForCausalLM, int]:
    """A model that ends after ``ids[0]`` and at least two tokens, and its end-of-text token."""
    model = tiny_senri().double()
    says = greedy(model, ids[:1], 20)[0].tolist()
    end = next(token for place, token in enumerate(says) if place > 1 and token not in says[:place])
    model.generation_config.eos_token_id = end
    return model, end


def said(session: Session, prompt: Any = None, tokens: int = 6, **options: Any) -> list[list[int]]:
    rows = session.generate(prompt, max_new_tokens=tokens, **options)
    assert isinstance(rows, list)
    return rows  # type: ignore[return-value]


# Streams


@settings(max_examples=15)
@given(cuts=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), min_size=1), chunk=st.integers(1, 16))
def test_streams_cut_anywhere_side_by_side_are_those_read_alone_at_once(
    cuts: list[tuple[int, int]], chunk: int
) -> None:
    both = Session(exact_senri(), batch_size=2, chunk=chunk)
    parts = [(random_tokens(first), random_tokens(second)) for first, second in cuts]
    for rows in parts:
        both.feed(rows)
    for row in range(2):
        alone = Session(exact_senri())
        alone.feed(torch.cat([rows[row] for rows in parts]))
        if alone.tokens != [0]:
            assert_same_memory(alone, both, row)
            assert said(alone) == [said_by_row(both, row)]


def said_by_row(session: Session, row: int) -> list[int]:
    """What ``row`` says alone: its mates may not have read anything."""
    snapshot = session.snapshot()
    alone = Session(session.model)
    states = tuple(None if s is None else s.map(lambda t: t[row : row + 1]) for s in snapshot.states)
    hidden = None if snapshot.hidden is None else snapshot.hidden[row : row + 1]
    alone.restore(Snapshot(states, hidden, snapshot.pending[row : row + 1], snapshot.recent[row : row + 1]))
    return said(alone)[0]


def test_generate_is_that_of_transformers_turn_after_turn() -> None:
    """Also where transformers, given new ids and an old cache without a mask, says something else."""
    model, ids = exact_senri(), random_tokens(1, 30)
    session = Session(model)
    session.feed(ids[:, :9])
    session.feed(ids[0, 9:20].tolist())
    first = said(session, ids[:, 20:])
    assert first == greedy(model, ids, 6).tolist()
    read = torch.cat([ids, torch.tensor(first), more := random_tokens(1, 5)], 1)
    assert said(session, more) == greedy(model, read, 6).tolist()


def test_last_token_is_read_by_the_next_call() -> None:
    model, ids, more = exact_senri(), random_tokens(10), random_tokens(4)
    session, whole = Session(model), Session(model)
    text = said(session, ids, 3)[0]
    assert session.tokens == [12]
    assert session.pending == text[-1:]
    session.feed(more)
    assert session.tokens == [17]
    assert session.pending == [-1]
    whole.feed([*ids.tolist(), *text, *more.tolist()])
    assert_same_memory(session, whole)
    # Without anything new to read, generation goes on where it stopped.
    halves, at_once = Session(model), Session(model)
    halves.feed(ids)
    assert said(halves, None, 3)[0] + said(halves, None, 3)[0] == said(at_once, ids, 6)[0]


def test_rows_that_have_ended_are_not_disturbed() -> None:
    ids = random_tokens(3, 9)
    model, end = ending_senri(ids)
    rows, more = [ids[0], ids[1, :4], ids[2, :7]], random_tokens(3, 4)
    together = Session(model, batch_size=3)
    first = said(together, rows, 12)
    kept = together.fork()
    second = said(together, more, 12)
    assert 2 <= len(first[0]) < 12
    assert max(map(len, first)) > len(first[0])
    for row in range(3):
        alone = Session(model)
        assert said(alone, rows[row], 12) == [first[row]]
        assert_same_memory(alone, kept, row)
        assert (alone.pending == [end]) == (len(first[row]) < 12)
        assert said(alone, more[row], 12) == [second[row]]
        assert_same_memory(alone, together, row)


def test_end_of_text_belongs_to_the_stream() -> None:
    ids = random_tokens(1, 9)
    model, end = ending_senri(ids)
    session, whole = Session(model), Session(model)
    text = said(session, ids)[0]
    assert end not in text
    session.feed([])
    whole.feed([*ids[0].tolist(), *text, end])
    assert_same_memory(session, whole)
    model.generation_config.eos_token_id = [end, text[0]]
    assert said(Session(model), ids) == [[]]


def test_stream_that_is_left_early_goes_on_in_order() -> None:
    model, ids = exact_senri(), random_tokens(9)
    session = Session(model)
    steps = session.stream(ids, max_new_tokens=20)
    begun = [int(next(steps)) for _ in range(4)]
    steps.close()
    assert begun + said(session, None, 6)[0] == said(Session(model), ids, 10)[0]


def test_state_is_of_constant_size() -> None:
    session, sizes = Session(tiny_senri()), set()
    assert session.state_bytes == 0
    for tokens in (1, 6, 1, 200):
        session.feed(random_tokens(tokens))
        sizes.add(session.state_bytes)
    assert session.tokens == [208]
    # Per layer 2 heads: a ring of 8 keys and values of 8 floats, and a position; two memories of 8 x 8 and 8.
    assert sizes == {3 * (2 * 2 * 8 * 8 * 4 + 8) + 2 * (2 * (8 * 8 + 8) * 4)}


def test_streams_never_become_too_long() -> None:
    model = exact_senri()
    session = Session(model)
    session.feed(random_tokens(43))
    early, more = session.snapshot(), random_tokens(29)
    far = 2**40
    states = tuple(s and s._replace(position=s.position + far) for s in early.states)
    results = []
    for snapshot in (early, early._replace(states=states)):
        session.restore(snapshot)
        losses = session.score(more)
        results.append((losses, session.snapshot().hidden, session.tokens[0], said(session, None, 20)))
    (losses, hidden, tokens, text), (far_losses, far_hidden, far_tokens, far_text) = results
    assert far_tokens == tokens + far
    assert torch.equal(far_losses, losses)
    assert hidden is not None
    assert torch.equal(far_hidden, hidden)
    assert far_text == text
    assert losses.isfinite().all()


def test_score_is_the_cross_entropy_of_the_whole_text() -> None:
    model, ids = exact_senri(), random_tokens(1, 50)
    with torch.no_grad():
        expected = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    session = Session(model, chunk=7)
    losses = torch.cat([session.score(part) for part in ids.split([1, 20, 0, 29], 1)])
    assert losses.shape == (50,)
    assert losses[0].isnan()
    assert_same(losses[1:], expected)
    # A token that was generated before is read, not scored.
    said(session, None, 2)
    assert session.score(ids[:, :3]).shape == (3,)
    with pytest.raises(ValueError, match="score needs a session of batch_size 1, got 2"):
        Session(model, batch_size=2).score(ids.repeat(2, 1))


# Text


def test_text_goes_in_and_out_by_the_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    model = tiny_senri(vocab_size=len(tokenizer))
    session = Session(model, tokenizer)
    text = session.generate("Hello there, ", max_new_tokens=5)
    assert session.tokens == [13 + 4]
    ids = greedy(model, torch.tensor([list(b"Hello there, ")]), 5)[0]
    assert text == tokenizer.decode(ids, skip_special_tokens=True)
    several = Session(model, tokenizer, batch_size=2).generate(["Hello there, ", "x"], max_new_tokens=5)
    assert isinstance(several, list)
    assert several[0] == text


def test_what_cannot_be_read_leaves_the_session_as_it_was() -> None:
    session = Session(exact_senri())
    said(session, random_tokens(9), 3)
    before = session.snapshot()
    for text, message in (
        ("words", "tokenizer must be given to read text, got None; token ids need none"),
        ([[1], [2]], "text must hold 1 rows, one per stream, got 2"),
        ([3, VOCABULARY], f"token ids must lie between 0 and {VOCABULARY - 1}, got 3 to {VOCABULARY}"),
        ([-1], f"token ids must lie between 0 and {VOCABULARY - 1}, got -1 to -1"),
    ):
        for read in (session.feed, session.score, said_after(session)):
            with pytest.raises(ValueError, match=f"^{message}$"):
                read(text)  # type: ignore[arg-type]
    for one, other in zip(before.states, session.snapshot().states, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one.keys, other.keys)
    assert session.pending == before.pending.tolist()


def said_after(session: Session) -> Any:
    return lambda text: session.generate(text)


def test_generation_needs_something_to_go_on_from() -> None:
    session = Session(exact_senri(), batch_size=2)
    message = "prompt must hold a token for each row that has not read anything, got none"
    for prompt in (None, [[], []], [[5], []]):
        with pytest.raises(ValueError, match=message):
            session.generate(prompt)
    session.feed([[], [7]])
    assert len(said(session)) == 2
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        session.generate(max_new_tokens=0)


def test_other_models_and_sizes_are_refused() -> None:
    with pytest.raises(
        TypeError,
        match=r"model must be a SenriForCausalLM \(see newllm.convert\) or a context model, got Llama",
    ):
        Session(tiny_base("llama"))  # type: ignore[arg-type]
    for name in ("batch_size", "chunk"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            Session(exact_senri(), **{name: 0})  # type: ignore[arg-type]


# Sampling


def test_sampling_is_seeded() -> None:
    session = Session(exact_senri())
    sampling = Sampling(temperature=1, top_k=20, top_p=0.9, repetition_penalty=1.2)
    session.feed(random_tokens(9))
    start, texts = session.snapshot(), []
    for seed in (1, 1, 2):
        session.restore(start)
        generator = torch.Generator().manual_seed(seed)
        texts.append(said(session, None, 20, sampling=sampling, generator=generator))
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or more, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, got nan"),
        ({"top_k": 0}, "top_k must be 1 or more, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0, got 0.0"),
    ],
    ids=str,
)
def test_options_of_sampling_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Sampling(**options)


def test_repetition_penalty_holds_back_the_last_fifty_tokens() -> None:
    model, ids = exact_senri(), random_tokens(1, 80)
    session = Session(model)
    session.feed(ids)
    with torch.no_grad():
        scores = model(ids).logits[0, -1]
    used = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, ids[0, -50:], True)
    penalty = 1.0
    while used[winner := int(torch.where(used, penalised(scores, penalty), scores).argmax())]:
        penalty *= 2
    assert said(session, None, 1, sampling=Sampling(repetition_penalty=penalty)) == [[winner]]


def penalised(scores: Tensor, penalty: float) -> Tensor:
    """Keskar et al. 2019, section 4.1, as transformers has it for negative scores."""
    return torch.where(scores > 0, scores / penalty, scores * penalty)


@pytest.mark.parametrize(
    ("sampling", "chosen"),
    [
        (Sampling(1.0), [1, 1, 2, 2, 0]),
        (Sampling(1.0, top_k=2), [1, 1, 2, 2, 2]),
        (Sampling(1.0, top_p=0.6), [1, 1, 2, 2, 2]),
        (Sampling(1.0, top_p=0.49), [1, 1, 1, 1, 1]),
        (Sampling(1.0, top_k=2, top_p=0.62), [1, 1, 1, 1, 1]),
        (Sampling(0.0), [1, 1, 1, 1, 1]),
    ],
    ids=str,
)
def test_token_is_where_the_cumulative_probability_passes_the_drawn_number(
    sampling: Sampling, chosen: list[int]
) -> None:
    """Of the best by top_k the likeliest with top_p of their probability: 0.5 / 0.8 is above 0.62."""
    logits = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log().repeat(5, 1)
    uniform = torch.tensor([0.0, 0.49, 0.63, 0.79, 0.81], dtype=torch.float64)
    found = choose(logits, torch.full((5, 1), -1), controls([sampling] * 5, logits), uniform)
    assert found.tolist() == chosen


def test_top_k_and_top_p_of_almost_nothing_are_greedy() -> None:
    model, ids = exact_senri(), random_tokens(1, 12)
    expected = greedy(model, ids, 6).tolist()
    for options in ({"top_k": 1}, {"top_p": 1e-9}):
        assert said(Session(model), ids, sampling=Sampling(temperature=5.0, **options)) == expected  # type: ignore[arg-type]


def fails(*tensors: Tensor) -> Tensor:
    raise RuntimeError("no memory left")


def test_a_step_that_fails_loses_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(exact_senri())
    session.feed(random_tokens(1, 9))
    monkeypatch.setattr(session._streams, "step", fails)
    with pytest.raises(RuntimeError, match="no memory left"):
        session.generate(max_new_tokens=3)
    assert session.tokens == [9]
    assert session.pending[0] >= 0


def test_a_read_that_fails_loses_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(exact_senri())
    said(session, random_tokens(9), 3)
    pending = session.pending
    with monkeypatch.context() as patch:
        patch.setattr(session._streams, "read", fails)
        with pytest.raises(RuntimeError, match="no memory left"):
            session.feed([4, 5])
    assert session.pending == pending
    session.feed([4, 5])
    assert session.pending == [-1]


# Snapshots


def test_snapshot_can_be_restored_as_often_as_one_likes() -> None:
    session = Session(exact_senri())
    said(session, random_tokens(9), 3)
    snapshot = session.snapshot()
    texts = []
    for _ in range(3):
        texts.append(said(session, None, 15))
        session.restore(snapshot)
    assert texts[0] == texts[1] == texts[2]
    session.reset()
    assert session.tokens == [0]
    assert session.pending == [-1]
    session.restore(snapshot)
    assert said(session, None, 15) == texts[0]
    empty = Session(exact_senri()).snapshot()
    session.restore(empty)
    assert session.tokens == [0]
