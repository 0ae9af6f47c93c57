"""Training Senri: checkpointing, carried states, adapters, the Trainer of transformers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Trainer, TrainingArguments

from newllm.models import SenriForCausalLM
from newllm.testing import assert_rounding, largest
from tests.tiny_models import ADDITIONS, random_tokens, tiny_senri

MEMORY = ["memory_gate", "memory_feature"]


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def backward_through_two_calls(model: Any, first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """Gradients of the second call's loss alone, so that all that ``first`` gets came through the state."""
    cache = DynamicCache(config=model.config)
    model(first, past_key_values=cache)
    model(second, labels=second, past_key_values=cache).loss.backward()
    assert cache.layers[0].state.position.tolist() == [first.shape[1] + second.shape[1]] * len(first)
    return gradients(model)


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_gradients_with_and_without_checkpointing_are_equal(rule: str) -> None:
    model, ids = tiny_senri(rule=rule).train(), random_tokens(2, 30)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        found.append(gradients(model))
    assert model.is_gradient_checkpointing
    assert found[0].keys() == found[1].keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


class Casts(TorchDispatchMode):
    """Counts what is cast to bfloat16, by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[torch.Size] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.counts[args[0].shape] += 1
        return func(*args, **(kwargs or {}))


def test_autocast_casts_the_input_of_several_products_once() -> None:
    model, ids = tiny_senri().train(), random_tokens(2, 30)
    with Casts() as casts, torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(ids).last_hidden_state
    # Before the attention and before the MLP of each layer.
    assert casts.counts[hidden.shape] == 2 * model.config.num_hidden_layers


def test_sizes_are_found_out_without_numbers() -> None:
    """On the meta device, which has no autocast."""
    ids = random_tokens(2, 9)
    bare = tiny_senri().to("meta")(ids.to("meta"), use_cache=False)
    assert bare.logits.shape == tiny_senri()(ids, use_cache=False).logits.shape


def test_checkpointing_keeps_a_state_that_is_carried_in_training() -> None:
    model = tiny_senri().train()
    # Each half has tokens of its own, so that their embeddings' gradients tell where they came from.
    first, second = torch.randint(1, 20, (2, 13)), torch.randint(20, 48, (2, 17))
    plain = backward_through_two_calls(model, first, second)
    model.gradient_checkpointing_enable()
    checkpointed = backward_through_two_calls(model, first, second)
    assert plain["model.embed_tokens.weight"][first].abs().amax(-1).min() > 0
    assert all(torch.equal(checkpointed[name], gradient) for name, gradient in plain.items())


def test_gradients_through_carried_states_are_those_of_one_call() -> None:
    model, ids = tiny_senri().double().train(), random_tokens(2, 30)
    labels = ids.clone()
    labels[:, :14] = -100
    model(ids, labels=labels).loss.backward()
    whole = gradients(model)
    cache = DynamicCache(config=model.config)
    head = model(ids[:, :13], past_key_values=cache)
    rest = model(ids[:, 13:], past_key_values=cache)
    joined = torch.cat([head.logits, rest.logits], 1)
    model.loss_function(joined, labels, vocab_size=model.config.vocab_size).backward()
    for name, gradient in gradients(model).items():
        # Forward and backward, and a sum over 60 tokens, through a loss in float32.
        eps = torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps
        assert_rounding(
            gradient, whole[name], additions=2 * ADDITIONS + 60, magnitude=eps * largest(whole[name])
        )


def test_gradients_flow_through_calls_of_single_tokens() -> None:
    model, ids = tiny_senri().train(), torch.randint(20, 48, (1, 5))
    cache = DynamicCache(config=model.config)
    first = torch.randint(1, 20, (1, 12))
    model(first, past_key_values=cache)
    parts = [model(token, past_key_values=cache).logits for token in ids.split(1, 1)]
    model.loss_function(torch.cat(parts, 1), ids, vocab_size=model.config.vocab_size).backward()
    assert gradients(model)["model.embed_tokens.weight"][first].abs().amax(-1).min() > 0


def test_detached_state_cuts_between_calls() -> None:
    model, ids = tiny_senri().train(), torch.randint(20, 48, (1, 12))
    cache = DynamicCache(config=model.config)
    first = torch.randint(1, 20, (1, 12))
    model(first, past_key_values=cache)
    for layer in cache.layers:
        layer.state = layer.state.map(Tensor.detach)
    model(ids, labels=ids, past_key_values=cache).loss.backward()
    assert (gradients(model)["model.embed_tokens.weight"][first] == 0).all()


def test_generation_after_a_training_call_leaves_its_backward_alone() -> None:
    model, ids = tiny_senri().train(), random_tokens(1, 14)
    cache = DynamicCache(config=model.config)
    out = model(ids, past_key_values=cache, labels=ids)
    out.loss.backward()
    expected = gradients(model)
    cache = DynamicCache(config=model.config)
    loss = model(ids, past_key_values=cache, labels=ids).loss
    with torch.no_grad():
        for token in random_tokens(1, 6).split(1, 1):
            model(token, past_key_values=cache)
    loss.backward()
    assert all(torch.equal(found, expected[name]) for name, found in gradients(model).items())


def test_every_parameter_learns() -> None:
    model, ids = tiny_senri(gate="tanh").train(), random_tokens(2, 30)
    for layer in (0, 2):
        torch.nn.init.zeros_(model.model.layers[layer].self_attn.memory_gate.weight)
    model(ids, labels=ids).loss.backward()
    found = gradients(model)
    shut = {name for name, gradient in found.items() if not gradient.any()}
    # Behind a shut gate the features have nothing to learn yet; the gate itself has.
    assert shut == {n for n, _ in model.named_parameters() if "memory_feature" in n}
    assert found["model.layers.0.self_attn.memory_gate.weight"].abs().min() > 0


# Adapters


def test_lora_trains_saves_reloads_and_merges_with_the_memory(tmp_path: Path) -> None:
    base, ids = tiny_senri(), random_tokens(4, 24)
    base.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=MEMORY, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).train()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {
        name.split(".modules_to_save")[0].rsplit(".", 1)[1] for name in trained if "lora" not in name
    } == {*MEMORY}
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    model.save_pretrained(tmp_path / "adapter")

    fresh = SenriForCausalLM.from_pretrained(tmp_path / "base")
    kept = fresh.model.layers[0].self_attn.memory_gate().detach().clone()
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    gate = again.base_model.model.model.layers[0].self_attn.memory_gate
    assert largest(gate() - kept) > 0
    assert torch.equal(gate(), model.base_model.model.model.layers[0].self_attn.memory_gate())
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(again(ids).logits, expected)
        merged = again.merge_and_unload()
        assert type(merged) is SenriForCausalLM
        assert merged.state_dict().keys() == tiny_senri().state_dict().keys()
        assert_rounding(merged(ids).logits, expected, additions=ADDITIONS, magnitude=largest(expected))


# The Trainer


def arguments(folder: Path, steps: int, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **options,
    )


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=str)
def test_trainer_trains_and_resumes_where_it_stopped(options: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in random_tokens(16, 24)]
    weights = tiny_senri().state_dict()

    def trainer(folder: Path, steps: int) -> Trainer:
        model = tiny_senri()
        model.load_state_dict(weights)
        return Trainer(model, arguments(folder, steps, **options), train_dataset=rows)

    whole = trainer(tmp_path / "whole", 8)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert min(losses[4:]) < losses[0]

    trainer(tmp_path / "parts", 4).train()
    resumed = trainer(tmp_path / "parts", 8)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
        assert "memory_gate" not in name or largest(tensor - weights[name]) > 0


def test_trainer_averages_over_accumulated_batches(tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in random_tokens(8, 24)]
    weights = tiny_senri().state_dict()
    found = []
    for batch, accumulated in ((8, 1), (2, 4)):
        model = tiny_senri()
        model.load_state_dict(weights)
        options = arguments(tmp_path / str(batch), 1, gradient_accumulation_steps=accumulated)
        options.per_device_train_batch_size = batch
        trainer = Trainer(model, options, train_dataset=rows)
        trainer.train()
        found.append(trainer.state.log_history[0]["loss"])
    # Printed with four digits after the point.
    assert abs(found[0] - found[1]) <= 1e-4
