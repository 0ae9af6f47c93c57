"""What a session can be given to read, and what it says of anything else."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from newllm import Session
from newllm.data.tokenizer import byte_tokenizer
from newllm.models.sampling import Sampling
from tests.tiny_models import tiny_senri

KINDS = "text must be a string, token ids, or one of either per row, got "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (5, KINDS + "int"),
        (None, KINDS + "NoneType"),
        (b"abc", KINDS + "bytes"),
        ({"input_ids": [1]}, KINDS + "dict: give its input_ids"),
        (BatchEncoding({"input_ids": [[1, 2]]}), KINDS + "BatchEncoding: give its input_ids"),
        ([1.5, 2.0], KINDS + "a list of float"),
        ([[1.5, 2.0]], "token ids must be whole numbers, got float"),
        ([1, "a"], "token ids must be whole numbers, got str"),
        (torch.full((3,), 0.5), "token ids must be whole numbers, got torch.float32"),
        (iter([1, 2]), "text must come in strings, got int"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_kinds_are_refused(text: Any, message: str) -> None:
    session = Session(tiny_senri())
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        session.feed(text)
    assert session.tokens == [0]


def test_ids_of_more_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^token ids must be of shape \[T\] in each row, got \[1, 3\]$"):
        Session(tiny_senri()).feed(torch.zeros(1, 1, 3, dtype=torch.int64))


@pytest.mark.parametrize("ids", [np.array([3, 1, 4]), list(np.array([3, 1, 4])), np.array([[3, 1, 4]])])
def test_arrays_are_read(ids: Any) -> None:
    session = Session(tiny_senri())
    assert session.score(ids).shape == (3,)


def test_half_characters_are_refused() -> None:
    """Python makes them of file names that are not UTF-8."""
    session = Session(tiny_senri(vocab_size=259), byte_tokenizer())
    with pytest.raises(ValueError, match=r"^text must be of whole characters, got '\\udce9' at 1$"):
        session.feed("a\udce9b")


@pytest.mark.parametrize("name", ["batch_size", "chunk"])
@pytest.mark.parametrize("value", [1.5, "2", True])
def test_sizes_are_whole_numbers(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be a whole number, got {value!r}$"):
        Session(tiny_senri(), **{name: value})


@pytest.mark.parametrize("value", [1.5, "3", None])
def test_a_number_of_new_tokens_is_whole(value: Any) -> None:
    with pytest.raises(TypeError, match=f"^max_new_tokens must be a whole number, got {value!r}$"):
        Session(tiny_senri()).generate([1], max_new_tokens=value)


def test_a_number_of_choices_is_whole() -> None:
    with pytest.raises(TypeError, match=r"^top_k must be a whole number, got 1.5$"):
        Sampling(top_k=1.5)  # type: ignore[arg-type]


def test_names_in_place_of_models_and_tokenizers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^model must be a SenriForCausalLM .*, got str$"):
        Session("senri")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^tokenizer must be a tokenizer of transformers, got str$"):
        Session(tiny_senri(), "senri")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^sampling must be a Sampling, got dict$"):
        Session(tiny_senri()).generate([1], sampling={"temperature": 1.0})  # type: ignore[arg-type]
