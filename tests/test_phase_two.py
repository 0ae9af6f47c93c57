"""Phase 2: the cache, what learns, batch sizes, the best weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from newllm.models import ContextKVConfig, ContextKVForCausalLM, ContextLMConfig, ContextLMForCausalLM
from newllm.modules.context_kv import visible_positions
from newllm.testing import assert_rounding
from newllm.training.phase_cache import SlotCache, TokenCache
from newllm.training.phase_config import Phase2Config
from newllm.training.phase_two import batch_from_memory, evaluate, phase_two_parameters, train_tokens

SIZES: dict[str, Any] = {"vocab_size": 20, "embed_dim": 8, "initializer_range": 0.5}
PLANS = [
    {},
    {"num_hidden_layers": 2, "input_tokens": 3},
    *({"num_hidden_layers": 2, "plan": p} for p in "ADFG"),
]


def tiny(**options: Any) -> ContextLMForCausalLM:
    config = ContextLMConfig(**{**SIZES, "cell": "context", "context_dim": 6, **options})
    return ContextLMForCausalLM(config).eval().double()


def slots(**options: Any) -> ContextKVForCausalLM:
    fields = {**SIZES, "context_dims": [4, 3], "chunk_size": 5, "num_attention_heads": 2, **options}
    return ContextKVForCausalLM(ContextKVConfig(**fields)).eval().double()


def ids(length: int = 60) -> Tensor:
    """A text in which each token follows from the one before, most of the time."""
    generator = torch.Generator().manual_seed(3)
    steps = torch.randint(1, 3, (length,), generator=generator)
    return steps.cumsum(0) % 20


def close(actual: Tensor, expected: Tensor) -> None:
    assert_rounding(actual, expected, additions=512, magnitude=512)


@pytest.mark.parametrize("options", PLANS, ids=str)
def test_row_38_cached_logits_are_the_model_s(options: dict[str, Any]) -> None:
    model = tiny(**options)
    cache = TokenCache(model, ids())
    positions = torch.randperm(60)
    with torch.no_grad():
        expected = model(ids()[None]).logits[0]
        close(model.lm_head(cache.features(model, positions)), expected[positions])
    assert len(cache.contexts) == model.model.token_block.reads


@pytest.mark.parametrize(
    "options",
    [{}, {"max_contexts": 3}, {"slot_kind": "interval", "max_contexts": 3}, {"duplicate_boundary": True}],
    ids=str,
)
def test_row_38_cached_slots_are_the_model_s(options: dict[str, Any]) -> None:
    model = slots(**options)
    cache = SlotCache(model, ids(), torch.tensor([0]))
    positions = torch.randperm(60)
    with torch.no_grad():
        expected = model(ids()[None]).logits[0]
        close(model.lm_head(cache.features(model, positions)), expected[positions])


def test_row_45_no_slot_of_another_document() -> None:
    model = slots()
    borders = torch.tensor([0, 17, 30])
    cache = SlotCache(model, ids(), borders)
    for position in range(60):
        start = max(b for b in borders.tolist() if b <= position)
        found, visible = cache.slots(torch.tensor([position]))
        expected = [start + p for p in visible_positions(position - start, model.config.rule)[:-1]]
        assert found[visible[0]].tolist() == expected
    found, visible = cache.slots(torch.tensor([59, 20, 29]))
    assert found[visible[1]].tolist() == [] and found[visible[2]].tolist() == [21, 26]
    with pytest.raises(ValueError, match="borders must rise from 0 and lie inside ids"):
        SlotCache(model, ids(), torch.tensor([3, 17]))


def test_row_38_caches_must_be_given() -> None:
    with pytest.raises(TypeError, match="missing 3 required positional arguments"):
        train_tokens(tiny())  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="model must have the cell 'context', got 'gated'"):
        TokenCache(tiny(cell="gated"), ids())
    with pytest.raises(ValueError, match=r"ids must be a stream \[N\] of at least 2 tokens, got shape \[1\]"):
        TokenCache(tiny(), ids(1))


def count(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def test_row_39_what_phase_two_trains() -> None:
    with torch.device("meta"):
        options: dict[str, Any] = {"vocab_size": 50257, "embed_dim": 768, "cell": "context"}
        wide = ContextLMForCausalLM(ContextLMConfig(**options, context_dim=768, num_hidden_layers=6))
        kv = ContextKVForCausalLM(ContextKVConfig())
    assert count(phase_two_parameters(wide, Phase2Config())) == 7_091_712
    assert count(phase_two_parameters(kv, Phase2Config())) == 6_301_440
    loose = phase_two_parameters(wide, Phase2Config(freeze_embedding=False))
    assert count(loose) == 7_091_712 + 50257 * 768 + 2 * 768
    untied = tiny(tie_word_embeddings=False)
    heads = count(phase_two_parameters(untied, Phase2Config()))
    assert heads == count(list(untied.model.token_block.parameters())) + 8 * 20 + 20


def test_row_37_gradients_reach_the_token_block_alone() -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cache = TokenCache(model, ids())
    train_tokens(model, cache, cache, Phase2Config(epochs=2, batch_size=16))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all("token_block" in name for name in moved)


def test_row_40_batches_from_allocated_memory() -> None:
    assert batch_from_memory(22.2, 13.8, 50257) == 3204
    assert batch_from_memory(22.2, 22.0, 50257) == 256
    assert batch_from_memory(80.0, 0.0, 1000) == 16384
    assert batch_from_memory(4.0, 0.0, 1000) == 1600
    assert batch_from_memory(0.0, 0.0, 50257) == 512


@pytest.mark.parametrize("make", [tiny, slots])
def test_row_41_the_best_weights_come_back(make: Any) -> None:
    model = make()
    make_cache = TokenCache if make is tiny else lambda *a: SlotCache(*a, torch.tensor([0]))
    train, held = make_cache(model, ids(40)), make_cache(model, ids(80)[40:] * 7 % 20)
    config = Phase2Config(epochs=12, patience=3, learning_rate=0.05, batch_size=16, min_improvement=0.1)
    result = train_tokens(model, train, held, config)
    assert result.stopped == "patience" and len(result.history) < 12
    best = min(row["validation_perplexity"] for row in result.history)
    assert result.perplexity == best < result.history[-1]["validation_perplexity"]
    assert evaluate(model, held, 16)["perplexity"] == best
    assert result.history[result.best_epoch - 1]["validation_perplexity"] == best


def test_phase_two_learns() -> None:
    model = tiny(context_dim=16)
    cache = TokenCache(model, ids(300))
    result = train_tokens(model, cache, cache, Phase2Config(epochs=15, learning_rate=0.02, batch_size=64))
    assert result.history[-1]["train_loss"] < 0.7 * result.history[0]["train_loss"]


def test_row_50_two_runs_are_equal_to_the_last_bit() -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model = tiny().train()
        cache = TokenCache(model, ids())
        train_tokens(model, cache, cache, Phase2Config(epochs=2, batch_size=16))
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("make", [tiny, slots])
def test_an_untrained_model_is_hardly_worse_than_a_guess(make: Any) -> None:
    """Heads drawn as wide as the blocks made a first perplexity of 1e8."""
    model = make(vocab_size=500, embed_dim=64, initializer_range=0.02)
    stream = torch.randint(500, (300,), generator=torch.Generator().manual_seed(0))
    cache = TokenCache(model, stream) if make is tiny else SlotCache(model, stream, torch.tensor([0]))
    assert evaluate(model, cache)["loss"] < math.log(500) + 0.2


def test_cached_contexts_are_exact_for_validation_too() -> None:
    """Three sweeps from random contexts, the documents' validation contexts, are not the recurrence."""
    model = tiny()
    cache, context = TokenCache(model, ids()), torch.zeros(1, 6).double()
    block: Any = model.model.context_block
    with torch.no_grad():
        for place, x in enumerate(model.model.embed(ids())):
            context = block.step(context, x[None])[-1]
            close(cache.contexts[0][place], context[0])
