"""The byte tokenizer, and ids as tensors."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from newllm.data.packing import random_blocks
from newllm.data.tokenizer import KEY_TOKEN, QUESTION_TOKEN, SPECIAL_TOKENS, byte_tokenizer, encode

SHARED = byte_tokenizer()


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def trained_tokenizer(text: str, **options) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def test_ids_are_bytes_then_special_tokens(tokenizer):
    assert len(tokenizer) == 264
    assert tokenizer("aé").input_ids == [97, 0xC3, 0xA9]
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(256, 264))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257, 258)
    assert tokenizer("<key>1<question>").input_ids == [KEY_TOKEN, 49, QUESTION_TOKEN]


@given(st.text())
def test_every_text_comes_back(text):
    ids = encode(SHARED, text)
    assert ids.tolist() == list(text.encode())
    assert SHARED.decode(ids) == text


def test_incomplete_characters_decode_to_the_replacement_sign(tokenizer):
    assert tokenizer.decode([97, 0xE6, 0x97]) == "a\ufffd"
    assert tokenizer.decode([KEY_TOKEN, 97], skip_special_tokens=True) == "a"


def test_it_is_saved_and_loaded_with_a_model(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = " a . 'tis 日本 <key>\n\n12 </s>"
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert loaded.all_special_ids == tokenizer.all_special_ids
    assert encode(loaded, text).tolist() == tokenizer(text).input_ids


def test_batches_can_be_padded_on_the_left(tokenizer):
    batch = tokenizer(["a", "abc"], padding=True, padding_side="left", return_tensors="pt")
    assert batch.input_ids.tolist() == [[256, 256, 97], [97, 98, 99]]
    assert batch.attention_mask.tolist() == [[0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("text", ["", "plain é 日本", "with <key> and </s> inside"])
def test_encode_equals_the_tokenizer(tokenizer, text):
    for each in (tokenizer, trained_tokenizer("the key and the text " * 5)):
        ids = encode(each, text)
        assert ids.dtype == torch.int64
        assert ids.shape == (len(ids),)
        assert ids.tolist() == each(text, add_special_tokens=False).input_ids


def test_encode_is_silent_about_long_texts(caplog):
    words = "the key and the text " * 5
    tokenizer = trained_tokenizer(words, model_max_length=4)
    with caplog.at_level(logging.WARNING):
        assert len(encode(tokenizer, words)) > 4
    assert caplog.records == []


def test_encode_skips_the_tokenizer_for_plain_bytes(tokenizer, monkeypatch):
    text = "no detour"
    expected = tokenizer(text).input_ids
    monkeypatch.setattr(type(tokenizer), "__call__", None)
    assert encode(tokenizer, text).tolist() == expected


# --- packing ---------------------------------------------------------------------------------------


def test_random_blocks_come_from_everywhere_and_from_the_seed():
    ids = torch.arange(10)
    blocks = random_blocks(ids, 3, 200, torch.Generator().manual_seed(1))
    assert blocks.shape == (200, 3)
    assert torch.equal(blocks, blocks[:, :1] + torch.arange(3))
    assert blocks[:, 0].unique().tolist() == list(range(8))
    assert torch.equal(blocks, random_blocks(ids, 3, 200, torch.Generator().manual_seed(1)))
    assert not torch.equal(blocks, random_blocks(ids, 3, 200, torch.Generator().manual_seed(2)))
    assert random_blocks(ids, 10, 2, torch.Generator()).tolist() == [list(range(10))] * 2


@pytest.mark.parametrize(
    ("ids", "length", "message"),
    [
        (torch.arange(3), 4, "text is too short, it has 3 tokens and length asks for 4"),
        (torch.arange(3), 0, "length is 0, expected at least 1"),
        (torch.zeros(2, 3), 2, r"ids has shape \[2, 3\]"),
    ],
)
def test_packing_refuses_what_does_not_fit(ids, length, message):
    with pytest.raises(ValueError, match=message):
        random_blocks(ids, length, 1, torch.Generator())
