"""The passkey task: exact lengths, exact places, digits only in the key."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from newllm.data.passkey import PasskeyTask, batch, byte_passkey, text_passkey, training_batch
from newllm.data.text import embedded_corpus
from newllm.data.tokenizer import KEY_TOKEN, QUESTION_TOKEN, byte_tokenizer, encode

TEXT = "It was the year 1803, and 27 people sat in the room. " * 3
SENTENCES = "\nThe pass key is . Remember it.\nWhat is the pass key? The pass key is "


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counting_task(**changes) -> PasskeyTask:
    """Filler 0, 1, 2, ... (a token tells its place), needle 900 d d d 901, question 800 801."""
    filler = torch.arange(100)
    task = PasskeyTask(filler, (900,), (800, 801), tuple(range(700, 710)), key_length=3, suffix=(901,))
    return task._replace(**changes)


def smol_tokenizer(text: str, *, single_digits: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE; with ``single_digits`` digits are cut apart first, as SmolLM2's does."""
    backend = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([text, SENTENCES], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


# --- batch -----------------------------------------------------------------------------------------


@given(
    length=st.integers(40, 300),
    depth=st.floats(0, 1),
    reach=st.integers(0, 20),
    prefix=st.integers(0, 3),
    key_length=st.integers(1, 6),
)
def test_prompt_has_its_exact_length_and_the_needle_its_place(length, depth, reach, prefix, key_length):
    task = counting_task(prefix=tuple(range(900, 900 + prefix)), key_length=key_length)
    made = batch(task, length=length, samples=4, depth=depth, reach=reach, generator=generator())
    needle = prefix + key_length + 1
    place = round(depth * (length - 2 - needle - reach))
    assert made.needle_length == task.needle_length == needle
    assert made.input_ids.shape == (4, length + key_length - 1)
    assert made.answers.shape == (4, key_length)
    assert made.key_start.tolist() == [place] * 4
    inside = made.input_ids[:, place : place + needle]
    assert torch.equal(inside[:, prefix:-1], made.answers)
    assert inside[:, :prefix].tolist() == [list(task.prefix)] * 4
    assert inside[:, -1].tolist() == [901] * 4
    assert made.input_ids[:, length - 2 : length].tolist() == [[800, 801]] * 4
    assert torch.equal(made.input_ids[:, length:], made.answers[:, :-1])
    # No needle token within reach of the question, and digits nowhere but in the key and the answer.
    assert place + needle - 1 + reach < length - 2
    assert ((made.input_ids >= 700) & (made.input_ids < 710)).sum(1).tolist() == [2 * key_length - 1] * 4


def test_filler_is_read_in_a_circle_around_the_needle():
    made = batch(counting_task(), length=250, samples=30, depth=0.5, generator=generator())
    start, needle = int(made.key_start[0]), made.needle_length
    rest = torch.cat([made.input_ids[:, :start], made.input_ids[:, start + needle : 248]], 1)
    assert torch.equal(rest, (rest[:, :1] + torch.arange(rest.shape[1])) % 100)
    assert rest[:, 0].unique().numel() > 10


def test_teacher_forcing_predicts_the_answer_from_the_last_positions():
    """The logits at the last K positions come right after the question and after each answer token."""
    task = counting_task()
    made = batch(task, length=60, samples=5, depth=0.0, generator=generator())
    k = task.key_length
    whole = torch.cat([made.input_ids, made.answers[:, -1:]], 1)
    assert torch.equal(whole[:, -k:], made.answers)
    assert torch.equal(made.input_ids[:, -k:], whole[:, -k - 1 : -1])
    assert made.input_ids[:, -k].tolist() == [801] * 5


def test_depths_reach_from_the_first_token_to_the_last_that_is_far_enough():
    task, layers, window, length = counting_task(), 2, 16, 128
    first, last = (
        int(
            batch(
                task, length=length, samples=1, depth=d, reach=layers * window, generator=generator()
            ).key_start
        )
        for d in (0.0, 1.0)
    )
    assert first == 0
    assert last == length - 2 - task.needle_length - layers * window


def test_places_can_be_given_or_drawn():
    places = torch.tensor([0, 7, 31, 53])
    made = batch(counting_task(), length=60, samples=4, depth=places, generator=generator())
    assert torch.equal(made.key_start, places)
    assert made.input_ids[torch.arange(4), places].tolist() == [900] * 4
    drawn = batch(counting_task(), length=20, samples=400, generator=generator())
    assert drawn.key_start.unique().tolist() == list(range(20 - 2 - 5 + 1))


def test_the_generator_decides_everything():
    def make(seed: int):
        return training_batch(counting_task(), length=64, samples=8, segment=16, generator=generator(seed))

    torch.manual_seed(1)
    one = make(3)
    torch.manual_seed(2)
    two, other = make(3), make(4)
    assert all(torch.equal(a, b) for a, b in zip(one[:3], two[:3], strict=True))
    assert not torch.equal(one.input_ids, other.input_ids)
    keys = batch(counting_task(), length=64, samples=500, depth=0.5, generator=generator()).answers
    assert keys.unique().tolist() == list(range(700, 710))


def test_a_prompt_of_the_least_length_is_needle_and_question_only():
    made = batch(counting_task(), length=7, samples=2, depth=1.0, generator=generator())
    assert made.key_start.tolist() == [0, 0]
    assert made.input_ids[:, [0, 4, 5, 6]].tolist() == [[900, 901, 800, 801]] * 2
    with pytest.raises(
        ValueError, match=r"length 6 is too short .* needle \(5\), question \(2\) and reach \(0\) .* 7"
    ):
        batch(counting_task(), length=6, samples=2, depth=1.0, generator=generator())
    with pytest.raises(ValueError, match=r"length 70 is too short .* reach \(64\) need at least 71 tokens"):
        batch(counting_task(), length=70, samples=2, depth=0.0, reach=64, generator=generator())


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        (1.5, "depth is 1.5, expected a number from 0 to 1"),
        (-0.1, "expected a number from 0 to 1"),
        (torch.tensor([0, 54]), "places outside 0 to 53"),
        (torch.tensor([-1, 0]), "places outside 0 to 53"),
        (torch.tensor([0]), r"torch.int64 tensor \[1\], expected torch.int64 \[2\]"),
        (torch.tensor([0.0, 1.0]), "depth is a torch.float32 tensor"),
    ],
)
def test_depths_out_of_range_are_refused(depth, message):
    with pytest.raises(ValueError, match=message):
        batch(counting_task(), length=60, samples=2, depth=depth, generator=generator())


