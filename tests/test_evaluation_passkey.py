"""Recall of passkeys: what is measured is what was asked, whatever the chunks, batches and models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from newllm.data.passkey import PasskeyTask, batch, byte_passkey, text_passkey
from newllm.data.tokenizer import KEY_TOKEN, byte_tokenizer
from newllm.evaluation import passkey
from newllm.evaluation.control import remove_memories
from newllm.evaluation.forced import last_logits
from newllm.evaluation.intervals import mean95, wilson95
from newllm.evaluation.passkey import cell_generator, passkey_recall, state_bytes
from newllm.models.session import Session
from newllm.testing import assert_rounding, largest
from tests.evaluation_parts import BYTE_SIZES, PROSE, byte_senri
from tests.tiny_models import ADDITIONS, VOCABULARY, random_tokens, tiny_senri

LENGTHS, DEPTHS = (40, 130), (0.0, 0.5, 1.0)


class Reader(nn.Module):
    """Stands for a model: keeps what it read in the cache it was given, and answers by ``rule``.

    ``rule`` takes all ids so far ``[B, T]`` and how many answers are wanted, and gives them ``[B, keep]``.
    """

    def __init__(self, rule: Any) -> None:
        super().__init__()
        self.rule, self.config, self.device = rule, tiny_senri().config, torch.device("cpu")
        self.calls: list[tuple[int, ...]] = []
        self.prompts: list[Tensor] = []

    def forward(self, ids: Tensor, *, past_key_values: Any, use_cache: bool, logits_to_keep: int) -> Any:
        assert use_cache == (past_key_values is not None)
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.calls.append(tuple(ids.shape))
        seen = torch.cat([*getattr(past_key_values, "seen", []), ids], 1)
        if not hasattr(past_key_values, "seen"):
            self.prompts.append(seen)
        if use_cache:
            past_key_values.seen = [seen]
        answers = self.rule(seen, logits_to_keep)
        return SimpleNamespace(logits=F.one_hot(answers, BYTE_SIZES["vocab_size"]).float())


def oracle(ids: Tensor, keep: int) -> Tensor:
    """The tokens behind the key's marker, or anything before it has been seen."""
    start = (ids == KEY_TOKEN).int().argmax(1, keepdim=True) + 1
    return ids.gather(1, (start + torch.arange(keep)).clamp(max=ids.shape[1] - 1))


def blind(ids: Tensor, keep: int) -> Tensor:
    """Always the same digit."""
    return torch.full((len(ids), keep), ord("7"))


def parrot(ids: Tensor, keep: int) -> Tensor:
    """Right but for the last digit."""
    answers = oracle(ids, keep)
    return torch.cat([answers[:, :-1], answers[:, -1:] + 20], 1)


def measured(model: Any, task: PasskeyTask | None = None, **options: Any) -> list[passkey.Cell]:
    defaults = {"lengths": LENGTHS, "depths": DEPTHS, "samples": 9, "reach": 10, "seed": 3, "progress": False}
    return passkey_recall(model, task or byte_passkey(PROSE), **{**defaults, **options})


@pytest.mark.parametrize("batch_tokens", [3, 50, 300, 32768])
def test_oracle_scores_one_and_the_blind_none(batch_tokens: int) -> None:
    cells = measured(Reader(oracle), batch_tokens=batch_tokens)
    assert [(cell.length, cell.depth) for cell in cells] == [(n, d) for n in LENGTHS for d in DEPTHS]
    assert {cell.score for cell in cells} == {1.0}
    assert {cell.samples for cell in cells} == {9}
    assert {cell.ci95 for cell in cells} == {wilson95(9, 9)}
    for rule in (blind, parrot):
        assert {cell.score for cell in measured(Reader(rule), batch_tokens=batch_tokens)} == {0.0}


def test_recall_counts_the_share_of_whole_answers() -> None:
    """Only the first sample of each batch of three is answered."""

    def first_only(ids: Tensor, keep: int) -> Tensor:
        return torch.where(torch.arange(len(ids))[:, None] == 0, oracle(ids, keep), ord("x"))

    cells = measured(Reader(first_only), lengths=[40], batch_tokens=3 * 45)
    assert {(cell.score, cell.ci95) for cell in cells} == {(3 / 9, wilson95(3, 9))}


def test_short_prompts_are_read_side_by_side_and_long_ones_in_pieces() -> None:
    model = Reader(oracle)
    # 40 tokens and all of the answer but its last token.
    measured(model, lengths=[40], depths=[0.5], samples=5, batch_tokens=84)
    assert model.calls == [(2, 42), (2, 42), (1, 42)]
    model.calls.clear()
    measured(model, lengths=[130], depths=[0.5], samples=1, batch_tokens=50)
    assert model.calls == [(1, 32), (1, 50), (1, 50)]


def test_prompts_depend_on_the_cell_alone() -> None:
    """Other models, cells, batches and numbers of samples change no prompt."""
    one, two = Reader(oracle), Reader(blind)
    measured(one, samples=4)
    measured(two, samples=4)
    assert all(torch.equal(*pair) for pair in zip(one.prompts, two.prompts, strict=True))
    alone = Reader(oracle)
    measured(alone, lengths=[130], depths=[0.5], samples=2, batch_tokens=150)
    assert torch.equal(torch.cat(alone.prompts), one.prompts[4][:2])
    other = Reader(oracle)
    measured(other, lengths=[130], depths=[0.5], samples=2, seed=4)
    assert not torch.equal(other.prompts[0], one.prompts[4][:2])


