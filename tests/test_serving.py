"""``newllm serve`` as OpenAI's own client sees it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import httpx2
import openai
from openai import OpenAI

from newllm import Session
from newllm.evaluation.process import resident_bytes
from newllm.serving.app import Limits
from newllm.serving.engine import Engine
from newllm.serving.jobs import Busy, InUse
from newllm.serving.store import SessionStore
from tests.serving_parts import GREEDY, NAME, Served, serving, session, talker, user


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for most tests."""
    with serving(tmp_path_factory.mktemp("sessions"), slots=4, save_every=8) as server:
        yield server


@pytest.fixture
def client(served: Served) -> OpenAI:
    return served.client()


def alone(served: Served, text: str, tokens: int, **options: Any) -> str:
    said = Session(served.model, served.tokenizer).generate(text, max_new_tokens=tokens, **options)
    assert isinstance(said, str)
    return said


def chatted(text: str) -> str:
    """What the tiny model reads for a chat's first message: it has no template."""
    return f"Human: {text}\n\nAssistant:"


# Answers


def test_completion_is_what_a_session_says(served: Served, client: OpenAI) -> None:
    made = client.completions.create(prompt="Hello there", max_tokens=20, **GREEDY)
    assert made.choices[0].text == alone(served, "Hello there", 20)
    assert made.choices[0].finish_reason == "length"
    assert made.usage is not None
    assert made.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
        "prompt_tokens": 11,
        "completion_tokens": 20,
        "total_tokens": 31,
    }
    ids = client.completions.create(prompt=list(b"Hello there"), max_tokens=20, **GREEDY)
    assert ids.choices[0].text == made.choices[0].text
    about = made.model_extra["newllm"]
    assert about["tokens"] == 31 and about["in_window"] == 8
    assert about["state_bytes"] == served.engine.counts.state_bytes > 0


def test_chat_goes_on_where_it_stopped(served: Served, client: OpenAI) -> None:
    """Only the new message is sent: the server remembers the rest, as a session fed turn by turn."""
    first = client.chat.completions.create(messages=user("Hi"), max_tokens=9, **GREEDY, **session("talk"))
    second = client.chat.completions.create(messages=user("And?"), max_tokens=9, **GREEDY, **session("talk"))
    whole = Session(served.model, served.tokenizer)
    said = [whole.generate(chatted("Hi"), max_new_tokens=9)]
    said.append(whole.generate("\n\n" + chatted("And?"), max_new_tokens=9))
    assert [each.choices[0].message.content for each in (first, second)] == said
    kept = client.get("/sessions/talk", cast_to=dict[str, Any])
    assert kept["tokens"] == whole.tokens[0]
    assert second.model_extra["newllm"]["session"] == "talk"
    history = [*user("Hi"), {"role": "assistant", "content": "Yes."}, *user("And?")]
    fresh = client.chat.completions.create(messages=history, max_tokens=9, **GREEDY)
    assert fresh.choices[0].message.content == alone(
        served, "Human: Hi\n\nAssistant: Yes.\n\n" + chatted("And?"), 9
    )


def test_stream_is_the_answer_in_pieces(served: Served, client: OpenAI) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    pieces = list(client.chat.completions.create(messages=user("Hi"), max_tokens=30, **GREEDY, **options))
    whole = client.chat.completions.create(messages=user("Hi"), max_tokens=30, **GREEDY)
    *texts, last = pieces
    assert "".join(piece.choices[0].delta.content for piece in texts) == whole.choices[0].message.content
    assert [piece.choices[0].finish_reason for piece in texts] == [None] * (len(texts) - 1) + ["length"]
    assert last.choices == [] and last.usage == whole.usage
    lengths = [piece.model_extra["newllm"]["tokens"] for piece in texts]
    assert lengths == sorted(lengths) and len(texts) > 5
    parts = client.completions.create(prompt="Hello there", max_tokens=20, stream=True, **GREEDY)
    assert "".join(part.choices[0].text for part in parts) == alone(served, "Hello there", 20)


def test_text_ends_before_a_stop(served: Served, client: OpenAI) -> None:
    text = alone(served, "Hello there", 40)
    stop = text[11:14]
    for stream in (False, True):
        made: Any = client.completions.create(
            prompt="Hello there", max_tokens=40, stop=["never said", stop], stream=stream, **GREEDY
        )
        parts = list(made) if stream else [made]
        assert "".join(part.choices[0].text for part in parts) == text[: text.index(stop)]
        assert parts[-1].choices[0].finish_reason == "stop"


