"""Senri as a transformers model: streams, generation, causality, files, errors."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, StaticCache

from newllm.models import SenriConfig, SenriForCausalLM
from newllm.models.senri.configuration import default_memory_layers
from newllm.testing import assert_rounding, largest
from tests.tiny_models import (
    ADDITIONS,
    PAD,
    RECIPES,
    SIZES,
    greedy,
    left_padded,
    random_tokens,
    tiny_base,
    tiny_senri,
)

LAYERS, WINDOW = 3, 8


def assert_same(out: Tensor, expected: Tensor) -> None:
    """Equal but for the order of sums; what is divided by a small norm may carry some more digits."""
    assert_rounding(out, expected, additions=ADDITIONS, magnitude=ADDITIONS * largest(expected))


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


def states(cache: Any) -> list[Any]:
    return [layer.state for layer in cache.layers]


# Streams


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": None},
        {"memory_layers": []},
        {"rule": "delta"},
        {"rule": "gamma", "feature": "dpfp", "feature_order": 2},
        {"gate": "tanh", "qk_norm": True, "attention_bias": True, "head_dim": 12},
        *RECIPES,
    ],
    ids=str,
)
def test_row_68_incremental_equals_full(options: dict[str, Any]) -> None:
    model, ids = tiny_senri(**options).double(), random_tokens(2, 37)
    full = logits(model, ids)
    for sizes in ([1] * 37, [11, 1, 1, 8, 4, 12], [36, 1]):
        cache = DynamicCache(config=model.config)
        parts = [logits(model, part, past_key_values=cache) for part in ids.split(sizes, 1)]
        assert_same(torch.cat(parts, 1), full)


def test_row_68_prefill_chunks_of_the_model_itself_change_nothing() -> None:
    model, ids = tiny_senri().double(), random_tokens(2, 37)
    whole = model(ids)
    for chunk in (1, 5, 36):
        model.config.prefill_chunk = chunk
        chunked = model(ids)
        assert_same(chunked.logits, whole.logits)
        for state, expected in zip(
            states(chunked.past_key_values), states(whole.past_key_values), strict=True
        ):
            assert torch.equal(state.position, expected.position)
            assert_same(state.keys, expected.keys)


def test_row_68_round_trip_through_auto_classes_in_a_fresh_process(tmp_path: Path) -> None:
    model, ids = tiny_senri(qk_norm=True, rule="delta"), random_tokens(1, 30)
    model.save_pretrained(tmp_path / "model")
    torch.save(ids, tmp_path / "ids")
    script = f"""
