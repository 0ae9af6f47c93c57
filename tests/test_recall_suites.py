"""Suites of recall, proven by their controls: who reads all is right, who reads nothing guesses."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from newllm.data.recall.prompts import GIVEN, Suite, part_ids, scores, share_written
from newllm.data.recall.suites import NAMES, make_suite, suite_names
from newllm.data.tokenizer import byte_tokenizer
from newllm.evaluation.forced import greedy_tokens
from newllm.evaluation.intervals import wilson95
from newllm.evaluation.recall import (
    Task,
    interval,
    measure,
    model_answers,
    reader_answers,
    usual_samples,
)
from newllm.evaluation.rows import RowFile
from tests.evaluation_parts import PROSE, byte_senri

LENGTH, SEGMENT, SAMPLES = 2500, 64, 40
# What a guess is right by: one of six rooms, or of seven people and things.
GUESSED = {"qa1": 6, "qa2": 6, "qa3": 6, "qa4": 6, "qa5": 7}
# At depth 0 what decides stands at the start, but another fact may tell as much; see the one test of both.
# What counts of words are asked for stands all over the prompt.
WINDOWED = [name for name in NAMES if name not in ("qa5", "cwe", "fwe")]


@cache
def suite(name: str) -> Suite:
    return make_suite(name, byte_tokenizer(), PROSE, segment=SEGMENT)


def control(name: str, tmp_path: Path, sees: int | None, depth: float | None = None) -> float:
    """The score of a reader of the last ``sees`` tokens."""
    task = Task([LENGTH], [depth], lambda length: SAMPLES, seed=1)
    facts = {"model": f"reader of {sees}", "weights": None, "memory": "on"}
    answerer = reader_answers(suite(name), sees=sees)
    rows = RowFile(tmp_path / "rows.jsonl")
    (row,) = measure(answerer, suite(name), task, facts=facts, rows=rows, progress=False)
    return float(row["score"])


@pytest.mark.parametrize("name", NAMES)
def test_row_82_oracle_scores_all_and_the_blind_guesses(name: str, tmp_path: Path) -> None:
    assert control(name, tmp_path, None) == 1.0
    chance = 1 / GUESSED[name] if name in GUESSED else 0.0
    blind = control(name, tmp_path, 0)
    low, high = wilson95(round(blind * SAMPLES), SAMPLES)
    assert low <= chance <= high


@pytest.mark.parametrize("name", WINDOWED)
def test_row_82_a_window_knows_what_is_in_it_and_nothing_before(name: str, tmp_path: Path) -> None:
    """Full attention of the prompt's length is an oracle; a window of its end has to guess what is early."""
    assert control(name, tmp_path, LENGTH, 0.0) == 1.0
    chance = 1 / GUESSED[name] if name in GUESSED else 0.0
    seen = control(name, tmp_path, 900 if name in GUESSED else 600, 0.0)
    if name in ("niah_multivalue", "niah_multiquery", "vt", "qa2", "qa3"):
        # The parts, or facts, that do not stand at the depth may lie in the window.
        assert seen < 0.75
    else:
        low, high = wilson95(round(seen * SAMPLES), SAMPLES)
        assert low <= chance <= high


@pytest.mark.parametrize("name", NAMES)
def test_prompts_have_their_length_and_depend_on_their_cell_alone(name: str) -> None:
    made = suite(name).prompts(LENGTH, 0.5, range(3), 4)
    assert made.length == LENGTH
    assert made.input_ids.dtype == made.answers.dtype == torch.int64
    assert (made.parts.max(1).values >= 0).all()
    alone = suite(name).prompts(LENGTH, 0.5, [2], 4)
    assert torch.equal(made.input_ids[2, :LENGTH], alone.input_ids[0, :LENGTH])
    for other in (suite(name).prompts(LENGTH, 0.5, [2], 5), suite(name).prompts(LENGTH, 0.75, [2], 4)):
        assert not torch.equal(alone.input_ids[0, :LENGTH], other.input_ids[0, :LENGTH])
    # The inputs go on with the answer but for its last token.
    assert torch.equal(made.input_ids[:, LENGTH:], made.answers[:, :-1])


