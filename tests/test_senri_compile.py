"""Compiled decoding of Senri: one graph, no breaks, no recompilation from token to token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig, StaticCache

from newllm.testing import assert_rounding, largest
from tests.tiny_models import ADDITIONS, greedy, left_padded, random_tokens, tiny_senri


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def decode(step: Any, cache: StaticCache, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([step(token, past_key_values=cache).logits for token in tokens.split(1, 1)], 1)


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("aot_eager", {}),
        ("eager", {"rule": "delta"}),
        ("eager", {"sliding_window": None}),
        ("eager", {"memory_layers": []}),
    ],
    ids=str,
)
def test_static_decode_is_one_graph_for_all_tokens(backend: str, options: dict[str, Any]) -> None:
    model, prompt, tokens = tiny_senri(**options), random_tokens(2, 13), random_tokens(2, 14)
    counter = CompileCounterWithBackend(backend)
    results, caches = [], []
    for step in (model, torch.compile(model, fullgraph=True, backend=counter)):
        cache = StaticCache(model.config, max_cache_len=64)
        with torch.no_grad():
            model(prompt, past_key_values=cache)
        addresses = [tensor.data_ptr() for tensor in cache.layers[0].state if tensor is not None]
        results.append(decode(step, cache, tokens))
        assert [tensor.data_ptr() for tensor in cache.layers[0].state if tensor is not None] == addresses
        caches.append(cache)
    assert counter.frame_count == 1
    assert torch.equal(results[1], results[0])
    for eager, compiled in zip(caches[0].layers, caches[1].layers, strict=True):
        assert int(eager.get_seq_length()) == int(compiled.get_seq_length()) == 27
        for found, expected in zip(compiled.state, eager.state, strict=True):
            assert found is None or torch.equal(found, expected)


def test_generate_compiles_once_and_again_for_no_later_call() -> None:
    model, (ids, mask) = tiny_senri(), left_padded((17, 9))
    expected = greedy(model, ids, 20, attention_mask=mask)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model.forward, fullgraph=True, backend=counter)
    model.get_compiled_call = lambda *_: compiled
    # On a CPU transformers compiles only when it is told to.
    how = {"cache_implementation": "static", "compile_config": CompileConfig(fullgraph=True)}
    how["compile_config"]._compile_all_devices = True
    assert torch.equal(greedy(model, ids, 20, attention_mask=mask, **how), expected)
    assert counter.frame_count == 1
    assert torch.equal(greedy(model, ids, 20, attention_mask=mask, **how), expected)
    assert counter.frame_count == 1


def test_training_step_compiles_without_breaks() -> None:
    model, ids = tiny_senri().train(), random_tokens(2, 24)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model, fullgraph=True, backend=counter)
    gradients = []
    for forward in (model, step):
        model.zero_grad()
        forward(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert counter.frame_count == 1
    for found, expected in zip(*gradients, strict=True):
        # Each gradient is a sum over 48 tokens of what came down the model.
        assert_rounding(found, expected, additions=48 + ADDITIONS, magnitude=largest(expected))