def test_model_that_ends_says_so(tmp_path: Path) -> None:
    made, tokenizer = talker()
    ids = tokenizer(str(Session(made, tokenizer).generate("Hello", max_new_tokens=9)))["input_ids"]
    made.generation_config.eos_token_id = end = Session(made).generate(list(b"Hello"), max_new_tokens=9)[0][5]  # type: ignore[index]
    with serving(tmp_path, model=(made, tokenizer)) as server:
        answer = server.client().completions.create(prompt="Hello", max_tokens=30, **GREEDY, **session("a"))
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= 6
        assert int(server.engine.store.load("a").pending[0]) == end  # type: ignore[union-attr]
    assert ids


def test_sampling_is_the_request_s_own(served: Served, client: OpenAI) -> None:
    def said(seed: int | None, **options: Any) -> str:
        made = client.completions.create(
            model=NAME, prompt="Hello", max_tokens=30, temperature=1.5, seed=seed, **options
        )
        return made.choices[0].text

    assert said(1) == said(1) != said(2)
    assert said(None, extra_body={"top_k": 1}) == said(None, top_p=1e-9) == alone(served, "Hello", 30)


def test_book_is_read_without_an_answer(served: Served, client: OpenAI) -> None:
    text = "It is a truth universally acknowledged. " * 100
    made = client.completions.create(prompt=text, max_tokens=0, **GREEDY, **session("book"))
    assert made.choices[0].text == ""
    assert client.get("/sessions/book", cast_to=dict[str, Any])["tokens"] == 4000
    after = client.completions.create(prompt="And", max_tokens=9, **GREEDY, **session("book"))
    assert after.choices[0].text == alone(served, text + "And", 9)
    assert after.model_extra["newllm"]["state_bytes"] == made.model_extra["newllm"]["state_bytes"]


# Many


def test_64_clients_at_once_get_what_each_would_alone(served: Served) -> None:
    """With four slots: most wait, none is lost, and none hears another."""

    def asked(index: int) -> str:
        made = served.client().completions.create(
            prompt=f"Client {index}", max_tokens=5 + index % 7, **GREEDY
        )
        return made.choices[0].text

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(asked, range(64)))
    assert answers == [alone(served, f"Client {index}", 5 + index % 7) for index in range(64)]
    served.idle()
    assert served.engine.counts.waiting == 0


@pytest.mark.slow
def test_64_clients_for_two_minutes_lose_nothing(served: Served) -> None:
    """Each with a session of its own, half of them streaming: all is answered, memory stays where it is."""
    end = time.monotonic() + 120
    memory: list[int] = []

    def asked(index: int) -> int:
        client, tokens, said = served.client(timeout=120), 0, 0
        while time.monotonic() < end:
            more = {"max_tokens": 20, **GREEDY, **session(f"many-{index}")}
            if index % 2:
                pieces = client.completions.create(prompt="More. ", stream=True, **more)
                tokens = [piece.model_extra["newllm"]["tokens"] for piece in pieces][-1]
            else:
                made = client.completions.create(prompt="More. ", **more)
                tokens = made.model_extra["newllm"]["tokens"]
            said += 1
            assert tokens == said * 26, "a turn was lost"
            if index == 0:
                memory.append(resident_bytes())
        return said

    with ThreadPoolExecutor(64) as pool:
        turns = list(pool.map(asked, range(64)))
    assert min(turns) >= 2
    half = len(memory) // 2
    # Sessions are files: what the process holds does not grow with what was said.
    assert max(memory[half:]) - max(memory[:half]) < 64 * 2**20
    for index in range(64):
        served.engine.store.delete(f"many-{index}")


def test_client_that_goes_away_frees_its_place(served: Served, client: OpenAI) -> None:
    options = {"max_tokens": 1000, "stream": True, **GREEDY, **session("left")}
    with client.completions.create(prompt="Hello", **options) as stream:
        begun = [next(stream).choices[0].text for _ in range(3)]
    served.idle()
    written = client.get("/sessions/left", cast_to=dict[str, Any])["tokens"] - 5
    assert len("".join(begun)) <= written < 1000
    after = client.completions.create(prompt="", max_tokens=9, **GREEDY, **session("left"))
    text = alone(served, "Hello", 1000)
    whole = Session(served.model)
    whole.feed(list(b"Hello"))
    ids = whole.generate(max_new_tokens=written + 12)[0]
    assert after.choices[0].text in served.tokenizer.decode(ids)
    assert text.startswith("".join(begun))


