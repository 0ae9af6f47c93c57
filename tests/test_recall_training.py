"""Training for recall: questions anywhere in a segment, and a preset that reaches 64 windows and more."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import yaml

from newllm.cli import main
from newllm.cli.presets import preset_path
from newllm.data.documents import documents
from newllm.data.passkey import byte_passkey, training_batch
from newllm.data.recall.drafts import language
from newllm.data.recall.stories import PLACES, story_drafting
from newllm.data.sources import Corpus
from newllm.data.tokenizer import QUESTION_TOKEN, byte_tokenizer, encode
from newllm.evaluation.intervals import wilson95
from newllm.training.assemble import chosen_tokenizer
from newllm.training.batches import NeedleBatches
from newllm.training.config import ModelConfig, TaskConfig, TrainConfig
from newllm.training.groups import freeze_features
from newllm.training.scratch import scratch_model
from newllm.training.suite_batches import SuiteBatches
from tests.evaluation_parts import PROSE

TASK = TaskConfig(
    lengths=[16, 64], tokens_per_step=640, key_length=3, shift=True, text_weight=0.0, dilution=8.0
)


def test_questions_stand_anywhere_in_a_segment() -> None:
    batches = NeedleBatches(byte_passkey(PROSE), TASK, segment=16, steps=200, seed=0)
    phases = set()
    for step in range(100, 200):
        made = batches.batch(step)
        ids, weight = made["input_ids"], made["loss_weight"]
        assert ids.shape == (10, 64)
        question = (ids == QUESTION_TOKEN).int().argmax(1)
        assert len(set(question.tolist())) == 1
        place = int(question[0])
        phases.add(place % 16)
        assert torch.equal(weight.nonzero()[:, 1].unique(), torch.arange(place + 1, place + 4))
        assert bool(
            ((ids[:, place + 1 : place + 4] >= ord("0")) & (ids[:, place + 1 : place + 4] <= ord("9"))).all()
        )
    assert phases == set(range(16))
    still = NeedleBatches(byte_passkey(PROSE), replace(TASK, shift=False), segment=16, steps=200, seed=0)
    assert {
        int((still.batch(s)["input_ids"][0] == QUESTION_TOKEN).int().argmax()) for s in range(100, 120)
    } == {60}


def test_features_can_be_left_as_they_begin() -> None:
    model, _ = scratch_model(ModelConfig(feature_scale=1.0, feature_bias=0.0), seed=0)
    freeze_features(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen
    assert all("memory_feature" in name for name in frozen)
    assert {
        float(parameter) for name, p in model.named_parameters() if name in frozen for parameter in p
    } == {1.0, 0.0}
    assert TrainConfig().freeze_features is False


@pytest.mark.slow
def test_row_82_quick_preset_recalls_64_windows_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained at 6 windows or less; beyond what the windows reach an emptied memory knows nothing."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "recall", "--preset", "quick"]) == 0
    words = ["--suite", "passkey", "--lengths", "1k", "--key-length", "3", "--control", "[zeroed]"]
    assert main(["eval", "runs/recall/last", *words, "--depths", "[0,0.25,0.5,0.75]"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "runs" / "recall.jsonl").read_text().splitlines()]
    scores = {
        memory: [row["score"] for row in rows if row["memory"] == memory] for memory in ("on", "zeroed")
    }
    assert len(scores["on"]) == len(scores["zeroed"]) == 8
    assert min(scores["on"]) >= 0.95
    assert max(scores["zeroed"]) <= 0.05


def test_keys_come_near_their_question() -> None:
    """Beside one another one time in eight, and within two segments."""
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {
        "length": 400,
        "samples": 2000,
        "segment": 16,
        "generator": generator,
        "edge": 0.0,
        "straddle": 0.0,
    }
    task = byte_passkey(PROSE)
    distance = task.last_start(400) - training_batch(task, near=1.0, **options).key_start
    assert (int(distance.min()), int(distance.max()) < 32) == (0, True)
    share = float((distance == 0).double().mean())
    low, high = wilson95(round(share * 2000), 2000)
    assert low < math.log(2) / math.log(32) < high
    few = training_batch(task, near=0.5, **options).key_start
    assert 0.5 < float((task.last_start(400) - few < 32).double().mean()) < 0.65
    with pytest.raises(ValueError, match=r"near 0.6 must be shares that sum to at most 1"):
        training_batch(task, near=0.6, **{**options, "edge": 0.5})


def test_suites_in_words_are_trained_on_as_they_are_tested() -> None:
    config = TaskConfig(
        suites=["niah_single_2", "qa1"],
        lengths=[700],
        tokens_per_step=2100,
        edge=0.3,
        shift=True,
        dilution=50.0,
    )
    batches = SuiteBatches(language(byte_tokenizer(), PROSE * 4), config, segment=64, steps=10, seed=0)
    seen = set()
    for step in range(10):
        made = batches.batch(step)
        assert torch.equal(made["input_ids"], batches.batch(step)["input_ids"])
        assert made["input_ids"].shape == made["loss_weight"].shape == (3, 700)
        assert made["segment_weight"].shape == (3, 11)
        for ids, weight, segments in zip(*made.values(), strict=True):
            counted = (weight > weight.min()).nonzero()[:, 0]
            text = bytes(ids.tolist()).decode()
            answer = text[int(counted[0]) : int(counted[-1]) + 1].strip()
            asked = text[: int(counted[0])]
            seen.add(asked[-20:])
            place = asked.index(f"{answer}.")
            assert asked.endswith(("the provided text is", "Answer:"))
            if asked.endswith("is"):
                assert float(segments[place // 64]) == 1.0
    assert len(seen) >= 2


def test_stories_ask_about_as_many_people_as_fit() -> None:
    config = TaskConfig(suites=["qa1"], lengths=[200, 700], tokens_per_step=7000, questions=4, dilution=1.0)
    batches = SuiteBatches(language(byte_tokenizer(), PROSE * 4), config, segment=64, steps=4, seed=0)
    solve, numbers = story_drafting("qa1")[1], {0: set[int](), 3: set[int]()}
    for step, seen in numbers.items():
        made = batches.batch(step)
        for ids, weight in zip(made["input_ids"], made["loss_weight"], strict=True):
            text, counted = bytes(ids.tolist()).decode(), (weight > weight.min()).tolist()
            starts = [n for n in range(1, len(text)) if counted[n] and not counted[n - 1]]
            seen.add(len(starts))
            assert len({text[:start].split()[-2] for start in starts}) == len(starts)
            for start in starts:
                (answer,) = solve(text[:start], Random(0))
                assert text[start:].startswith(f" {answer}")
                assert sum(counted[start : start + len(answer) + 2]) == len(answer) + 1
    assert numbers == {0: {1, 2}, 3: {3, 4}}


def test_a_share_of_the_samples_of_suites_is_text_alone() -> None:
    config = TaskConfig(suites=["qa1"], lengths=[400], tokens_per_step=1600, needle_share=0.5, dilution=1.0)
    words = language(byte_tokenizer(), PROSE * 4)
    made = SuiteBatches(words, config, segment=64, steps=4, seed=0).batch(0)
    asks = [b"Answer:" in bytes(ids.tolist()) for ids in made["input_ids"]]
    assert asks == [True, True, False, False]
    weight = made["loss_weight"]
    assert (weight > weight.min()).any(1).tolist() == asks
    whole = replace(config, needle_share=0.0)
    text = SuiteBatches(words, whole, segment=64, steps=4, seed=0).batch(0)["loss_weight"]
    assert float(text.double().sum()) == pytest.approx(config.text_weight)


def test_samples_hardly_longer_than_their_prompts_leave_less_behind_the_answer() -> None:
    config = TaskConfig(
        suites=["niah_multiquery"],
        lengths=[720],
        tokens_per_step=7200,
        shift=True,
        text_weight=0.0,
        dilution=1.0,
    )
    words = language(byte_tokenizer(), PROSE * 4)
    batches = SuiteBatches(words, config, segment=128, steps=10, seed=0)
    behind = [
        719 - int(weight.nonzero()[-1]) for step in range(10) for weight in batches.batch(step)["loss_weight"]
    ]
    assert min(behind) < 8
    assert 32 < max(behind) < 128


@pytest.mark.parametrize("name", ["niah", "niah-single", "qa1"])
def test_presets_of_suites_can_be_written_from_their_shortest_length_on(name: str) -> None:
    preset = yaml.safe_load(preset_path(name, "train recall").read_text())
    config, segment = TaskConfig(**preset["task"]), preset["model"]["segment"]
    batches = SuiteBatches(language(byte_tokenizer(), PROSE), config, segment=segment, steps=4, seed=0)
    assert batches.batch(0)["input_ids"].shape == (config.max_rows, min(config.lengths))


def test_a_vocabulary_learns_what_suites_hide() -> None:
    text = documents("text", ["prose"], [PROSE])
    corpus = Corpus("text", "text", None, text, text)

    def lengths(*suites: str) -> set[int]:
        tokenizer = chosen_tokenizer("bpe:500", corpus, suites)
        return {len(encode(tokenizer, f" {word}")) for word in PLACES}

    assert lengths("qa1") == lengths("passkey", "qa1") == {1}
    assert min(lengths()) > 1 and lengths("passkey") == lengths()
    with pytest.raises(ValueError, match="suites must be of"):
        lengths("cwe")


def test_short_lengths_ask_what_is_short() -> None:
    config = TaskConfig(
        suites=["niah_single_2", "niah_multiquery", "qa1"],
        lengths=[160, 384, 800],
        tokens_per_step=8000,
        shift=True,
    )
    batches = SuiteBatches(language(byte_tokenizer(), PROSE * 4), config, segment=64, steps=3, seed=0)
    asked = []
    for step in range(3):
        text = b"".join(bytes(ids.tolist()) for ids in batches.batch(step)["input_ids"])
        asked.append(tuple(question in text for question in (b" Answer: ", b" text is ", b" text are ")))
    assert asked == [(True, False, False), (True, True, False), (True, True, True)]


@pytest.mark.parametrize(("lengths", "least"), [([300, 800], 34), ([500], 6)])
def test_lengths_too_short_for_a_suite_are_refused_at_once(lengths: list[int], least: int) -> None:
    words = language(byte_tokenizer(), PROSE)
    config = TaskConfig(suites=["niah_single_2", "niah_multiquery"], lengths=lengths)
    with pytest.raises(
        ValueError, match=f"length {lengths[0]} is too short for its prompt, which needs {least}"
    ):
        SuiteBatches(words, config, segment=64, steps=1, seed=0)
