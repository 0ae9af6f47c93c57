"""Tokens as text while they come: whole characters, nothing of a stop."""

from __future__ import annotations

from hypothesis import given, strategies as st

from newllm.data.tokenizer import byte_tokenizer
from newllm.serving.text import TextStream

BYTES = byte_tokenizer()


def parts(text: str, stops: tuple[str, ...] = ()) -> list[str]:
    """What is shown after each token of ``text``, and at its end."""
    stream = TextStream(BYTES, stops)
    ids = BYTES(text, add_special_tokens=False)["input_ids"]
    return [*(stream.add(token) for token in ids), stream.finish()]


@given(st.text(max_size=40), st.lists(st.text(max_size=4), max_size=3))
def test_whole_text_up_to_the_first_stop(text: str, stops: list[str]) -> None:
    places = [text.index(stop) for stop in stops if stop and stop in text]
    assert "".join(parts(text, tuple(stops))) == (text[: min(places)] if places else text)


def test_characters_come_whole() -> None:
    assert parts("né東") == ["n", "", "é", "", "", "東", ""]


def test_what_may_become_a_stop_is_held_back() -> None:
    assert parts("abcabd", ("abd",)) == ["", "", "abc", "", "", "", ""]
    assert parts("ab", ("abc",)) == ["", "", "ab"]
    stream = TextStream(BYTES, ("b",))
    assert [stream.add(token) for token in b"abc"] == ["a", "", ""]
    assert stream.stopped and stream.finish() == ""


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    stream = TextStream(BYTES)
    assert stream.add("東".encode()[0]) == ""
    assert stream.finish() == "\ufffd"