def test_client_that_hangs_up_on_a_whole_answer_is_noticed(tmp_path: Path) -> None:
    """However long the answer would have been."""
    with serving(tmp_path, limits=Limits(max_tokens=10**7)) as server:
        with pytest.raises(openai.APITimeoutError):
            server.client(timeout=0.3).completions.create(prompt="Hello", **GREEDY)
        server.idle()


# Sessions


def test_sessions_are_listed_forked_and_deleted(tmp_path: Path) -> None:
    with serving(tmp_path, most=2) as server:
        client = server.client()

        def said(name: str) -> str:
            return (
                client.completions.create(prompt="?", max_tokens=9, **GREEDY, **session(name)).choices[0].text
            )

        client.completions.create(prompt="Hello", max_tokens=5, **GREEDY, **session("one"))
        fork = client.post("/sessions/one/fork", body={"to": "two"}, cast_to=dict[str, Any])
        assert fork["tokens"] == 9
        with pytest.raises(openai.BadRequestError, match="at most 2 sessions can be kept: delete one first"):
            said("three")
        assert said("one") == said("two")
        listed = client.get("/sessions", cast_to=dict[str, Any])["data"]
        assert [each["id"] for each in listed] == ["one", "two"]
        assert {each["bytes"] for each in listed} == {(tmp_path / "one.safetensors").stat().st_size}
        assert client.delete("/sessions/one", cast_to=dict[str, Any])["deleted"]
        for call in (
            lambda: client.delete("/sessions/one", cast_to=dict[str, Any]),
            lambda: client.get("/sessions/one", cast_to=dict[str, Any]),
            lambda: client.post("/sessions/one/fork", body={"to": "three"}, cast_to=dict[str, Any]),
        ):
            with pytest.raises(openai.NotFoundError, match="there is no session 'one'"):
                call()
        said("three")


def test_session_outlives_the_server(tmp_path: Path) -> None:
    texts = []
    for _ in range(2):
        with serving(tmp_path) as server:
            made = server.client().completions.create(prompt="Hi", max_tokens=9, **GREEDY, **session("one"))
            texts.append(made.choices[0].text)
            whole = Session(server.model, server.tokenizer)
    assert texts == [whole.generate("Hi", max_new_tokens=9), whole.generate("Hi", max_new_tokens=9)]


def test_damaged_session_is_told(served: Served, client: OpenAI) -> None:
    (served.engine.store.folder / "bad.safetensors").write_bytes(b"words")
    with pytest.raises(openai.BadRequestError, match=r"bad\.safetensors cannot be read"):
        client.completions.create(prompt="a", **GREEDY, **session("bad"))
    (served.engine.store.folder / "bad.safetensors").unlink()


def test_claims_are_given_back(tmp_path: Path) -> None:
    made, tokenizer = talker()
    engine = Engine(made, tokenizer, SessionStore(tmp_path, made, most=1))
    assert engine.claim("one") is None
    with pytest.raises(InUse):
        engine.claim("one")
    engine.release("one")
    with engine.holding("one"), pytest.raises(InUse):
        engine.claim("one")
    assert engine.claim("one") is None
    with pytest.raises(ValueError, match="session must be 1 to 64 letters"):
        engine.claim("")
    with pytest.raises(Busy):
        engine.submit(None)  # type: ignore[arg-type] # it has not been started


# About


def test_machines_can_ask_how_it_is(served: Served, client: OpenAI) -> None:
    assert httpx2.get(f"{served.url}/health").json() == {"status": "ok"}
    client.completions.create(prompt="Hello", max_tokens=3, **GREEDY)
    text = httpx2.get(f"{served.url}/metrics").text
    assert 'newllm_requests_total{path="/v1/completions",status="200"}' in text
    values = {line.split()[0]: float(line.split()[-1]) for line in text.splitlines() if line[:1] != "#"}
    assert values["process_resident_memory_bytes"] > values["newllm_state_bytes"]
    assert values["newllm_tokens_written_total"] == served.engine.counts.tokens_written > 0
    assert values["newllm_state_bytes"] == served.engine.counts.state_bytes
    (model,) = client.models.list().data
    assert model.id == NAME
    about = model.model_extra["newllm"]
    assert (about["window"], about["segment"], set(about["gates"])) == (8, 4, {"0", "2"})
    gate = served.model.model.layers[2].self_attn.memory_gate.weight.float().sigmoid()
    assert about["gates"]["2"] == gate.tolist()