# --- training_batch --------------------------------------------------------------------------------


def crosses(start: torch.Tensor, needle: int, segment: int) -> torch.Tensor:
    return start // segment != (start + needle - 1) // segment


def test_training_places_are_everywhere_with_shares_at_the_edge_and_across_borders():
    task, segment, samples = counting_task(), 32, 20_000
    made = training_batch(task, length=128, samples=samples, segment=segment, generator=generator())
    last = 128 - 2 - task.needle_length
    assert made.key_start.unique().tolist() == list(range(last + 1))
    # The fixed shares plus what the uniform rest adds by chance, within five standard deviations.
    rest = 1 - 0.15 - 0.15
    every = torch.arange(last + 1)
    chance = float(crosses(every, task.needle_length, segment).double().mean())
    found = {
        0.15 + rest / (last + 1): (made.key_start == 0),
        0.15 + rest * chance: crosses(made.key_start, task.needle_length, segment),
    }
    for share, hits in found.items():
        assert abs(float(hits.double().mean()) - share) < 5 * (share * (1 - share) / samples) ** 0.5


@pytest.mark.parametrize(("edge", "straddle"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_shares_are_kept_at_their_limits(edge, straddle):
    task = counting_task()
    made = training_batch(
        task, length=96, samples=300, segment=16, edge=edge, straddle=straddle, generator=generator()
    )
    crossing = crosses(made.key_start, task.needle_length, 16)
    assert ((made.key_start == 0) | crossing).all()
    assert bool((made.key_start == 0).any()) == (edge > 0)
    # Every place that crosses a border turns up: 5 borders times needle - 1 places.
    assert made.key_start[crossing].unique().numel() == (5 * 4 if straddle > 0 else 0)


def test_needle_segments_name_the_segments_that_hold_the_needle():
    task = counting_task()
    made = training_batch(task, length=100, samples=200, segment=16, generator=generator())
    segments = made.needle_segments(16)
    assert segments.shape == (200, 7)  # 102 tokens
    inside = torch.zeros(200, 7 * 16, dtype=torch.bool)
    place = made.key_start[:, None] + torch.arange(task.needle_length)
    expected = inside.scatter(1, place, True).view(200, 7, 16).any(-1)
    assert torch.equal(segments, expected)
    assert set(segments.sum(1).tolist()) == {1, 2}


def test_training_refuses_impossible_shares_and_borders():
    with pytest.raises(ValueError, match=r"edge 0.9, straddle 0.2 and near 0.0 must be shares"):
        training_batch(
            counting_task(), length=96, samples=1, segment=16, edge=0.9, straddle=0.2, generator=generator()
        )
    with pytest.raises(ValueError, match=r"edge -0.1"):
        training_batch(counting_task(), length=96, samples=1, segment=16, edge=-0.1, generator=generator())
    with pytest.raises(
        ValueError, match=r"straddle needs a segment border .* 5 tokens .* at most at 9 .* segment 64"
    ):
        training_batch(counting_task(), length=16, samples=1, segment=64, generator=generator())
    with pytest.raises(ValueError, match=r"length 5 is too short"):
        training_batch(counting_task(), length=5, samples=1, segment=2, generator=generator())


# --- builders --------------------------------------------------------------------------------------


def test_byte_passkey_hides_one_marker_and_the_key_in_text_without_digits():
    task = byte_passkey(embedded_corpus().text, key_length=4)
    assert task.needle_length == 5
    made = batch(task, length=200, samples=3, depth=0.25, generator=generator())
    text = byte_tokenizer().decode(made.input_ids[0])
    key = byte_tokenizer().decode(made.answers[0])
    assert text.count("<key>") == text.count("<question>") == 1
    assert text.index("<key>") < text.index("<question>")
    assert f"<key>{key}" in text
    assert text.endswith(f"<question>{key[:-1]}")
    assert sum(letter.isascii() and letter.isdigit() for letter in text) == 7
    assert (made.input_ids[:, 199] == QUESTION_TOKEN).all()
    assert (made.input_ids[:, made.key_start[0]] == KEY_TOKEN).all()


def test_byte_passkey_keeps_special_tokens_of_the_text_as_bytes():
    task = byte_passkey("a <key> 5 b")
    assert bytes(task.filler.tolist()).decode() == "a <key> # b"


def test_text_passkey_reads_as_english_sentences():
    tokenizer = smol_tokenizer(TEXT, single_digits=True)
    task = text_passkey(tokenizer, TEXT)
    assert [tokenizer.decode([symbol]) for symbol in task.symbols] == list("0123456789")
    assert tokenizer.decode(task.filler) == TEXT.replace("1803", "####").replace("27", "##")
    made = batch(task, length=120, samples=2, depth=0.5, generator=generator())
    key = tokenizer.decode(made.answers[1])
    needle = f"\nThe pass key is {key}. Remember it.\n"
    text = tokenizer.decode(made.input_ids[1])
    assert len(key) == 5
    assert needle in text
    assert text.endswith(f"\nWhat is the pass key? The pass key is {key[:-1]}")
    place, size = int(made.key_start[1]), made.needle_length
    assert made.input_ids[1, place : place + size].tolist() == encode(tokenizer, needle).tolist()


def test_text_passkey_refuses_a_tokenizer_that_joins_digits():
    tokenizer = smol_tokenizer("0123456789 " * 50, single_digits=False)
    with pytest.raises(ValueError, match="tokenizer must give each digit its own token"):
        text_passkey(tokenizer, TEXT)


def test_builders_refuse_empty_texts_and_keys():
    with pytest.raises(ValueError, match="text is empty"):
        byte_passkey("")
    with pytest.raises(ValueError, match="key_length is 0, expected at least 1"):
        byte_passkey(TEXT, key_length=0)
