"""The decode kernels: one token a row, in place, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from newllm import ops
from newllm.ops.infini_decode_fused import infini_decode as contract
from newllm.reference.infini import empty_state, infini_attention
from newllm.testing import CASES, DRAWS, Inputs, assert_no_worse, leaves, mapped
from newllm.types import FeatureMap, InfiniState
from tests.decode_cases import decode

CASE = CASES["infini_decode"]
FUSED = partial(ops.infini_decode, backend="fused")

# Row b of a case has seen tokens - batch + b tokens, so the rows differ in phase.
SMALL = {"batch": 2, "heads": 4, "kv_heads": 2, "tokens": 9, "key": 6, "value": 5, "window": 5, "segment": 4}
SPLIT = {
    "batch": 2,
    "heads": 6,
    "kv_heads": 2,
    "tokens": 71,
    "key": 16,
    "value": 24,
    "window": 70,
    "segment": 35,
}
YOUNG = {**SPLIT, "heads": 2, "kv_heads": 1, "tokens": 40, "window": 70, "segment": 40}
ODD = {**SMALL, "heads": 3, "kv_heads": 3, "key": 80, "value": 96, "tokens": 18, "window": 17, "segment": 17}
BRIM = {**SMALL, "tokens": 17, "window": 16, "segment": 16}
SINGLE = {**SMALL, "window": 1, "segment": 1}


def judged(sizes: dict[str, int], variant: str, change: str, dtype: torch.dtype, device: str) -> None:
    case = decode(variant, change)
    draws = range(DRAWS[dtype] if device == "cuda" else 1)
    first, *others = (case.inputs("changed", dtype, device=device, seed=seed, **sizes) for seed in draws)
    case.judge(first, dtype, function=FUSED, others=others)


FEW = [
    (SMALL, "linear", "plain", torch.float32),
    (SMALL, "delta", "plain", torch.float16),
    (SMALL, "active", "plain", torch.bfloat16),
    (SPLIT, "linear", "plain", torch.bfloat16),
    (SPLIT, "delta", "plain", torch.float32),
    (SPLIT, "active", "rope by row", torch.float32),
    (SPLIT, "linear", "tanh", torch.float32),
    (SPLIT, "linear", "bias", torch.bfloat16),
    ({**SMALL, "heads": 16, "kv_heads": 8}, "linear", "far gates", torch.float32),
    (SPLIT, "linear", "no memory", torch.float16),
    (YOUNG, "linear", "plain", torch.float32),
    (ODD, "linear", "local", torch.float32),
    (ODD, "delta", "no rope", torch.bfloat16),
    ({**SMALL, "key": 7}, "linear", "no rope", torch.float32),
    (BRIM, "linear", "plain", torch.float16),
    (SINGLE, "linear", "plain", torch.float32),
    (SINGLE, "delta", "local", torch.float32),
    (SMALL, "gamma", "plain", torch.float32),
    ({**SPLIT, "window": 35}, "gamma", "local", torch.bfloat16),
    (ODD, "gamma", "no rope", torch.float32),
]


@pytest.mark.parametrize(("sizes", "variant", "change", "dtype"), FEW)
def test_a_token_obeys_the_error_rule(
    sizes: dict[str, int], variant: str, change: str, dtype: torch.dtype, fused_device: str
) -> None:
    judged(sizes, variant, change, dtype, fused_device)


@pytest.mark.parametrize(("slots", "columns", "splits"), [(16, 16, 2), (32, 64, 16)])
def test_any_tiles_obey_the_error_rule(
    slots: int, columns: int, splits: int, fused_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More splits than the second kernel combines at once, and memories of several column blocks."""
    from newllm.kernels import infini_decode

    changes = {"split": {"BT": slots, "BM": columns, "BS": 16}, "combine": {"BN": splits}}
    chosen = infini_decode.tiles_of
    monkeypatch.setattr(
        infini_decode,
        "tiles_of",
        lambda kernel, *of: {**chosen(kernel, *of), **changes[kernel.split("_")[3]]},
    )
    judged({**SPLIT, "value": 40}, "delta", "plain", torch.float32, fused_device)
    judged(SPLIT, "active", "plain", torch.bfloat16, fused_device)


def stream(
    tokens: int, device: str, dtype: torch.dtype = torch.float32, variant: str = "delta", **sizes: int
) -> Inputs:
    """q, k, v of whole streams, with beta and no tables."""
    inputs = CASES["infini_attention"].inputs(
        variant, dtype, device=device, **{**SMALL, "heads": 2, "kv_heads": 1, "tokens": tokens, **sizes}
    )
    return {**inputs, "rope": None}


