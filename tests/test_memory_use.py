"""What heads take from their memories, and changing the memories of a stream just before an answer."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from newllm.data.tokenizer import byte_ids
from newllm.evaluation.control import clean_memories, remove_memories, zero_memories
from newllm.evaluation.forced import last_logits
from newllm.evaluation.memory_use import memory_use
from newllm.modules import MemoryGate
from newllm.modules.cache import cache_layer
from newllm.modules.gate import gate_histogram
from newllm.testing import assert_rounding, largest
from tests.evaluation_parts import PROSE, byte_senri
from tests.tiny_models import ADDITIONS

IDS = byte_ids(PROSE)[:200]


def set_gates(model: torch.nn.Module, value: float) -> None:
    for module in model.modules():
        if isinstance(module, MemoryGate):
            torch.nn.init.constant_(module.weight, value)


def test_shares_follow_the_gates() -> None:
    model = byte_senri(gate="tanh")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    heads, fills = memory_use(model, IDS, chunk=64)
    assert [(use.layer, use.head) for use in heads] == [
        (layer, head) for layer in (0, 2) for head in range(4)
    ]
    assert [fill.layer for fill in fills] == [0, 2]
    assert all(0 < use.share < 1 for use in heads)
    assert all(0 < fill.rank_ratio <= 1 and fill.norm > 0 for fill in fills)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not any(module._forward_hooks for module in model.modules())
    set_gates(model, 0.0)
    assert {use.share for use in memory_use(model, IDS)[0]} == {0.0}
    set_gates(model, 20.0)
    # tanh(20) is 1 in float32: nothing of the window is left.
    assert {use.share for use in memory_use(model, IDS)[0]} == {1.0}


def test_chunks_do_not_change_the_report() -> None:
    model = byte_senri(gate="tanh").double()
    whole, cut = (memory_use(model, IDS, chunk=chunk)[0] for chunk in (200, 33))
    for one, other in zip(whole, cut, strict=True):
        assert_rounding(
            torch.tensor(other.share), torch.tensor(one.share), additions=ADDITIONS, magnitude=ADDITIONS
        )


def test_histogram_counts_heads_by_tenths() -> None:
    model = byte_senri(gate="tanh")
    set_gates(model, 0.0)
    assert gate_histogram(model) == [8] + [0] * 9
    gates = [module for module in model.modules() if isinstance(module, MemoryGate)]
    with torch.no_grad():
        gates[0].weight.copy_(torch.tensor([0.95, -0.95, 0.55, 0.05]).atanh())
    assert gate_histogram(model) == [5, 0, 0, 0, 0, 1, 0, 0, 0, 2]
    remove_memories(model)
    assert gate_histogram(model) == [0] * 10


def read(model: torch.nn.Module, change: object) -> torch.Tensor:
    return last_logits(model, IDS[None], keep=3, chunk=64, before_answer=change)  # type: ignore[arg-type]


def test_emptied_memories_change_answers_and_leave_the_windows() -> None:
    model = byte_senri().double()
    plain = last_logits(model, IDS[None], keep=3, chunk=64)
    same = read(model, lambda cache: None)
    assert_rounding(same, plain, additions=ADDITIONS, magnitude=ADDITIONS * largest(plain))
    assert float((read(model, zero_memories) - plain).abs().max()) > 1e-3
    cache = DynamicCache(config=model.config)
    model(IDS[None], past_key_values=cache, use_cache=True)
    keys = [cache_layer(cache, number).state.keys.clone() for number in range(3)]
    zero_memories(cache)
    for number in range(3):
        state = cache_layer(cache, number).state
        assert torch.equal(state.keys, keys[number])
        assert number == 1 or (float(state.matrix.abs().max()), float(state.norm.abs().max())) == (0.0, 0.0)


def test_cleaning_keeps_what_carries_the_energy() -> None:
    model = byte_senri().double()
    plain = last_logits(model, IDS[None], keep=3, chunk=64)
    changed = [
        float((read(model, lambda cache, share=share: clean_memories(cache, share)) - plain).abs().max())
        for share in (1.0, 0.99, 0.5)
    ]
    assert changed[0] < changed[1] < changed[2]
