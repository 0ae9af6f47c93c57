"""``newllm chat`` with a model of every family."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from newllm.cli import main
from newllm.data.tokenizer import byte_tokenizer
from newllm.models import (
    BaselineConfig,
    BaselineForCausalLM,
    ContextKVConfig,
    ContextKVForCausalLM,
    ContextLMConfig,
    ContextLMForCausalLM,
)
from newllm.models.files import save_model
from newllm.models.history import HistorySession
from tests.cli_parts import Captured, chatted
from tests.tiny_models import BASES, tiny_base, tiny_senri


def made(model: Any, config: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return model(config(vocab_size=264, **options)).eval()


# One model of each family, with the 264 tokens of the byte tokenizer.
TALKERS: dict[str, Callable[[], Any]] = {
    "senri": lambda: tiny_senri(vocab_size=264),
    **{
        f"context_lm, {cell}": partial(made, ContextLMForCausalLM, ContextLMConfig, cell=cell)
        for cell in ("gated", "simple", "context")
    },
    "context_kv": partial(
        made, ContextKVForCausalLM, ContextKVConfig, context_dims=[6, 4], num_attention_heads=2
    ),
    "newllm_baseline": partial(made, BaselineForCausalLM, BaselineConfig, max_position_embeddings=256),
    "gpt2": partial(made, GPT2LMHeadModel, GPT2Config, n_embd=16, n_layer=2, n_head=2),
    **{family: partial(tiny_base, family, vocab_size=264) for family in BASES},
}


@pytest.fixture(params=TALKERS)
def talker(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A model of each family: with a state of constant size, or with a cache that grows."""
    save_model(TALKERS[request.param](), byte_tokenizer(), tmp_path / "talker")
    return str(tmp_path / "talker")


def test_row_66_chat_is_one_stream_until_reset(
    talker: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    one, _ = chatted(monkeypatch, capsys, talker, "Hello", "And you?")
    two, _ = chatted(monkeypatch, capsys, talker, "Hello", "", "And you?", "reset", "Hello", "quit", "Hello")
    assert two == [*one, *two[-1:]]
    assert "".join(two).startswith("".join(one))
    fresh, told = chatted(monkeypatch, capsys, talker, "Hello", "exit")
    line = r"\d+ tokens read at .*, \d+ written at .* tokens/s; after \d+ tokens: state [\d,]+ bytes, .* MB\n"
    assert re.fullmatch(line, told)
    assert "state 0 bytes" not in told
    assert "".join(two).endswith("".join(fresh))


def test_row_66_chat_is_kept_in_a_file(
    talker: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path
) -> None:
    kept = tmp_path / "my chat"
    straight, _ = chatted(monkeypatch, capsys, talker, "Hello", "And you?")
    first, _ = chatted(monkeypatch, capsys, talker, "Hello", f"save {kept}")
    after, told = chatted(monkeypatch, capsys, talker, f"load {kept}x", "load", f"load {kept}", "And you?")
    assert "".join(first + after) == "".join(straight)
    wrong, path, loaded, _ = told.splitlines()
    assert wrong == f"newllm: there is no session file {kept}x"
    assert path == "newllm: load needs the path of a file"
    assert re.fullmatch(rf"load: \d+ tokens are in {re.escape(str(kept))}", loaded)


def test_row_66_a_full_model_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """A model of 256 positions; the conversation goes on after a reset."""
    save_model(tiny_base("smollm", vocab_size=264), byte_tokenizer(), tmp_path / "base")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{'long ' * 60}\nreset\nHello\n"))
    assert main(["chat", str(tmp_path / "base"), "--max-new-tokens", "4", "--temperature", "0"]) == 0
    said = capsys.readouterr()
    assert "the model reads 256: reset it" in said.err
    assert said.out.strip()


def test_history_ends_at_any_end_of_its_model() -> None:
    """As a session does: those of the checkpoint's generation, beside the tokenizer's own."""
    model, tokenizer = tiny_base("llama", vocab_size=264).eval(), byte_tokenizer()

    def said() -> list[int]:
        session = HistorySession(model, tokenizer)
        session.feed("Hello")
        return [int(token) for token in session.stream(max_new_tokens=9)]

    model.generation_config.eos_token_id = None
    text = said()
    end = next(token for token in text if token != text[0])
    short = [*text[: text.index(end)], -1]
    for ends in ([258, end], end):
        model.generation_config.eos_token_id = ends
        assert said() == short
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    assert said() == short
