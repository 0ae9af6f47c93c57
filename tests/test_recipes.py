"""The optional parts of the memory: write gate, decay, short convolution, one memory for several layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, StaticCache

from newllm import FeatureMap, Session, convert, ops
from newllm.data.tokenizer import byte_tokenizer
from newllm.distributed.line import Line
from newllm.distributed.senri import parallelize
from newllm.evaluation.control import remove_memories, zero_memories
from newllm.models import SenriConfig, SenriForCausalLM
from newllm.modules.short_conv import ShortConvolution
from newllm.testing import CASES, assert_rounding, largest
from newllm.training.carry import CarriedStates
from newllm.training.groups import parameter_groups
from tests.tiny_models import ADDITIONS, RECIPES, left_padded, random_tokens, tiny_base, tiny_senri

F64 = torch.float64
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=str)


def assert_same(out: Tensor, expected: Tensor) -> None:
    assert_rounding(out, expected, additions=ADDITIONS, magnitude=ADDITIONS * largest(expected))


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


# Operators


def gated(heads: int = 2, width: int = 6) -> FeatureMap:
    gate = torch.randn(heads, width, dtype=F64), torch.randn(heads, dtype=F64)
    return FeatureMap("elu1", write=gate[0], write_bias=gate[1])


def test_what_a_gate_and_a_decay_leave_in_the_memory() -> None:
    """Token by token, as the definition says; decay acts before a segment is written, and not without one."""
    k, v = torch.randn(2, 2, 7, 6, dtype=F64), torch.randn(2, 2, 7, 5, dtype=F64)
    feature, decay = gated(), torch.tensor([0.5, 0.9], dtype=F64)
    real = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    _, state = ops.memory_scan(k, v, segment=3, feature=feature, decay=decay, padding_mask=real)
    for row, (lengths, total) in enumerate((((3, 3, 1), 7), ((3, 1), 4))):
        for head in range(2):
            ends = torch.tensor(lengths).cumsum(0)
            faded = [decay[head] ** int((ends[:-1] > t).sum()) for t in range(total)]
            matrix, norm = torch.zeros(6, 5, dtype=F64), torch.zeros(6, dtype=F64)
            for t in range(total):
                key = k[row, head, t]
                strength = (feature.write[head] @ key + feature.write_bias[head]).sigmoid() * faded[t]
                written = torch.where(key > 0, key + 1, key.exp()) * strength
                matrix, norm = matrix + torch.outer(written, v[row, head, t]), norm + written
            assert_rounding(state.matrix[row, head], matrix, additions=20, magnitude=largest(matrix))
            assert_rounding(state.norm[row, head], norm, additions=20, magnitude=largest(norm))


def test_a_shut_gate_writes_nothing_and_an_open_one_all() -> None:
    k, v, q = (torch.randn(1, 2, 9, 6, dtype=F64) for _ in "kvq")
    first = torch.arange(9) < 4
    k[..., 0] = torch.where(first, 40.0, -40.0)
    only = torch.zeros(2, 6, dtype=F64)
    only[:, 0] = 1
    feature = FeatureMap("elu1", write=only, write_bias=torch.zeros(2, dtype=F64))
    plain = ops.memory_update(k[:, :, :4], v[:, :, :4])
    found = ops.memory_update(k, v, feature=feature)
    assert_rounding(found.matrix, plain.matrix, additions=20, magnitude=largest(plain.matrix))
    read = ops.memory_retrieve(q, found, feature=feature)
    assert_rounding(read, ops.memory_retrieve(q, plain), additions=20, magnitude=largest(v))


@pytest.mark.parametrize("weighed", ["gate", "decay"])
def test_delta_after_weak_writes_inverts_nothing(weighed: str) -> None:
    """A segment that counts far more than all before may not take away more than they hold."""
    feature = FeatureMap("elu1", write=torch.eye(4, dtype=F64)[:1], write_bias=torch.zeros(1, dtype=F64))
    k = torch.zeros(1, 1, 8, 4, dtype=F64)
    v = torch.ones(1, 1, 8, 3, dtype=F64)
    options: dict[str, Any] = {"decay": torch.tensor([1e-3], dtype=F64)}
    if weighed == "gate":
        k[:, :, :4, 0], k[:, :, 4:, 0] = -8.0, 8.0
        options = {"feature": feature}
    v[:, :, 4:] = -1
    q = torch.zeros(1, 1, 1, 4, dtype=F64)
    _, state = ops.memory_scan(k, v, segment=4, rule="delta", **options)
    read = ops.memory_retrieve(q, state)
    assert read.abs().max() <= 1 + 1e-12


@pytest.mark.parametrize("what", ["write gate", "decay"])
def test_kernels_say_what_they_lack(what: str, fused_device: str) -> None:
    inputs = CASES["infini_attention"].inputs("gated", torch.float32, device=fused_device)
    if what == "decay":
        inputs["feature"] = inputs["feature"]._replace(write=None, write_bias=None)
    else:
        del inputs["decay"]
    with pytest.raises(ValueError, match=f"backend 'fused' cannot run infini_attention: .* no {what}"):
        ops.infini_attention(**inputs, backend="fused")
    out, _ = ops.infini_attention(**inputs)
    assert out.isfinite().all()


def test_wrong_arguments_are_named() -> None:
    k, v = torch.randn(1, 2, 4, 6), torch.randn(1, 2, 4, 5)
    one = FeatureMap("elu1", write=torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"feature\.write and write_bias must be given both or neither"):
        ops.memory_update(k, v, feature=one)
    narrow = FeatureMap("elu1", write=torch.zeros(2, 3), write_bias=torch.zeros(2))
    with pytest.raises(ValueError, match=r"feature.write must be of shape \[2, 6\], got \[2, 3\]"):
        ops.memory_update(k, v, feature=narrow)
    weights = {"decay": torch.ones(2), "segment_weight": torch.ones(1, 2)}
    with pytest.raises(ValueError, match="segment_weight must be None when decay is given, got a tensor"):
        ops.memory_scan(k, v, segment=2, **weights)


# The convolution


def test_short_convolution_is_the_textbook_s_and_the_identity_at_the_start() -> None:
    x = torch.randn(2, 11, 5, dtype=F64)
    layer = ShortConvolution(5, 4).double()
    assert torch.equal(layer(x, None, None)[0], x)
    torch.nn.init.normal_(layer.weight)
    y, recent = layer(x, None, None)
    kernel = layer.weight.T[:, None]
    expected = x + F.conv1d(F.pad(x.mT, (3, 0)), kernel, groups=5).mT
    assert_rounding(y, expected, additions=5, magnitude=4 * largest(expected))
    assert torch.equal(recent, x[:, -3:])
    # Any split has the same bits.
    parts, past = [], None
    for part in x.split([1, 1, 2, 6, 1], 1):
        out, past = layer(part, past, None)
        parts.append(out)
    assert torch.equal(torch.cat(parts, 1), y)
    assert past is not None
    assert torch.equal(past, recent)


def test_short_convolution_reads_past_padding() -> None:
    torch.manual_seed(0)
    layer = ShortConvolution(5, 3).double()
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(2, 9, 5, dtype=F64)
    real = torch.rand(2, 9) < 0.6
    real[0, :5] = False
    past = torch.randn(2, 2, 5, dtype=F64)
    y, recent = layer(x, past, real)
    assert not y[~real].any()
    for row in range(2):
        alone, last = layer(x[row, real[row]][None], past[row : row + 1], None)
        assert torch.equal(y[row, real[row]], alone[0])
        assert torch.equal(recent[row], last[0])


def test_one_tap_is_refused_and_a_state_without_its_past() -> None:
    with pytest.raises(ValueError, match="short_conv must be None or at least 2 taps, got 1"):
        ShortConvolution(4, 1)
    model, ids = tiny_senri(short_conv=3), random_tokens(1, 9)
    plain = tiny_senri()(ids).past_key_values
    with pytest.raises(ValueError, match=r"state\.recent must be a tensor for a layer with a short conv"):
        model(ids, past_key_values=plain)


# Models


@each_recipe
def test_tokens_one_by_one_padding_and_static_caches(recipe: dict[str, Any]) -> None:
    model = tiny_senri(**recipe).double()
    ids, mask = left_padded((21, 14))
    padded = logits(model, ids, attention_mask=mask)
    alone = logits(model, ids[1:, 7:])
    assert_same(padded[1:, 7:], alone)
    for cache in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=64)):
        found = [
            logits(model, part, attention_mask=seen, past_key_values=cache)
            for part, seen in zip(ids.split([5, 1, 14, 1], 1), mask.split([5, 1, 14, 1], 1), strict=True)
        ]
        assert_same(torch.cat(found, 1)[mask.bool()], padded[mask.bool()])


@each_recipe
def test_no_token_is_seen_before_it_comes(recipe: dict[str, Any]) -> None:
    model, ids = tiny_senri(**recipe).double(), random_tokens(1, 30)
    other = ids.clone()
    other[0, 17] = other[0, 17] % 40 + 1
    before, after = logits(model, ids)[0], logits(model, other)[0]
    assert torch.equal(before[:17], after[:17])
    assert not torch.equal(before[17:], after[17:])


@each_recipe
def test_checkpointing_recomputes_the_same_gradients(recipe: dict[str, Any]) -> None:
    model, ids = tiny_senri(**recipe).double().train(), random_tokens(2, 26)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    own = [name for name in plain if any(part in name for part in ("write", "decay", "short_conv"))]
    assert bool(own) == (set(recipe) != {"share_memory"})
    assert all(plain[name].any() for name in own)
    model.gradient_checkpointing_enable()
    again = gradients()
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@each_recipe
def test_sessions_come_back_from_a_file_and_a_reset_row_begins_anew(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_senri(**recipe, vocab_size=264)
    session = Session(model, byte_tokenizer())
    session.feed("a text of some length, read")
    session.save(tmp_path / "session")
    expected = session.generate(max_new_tokens=12)
    other = Session(model, byte_tokenizer())
    other.load(tmp_path / "session")
    assert other.generate(max_new_tokens=12) == expected


@each_recipe
def test_rows_that_are_reset_begin_anew(recipe: dict[str, Any]) -> None:
    model, ids = tiny_senri(**recipe).double(), random_tokens(2, 13)
    carry = CarriedStates(model.config)
    model(random_tokens(2, 22), past_key_values=carry.enter(0, torch.tensor([True, True])))
    carry.leave()
    kept = logits(model, ids, past_key_values=carry.enter(0, torch.tensor([False, True])))
    assert_same(kept[1], logits(model, ids)[1])
    assert not torch.equal(kept[0], logits(model, ids)[0])


@each_recipe
def test_files_keep_the_switches(recipe: dict[str, Any], tmp_path: Path) -> None:
    model, ids = tiny_senri(**recipe), random_tokens(1, 30)
    model.save_pretrained(tmp_path)
    again = SenriForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert all(getattr(again.config, name) == value for name, value in recipe.items())


@each_recipe
def test_a_converted_model_is_its_base_within_the_window(recipe: dict[str, Any]) -> None:
    base, ids = tiny_base("llama"), random_tokens(2, 8)
    model = convert(base, window=8, segment=4, memory_layers=[0, 2], **recipe).eval()
    plain = convert(base, window=8, segment=4, memory_layers=[0, 2]).eval()
    if "share_memory" in recipe:  # read segment by segment, in another order of sums
        assert_same(logits(model, ids), logits(plain, ids))
    else:
        assert torch.equal(logits(model, ids), logits(plain, ids))
    assert torch.equal(logits(model, ids).argmax(-1), logits(base, ids).argmax(-1))


def test_shared_memory_is_one_and_holds_what_all_layers_wrote() -> None:
    model, ids = tiny_senri(share_memory=True).double(), random_tokens(2, 20)
    first, _, second = (layer.state for layer in model(ids).past_key_values.layers)
    assert second.matrix is None
    own = tiny_senri().double()
    own.load_state_dict(model.state_dict())
    # Nothing reads a memory in the first segment, so what it adds is the sum of what each layer adds.
    a, _, b = (layer.state for layer in own(ids[:, :4]).past_key_values.layers)
    one = model(ids[:, :4]).past_key_values.layers[0].state
    assert_rounding(one.matrix, a.matrix + b.matrix, additions=4, magnitude=largest(a.matrix))
    sizes = [sum(layer.state.nbytes() for layer in m(ids).past_key_values.layers) for m in (model, own)]
    assert sizes[1] - sizes[0] == first.matrix.nbytes + first.norm.nbytes


def test_shared_memory_and_its_controls() -> None:
    model, ids = tiny_senri(share_memory=True), random_tokens(1, 24)
    out = model(ids)
    zero_memories(out.past_key_values)
    assert not out.past_key_values.layers[0].state.matrix.any()
    with pytest.raises(ValueError, match="segment_weight needs memories of their own"):
        model(ids, segment_weight=torch.ones(1, 6))
    with pytest.raises(
        ValueError, match="share_memory needs rule 'linear' and memory_decay None, got 'delta'"
    ):
        SenriConfig(share_memory=True, rule="delta")
    remove_memories(model)
    assert all(layer.state.matrix is None for layer in model(ids).past_key_values.layers)


@pytest.mark.parametrize(
    ("name", "value"),
    [("write_gate", True), ("memory_decay", 0.9), ("short_conv", 3), ("share_memory", True)],
)
def test_slices_over_ranks_refuse_what_they_lack(name: str, value: object) -> None:
    model = tiny_senri(**{name: value})
    before = [layer.self_attn.attend for layer in model.model.layers]
    with pytest.raises(ValueError, match=f"{name} must be (off|False) over several ranks, got (one|True)"):
        parallelize(model, Line("alone", 0, 1))
    assert [layer.self_attn.attend for layer in model.model.layers] == before


def test_own_parameters_learn_with_the_memory_s() -> None:
    model = tiny_senri(write_gate=True, memory_decay=0.9, short_conv=4)
    groups = {group["name"]: group for group in parameter_groups(model, 1e-3, weight_decay=0.1)}
    names = {id(p): name for name, p in model.named_parameters()}
    memory = {names[id(p)].rpartition("self_attn.")[2] for p in groups["memory_plain"]["params"]}
    assert {"memory_feature.write", "memory_feature.write_bias", "memory_decay.weight"} <= memory
    assert all(p.dtype == torch.float32 for p in groups["memory_plain"]["params"])