def test_a_prompt_reads_as_ruler_writes_it() -> None:
    made = suite("niah_multikey_1").prompts(LENGTH, 0.25, [0], 0)
    text = bytes(made.input_ids[0, :LENGTH].tolist()).decode()
    assert text.startswith("A special magic number is hidden within the following text.")
    assert "I will quiz you about the number afterwards." in text
    assert text.count("One of the special magic numbers for ") == 4
    assert text.endswith("mentioned in the provided text is")
    key = text.split("The special magic number for ")[-1].split(" mentioned")[0]
    needle = f"One of the special magic numbers for {key} is:"
    answer = bytes(made.answers[0].tolist()).decode()
    assert f"{needle}{answer}." in text
    # A quarter into the filler, at the end of a sentence.
    assert abs(text.index(needle) / LENGTH - 0.25) < 0.1
    before = text[: text.index(needle)].rstrip(" ")
    assert before[-1] in ".\n"


def test_several_answers_are_scored_one_by_one() -> None:
    made = suite("niah_multivalue").prompts(LENGTH, None, [0], 0)
    text = bytes(made.input_ids[0, :LENGTH].tolist()).decode()
    assert text.startswith("Some special magic numbers are hidden within the following text.")
    parts = made.parts[0]
    assert set(parts.tolist()) == {GIVEN, 0, 1, 2, 3}
    right = torch.ones(1, len(parts), dtype=torch.bool)
    assert scores(right, made.parts).tolist() == [1.0]
    right[0, parts == GIVEN] = False
    assert scores(right, made.parts).tolist() == [1.0]
    right[0, (parts == 2).nonzero()[-1]] = False
    assert scores(right, made.parts).tolist() == [0.75]


def test_counts_are_ruler_s_and_asked_for_in_any_order() -> None:
    made = suite("cwe").prompts(9000, None, [0], 0)
    text = bytes(made.input_ids[0, : made.length].tolist()).decode()
    assert text.count("Below is a numbered list of words.") == 2
    assert text.endswith("The top 10 words that appear most often in the list are:")
    listed = text.rpartition("Memorize the ones that appear most often.\n")[2].rpartition("\nQuestion")[0]
    counts = Counter(re.findall(r"\d+\. ([a-z]+)", listed))
    assert sorted(counts.values(), reverse=True)[:11] == [30] * 10 + [3]
    answer = bytes(made.answers[0].tolist()).decode()
    wanted = re.findall(r"\d+\. ([a-z]+)", answer)
    assert {word for word, count in counts.items() if count == 30} == set(wanted)
    coded = suite("fwe").prompts(LENGTH, None, [0], 0)
    text = bytes(coded.input_ids[0, : coded.length].tolist()).decode()
    ranked = [word for word, _ in Counter(re.findall(r"\b[a-z]{6}\b|\.{3}", text)).most_common(4)]
    assert ranked[0] == "..."
    assert bytes(coded.answers[0].tolist()).decode() == "".join(
        f" {n}. {word}" for n, word in enumerate(ranked[1:], 1)
    )


def test_free_answers_are_searched_for_every_part() -> None:
    """A model that writes the words backwards scores as one that writes them in order."""
    made = suite("fwe").prompts(LENGTH, None, [0], 0)
    parts = part_ids(made, 0)
    assert share_written([token for part in reversed(parts) for token in part], parts) == 1.0
    assert share_written(list(parts[1]), parts) == pytest.approx(1 / 3)
    model = byte_senri()
    found = model_answers(model)(made, 512)
    wrote = greedy_tokens(model, made.input_ids[:, : made.length], tokens=made.written, chunk=LENGTH)
    assert found == [share_written(wrote[0].tolist(), parts)]
    generated = model.generate(
        made.input_ids[:, : made.length], max_new_tokens=made.written, do_sample=False, eos_token_id=None
    )
    assert torch.equal(generated[:, made.length :], wrote)


