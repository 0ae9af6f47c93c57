"""The fused layer and window attention on a GPU: every width, dtype, option and shape, compiled and large."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import StaticCache

from newllm import ops
from newllm.reference import infini, memory
from newllm.testing import DRAWS, OpCase, assert_no_worse, assert_rounding, largest, mapped
from newllm.types import InfiniState
from tests.attention_cases import Launches, judge, layer, window
from tests.tiny_models import ADDITIONS, random_tokens, tiny_senri

pytestmark = pytest.mark.gpu

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = [F32, BF16, F16]
CASES = {"window": window, "layer": layer}
# The gradients of gates and feature maps are one number a head, of which the rule compares the largest.
HEADS = {"batch": 2, "heads": 16, "kv_heads": 8}
WIDTHS = [(d, d) for d in (16, 32, 64, 80, 96, 128, 256)] + [(64, 128), (96, 40)]
# Tokens, window, segment; odd numbers, since multiples of 16 are other programs to the compiler.
LENGTHS = [(1, 65, 65), (131, 131, 67), (1031, 301, 251)]


def sized(tokens: int, reach: int, segment: int, **sizes: int) -> dict[str, int]:
    return {
        **HEADS,
        "tokens": tokens,
        "window": reach,
        "segment": segment,
        "before": 2 * segment + 9,
        **sizes,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("key", "value"), WIDTHS)
@pytest.mark.parametrize("shape", LENGTHS, ids=str)
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("layer", "learned"),
        ("layer", "learned delta padded stream"),
        ("window", ""),
        ("window", "local padded"),
    ],
)
def test_every_width(
    kind: str, changes: str, shape: tuple[int, int, int], key: int, value: int, dtype: torch.dtype
) -> None:
    # One token's gate has few numbers, and in some draws none.
    draws = DRAWS[dtype] * (3 if shape[0] == 1 else 1)
    judge(CASES[kind](changes), dtype, "cuda", draws=draws, **sized(*shape, key=key, value=value))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("key", "value"), [(8, 8), (24, 24), (40, 24), (64, 20)])
@pytest.mark.parametrize("changes", ["learned stream", "no-memory"])
def test_values_that_no_copy_engine_brings(changes: str, key: int, value: int, dtype: torch.dtype) -> None:
    sizes = sized(131, 131, 67, key=key, value=value)
    judge(CASES["layer"](changes), dtype, "cuda", draws=DRAWS[dtype], **sizes)


OPTIONS = [
    "", "no-rope", "tanh", "learned open", "delta", "local", "no-memory", "weights", "cut", "full", "two",
    "delta cut", "delta full", "delta two", "padded", "apart", "stream", "delta stream", "local stream",
    "two stream weights", "long", "long padded stream", "clamped stream", "no-memory padded stream",
    "learned tanh apart padded stream by-row",
]  # fmt: skip
SHAPES = [(67, 64, 64), (2048, 256, 128), (1031, 300, 250)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("changes", OPTIONS)
def test_every_option(changes: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    judge(layer(changes), dtype, "cuda", draws=DRAWS[dtype], **sized(*shape, key=64, value=64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (19, 1, 1), (67, 17, 3), (200, 300, 300), (2100, 1000, 64)], ids=str
)
@pytest.mark.parametrize("changes", ["", "local", "delta stream", "gamma stream"])
def test_windows_and_segments_of_any_size(
    changes: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """One token, many segments a tile, a segment longer than the call, a window of many segments."""
    judge(layer(changes), dtype, "cuda", draws=DRAWS[dtype], **sized(*shape, key=80, value=96))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (24, 8), (32, 8), (8, 1)])
@pytest.mark.parametrize("changes", ["learned", "delta padded stream"])
@pytest.mark.parametrize("shape", [(127, 64, 64), (700, 256, 128)], ids=str)
def test_groups_of_queries(
    shape: tuple[int, int, int], changes: str, heads: int, kv_heads: int, dtype: torch.dtype
) -> None:
    # A single feature map would be judged by one number.
    changes = changes.replace("learned", "tanh") if kv_heads == 1 else changes
    sizes = {"key": 64, "value": 64, "heads": heads, "kv_heads": kv_heads}
    judge(layer(changes), dtype, "cuda", draws=DRAWS[dtype], **sized(*shape, **sizes))


ATTENTION = {
    f"_infini_attention_{part}_kernel"
    for part in ("forward", "backward_prepare", "backward_recall", "backward_keys", "backward_queries")
}
MEMORY = {"_rotate_kernel", "_memory_fold_forward_kernel", "_memory_fold_backward_kernel"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("key", "value"), WIDTHS)
@pytest.mark.parametrize("rule", ["linear", "delta", "gamma"])
@pytest.mark.parametrize("detach", ["", "cut", "full", "two"])
def test_only_kernels_run(
    detach: str, rule: str, key: int, value: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = layer(f"learned {'' if rule == 'linear' else rule} {detach}")
    inputs = case.inputs("changed", dtype, device="cuda", **sized(131, 131, 67, key=key, value=value))
    launches = Launches(monkeypatch)
    case.results(partial(case.call, function=partial(case.public, backend="fused")), inputs)
    names = {name.replace("_hopper", "") for name in launches.names}
    assert names >= ATTENTION | MEMORY | {f"_memory_scan_{rule}_kernel"}
    assert ("_infini_attention_backward_slopes_kernel" in names) == (dtype == F32)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize(("kind", "changes"), [("window", ""), ("layer", ""), ("layer", "delta stream")])
def test_more_heads_than_a_grid_axis_holds(kind: str, changes: str, dtype: torch.dtype) -> None:
    sizes = {"batch": 9000, "heads": 8, "key": 16, "value": 16}
    judge(CASES[kind](changes), dtype, "cuda", draws=DRAWS[dtype], **sized(3, 2, 2, **sizes))


@pytest.mark.parametrize("changes", ["learned", "delta padded stream"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_repeat_bit_by_bit(dtype: torch.dtype, changes: str) -> None:
    case = layer(changes)
    inputs = case.inputs("changed", dtype, device="cuda", **sized(2000, 512, 512, key=128, value=128))
    call = partial(case.call, function=partial(case.public, backend="fused"))
    first, second = case.results(call, inputs), case.results(call, inputs)
    assert all(torch.equal(x, second[name]) or x.isnan().any() for name, x in first.items())


# More than 2**31 elements


def many() -> dict[str, Tensor]:
    """q of 2.15e9 elements, k and v of an eighth, window and segments of 1024."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = {"q": (1, 8, 2**21 + 7, 128), "k": (1, 1, 2**21 + 7, 128), "v": (1, 1, 2**21 + 7, 128)}
    return {
        name: torch.randn(shape, generator=generator, device="cuda", dtype=BF16)
        for name, shape in shapes.items()
    }