def fresh(inputs: Inputs) -> InfiniState:
    return empty_state(
        inputs["k"], inputs["v"], ring=inputs["window"], memory=True, feature=inputs["feature"]
    )


@pytest.mark.parametrize("rule", ["linear", "delta", "gamma"])
def test_a_stream_equals_one_call(rule: str, fused_device: str) -> None:
    """From the empty state through three folds, with rows that pause: what one call over all tokens gives."""
    variant = "gamma" if rule == "gamma" else "delta"
    inputs = stream(13, fused_device, variant=variant) | {"rule": rule}
    mask = torch.rand(2, 13, device=fused_device) > 0.3
    mask[0] = True
    state = fresh(inputs)
    assert state.norm is not None
    qkv = {name: inputs.pop(name) for name in ("q", "k", "v")}
    outs = []
    for t in range(13):
        token = {name: x[:, :, t : t + 1] for name, x in qkv.items()}
        outs.append(FUSED(**token, **inputs, state=state, active=mask[:, t]))
    everything = {**qkv, **inputs, "padding_mask": mask}
    oracle = infini_attention(**mapped(doubled, everything))
    baseline = infini_attention(**everything, compute_dtype=torch.float32)
    found = (torch.cat(outs, 2), state)
    for (name, out), (_, wanted), (_, base) in zip(
        leaves(found), leaves(oracle), leaves(baseline), strict=True
    ):
        assert_no_worse(out, wanted, base, name)


def test_only_what_must_change_changes(fused_device: str) -> None:
    """Paused rows keep every bit, others get one slot, one position and, at a border, a memory."""
    inputs = CASE.inputs("linear", torch.float32, device=fused_device, **{**SMALL, "batch": 4, "tokens": 8})
    state, before = inputs["state"], mapped(Tensor.clone, inputs["state"])
    addresses = [x.data_ptr() for x in state[:5]]
    active = torch.tensor([True, True, False, True], device=fused_device)
    out = FUSED(**inputs, active=active)
    assert [x.data_ptr() for x in state[:5]] == addresses
    assert torch.equal(state.position - before.position, active.long())
    assert not out[2].any()
    assert out[active].all()
    assert torch.equal(state.position[active], torch.tensor([5, 6, 8], device=fused_device))
    for row, position in enumerate(before.position.tolist()):
        slot = position % 5
        others = [s for s in range(5) if s != slot or row == 2]
        for ring, old, new in (
            (state.keys, before.keys, inputs["k"]),
            (state.values, before.values, inputs["v"]),
        ):
            assert torch.equal(ring[row, :, others], old[row, :, others])
            assert row == 2 or torch.equal(ring[row, :, slot], new[row, :, 0])
        folded = row == 3
        assert torch.equal(state.matrix[row], before.matrix[row]) is not folded
        assert torch.equal(state.norm[row], before.norm[row]) is not folded