def test_border_keys_are_cut_by_a_border_in_every_way() -> None:
    from newllm.data.tokenizer import KEY_TOKEN

    cuts = set()
    for depth in (0.0, 0.3, 1.0):
        made = suite("passkey_border").prompts(LENGTH, depth, range(10), 0)
        start = (made.input_ids == KEY_TOKEN).int().argmax(1)
        assert (start // SEGMENT + 1 == (start + 5) // SEGMENT).all()
        cuts |= set((-start % SEGMENT).tolist())
        assert ((start / LENGTH - depth).abs() < 2 * SEGMENT / LENGTH).all()
    assert cuts == {1, 2, 3, 4, 5}


def test_short_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="length 100 is too short for its prompt, which needs"):
        suite("niah_single_2").prompts(100, None, [0], 0)
    with pytest.raises(ValueError, match="length 40 has no border of segments of 64 tokens"):
        suite("passkey_border").prompts(40, 0.5, [0], 0)
    with pytest.raises(ValueError, match=r"suite must be one or several of passkey, niah, .* got 'nah'"):
        suite_names("niah,nah")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": [0.5, 2.0]}, r"depths must lie between 0 and 1, got 2\.0"),
        ({"samples": lambda length: 0}, "samples must be at least 1, got 0"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1, got 0"),
    ],
)
def test_cells_that_cannot_be_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    task = Task([300], [0.5], lambda length: 1)._replace(**change)
    rows = RowFile(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=message):
        measure(lambda prompts, chunk: [1.0], suite("passkey"), task, facts={}, rows=rows, progress=False)
    assert not rows.path.exists()


def test_finished_cells_are_not_measured_again(tmp_path: Path) -> None:
    path, calls = tmp_path / "rows.jsonl", []

    def answerer(prompts: object, chunk: int) -> list[float]:
        calls.append(chunk)
        return [1.0]

    def run(lengths: list[int], seed: int = 0, model: str = "one") -> list[dict[str, object]]:
        facts = {"model": model, "weights": "w", "memory": "on", "commit": "c"}
        task = Task(lengths, [0.5], lambda length: 1, seed)
        return measure(answerer, suite("passkey"), task, facts=facts, rows=RowFile(path), progress=False)

    (first,) = run([300])
    assert first == {
        "model": "one", "weights": "w", "memory": "on", "commit": "c", "suite": "passkey", "seed": 0,
        "length": 300, "depth": 0.5, "samples": 1, "score": 1.0, "ci95": wilson95(1, 1),
    }  # fmt: skip
    # A line that was cut off counts for nothing and hurts no other.
    path.write_text(path.read_text() + '{"suite": "pass')
    again = run([300, 400])
    assert [row["length"] for row in again] == [300, 400]
    assert len(calls) == 2
    run([300], seed=1)
    run([300], model="two")
    assert len(calls) == 4
    run([300, 400])
    assert len(calls) == 4


def test_intervals_and_samples() -> None:
    assert interval([1.0, 0.0, 1.0]) == wilson95(2, 3)
    low, high = interval([0.5, 1.0, 0.75, 0.25])
    assert 0 <= low < 0.625 < high <= 1
    assert [usual_samples(length) for length in (2**15, 2**17, 2**20, 2**24, 2**26)] == [100, 100, 40, 8, 4]


def test_guesses_are_seeded() -> None:
    ids = suite("qa1").prompts(LENGTH, None, [0], 0).input_ids[0]
    question = int(suite("qa1").prompts(LENGTH, None, [0], 0).question[0])
    end = ids[:LENGTH][-question:]
    assert suite("qa1").solve(end, Random(3)) == suite("qa1").solve(end, Random(3))
