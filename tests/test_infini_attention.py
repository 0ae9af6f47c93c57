"""InfiniAttention alone, and in place of the attention of stock transformers models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache

from newllm import InfiniAttention
from newllm.models import SenriConfig
from newllm.modules.infini_attention import padding_mask
from newllm.testing import assert_rounding, largest, leaves
from tests.tiny_models import (
    BASES,
    SIZES,
    greedy,
    left_padded,
    open_gates,
    random_tokens,
    tiny_base,
    tiny_senri,
    with_memory,
)

HIDDEN = 32
WINDOW = 8
# Longest chain of sums in the module: projections, head, window and features.
ADDITIONS = 4 * HIDDEN + WINDOW


def attention(**options: Any) -> InfiniAttention:
    options = {"window": WINDOW, "segment": 4, **options}
    return open_gates(InfiniAttention(HIDDEN, 4, 2, **options)).double()


def hidden(*shape: int) -> Tensor:
    return torch.randn(*shape, HIDDEN, dtype=torch.float64)


# The module alone


@pytest.mark.parametrize("options", [{}, {"window": None}, {"memory": False}, {"rule": "delta"}], ids=str)
def test_state_carries_a_stream_over_any_split(options: dict[str, Any]) -> None:
    module, x = attention(**options), hidden(2, 29)
    whole, end = module(x)
    state, parts = None, []
    for part in x.split([5, 1, 1, 13, 9], 1):
        out, state = module(part, state=state)
        parts.append(out)
    assert_rounding(torch.cat(parts, 1), whole, additions=ADDITIONS, magnitude=largest(whole))
    assert state.position.tolist() == end.position.tolist() == [29, 29]
    for found, expected in zip(state, end, strict=True):
        assert (found is None) == (expected is None)
        if found is not None and found.is_floating_point():
            assert_rounding(found, expected, additions=29 * ADDITIONS, magnitude=largest(expected))


def test_decoding_in_place_equals_the_whole_and_writes_only_into_the_state_it_is_given() -> None:
    module, x = attention(), hidden(2, 21)
    with torch.no_grad():
        whole, _ = module(x)
        _, first = module(x[:, :3])
        # No segment is complete yet, so nothing was folded between the two states.
        _, second = module(x[:, 3:4], state=first)
        before = first.map(Tensor.clone)
        addresses = [tensor.data_ptr() for _, tensor in leaves(second)]
        for t in range(4, 21):
            out, second = module(x[:, t : t + 1], state=second, in_place=True)
            assert_rounding(out, whole[:, t : t + 1], additions=ADDITIONS, magnitude=largest(whole))
    assert [tensor.data_ptr() for _, tensor in leaves(second)] == addresses
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(first[:5], before[:5], strict=True))


def test_own_rotary_is_that_of_llama() -> None:
    base = tiny_base("llama", attention_bias=False)
    original = base.model.layers[0].self_attn
    module = InfiniAttention(HIDDEN, 4, 2, window=32, memory=False, rope_theta=10000.0)
    module.load_state_dict(original.state_dict())
    x = torch.randn(1, 20, HIDDEN)
    expected, _ = original(
        x, position_embeddings=base.model.rotary_emb(x, torch.arange(20)[None]), attention_mask=None
    )
    assert torch.equal(module(x)[0], expected)


def test_own_rotary_is_relative() -> None:
    # Without a memory only the last window matters, wherever in the stream it lies.
    module, x = attention(memory=False), hidden(1, 60)
    late, _ = module(x)
    alone, _ = module(x[:, -WINDOW:])
    assert_rounding(late[:, -1], alone[:, -1], additions=ADDITIONS, magnitude=largest(alone))


def test_position_embeddings_serve_a_module_without_rotary() -> None:
    module = attention()
    x, tables = hidden(1, 12), module.rotary(12, hidden(1, 12))
    expected, _ = module(x)
    module.rotary = None
    assert torch.equal(module(x, tables)[0], expected)
    assert not torch.equal(module(x)[0], expected)
    _, state = module(x, tables)
    with pytest.raises(ValueError, match="rope's rows must be at least 19 with a state, got 12"):
        module(x, tables, state=state)


def test_padding_is_as_if_it_were_not_there() -> None:
    module, x = attention(), hidden(1, 17)
    alone, end = module(x)
    mask = torch.ones(1, 25, dtype=torch.long)
    mask[:, [0, 1, 2, 9, 10, 15, 22, 24]] = 0
    padded = hidden(1, 25)
    padded[mask.bool()] = x[0]
    out, state = module(padded, attention_mask=mask)
    assert_rounding(out[mask.bool()], alone[0], additions=ADDITIONS, magnitude=largest(alone))
    assert state.position.tolist() == [17]
    assert_rounding(state.matrix, end.matrix, additions=17 * ADDITIONS, magnitude=largest(end.matrix))


def test_row_74_detach_modes_set_the_reach_of_gradients() -> None:
    x = hidden(1, 24)  # six segments; the last is read
    for options, reach in (
        ({"detach": "none"}, 5),
        ({"detach": "segment"}, 1),
        ({"detach": "full"}, 0),
        ({"bptt_segments": 3}, 3),
    ):
        module, inputs = attention(window=None, **options), x.clone().requires_grad_()
        module(inputs)[0][:, 20:].sum().backward()
        reached = inputs.grad.view(6, 4, HIDDEN).abs().amax((1, 2)) > 0
        assert reached.tolist() == [segment >= 5 - reach for segment in range(6)], options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment": 9}, r"segment must be at most window \(8\), got 9"),
        ({"num_kv_heads": 3}, r"num_heads must be a multiple of num_kv_heads \(3\), got 4"),
        ({"window": None, "segment": None}, "segment must be given when window is None, got None"),
    ],
    ids=["segment", "heads", "neither"],
)
def test_wrong_sizes_are_refused(options: dict[str, Any], message: str) -> None:
    arguments = {"num_kv_heads": 2, "window": 8, "segment": 4, **options}
    with pytest.raises(ValueError, match=message):
        InfiniAttention(HIDDEN, 4, **arguments)


def test_state_of_other_heads_or_batch_is_refused() -> None:
    _, state = attention()(hidden(2, 3))
    with pytest.raises(ValueError, match=r"state.keys must be of shape"):
        attention()(hidden(1, 3), state=state)
    with pytest.raises(ValueError, match=r"state.keys must be of shape"):
        InfiniAttention(HIDDEN, 4, 4, window=8, segment=4).double()(hidden(2, 3), state=state)


def test_cache_needs_a_layer_index() -> None:
    with pytest.raises(
        ValueError, match="past_key_values needs a module with a layer_idx; got layer_idx None"
    ):
        attention()(hidden(1, 3), past_key_values=DynamicCache())


# In stock models


@pytest.mark.parametrize("family", BASES)
def test_row_72_shut_gates_and_a_long_window_equal_the_base_bit_for_bit(family: str) -> None:
    base, ids = tiny_base(family), random_tokens(2, 30)
    with torch.no_grad():
        expected = base(ids).logits
        model = with_memory(base, window=32, segment=4)
        assert torch.equal(model(ids).logits, expected)
        # Seven segments are in the memory: with open gates it is heard.
        assert not torch.equal(open_gates(model)(ids).logits, expected)


@pytest.mark.parametrize("family", BASES)
def test_equal_in_bfloat16(family: str, tmp_path: Path) -> None:
    tiny_base(family).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = random_tokens(2, 30)
    with torch.no_grad():
        expected = base(ids).logits
        assert torch.equal(with_memory(base, window=32, segment=4)(ids).logits, expected)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rotary_embeddings_equal_the_base(rope: dict[str, Any]) -> None:
    base, ids = tiny_base("llama", rope_parameters={"rope_theta": 500.0, **rope}), random_tokens(1, 30)
    with torch.no_grad():
        expected = base(ids).logits
        assert torch.equal(with_memory(base, window=32)(ids).logits, expected)


@pytest.mark.parametrize("family", BASES)
def test_state_dict_is_that_of_the_base_and_the_memory(family: str) -> None:
    base = tiny_base(family)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = with_memory(tiny_base(family), window=8)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    own = ("memory_gate.weight", "memory_feature.scale", "memory_feature.bias")
    assert set(missing) == {f"model.layers.{n}.self_attn.{name}" for n in range(3) for name in own}
    assert not unexpected
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())


def test_from_attention_shares_the_projections_and_the_mode() -> None:
    original = tiny_base("qwen3").train().model.layers[1].self_attn
    module = InfiniAttention.from_attention(original, window=8)
    assert module.q_proj is original.q_proj
    assert module.k_norm is original.k_norm
    assert (module.layer_idx, module.training) == (1, True)
    assert module.memory_gate.openness().tolist() == [0.0] * 4


def test_from_attention_refuses_what_it_does_not_compute() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=16)).transformer.h[0].attn
    with pytest.raises(ValueError, match=r"attention must be the self_attn of a llama, .* got GPT2Attention"):
        InfiniAttention.from_attention(gpt2, window=8)
    dropping = tiny_base("llama", attention_dropout=0.1).model.layers[0].self_attn
    with pytest.raises(ValueError, match=r"attention_dropout must be 0, got 0.1"):
        InfiniAttention.from_attention(dropping, window=8)
    stretching = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    dynamic = tiny_base("llama", rope_parameters=stretching).model.layers[0].self_attn
    with pytest.raises(ValueError, match=r"rope_type must be one of default, .* got 'dynamic'"):
        InfiniAttention.from_attention(dynamic, window=8)


@pytest.mark.parametrize("family", BASES)
def test_trained_in_a_stock_model(family: str) -> None:
    model = with_memory(tiny_base(family, initializer_range=0.05), window=8, segment=4).train()
    ids = random_tokens(4, 12).repeat(1, 3)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = model(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    for layer in model.model.layers:
        assert layer.self_attn.memory_gate.openness().abs().min() > 0
        assert largest(layer.self_attn.memory_feature.scale - 4.0) > 0


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("layers", [None, (0,), (1, 2)], ids=["all", "first", "others"])
def test_generates_with_its_cache(family: str, layers: tuple[int, ...] | None) -> None:
    model = open_gates(with_memory(tiny_base(family), layers, window=8, segment=4))
    ids, mask = left_padded((19, 7, 12))
    options = {"attention_mask": mask}
    expected = greedy(model, ids, use_cache=False, **options)
    assert torch.equal(greedy(model, ids, **options), expected)
    assert torch.equal(greedy(model, ids, prefill_chunk_size=5, **options), expected)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(greedy(model, ids, **static, **options), expected)
    alone = greedy(model, ids[1:2, -7:])
    assert torch.equal(alone, expected[1:2])


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
@pytest.mark.parametrize("layers", [None, (0,), (2,)], ids=["all", "first", "last"])
def test_generates_among_layers_with_a_window_of_their_own(
    family: str, layers: tuple[int, ...] | None
) -> None:
    own = {"use_sliding_window": True, "max_window_layers": 1} if family == "qwen2" else {}
    model = tiny_base(family, sliding_window=6, **own)
    model = open_gates(with_memory(model, layers, window=8, segment=4))
    ids, mask = left_padded((19, 7))
    expected = greedy(model, ids, use_cache=False, attention_mask=mask)
    assert torch.equal(greedy(model, ids, attention_mask=mask), expected)
    assert torch.equal(greedy(model, ids, attention_mask=mask, prefill_chunk_size=5), expected)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(greedy(model, ids, attention_mask=mask, **static), expected)


@pytest.mark.parametrize("family", BASES)
def test_beams_carry_their_own_memory(family: str) -> None:
    model = open_gates(with_memory(tiny_base(family), window=8, segment=4))
    ids, mask = left_padded((13, 6))
    options = {"attention_mask": mask, "num_beams": 4, "tokens": 16}
    assert torch.equal(greedy(model, ids, **options), greedy(model, ids, use_cache=False, **options))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_masks_of_either_attention_implementation_are_understood(implementation: str) -> None:
    model = open_gates(with_memory(tiny_base("llama"), (1,), window=8, segment=4))
    model.set_attn_implementation(implementation)
    ids, mask = left_padded((15, 4))
    out = model(ids, attention_mask=mask).logits[1, -4:]
    alone = model(ids[1:, -4:]).logits[0]
    # Float32 through three layers: the two differ by the order of sums only.
    additions = 3 * (SIZES["hidden_size"] + SIZES["intermediate_size"] + 15)
    assert_rounding(out, alone, additions=additions, magnitude=largest(alone))


def test_masks_that_are_no_tensors_are_refused() -> None:
    model = with_memory(tiny_base("llama"), window=8)
    model.set_attn_implementation("flex_attention")
    message = "attention_mask must be a tensor, got BlockMask: set attn_implementation to 'sdpa' or 'eager'"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        model(random_tokens(1, 9), attention_mask=torch.ones(1, 9).long())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_texts_packed_into_one_row_are_refused(implementation: str) -> None:
    """A memory would carry one into the next, which the mask forbids."""
    model = with_memory(tiny_base("llama"), window=8)
    model.set_attn_implementation(implementation)
    positions = torch.cat([torch.arange(5), torch.arange(4)])[None]
    with pytest.raises(ValueError, match=r"attention_mask must be causal .* give each text a row"):
        model(random_tokens(1, 9), position_ids=positions, use_cache=False)
    model(random_tokens(1, 9), position_ids=torch.arange(9)[None] + 7)


def test_own_column_of_a_causal_mask_tells_padding() -> None:
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1]]).bool()
    causal = torch.ones(6, 6).tril().bool() & real[:, None, None]
    assert torch.equal(padding_mask(causal, 6), real)
    assert torch.equal(padding_mask(causal[:, :, 4:], 2), real[:, 4:])
    reserved = torch.nn.functional.pad(causal, (0, 3))[:, :, 3:5]
    assert torch.equal(padding_mask(reserved, 2, 3), real[:, 3:5])
    assert torch.equal(padding_mask(reserved, 2, torch.tensor(3)), real[:, 3:5])
    additive = torch.zeros(2, 1, 6, 6).masked_fill(~causal, torch.finfo(torch.float32).min)
    assert torch.equal(padding_mask(additive, 6), real)
    assert padding_mask(causal[:, :, :, 2:][:1, :, 2:], 4) is None


def test_cache_of_another_batch_or_model_is_refused() -> None:
    model = with_memory(tiny_base("llama"), window=8)
    cache = model(random_tokens(2, 5)).past_key_values
    with pytest.raises(ValueError, match="past_key_values holds 2 rows, the input has 3"):
        model(random_tokens(3, 1), past_key_values=cache)
    foreign = tiny_base("llama")(random_tokens(2, 5)).past_key_values
    with pytest.raises(ValueError, match=r"already holds Dynamic.*Layer content of another model in layer 0"):
        model(random_tokens(2, 1), past_key_values=foreign)
    with pytest.raises(RuntimeError, match="this cache belongs to newllm's InfiniAttention"):
        tiny_base("llama")(random_tokens(2, 1), past_key_values=cache)


def test_stock_model_saves_and_loads_its_memory(tmp_path: Path) -> None:
    model = open_gates(with_memory(tiny_base("llama"), window=8, segment=4))
    model.save_pretrained(tmp_path)
    again = with_memory(AutoModelForCausalLM.from_pretrained(tmp_path), window=8, segment=4)
    from safetensors.torch import load_file

    assert not again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False).unexpected_keys
    ids = random_tokens(1, 30)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_state_survives_no_grad_and_backward() -> None:
    """A cache that is passed on in training keeps the graph, and backward finds what forward used."""
    model = open_gates(with_memory(tiny_base("llama"), window=8, segment=4)).train()
    ids = random_tokens(1, 24)
    for cache in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=32)):
        model.zero_grad()
        outputs = [model(part, past_key_values=cache).logits for part in ids.split(12, 1)]
        outputs[1].sum().backward()
        carried = model.model.embed_tokens.weight.grad[ids[0, :4]].clone()
        assert carried.abs().min() > 0


def test_a_single_token_is_trained_through_the_cache_of_a_stock_model() -> None:
    model = open_gates(with_memory(tiny_base("llama"), window=8))
    ids, cache = random_tokens(1, 9), DynamicCache()
    model(ids[:, :8], past_key_values=cache)
    before = cache.layers[0].state
    kept = before.keys.detach().clone()
    model(ids[:, 8:], past_key_values=cache).logits.sum().backward()
    assert torch.equal(before.keys, kept)
    assert largest(model.model.layers[0].self_attn.k_proj.weight.grad) > 0


def test_senri_and_a_patched_llama_are_the_same_model() -> None:
    senri = tiny_senri(memory_layers=[0, 1, 2])
    assert isinstance(senri.config, SenriConfig)
    llama = with_memory(tiny_base("llama", attention_bias=False), window=8, segment=4, gate="sigmoid")
    llama.load_state_dict(senri.state_dict())
    ids = random_tokens(2, 40)
    with torch.no_grad():
        assert torch.equal(llama(ids).logits, senri(ids).logits)
