"""Context-KV as a transformers model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from newllm.models import ContextKVConfig, ContextKVForCausalLM
from newllm.modules.context_kv import visible_positions
from newllm.testing import assert_rounding
from tests.tiny_models import VOCABULARY, greedy, left_padded, random_tokens

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "embed_dim": 8,
    "context_dims": [6, 4],
    "chunk_size": 4,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "initializer_range": 0.5,
}
RULES = [
    {},
    {"max_contexts": 3},
    {"duplicate_boundary": True},
    {"slot_kind": "interval", "chunk_size": 3, "max_contexts": 3},
]
rules = pytest.mark.parametrize("options", RULES, ids=str)


def tiny(**options: Any) -> ContextKVForCausalLM:
    return ContextKVForCausalLM(ContextKVConfig(**{**SIZES, **options})).eval().double()


def close(actual: Tensor, expected: Tensor) -> None:
    assert_rounding(actual, expected, additions=512, magnitude=512)


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


def test_row_42_parameter_counts() -> None:
    with torch.device("meta"):
        model = ContextKVForCausalLM(ContextKVConfig())
    sizes = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in (
            ("all", model),
            ("blocks", model.model.context_blocks),
            ("attention", model.model.attention),
            ("ffn", model.model.feed_forward),
        )
    }
    assert sizes["all"] == 45_163_264 and sizes["blocks"] == 262_912
    assert sizes["attention"] + sizes["ffn"] == 6_301_440
    assert tiny().config.context_dim == 10


@rules
def test_row_42_the_whole_model_by_its_definition(options: dict[str, Any]) -> None:
    """Slot by slot, as a loop over positions."""
    model, ids = tiny(**options), random_tokens(1, 14)
    body, rule = model.model, model.config.rule
    with torch.no_grad():
        x = body.embed(ids)
        contexts, _ = body.contexts(x)
        for position in range(14):
            slots = contexts[:, visible_positions(position, rule)]
            keys, values = body.attention.project(slots)
            query = body.attention.query(x[:, position]).view(2, 4) / 2
            heads = zip(
                query, keys[0].view(-1, 2, 4).unbind(1), values[0].view(-1, 2, 4).unbind(1), strict=True
            )
            mixed = torch.cat([(k @ q).softmax(0) @ v for q, k, v in heads])
            y = body.attention.norm(x[0, position] + body.attention.out(mixed))
            out = model.lm_head(body.feed_forward(y))
            close(logits(model, ids)[0, position], out)


@rules
def test_incremental_equals_full(options: dict[str, Any]) -> None:
    model, ids = tiny(**options), random_tokens(2, 23)
    full = logits(model, ids)
    for sizes in ([1] * 23, [5, 1, 9, 8], [4] * 5 + [3]):
        cache = DynamicCache(config=model.config)
        parts = [logits(model, part, past_key_values=cache) for part in ids.split(sizes, 1)]
        close(torch.cat(parts, 1), full)


@rules
def test_row_44_rows_of_other_lengths_change_nothing(options: dict[str, Any]) -> None:
    model = tiny(**options)
    ids, mask = left_padded((21, 3, 10))
    cache = DynamicCache(config=model.config)
    together = logits(model, ids, attention_mask=mask, past_key_values=cache)
    next_token = random_tokens(3, 1)
    then = logits(model, next_token, past_key_values=cache)
    for row, length in enumerate((21, 3, 10)):
        alone = torch.cat([ids[row : row + 1, 21 - length :], next_token[row : row + 1]], 1)
        expected = logits(model, alone)[0]
        close(together[row, 21 - length :], expected[:-1])
        close(then[row], expected[-1:])


def test_row_45_state_is_constant_only_with_a_bound() -> None:
    for options, expected in (({}, [5, 10, 15]), ({"max_contexts": 3}, [2, 2, 2]), (RULES[3], [6, 6, 6])):
        model = tiny(**options)
        cache, slots = DynamicCache(config=model.config), []
        for _ in range(3):
            logits(model, random_tokens(1, 20), past_key_values=cache)
            slots.append(cache.layers[0].state.slots.shape[1])
        assert slots == expected


@rules
def test_generation_and_files(options: dict[str, Any], tmp_path: Any) -> None:
    model, ids = tiny(**options), random_tokens(2, 9)
    whole = ids
    for _ in range(12):
        whole = torch.cat([whole, logits(model, whole)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(greedy(model, ids), whole[:, 9:])
    beams = greedy(model, ids, num_beams=3)
    assert torch.equal(beams, greedy(model, ids, num_beams=3, use_cache=False))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_row_42_later_tokens_have_no_effect() -> None:
    model, ids = tiny(), random_tokens(1, 12)
    changed = ids.clone()
    changed[0, 8] = (ids[0, 8] + 1) % VOCABULARY
    before, after = logits(model, ids), logits(model, changed)
    close(before[:, :8], after[:, :8])
    assert (before[:, 8] - after[:, 8]).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"context_dims must hold widths of at least 1, got \[\]"):
        ContextKVConfig(context_dims=[])