def test_cell_generators_are_fixed() -> None:
    drawn = {
        (seed, length, depth): int(
            torch.randint(2**60, (), generator=cell_generator(seed, length, depth), dtype=torch.int64)
        )
        for seed in (0, 1)
        for length in (16, 17)
        for depth in (0.0, 0.25, 1.0)
    }
    assert len(set(drawn.values())) == len(drawn)
    assert cell_generator(0, 16, 1).initial_seed() == cell_generator(0, 16, 1.0).initial_seed()


def test_depth_keeps_out_of_reach() -> None:
    model = Reader(oracle)
    task = byte_passkey(PROSE)
    measured(model, task, lengths=[100], depths=[1.0], reach=30, samples=3)
    place = (model.prompts[0] == KEY_TOKEN).int().argmax(1)
    assert place.tolist() == [100 - 30 - len(task.question) - task.needle_length] * 3


def test_chunks_give_the_logits_of_one_pass() -> None:
    model = byte_senri().double()
    prompts = batch(byte_passkey(PROSE), length=60, samples=2, generator=cell_generator(0, 60, 0.5))
    whole, *cut = (last_logits(model, prompts.input_ids, keep=3, chunk=chunk) for chunk in (62, 3, 7, 40, 61))
    with torch.no_grad():
        expected = model(prompts.input_ids, use_cache=False).logits[:, -3:]
    for logits in (whole, *cut):
        assert_rounding(logits, expected, additions=ADDITIONS, magnitude=ADDITIONS * largest(expected))


def test_recall_leaves_the_model_as_it_was() -> None:
    model = byte_senri().train()
    measured(model, lengths=[40], samples=2)
    assert model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [40, 10]}, "length 10 is too short for a passkey prompt"),
        ({"lengths": []}, "lengths must hold at least one number"),
        ({"depths": [0.5, 1.5]}, "depths must lie between 0 and 1, got 1.5"),
        ({"depths": ()}, "depths must hold at least one number"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"batch_tokens": 2}, "batch_tokens must be at least 3, got 2"),
    ],
)
def test_recall_refuses_before_it_reads(options: dict[str, Any], message: str) -> None:
    model = Reader(oracle)
    with pytest.raises(ValueError, match=message):
        measured(model, **options)
    assert model.calls == []


def test_cells_are_told_as_they_come() -> None:
    told: list[passkey.Cell] = []
    assert measured(Reader(oracle), on_cell=told.append) == told


def test_state_bytes_are_the_same_at_every_length() -> None:
    model = byte_senri()
    sizes = [state_bytes(model, length) for length in (1, 8, 500)]
    session = Session(model)
    session.feed(random_tokens(30))
    assert sizes == [session.state_bytes] * 3
    assert sizes[0] > 0


def test_row_82_passkey_oracle_and_blind_model_on_english() -> None:
    """The task in sentences, for a tokenizer that is not the byte tokenizer's own task."""
    task = text_passkey(byte_tokenizer(), PROSE, 4)

    def find(ids: Tensor, keep: int) -> Tensor:
        needle = torch.tensor(task.prefix)
        found = (ids.unfold(1, len(needle), 1) == needle).all(2).int().argmax(1, keepdim=True)
        return ids.gather(1, (found + len(needle) + torch.arange(keep)).clamp(max=ids.shape[1] - 1))

    assert {cell.score for cell in measured(Reader(find), task, lengths=[200])} == {1.0}
    assert {cell.score for cell in measured(Reader(blind), task, lengths=[200])} == {0.0}


def test_removed_memories_leave_the_window() -> None:
    model, ids = tiny_senri(num_hidden_layers=1, memory_layers=[0]), random_tokens(1, 30)
    changed = ids.clone()
    changed[:, 0] = ids[:, 0] % (VOCABULARY - 1) + 1
    with torch.no_grad():
        assert not torch.equal(model(ids).logits[:, 8:], model(changed).logits[:, 8:])
        remove_memories(model)
        assert torch.equal(model(ids).logits[:, 8:], model(changed).logits[:, 8:])
    assert model.config.memory_layers == []


# Intervals


@pytest.mark.parametrize(
    ("successes", "samples", "low", "high"),
    [
        # Newcombe 1998, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_of_published_cases(successes: int, samples: int, low: float, high: float) -> None:
    assert tuple(round(end, 4) for end in wilson95(successes, samples)) == (low, high)
    mirrored = wilson95(samples - successes, samples)
    assert tuple(round(1 - end, 4) for end in reversed(mirrored)) == (low, high)


def test_wilson_interval_ends_are_exact() -> None:
    for samples in range(1, 200):
        assert wilson95(0, samples)[0] == 0.0
        assert wilson95(samples, samples)[1] == 1.0


@pytest.mark.parametrize(("successes", "samples"), [(-1, 3), (4, 3), (0, 0)])
def test_wilson_interval_refuses(successes: int, samples: int) -> None:
    with pytest.raises(ValueError, match="successes must be between 0 and samples"):
        wilson95(successes, samples)


def test_interval_of_a_mean() -> None:
    """Values 1 and 3, fifty times each: mean 2, deviation sqrt(100 / 99), standard error 0.1005."""
    low, high = mean95(200.0, 500.0, 100)
    assert (round(low, 4), round(high, 4)) == (1.8030, 2.1970)
    assert mean95(3.0, 9.0, 1) == (3.0, 3.0)
