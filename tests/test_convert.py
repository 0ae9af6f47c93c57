"""From checkpoints of the five families to Senri."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from newllm import convert
from newllm.models import SenriConfig, SenriForCausalLM
from newllm.training.groups import parameter_groups
from tests.tiny_models import BASES, SIZES, greedy, random_tokens, tiny_base

OWN = ("memory_gate.weight", "memory_feature.scale", "memory_feature.bias")


def tree(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("source", ["folder", "memory"])
def test_row_80_converted_model_equals_its_base(family: str, source: str, tmp_path: Path) -> None:
    base, ids = tiny_base(family), random_tokens(2, 30)
    base.save_pretrained(tmp_path)
    model = convert(tmp_path if source == "folder" else base, window=32, segment=4)
    assert type(model) is SenriForCausalLM
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base(ids).logits)
    assert torch.equal(greedy(model, ids[:, :12]), greedy(base, ids[:, :12]))


@pytest.mark.parametrize("family", BASES)
def test_row_80_only_gates_and_features_are_missing(family: str, tmp_path: Path) -> None:
    tiny_base(family).save_pretrained(tmp_path)
    config = SenriConfig.from_base(AutoConfig.from_pretrained(tmp_path), sliding_window=8, gate="tanh")
    _, info = SenriForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    expected = {f"model.layers.{layer}.self_attn.{name}" for layer in (1, 2) for name in OWN}
    assert set(info["missing_keys"]) == expected
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


@pytest.mark.parametrize("family", BASES)
def test_equal_in_bfloat16_with_the_memory_in_float32(family: str, tmp_path: Path) -> None:
    tiny_base(family).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model, ids = convert(tmp_path, window=32, dtype=torch.bfloat16), random_tokens(2, 30)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base(ids).logits)
        assert torch.equal(convert(base, window=32)(ids).logits, base(ids).logits)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "memory_" in name else torch.bfloat16)


def test_dtype_holds_for_models_in_memory_too() -> None:
    assert convert(tiny_base("llama"), window=8, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert convert(tiny_base("llama").to(torch.bfloat16), window=8).dtype == torch.bfloat16


def test_base_is_left_alone() -> None:
    base = tiny_base("smollm")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = convert(base, window=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    model.generation_config.max_new_tokens = 3
    assert base.generation_config.max_new_tokens is None


def test_options_reach_the_configuration() -> None:
    model = convert(
        tiny_base("qwen3"),
        window=16,
        segment=4,
        memory_layers=[1],
        rule="delta",
        feature_scale=1.0,
        gate="sigmoid",
    )
    config = model.config
    assert (config.sliding_window, config.segment, config.memory_layers) == (16, 4, [1])
    assert (config.rule, config.gate, config.qk_norm) == ("delta", "sigmoid", True)
    assert model.model.layers[1].self_attn.memory_feature.scale.tolist() == [1.0, 1.0]
    assert convert(tiny_base("llama"), window=16).config.segment == 16


def test_windows_alone_are_what_is_left_of_the_base_beyond_them() -> None:
    base, ids = tiny_base("mistral", sliding_window=8), random_tokens(1, 60)
    with torch.no_grad():
        found, expected = convert(base, window=8)(ids).logits, base(ids).logits
    # The same windows by another order of sums: three layers of it.
    additions = 3 * (SIZES["hidden_size"] + SIZES["intermediate_size"] + 8)
    eps = torch.finfo(torch.float32).eps
    assert (found - expected).abs().max() <= additions * eps * expected.abs().max()


def test_converted_model_survives_its_folder(tmp_path: Path) -> None:
    model, ids = convert(tiny_base("qwen2"), window=8, segment=4), random_tokens(1, 30)
    for module in model.modules():
        if hasattr(module, "memory_gate") and module.memory_gate is not None:
            nn.init.normal_(module.memory_gate.weight)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_row_80_gates_move_visibly_in_two_hundred_steps() -> None:
    """A copy task: the second half repeats the first, which has long left the window."""
    model = convert(tiny_base("llama", initializer_range=0.05), window=8, segment=4).train()
    groups = parameter_groups(model, 3e-3, weight_decay=0.01)
    by_name = {group["name"]: group for group in groups}
    assert by_name["memory_plain"]["lr"] > 3e-3
    assert by_name["memory_plain"]["weight_decay"] == 0
    memory = {id(parameter) for parameter in by_name["memory_plain"]["params"]}
    assert memory == {id(p) for name, p in model.named_parameters() if "memory_" in name}
    optimiser = torch.optim.AdamW(groups)
    losses = []
    for _ in range(200):
        half = random_tokens(8, 16)
        ids = torch.cat([half, half], 1)
        labels = ids.clone()
        labels[:, :17] = -100
        loss = model(ids, labels=labels, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    opened = [layer.self_attn.memory_gate.openness().abs().max().item() for layer in model.model.layers[1:]]
    # Shut is exactly zero; a tenth of the output now comes from the memory.
    assert max(opened) > 0.1
    assert sum(losses[-20:]) < sum(losses[:20])


# Errors


def refused(source: Any, kind: type[Exception], folder: Path, **options: Any) -> str:
    """The message with which ``convert`` refuses ``source``, having written nothing into ``folder``."""
    before = tree(folder)
    with pytest.raises(kind) as error:
        convert(source, **{"window": 8, **options})
    assert tree(folder) == before
    message = str(error.value)
    assert "\n" not in message
    return message


def test_other_families_are_refused(tmp_path: Path) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=16))
    gpt2.save_pretrained(tmp_path)
    expected = "model_type must be one of llama, mistral, qwen2, qwen3, got 'gpt2'"
    assert refused(gpt2, ValueError, tmp_path) == expected
    assert refused(tmp_path, ValueError, tmp_path) == expected
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
    assert str(tmp_path) in refused(tmp_path, ValueError, tmp_path)


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    assert str(tmp_path) in refused(tmp_path, FileNotFoundError, tmp_path)
    assert str(tmp_path / "none") in refused(tmp_path / "none", FileNotFoundError, tmp_path)
    tiny_base("llama").config.save_pretrained(tmp_path)
    assert str(tmp_path) in refused(tmp_path, (ValueError, OSError), tmp_path)


def test_hub_id_that_cannot_be_reached_is_refused(tmp_path: Path) -> None:
    assert "somebody/something" in refused("somebody/something", FileNotFoundError, tmp_path)


@pytest.mark.parametrize("damage", ["truncated weights", "no weights at all", "config", "no object"])
def test_damaged_checkpoint_is_refused(damage: str, tmp_path: Path) -> None:
    tiny_base("llama").save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    match damage:
        case "truncated weights":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "no weights at all":
            weights.write_bytes(b"")
        case "config":
            config.write_text(config.read_text()[:-40])
        case _:
            config.write_text("[1, 2]")
    assert str(tmp_path) in refused(tmp_path, (ValueError, OSError), tmp_path)


def test_checkpoint_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny_base("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refused(tmp_path, ValueError, tmp_path)


def test_checkpoint_of_other_sizes_than_its_config_is_refused(tmp_path: Path) -> None:
    tiny_base("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 24}))
    assert str(tmp_path) in refused(tmp_path, ValueError, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))
    assert str(tmp_path) in refused(tmp_path, ValueError, tmp_path)


def test_damaged_gguf_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "model.gguf"
    broken.write_bytes(b"GGUF" + bytes(40))
    assert str(broken) in refused(broken, ValueError, tmp_path)
    assert str(broken) in refused(tmp_path, ValueError, tmp_path)
    missing = tmp_path / "none.gguf"
    assert str(missing) in refused(missing, FileNotFoundError, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment": 9}, "segment must be between 1 and sliding_window (8), got 9"),
        ({"memory_layers": [3]}, "memory_layers must lie between 0 and 2, got [3]"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert refused(tiny_base("llama"), ValueError, tmp_path, **options) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_layer": [1]}, "'memory_layer' is no option of convert; did you mean 'memory_layers'?"),
        ({"sliding_window": 8}, "'sliding_window' is no option of convert; did you mean 'window'?"),
        ({"zzz": 8}, "'zzz' is no option of convert, nor a field of SenriConfig"),
        ({"dtype": "bf16"}, "dtype must be auto, float16, bfloat16, float32 or float64, got 'bf16'"),
        ({"dtype": torch.int8}, "dtype must be auto, float16, bfloat16, float32 or float64, got torch.int8"),
        ({"window": 0}, "sliding_window must be at least 1 or None, got 0"),
        ({"memory_layers": [1, 1]}, "memory_layers must name each layer once, got [1, 1]"),
        ({"memory_eps": 0.0}, "memory_eps must be above 0, got 0.0"),
        ({"feature_order": 0}, "feature_order must be at least 1, got 0"),
        ({"bptt_segments": -1}, "bptt_segments must be 0 or more, or None, got -1"),
        (
            {"bptt_segments": 1, "detach": "full"},
            "detach must be 'none' when bptt_segments is given, got 'full'",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("source", ["folder", "memory"])
def test_wrong_options_are_named(source: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = tiny_base("llama")
    base.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        convert(tmp_path if source == "folder" else base, **{"window": 8, **options})


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_length_dependent_rotary_embeddings_are_refused(kind: str, tmp_path: Path) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
        rope["original_max_position_embeddings"] = 64
    message = refused(tiny_base("llama", rope_parameters=rope), ValueError, tmp_path)
    assert message.startswith("rope_type must be one of default, linear, llama3, yarn")