import torch
import newllm.models
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder = {str(tmp_path)!r}
ids = torch.load(folder + "/ids")
model = AutoModelForCausalLM.from_pretrained(folder + "/model")
hidden = AutoModel.from_pretrained(folder + "/model")(ids).last_hidden_state
assert torch.equal(model.lm_head(hidden), model(ids).logits)
assert type(AutoConfig.from_pretrained(folder + "/model")).__name__ == "SenriConfig"
torch.save((model(ids).logits, model.state_dict()), folder + "/found")
"""
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True, timeout=120)
    found, weights = torch.load(tmp_path / "found")
    assert torch.equal(found, logits(model, ids))
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_row_73_state_is_explicit(training: bool) -> None:
    model = tiny_senri().train(training)
    ids, other = random_tokens(2, 20), random_tokens(2, 20)
    first = model(ids)
    # A forward without a cache starts empty, whatever came before.
    model(other)
    assert torch.equal(model(ids).logits, first.logits)
    # A cache that is passed is continued: here the memory holds the first call's five segments.
    again = model(ids, past_key_values=first.past_key_values)
    assert not torch.equal(again.logits, first.logits)
    assert states(again.past_key_values)[0].position.tolist() == [40, 40]
    # Another batch size is an error, and leaves the cache as it was.
    with pytest.raises(ValueError, match="past_key_values holds 2 rows, the input has 3: pass a cache of"):
        model(random_tokens(3, 1), past_key_values=first.past_key_values)
    assert states(first.past_key_values)[0].position.tolist() == [40, 40]
    # Nothing is forgotten until reset, and then everything.
    first.past_key_values.reset()
    assert first.past_key_values.get_seq_length() == 0
    assert torch.equal(model(ids, past_key_values=first.past_key_values).logits, first.logits)


def test_row_73_memory_off_and_on_differ_in_nothing_but_the_memory() -> None:
    on = tiny_senri()
    off = SenriForCausalLM(SenriConfig(**{**on.config.to_dict(), "memory_layers": []}))
    missing, unexpected = off.load_state_dict(on.state_dict(), strict=False)
    assert not missing
    assert all("memory_" in name for name in unexpected)
    assert states(off(random_tokens(1, 9)).past_key_values)[0].matrix is None


def test_state_is_of_constant_size() -> None:
    model = tiny_senri()
    sizes = {sum(s.nbytes() for s in states(model(random_tokens(1, t)).past_key_values)) for t in (1, 9, 90)}
    assert len(sizes) == 1


@pytest.mark.parametrize("times", [1, 2])
def test_static_cache_resets_to_the_same_addresses(times: int) -> None:
    model, ids = tiny_senri().double(), random_tokens(1, 20)
    cache = StaticCache(model.config, max_cache_len=64)
    first = logits(model, ids, past_key_values=cache)
    addresses = [tensor.data_ptr() for tensor in states(cache)[0] if tensor is not None]
    for _ in range(times):
        cache.reset()
    assert_same(logits(model, ids, past_key_values=cache), first)
    assert int(cache.get_seq_length()) == 20
    assert [tensor.data_ptr() for tensor in states(cache)[0] if tensor is not None] == addresses


def test_layers_do_not_ask_about_padding_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("newllm.modules.infini_attention.padding_mask")
    ids, mask = left_padded((5, 9))
    assert tiny_senri()(ids, attention_mask=mask).logits.isfinite().all()


def test_copied_cache_is_a_snapshot() -> None:
    model, ids = tiny_senri(), random_tokens(2, 21)
    cache = DynamicCache()  # without a config: layers come as they are needed
    logits(model, ids, past_key_values=cache)
    snapshot = copy.deepcopy(cache)
    more = random_tokens(2, 9)
    expected = logits(model, more, past_key_values=cache)
    assert states(snapshot)[0].position.tolist() == [21, 21]
    assert torch.equal(logits(model, more, past_key_values=snapshot), expected)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_batch_operations_of_the_cache_move_whole_streams(kind: str) -> None:
    model, ids, more = tiny_senri(), random_tokens(2, 21), random_tokens(2, 9)
    fresh = DynamicCache() if kind == "dynamic" else StaticCache(model.config, max_cache_len=64)
    logits(model, ids, past_key_values=fresh)
    rows = torch.tensor([1, 1, 0])
    for move, order in (
        (lambda cache: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1])),
        (lambda cache: cache.batch_select_indices(rows), rows),
        (lambda cache: cache.reorder_cache(rows), rows),
    ):
        cache = copy.deepcopy(fresh)
        expected = logits(model, more, past_key_values=copy.deepcopy(fresh))[order]
        move(cache)
        assert_same(logits(model, more[order], past_key_values=cache), expected)


def test_cache_cannot_be_cropped_nor_taken_from_another_model() -> None:
    model, ids = tiny_senri(), random_tokens(1, 10)
    cache = model(ids).past_key_values
    with pytest.raises(RuntimeError, match="a recurrent memory cannot be cropped"):
        cache.crop(-1)
    foreign = tiny_base("llama")(ids).past_key_values
    with pytest.raises(ValueError, match="already holds DynamicLayer content of another model in layer 0"):
        model(ids, past_key_values=foreign)
    deeper = tiny_senri(num_hidden_layers=4, memory_layers=[0, 2])
    with pytest.raises(ValueError, match="must be empty or of a model of 3 layers, got 4 layers"):
        model(ids, past_key_values=deeper(ids).past_key_values)
    with pytest.raises(ValueError, match="got 4 layers, 3 of the first 4 filled"):
        deeper(ids, past_key_values=model(ids).past_key_values)
    wider = tiny_senri(sliding_window=16)
    with pytest.raises(ValueError, match=r"state\.keys must be of shape \[1, 2, 16, 8\], got \[1, 2, 8, 8\]"):
        wider(ids, past_key_values=model(ids).past_key_values)


def test_inputs_embeds_stand_for_input_ids() -> None:
    model, ids = tiny_senri(), random_tokens(2, 20)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(logits(model, None, inputs_embeds=embeds), logits(model, ids))
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": PAD}
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), greedy(model, ids, 9))
    for both in ({"input_ids": ids, "inputs_embeds": embeds}, {}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds must be given"):
            model(**both)


def test_outputs_are_those_that_were_asked_for() -> None:
    model, ids = tiny_senri(), random_tokens(2, 20)
    out = model(ids, output_hidden_states=True, logits_to_keep=3)
    assert [tuple(hidden.shape) for hidden in out.hidden_states] == [(2, 20, 32)] * (LAYERS + 1)
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(model.lm_head(out.hidden_states[-1])[:, -3:], out.logits)
    assert model(ids, use_cache=False).past_key_values is None
    assert isinstance(model(ids, return_dict=False), tuple)


def test_labels_give_the_mean_loss_of_the_next_tokens() -> None:
    model, ids = tiny_senri().double(), random_tokens(2, 20)
    labels = ids.clone()
    labels[0, :5] = -100
    out = model(ids, labels=labels)
    log_probs = out.logits.log_softmax(-1)
    picked = [log_probs[b, t, ids[b, t + 1]] for b in range(2) for t in range(19) if labels[b, t + 1] >= 0]
    # transformers computes the loss in float32.
    error = abs(out.loss.item() + torch.stack(picked).mean().item())
    assert error <= len(picked) * torch.finfo(torch.float32).eps * largest(log_probs)
    halved = model(ids, labels=labels, num_items_in_batch=2 * len(picked)).loss
    assert abs(2 * halved.item() - out.loss.item()) <= 2 * torch.finfo(torch.float32).eps * out.loss.item()


# Who sees whom


def influence(model: Any, ids: Tensor, at: int, **options: Any) -> Tensor:
    """For each token, whether its logits change with token ``at``."""
    changed = ids.clone()
    changed[:, at] = (changed[:, at] % (SIZES["vocab_size"] - 1)) + 1
    assert not torch.equal(changed, ids)
    return (logits(model, ids, **options) != logits(model, changed, **options)).any(-1).any(0)


@pytest.mark.parametrize("window", [8, None])
def test_row_69_token_beyond_the_windows_has_exactly_no_influence(window: int | None) -> None:
    ids, at = random_tokens(1, 64), 5
    model = tiny_senri(memory_layers=[], sliding_window=window)
    # A window carries it WINDOW - 1 on per layer; without one it stays in its segment of four.
    last = at + LAYERS * (WINDOW - 1) if window else 7
    changed = influence(model, ids, at)
    assert changed.tolist() == [at <= t <= last for t in range(64)]
    one = tiny_senri(memory_layers=[], sliding_window=window, num_hidden_layers=1)
    last = at + WINDOW - 1 if window else 7
    assert influence(one, ids, at).tolist() == [at <= t <= last for t in range(64)]


def test_row_69_memory_carries_further() -> None:
    ids, at = random_tokens(1, 64), 5
    changed = influence(tiny_senri(), ids, at)
    assert changed.tolist() == [t >= at for t in range(64)]
    # The memory alone, in one layer: nothing between the window's end and the end of the token's segment.
    alone = tiny_senri(num_hidden_layers=1, memory_layers=[0], segment=8)
    assert influence(alone, ids, at).tolist() == [t >= at for t in range(64)]
    paper = tiny_senri(num_hidden_layers=1, memory_layers=[0], sliding_window=None, segment=8)
    assert influence(paper, ids, 0).all()


@pytest.mark.parametrize("options", [{}, {"rule": "delta"}, {"sliding_window": None}], ids=str)
def test_token_changes_nothing_before_it(options: dict[str, Any]) -> None:
    model, ids = tiny_senri(**options), random_tokens(1, 33)
    for at in (0, 3, 4, 16, 32):
        assert influence(model, ids, at).nonzero().min() == at


def test_padding_and_batch_mates_change_nothing() -> None:
    model = tiny_senri().double()
    lengths = (23, 5, 14)
    ids, mask = left_padded(lengths)
    out = logits(model, ids, attention_mask=mask)
    for row, length in enumerate(lengths):
        assert_same(out[row, -length:], logits(model, ids[row : row + 1, -length:])[0])
    # A mask of all that came before, as generate passes it, and one of the new tokens are the same.
    cache = DynamicCache(config=model.config)
    first = logits(model, ids[:, :15], attention_mask=mask[:, :15], past_key_values=cache)
    second = logits(model, ids[:, 15:], attention_mask=mask, past_key_values=cache)
    real = mask.bool()
    assert_same(torch.cat([first, second], 1)[real], out[real])


# Generation


@pytest.mark.parametrize("options", [{}, {"memory_layers": []}, {"sliding_window": None}], ids=str)
def test_greedy_generation_with_a_cache_is_that_without(options: dict[str, Any]) -> None:
    model = tiny_senri(**options)
    ids, mask = left_padded((19, 7, 12))
    expected = greedy(model, ids, attention_mask=mask, use_cache=False)
    for how in ({}, {"prefill_chunk_size": 5}, {"prefill_chunk_size": 1}):
        assert torch.equal(greedy(model, ids, attention_mask=mask, **how), expected)
        static = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(greedy(model, ids, attention_mask=mask, **static, **how), expected)
    assert torch.equal(greedy(model, ids, attention_mask=mask, past_key_values=DynamicCache()), expected)
    for row, length in enumerate((19, 7, 12)):
        assert torch.equal(greedy(model, ids[row : row + 1, -length:]), expected[row : row + 1])
    model.config.prefill_chunk = 6
    assert torch.equal(greedy(model, ids, attention_mask=mask), expected)


def test_sampling_is_seeded_and_the_same_with_a_cache() -> None:
    model, ids = tiny_senri(), random_tokens(2, 15)

    def sampled(seed: int, **options: Any) -> Tensor:
        torch.manual_seed(seed)
        return greedy(model, ids, do_sample=True, temperature=1.5, top_p=0.9, **options)

    assert torch.equal(sampled(1), sampled(1, use_cache=False))
    assert not torch.equal(sampled(1), sampled(2))


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_beams_carry_their_own_memory(static: bool) -> None:
    model = tiny_senri()
    ids, mask = left_padded((13, 6))
    options = {"attention_mask": mask, "num_beams": 4, "tokens": 20}
    how = {"cache_implementation": "static", "disable_compile": True} if static else {}
    expected = greedy(model, ids, use_cache=False, **options)
    assert torch.equal(greedy(model, ids, **how, **options), expected)
    assert not torch.equal(greedy(model, ids, attention_mask=mask, tokens=20), expected)
    several = {"num_return_sequences": 3, **options}
    assert torch.equal(greedy(model, ids, **how, **several), greedy(model, ids, use_cache=False, **several))


def test_finished_row_disturbs_no_other() -> None:
    model, ids = tiny_senri(), random_tokens(3, 10)
    free = greedy(model, ids, 16)
    stop = int(free[1, 4])
    out = greedy(model, ids, 16, eos_token_id=stop)
    for row in range(3):
        alone = greedy(model, ids[row : row + 1], 16, eos_token_id=stop)[0]
        assert torch.equal(out[row, : len(alone)], alone)
        assert (out[row, len(alone) :] == PAD).all()


def test_prompt_can_be_read_before_generate_is_called() -> None:
    model, ids = tiny_senri(), random_tokens(1, 30)
    expected = greedy(model, ids)
    cache = DynamicCache(config=model.config)
    logits(model, ids[:, :21], past_key_values=cache)
    assert torch.equal(greedy(model, ids, past_key_values=cache), expected)


def test_assisted_generation_is_refused() -> None:
    model, ids = tiny_senri(), random_tokens(1, 10)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        greedy(model, ids, assistant_model=tiny_senri())
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        greedy(model, ids, prompt_lookup_num_tokens=3)


# Configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment": 9}, r"segment must be between 1 and sliding_window \(8\), got 9"),
        ({"segment": 0}, r"segment must be between 1 and sliding_window \(8\), got 0"),
        ({"sliding_window": None, "segment": None}, "segment must be given when sliding_window is None"),
        ({"memory_layers": [0, 3]}, r"memory_layers must lie between 0 and 2, got \[0, 3\]"),
        ({"memory_layers": [-1]}, r"memory_layers must lie between 0 and 2, got \[-1\]"),
        ({"num_key_value_heads": 3}, r"num_attention_heads must be a multiple of .* \(3\), got 4"),
        ({"attention_dropout": 0.1}, r"attention_dropout must be 0, got 0\.1"),
        ({"prefill_chunk": 0}, "prefill_chunk must be at least 1, got 0"),
        ({"gate": "relu"}, "gate must be one of sigmoid, tanh, got 'relu'"),
        ({"rule": "hebb"}, "rule must be one of linear, delta, gamma, got 'hebb'"),
    ],
    ids=str,
)
def test_wrong_configurations_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SenriConfig(**{**SIZES, "sliding_window": 8, "segment": 4, **options})


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "unheard-of"])
def test_length_dependent_and_unknown_rotary_types_are_refused(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = SenriConfig(**SIZES, rope_parameters=rope)
    with pytest.raises(
        ValueError, match=f"rope_type must be one of default, linear, .* got '{kind}'"
    ) as error:
        SenriForCausalLM(config)
    assert "\n" not in str(error.value)


def test_memory_layers_are_the_documents_scaled_down_for_shallow_models() -> None:
    expected = {30: [10, 20], 32: [10, 20], 21: [10, 20], 12: [4, 8], 3: [1, 2], 2: [1], 1: [0]}
    assert {depth: default_memory_layers(depth) for depth in expected} == expected
    config = SenriConfig(num_hidden_layers=30)
    assert (config.memory_layers, config.sliding_window, config.segment) == ([10, 20], 1024, 1024)


def test_memory_is_where_the_configuration_says() -> None:
    model = tiny_senri(memory_layers=[1])
    found = [layer.self_attn.memory_gate is not None for layer in model.model.layers]
    assert found == [False, True, False]


def test_only_known_families_are_a_base() -> None:
    config = LlamaConfig(**SIZES)
    config.model_type = "gpt2"
    with pytest.raises(ValueError, match=r"model_type must be one of llama, .* got 'gpt2'"):
        SenriConfig.from_base(config)


def test_configuration_survives_its_file(tmp_path: Path) -> None:
    config = SenriConfig(**SIZES, sliding_window=8, segment=4, memory_layers=[], rule="delta", gate="tanh")
    config.save_pretrained(tmp_path)
    assert SenriConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_memory_parameters_stay_float32_in_a_bfloat16_load(tmp_path: Path) -> None:
    model = tiny_senri()
    model.save_pretrained(tmp_path)
    loaded = SenriForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in loaded.named_parameters():
        own = "memory_" in name
        assert parameter.dtype == (torch.float32 if own else torch.bfloat16), name
        if own:
            assert torch.equal(parameter, model.get_parameter(name))
    out = loaded(random_tokens(1, 20))
    assert out.logits.dtype == torch.bfloat16
    assert states(out.past_key_values)[0].matrix.dtype == torch.float32
    assert states(out.past_key_values)[0].keys.dtype == torch.bfloat16
