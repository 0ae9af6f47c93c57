"""Context language models as transformers models: counts, streams, generation, files, errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from newllm.models import BaselineConfig, BaselineForCausalLM, ContextLMConfig, ContextLMForCausalLM
from newllm.models.context_lm.expansion import expand_context
from newllm.modules import ContextBlock
from newllm.testing import assert_rounding
from tests.tiny_models import VOCABULARY, greedy, left_padded, random_tokens, tiny_senri

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "embed_dim": 8,
    "hidden_dim": 12,
    "context_dim": 6,
    "eos_token_id": None,
    "initializer_range": 0.5,
}
KINDS = [
    {"num_hidden_layers": 2},
    {"cell": "simple", "embed_norm": True},
    {"cell": "context"},
    {"cell": "context", "num_hidden_layers": 2, "input_tokens": 3},
    {"cell": "context", "num_hidden_layers": 2, "plan": "G"},
]
kinds = pytest.mark.parametrize("options", KINDS, ids=str)


def tiny(**options: Any) -> ContextLMForCausalLM:
    return ContextLMForCausalLM(ContextLMConfig(**{**SIZES, **options})).eval()


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def close(actual: Tensor, expected: Tensor) -> None:
    assert_rounding(actual, expected, additions=512, magnitude=512)


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


# Sizes


def test_row_01_parameter_counts_of_the_documents() -> None:
    small = {"vocab_size": 1000}
    expected = {
        2_739_432: {**small, "num_hidden_layers": 6},
        4_840_936: {**small, "num_hidden_layers": 12, "context_dim": 512},
        8_347_152: {},
        4_052_968: {**small, "num_hidden_layers": 9, "context_dim": 512},
        14_139_880: {**small, "num_hidden_layers": 11, "context_dim": 512, "hidden_dim": 1024},
    }
    for number, options in expected.items():
        with torch.device("meta"):
            assert count(ContextLMForCausalLM(ContextLMConfig(**options))) == number


def test_row_39_counts_tied_and_untied() -> None:
    options: dict[str, Any] = {"vocab_size": 50257, "embed_dim": 768, "cell": "context"}
    wide = {**options, "context_dim": 768, "num_hidden_layers": 6}
    with torch.device("meta"):
        tied = ContextLMForCausalLM(ContextLMConfig(**wide))
        untied = ContextLMForCausalLM(ContextLMConfig(**wide, tie_word_embeddings=False))
        single = ContextLMForCausalLM(ContextLMConfig(**options, context_dim=500))
    assert count(tied) == 52_782_336
    # The documents' 91.43M has a head with a bias.
    assert count(untied) == 52_782_336 + 50257 * 768 + 50257
    assert count(tied.model.token_block) == 7_091_712
    assert count(single) == 40_210_540
    assert count(single.model.context_block) == 635_500


def test_row_01_three_steps_by_hand() -> None:
    model = tiny(num_hidden_layers=2).double()
    cell, ids = model.model.recurrent, random_tokens(1, 3)
    context, found = torch.zeros(1, 6).double(), []
    for token in ids.unbind(1):
        hidden = torch.cat([model.model.embed_tokens(token), context], -1)
        for layer in (cell.first, *cell.deeper):
            hidden = layer(hidden).relu()
        found.append(model.lm_head(hidden))
        updater = cell.updater
        forget, write = updater.forget(hidden).sigmoid(), updater.write(hidden).sigmoid()
        mixed = forget * context + write * updater.candidate(hidden).tanh()
        context = torch.nn.functional.layer_norm(mixed, (6,)).clamp(-10, 10)
    close(logits(model, ids), torch.stack(found, 1).detach())


def test_row_04_contexts_start_at_zero_and_have_the_norm_of_a_layer_norm() -> None:
    model = tiny(context_dim=64, clamp=None)
    with torch.no_grad():
        outputs = model.model(random_tokens(2, 20))
        assert outputs.before[:, 0].abs().max() == 0
        # A layer norm makes the root mean square 1, less what its epsilon takes.
        assert ((outputs.contexts.norm(dim=-1) / 8 - 1).abs() < 0.01).all()
        bounded = tiny(context_dim=64, clamp=0.5).model(random_tokens(2, 20))
    assert bounded.contexts.abs().max() == 0.5


@kinds
def test_row_05_nothing_depends_on_a_length(options: dict[str, Any]) -> None:
    model = tiny(**options)
    assert not any("position" in name for name, _ in model.named_parameters())
    assert not hasattr(model.config, "max_position_embeddings")
    assert logits(model, random_tokens(1, 700), logits_to_keep=1).shape == (1, 1, VOCABULARY)


# Streams


@kinds
def test_row_07_incremental_equals_full(options: dict[str, Any]) -> None:
    model, ids = tiny(**options).double(), random_tokens(2, 17)
    full = logits(model, ids)
    for sizes in ([1] * 17, [5, 1, 8, 3]):
        cache = DynamicCache(config=model.config)
        parts = [logits(model, part, past_key_values=cache) for part in ids.split(sizes, 1)]
        close(torch.cat(parts, 1), full)
        assert cache.layers[0].state.position.tolist() == [17, 17]


@kinds
def test_row_06_the_state_is_of_constant_size(options: dict[str, Any]) -> None:
    model = tiny(**options)
    cache, sizes = DynamicCache(config=model.config), set()
    for _ in range(4):
        logits(model, random_tokens(1, 50), past_key_values=cache, logits_to_keep=1)
        sizes.add(cache.layers[0].state.nbytes())
    assert len(sizes) == 1
    assert cache.layers[0].state.context.dtype == torch.float32


@pytest.mark.slow
def test_row_06_memory_is_flat_up_to_100k_tokens() -> None:
    code = (
        "import resource, torch, sys; from transformers import DynamicCache;"
        "from newllm.models import ContextLMConfig, ContextLMForCausalLM; torch.set_num_threads(1);"
        "model = ContextLMForCausalLM(ContextLMConfig(vocab_size=100)).eval();"
        "cache = DynamicCache(config=model.config); torch.set_grad_enabled(False);"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "read = lambda: model(torch.randint(100, (1, 500)), past_key_values=cache, logits_to_keep=1);"
        "[read() for _ in range(2)]; first = peak(); [read() for _ in range(198)]; print(peak() / first)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.05


@kinds
def test_row_07_generation_is_greedy_decoding_of_the_full_forward(options: dict[str, Any]) -> None:
    model, ids = tiny(**options).double(), random_tokens(2, 9)
    with_state = greedy(model, ids)
    whole = ids
    for _ in range(with_state.shape[1]):
        whole = torch.cat([whole, logits(model, whole)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(with_state, whole[:, 9:])
    beams = greedy(model, ids, num_beams=3)
    assert torch.equal(beams, greedy(model, ids, num_beams=3, use_cache=False))


@kinds
def test_padding_anywhere_leaves_no_trace(options: dict[str, Any]) -> None:
    model = tiny(**options).double()
    ids, mask = left_padded((9, 4, 6))
    cache = DynamicCache(config=model.config)
    together = logits(model, ids, attention_mask=mask, past_key_values=cache)
    for row, length in enumerate((9, 4, 6)):
        alone = DynamicCache(config=model.config)
        close(
            together[row, 9 - length :],
            logits(model, ids[row : row + 1, 9 - length :], past_key_values=alone)[0],
        )
        for mine, its in zip(cache.layers[0].state, alone.layers[0].state, strict=True):
            assert (mine is None) == (its is None)
            if mine is not None and mine.is_floating_point():
                close(mine[row], its[0])
            elif mine is not None:
                assert torch.equal(mine[row], its[0])
    assert torch.equal(greedy(model, ids, attention_mask=mask)[1], greedy(model, ids[1:2, 5:])[0])


# Files


def test_row_08_auto_classes_in_a_fresh_process(tmp_path: Path) -> None:
    made = {str(place): tiny(**KINDS[place]) for place in (0, 3)}
    for name, model in made.items():
        model.save_pretrained(tmp_path / name)
    code = (
        "import sys, torch, newllm.models; from transformers import AutoModelForCausalLM as Auto;"
        "models = [Auto.from_pretrained(folder).eval() for folder in sys.argv[1:]];"
        "[print(type(m).__name__, m(torch.arange(1, 8)[None]).logits.double().sum().item()) for m in models]"
    )
    folders = [str(tmp_path / name) for name in made]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True)
    for model, line in zip(made.values(), done.stdout.splitlines(), strict=True):
        name, total = line.split()
        assert name == "ContextLMForCausalLM"
        expected = logits(model, torch.arange(1, 8)[None]).double().sum().float()
        close(torch.tensor(float(total)), expected)


def test_row_03_the_updater_is_told_by_bare_weights() -> None:
    for cell in ("gated", "simple"):
        model = tiny(cell=cell)
        again = ContextLMForCausalLM.from_weights(model.state_dict(), **SIZES)
        assert again.config.cell == cell
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


# Losses


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_loss_comes_first_and_by_name(weight: float) -> None:
    """As the Trainer looks for it."""
    model, ids = tiny(reconstruction_weight=weight), random_tokens(2, 6)
    found = model(ids, labels=ids)
    assert found["loss"] is found.loss and found[0] is found.loss
    assert torch.equal(model(ids, labels=ids, return_dict=False)[0], found.loss)
    assert torch.equal(model(ids)[0], found.logits)


def test_row_09_reconstruction_learns_and_its_targets_are_detached() -> None:
    model = tiny(reconstruction_weight=1.0).train()
    ids = random_tokens(4, 12)
    first = model(ids, labels=ids)
    assert not first.target.requires_grad and first.reconstruction.shape == (4, 12, 14)
    close(first.loss, first.token_loss + first.reconstruction_loss)
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(30):
        found = model(ids, labels=ids)
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
        losses.append(found.reconstruction_loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("freeze", [True, False])
def test_row_11_wider_contexts(freeze: bool) -> None:
    model = tiny(num_hidden_layers=2).train()
    wider = expand_context(model, 9, freeze_base=freeze)
    cell, ids = wider.model.recurrent, random_tokens(3, 7)
    assert cell.norm.weight.tolist() == [1.0] * 9
    assert cell.first.weight[:, 14:].abs().max() == 0
    before = {name: value.clone() for name, value in cell.state_dict().items()}
    optimizer = torch.optim.Adam(wider.parameters(), 0.1)
    for _ in range(2):
        wider(ids, labels=ids).loss.backward()
        optimizer.step()
    for name, value in cell.state_dict().items():
        base = tuple(slice(size) for size in model.model.recurrent.state_dict()[name].shape)
        assert torch.equal(value[base], before[name][base]) == freeze, name
    assert not torch.equal(cell.updater.candidate.weight, before["updater.candidate.weight"])
    with pytest.raises(ValueError, match="context_dim must be at least that of a recurrent model"):
        expand_context(model, 3)


def test_an_untrained_two_phase_model_starts_near_the_uniform_loss() -> None:
    """Heads of large numbers would begin at a perplexity of 1e8."""
    model = tiny(cell="context", embed_dim=64, initializer_range=0.02)
    ids = random_tokens(4, 40)
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert abs(loss - torch.tensor(float(VOCABULARY)).log().item()) < 0.5
    linear = ContextBlock(64, 64).layers[0].linear
    own = model.model.context_block.layers[0].linear
    assert own.weight.std() < 1.2 * linear.weight.std()


# Wrong input


def test_wrong_input_is_told_in_one_sentence() -> None:
    model, ids = tiny(), random_tokens(1, 3)
    with pytest.raises(
        ValueError, match="input_ids must lie between 0 and 47, the vocabulary of the model, got 48"
    ):
        model(torch.tensor([[1, 48]]))
    other, wide, two = (DynamicCache(config=model.config) for _ in range(3))
    tiny_senri()(ids, past_key_values=other)
    with pytest.raises(ValueError, match="content of another model"):
        model(ids, past_key_values=other)
    tiny(context_dim=5)(ids, past_key_values=wide)
    with pytest.raises(ValueError, match="past_key_values holds contexts of width 5, the model's have 6"):
        model(ids, past_key_values=wide)
    model(random_tokens(2, 3), past_key_values=two)
    with pytest.raises(ValueError, match="past_key_values holds 2 rows, the input has 1"):
        model(ids, past_key_values=two)
    with pytest.raises(ValueError, match="cell must be one of gated, simple, context, got 'lstm'"):
        ContextLMConfig(cell="lstm")
    with pytest.raises(
        ValueError, match=r"token_layers must equal num_hidden_layers \(2\) for plan E, got 1"
    ):
        ContextLMConfig(cell="context", num_hidden_layers=2, token_layers=1)
    with pytest.raises(ValueError, match="tie_word_embeddings needs hidden_dim equal to embed_dim"):
        ContextLMConfig(tie_word_embeddings=True)


# The documents' Transformer


def test_row_12_baseline_count_and_causality() -> None:
    model = BaselineForCausalLM(BaselineConfig()).eval()
    assert count(model) == 5_260_264
    ids = torch.randint(1000, (1, 12))
    changed = ids.clone()
    changed[0, -1] += 1 - 2 * (changed[0, -1] == 999).long()
    before, after = logits(model, ids), logits(model, changed)
    assert torch.equal(before[:, :-1], after[:, :-1]) and not torch.equal(before, after)
    with pytest.raises(
        ValueError, match="input_ids must have at most 32 tokens, the model's positions, got 33"
    ):
        model(torch.zeros(1, 33, dtype=torch.long))


@kinds
def test_row_12_every_context_model_is_causal(options: dict[str, Any]) -> None:
    model, ids = tiny(**options).double(), random_tokens(1, 12)
    changed = ids.clone()
    changed[0, 8] = (ids[0, 8] + 1) % VOCABULARY
    before, after = logits(model, ids), logits(model, changed)
    close(before[:, :8], after[:, :8])
    assert (before[:, 8] - after[:, 8]).abs().max() > 1e-3