def test_the_second_kernel_reads_nothing_unwritten(
    fused_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paused rows leave zeros, where otherwise there is what the memory held before: NaN in a test."""
    from newllm.kernels import infini_decode

    combine, read = infini_decode._infini_decode_combine_kernel, list[Tensor]()
    run = type(combine).run

    def spied(kernel: object, *args: Tensor, **options: object) -> object:
        read.extend(args[:3] if kernel is combine else [])
        return run(kernel, *args, **options)

    monkeypatch.setattr(type(combine), "run", spied)
    for active in ([True, False], [False, False]):
        inputs = CASE.inputs("linear", torch.float32, device=fused_device, **SPLIT)
        CASE.call({**inputs, "active": torch.tensor(active, device=fused_device)}, FUSED)
        assert len(read) == 3
        assert all(x.isfinite().all() for x in read)
        read.clear()


def test_positions_may_exceed_32_bits(fused_device: str) -> None:
    inputs = CASE.inputs("linear", torch.float32, device=fused_device, **{**SMALL, "tokens": 13})
    later = inputs["state"]._replace(position=inputs["state"].position + 20 * 2**28)
    out, state = CASE.call(inputs, FUSED)
    far, far_state = CASE.call({**inputs, "state": later}, FUSED)
    assert torch.equal(out, far)
    assert torch.equal(far_state.position, state.position + 20 * 2**28)
    assert all(torch.equal(a, b) for a, b in zip(state[:4], far_state[:4], strict=True))


def test_any_strides_will_do(fused_device: str) -> None:
    inputs = CASE.inputs("active", torch.float32, device=fused_device, **SMALL)
    out, state = CASE.call(inputs, FUSED)
    scattered = {name: inputs[name].mT.contiguous().mT for name in ("q", "k", "v")}
    scattered["q"] = scattered["q"].repeat_interleave(2, 1)[:, ::2]
    scattered["rope"] = tuple(table.repeat_interleave(2, 1)[:, ::2] for table in inputs["rope"])
    scattered["active"] = torch.stack([inputs["active"]] * 3, 1)[:, 1]
    mine = inputs["state"].map(spread)
    with torch.no_grad():
        assert torch.equal(FUSED(**{**inputs, **scattered, "state": mine}), out)
    assert all(torch.equal(a, b) for a, b in zip(mine[:5], state[:5], strict=True))


def spread(x: Tensor) -> Tensor:
    """The same values, with a gap after each index of every dimension but a matrix's last."""
    for dim in range(max(1, x.ndim - 1)):
        x = x.repeat_interleave(2, dim)
    return x[tuple([slice(None, None, 2)] * max(1, x.ndim - 1))]


@pytest.mark.parametrize("ring", [torch.float16, torch.float32])
def test_rings_keep_their_own_dtype(ring: torch.dtype, fused_device: str) -> None:
    """The new token is rounded as it is stored, and seen as it is stored."""
    inputs = CASE.inputs("linear", torch.bfloat16, device=fused_device, **SPLIT)
    state = inputs["state"]
    inputs["state"] = state._replace(keys=state.keys.to(ring), values=state.values.to(ring))
    out, mine = CASE.call(inputs, FUSED)
    _, other = CASE.call(inputs, partial(ops.infini_decode, backend="reference"))
    assert mine.keys.dtype == mine.values.dtype == ring
    assert torch.equal(mine.keys, other.keys)
    assert torch.equal(mine.values, other.values)
    oracle, _ = CASE.reference(**mapped(doubled, inputs))
    baseline, _ = CASE.reference(**inputs, compute_dtype=torch.bfloat16)
    assert_no_worse(out, oracle, baseline)


def doubled(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def test_the_contract_holds(fused_device: str) -> None:
    """opcheck: schema, fake, no gradient, and that exactly the state is written."""
    inputs = CASE.inputs("active", torch.float32, device=fused_device, **SMALL)
    qkv = [inputs[name] for name in ("q", "k", "v")]
    options = {"local": False, "segment": 4, "tanh": False, "rule": "linear", "eps": 1e-6}
    for beta, state, rope in (
        (inputs["beta"], inputs["state"], inputs["rope"]),
        (None, inputs["state"]._replace(matrix=None, norm=None), (None, None)),
    ):
        tensors = (*qkv, beta, *state[:5], *rope, None, None, inputs["active"])
        torch.library.opcheck(contract, tensors, options)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_one_graph_serves_every_token(compiler: str, fused_device: str) -> None:
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    compiled: Callable[..., Tensor] = torch.compile(FUSED, fullgraph=True, backend=frames)
    inputs = stream(6, fused_device)
    mine, eager = fresh(inputs), fresh(inputs)
    addresses = [x.data_ptr() for x in mine[:5]]  # type: ignore[union-attr]
    qkv = {name: inputs.pop(name) for name in ("q", "k", "v")}
    with torch.no_grad():
        for t in range(6):
            token = {name: x[:, :, t : t + 1] for name, x in qkv.items()}
            assert torch.equal(compiled(**token, **inputs, state=mine), FUSED(**token, **inputs, state=eager))
    assert [x.data_ptr() for x in mine[:5]] == addresses  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(leaves(mine), leaves(eager), strict=True))
    assert mine.norm is not None
    assert mine.norm.any()
    assert frames.frame_count == 1


def declined() -> dict[str, tuple[Inputs, str]]:
    """Calls that only the reference takes, each with what the refusal says."""
    plain = CASE.inputs("linear", torch.float32, **SMALL)
    wide = CASE.inputs("linear", torch.float32, **{**SMALL, "key": 258})
    state = plain["state"]
    dpfp = {"feature": FeatureMap("dpfp", order=1)}
    longer = state._replace(matrix=state.matrix.repeat(1, 1, 2, 1), norm=state.norm.repeat(1, 1, 2))
    return {
        "dtype": (CASE.inputs("linear", torch.float64, **SMALL), "float64"),
        "width": (wide, "258"),
        "feature": ({**plain, **dpfp, "state": longer}, "'dpfp'"),
        "ring": ({**plain, "state": state._replace(values=state.values.double())}, "rings"),
        "memory": ({**plain, "state": state._replace(norm=state.norm.double())}, "memory in float32"),
        "strides": ({**plain, "state": state._replace(keys=state.keys.mT.contiguous().mT)}, "contiguous"),
    }


@pytest.mark.parametrize("name", ["dtype", "width", "feature", "ring", "memory", "strides"])
def test_what_the_kernels_lack_is_the_references(name: str, fused_device: str) -> None:
    inputs, message = declined()[name]
    inputs = mapped(lambda x: x.to(fused_device), inputs)
    if name == "strides":
        inputs["state"] = inputs["state"]._replace(keys=inputs["state"].keys.mT.contiguous().mT)
    wanted = ops.infini_decode(**mapped(Tensor.clone, inputs), backend="reference")
    assert torch.equal(ops.infini_decode(**mapped(Tensor.clone, inputs)), wanted)
    with pytest.raises(ValueError, match=f"^backend 'fused' cannot run infini_decode: .*{message}"):
        FUSED(**inputs)


WIDTHS = [(16, 16), (32, 48), (64, 64), (80, 80), (96, 128), (128, 128), (256, 256), (34, 7)]
# Rows, key/value heads, queries of each, window, segment, tokens before: the first row completes a segment.
STREAMS = [
    (1, 8, 4, 1024, 1024, 2048),
    (3, 3, 3, 1000, 250, 750),
    (2, 1, 17, 61, 61, 183),
    (2, 4, 1, 1, 1, 3),
]
OPTIONS = [
    ("linear", "plain", torch.bfloat16),
    ("delta", "plain", torch.float16),
    ("active", "rope by row", torch.float32),
    ("linear", "tanh", torch.float16),
    ("linear", "no memory", torch.bfloat16),
    ("linear", "bias", torch.float32),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("variant", "change", "dtype"), OPTIONS)
@pytest.mark.parametrize(
    ("batch", "kv_heads", "group", "window", "segment", "tokens", "key", "value"),
    [(*stream, *widths) for widths, stream in product(WIDTHS, STREAMS)],
)
def test_every_shape_obeys_the_error_rule(
    batch: int,
    kv_heads: int,
    group: int,
    window: int,
    segment: int,
    tokens: int,
    key: int,
    value: int,
    variant: str,
    change: str,
    dtype: torch.dtype,
) -> None:
    if dtype == torch.float16:
        # The reference's own sums in float16 leave its range in longer streams.
        window, segment, tokens = (min(n, 64) for n in (window, segment, tokens))
    sizes = {
        "batch": batch,
        "heads": kv_heads * group,
        "kv_heads": kv_heads,
        "key": key,
        "value": value,
        "window": window,
        "segment": segment,
        "tokens": tokens + batch - 1,
    }
    judged(sizes, variant, change, dtype, "cuda")


@pytest.mark.gpu
def test_more_heads_than_a_grid_has_rows() -> None:
    judged({**SMALL, "batch": 16500}, "active", "plain", torch.float32, "cuda")


@pytest.mark.gpu
def test_a_replayed_graph_equals_eager_decoding() -> None:
    """One captured step serves every token: the fold is a branch on the device."""
    inputs = stream(40, "cuda", torch.bfloat16, key=64, value=64, window=16, segment=8)
    mine, eager = fresh(inputs), fresh(inputs)
    qkv = {name: inputs.pop(name) for name in ("q", "k", "v")}
    token = {name: x[:, :, :1].clone() for name, x in qkv.items()}
    FUSED(**token, **inputs, state=mapped(Tensor.clone, mine))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = FUSED(**token, **inputs, state=mine)
    for t in range(40):
        for name, x in qkv.items():
            token[name].copy_(x[:, :, t : t + 1])
        graph.replay()
        assert torch.equal(out, FUSED(**token, **inputs, state=eager))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(leaves(mine), leaves(eager), strict=True))
    assert eager.norm is not None
    assert eager.norm.any()


@pytest.mark.gpu
def test_overlapping_kernels_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred steps with the start of each kernel overlapping the end of the last, and without."""
    from newllm.kernels import infini_decode

    inputs = stream(100, "cuda", torch.bfloat16, key=128, value=128, window=64, segment=16)
    qkv = {name: inputs.pop(name) for name in ("q", "k", "v")}

    def run() -> list[Tensor]:
        state = fresh({**qkv, **inputs})
        tokens = [{name: x[:, :, t : t + 1] for name, x in qkv.items()} for t in range(100)]
        return [*(FUSED(**token, **inputs, state=state) for token in tokens), *state[:5]]

    overlapping = run()
    monkeypatch.setattr(infini_decode, "dependent_launch", lambda device: {"PDL": 0})
    assert all(torch.equal(a, b) for a, b in zip(overlapping, run(), strict=True))