PLACES = [2048, 2**20, 2**21 - 1024]


@pytest.mark.large
def test_a_window_over_more_elements_than_32_bits_count() -> None:
    inputs = many()
    assert inputs["q"].numel() > 2**31
    out = ops.window_attention(**inputs, window=1024, backend="fused")
    for start in PLACES:
        end = start + 1031
        near = {name: x[:, :, start - 1024 : end] for name, x in inputs.items()}
        oracle, baseline = (
            ops.window_attention(**mapped(change, near), window=1024, backend="reference")[:, :, 1024:]
            for change in (Tensor.double, Tensor.clone)
        )
        assert_no_worse(out[:, :, start:end], oracle, baseline, f"tokens from {start}")


@pytest.mark.large
def test_a_layer_over_more_elements_than_32_bits_count() -> None:
    inputs, beta = many(), torch.linspace(-2, 2, 8, device="cuda")
    sizes: dict[str, Any] = {"window": 1024, "segment": 1024}
    out, _ = ops.infini_attention(**inputs, beta=beta, **sizes, backend="fused")
    for start in PLACES:
        k, v = (inputs[name][:, :, :start].double() for name in ("k", "v"))
        past = memory.memory_update(k, v)
        assert past.count is not None
        tail = {name: x[:, :, start : start + 1031] for name, x in inputs.items()}
        found = []
        for change, dtype in ((Tensor.double, None), (Tensor.clone, BF16)):
            stored = past if dtype is None else mapped(Tensor.float, past)
            keys, values = (inputs[name][:, :, start - 1024 : start] for name in ("k", "v"))
            position = torch.tensor([start], device="cuda")
            state = InfiniState(stored.matrix, stored.norm, change(keys), change(values), position)
            call = {**mapped(change, tail), "beta": beta, "state": state, "compute_dtype": dtype}
            found.append(infini.infini_attention(**call, **sizes)[0])
        assert_no_worse(out[:, :, start : start + 1031], *found, f"tokens from {start}")


# Compiled, and in a model


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("kind", "changes"), [("window", ""), ("layer", "learned"), ("layer", "delta padded stream")]
)
def test_the_operator_compiles_whole(kind: str, changes: str, dynamic: bool) -> None:
    case: OpCase = CASES[kind](changes)
    torch._dynamo.reset()
    compiled = torch.compile(partial(case.public, backend="fused"), fullgraph=True, dynamic=dynamic)
    for tokens in (131, 200, 1031) if dynamic else (131,):
        inputs = case.inputs("changed", F32, device="cuda", **sized(tokens, 67, 67, key=64, value=64))
        case.judge(inputs, F32, function=compiled)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("kind", ["window", "layer"])
def test_autocast_is_a_call_in_its_dtype(kind: str, dtype: torch.dtype) -> None:
    case: OpCase = CASES[kind]("")
    inputs = case.inputs("changed", F32, device="cuda", **sized(131, 67, 67, key=64, value=64))
    lower = {name: inputs[name].to(dtype) for name in ("q", "k", "v")}
    expected = case.public(**{**inputs, **lower})
    with torch.autocast("cuda", dtype=dtype):
        found = case.public(**inputs)
    found, expected = (x if isinstance(x, Tensor) else x[0] for x in (found, expected))
    assert found.dtype == dtype
    assert torch.equal(found, expected)


MODELS: list[dict[str, Any]] = [{}, {"rule": "delta"}, {"sliding_window": None}, {"memory_layers": []}]


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_a_training_step_compiles_without_breaks(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model, ids = tiny_senri(**options).train().cuda(), random_tokens(2, 24).cuda()
    counter = CompileCounterWithBackend("inductor")
    gradients = []
    for forward in (model, torch.compile(model, fullgraph=True, backend=counter)):
        model.zero_grad()
        forward(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert counter.frame_count == 1
    for expected, found in zip(*gradients, strict=True):
        assert_rounding(found, expected, additions=48 + ADDITIONS, magnitude=largest(expected))


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_static_decode_is_one_graph_for_all_tokens(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model = tiny_senri(**options).cuda()
    prompt, tokens = random_tokens(2, 13).cuda(), random_tokens(2, 14).cuda()
    counter = CompileCounterWithBackend("inductor")
    results = []
    for step in (model, torch.compile(model, fullgraph=True, backend=counter)):
        cache = StaticCache(model.config, max_cache_len=64)
        with torch.no_grad():
            model(prompt, past_key_values=cache)
            logits = [step(token, past_key_values=cache).logits for token in tokens.split(1, 1)]
        results.append(torch.cat(logits, 1))
    assert counter.frame_count == 1
    expected, found = results
    assert_rounding(found, expected, additions=ADDITIONS, magnitude=largest(expected))
