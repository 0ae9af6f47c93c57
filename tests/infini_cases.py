"""Streams for the Infini layer: drawn by hypothesis, run through the operators, and through the loops."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from newllm import ops
from newllm.reference.infini import empty_state
from newllm.testing import assert_rounding, largest
from newllm.types import FeatureMap, InfiniState
from tests import loops

F64 = torch.float64


@dataclass(frozen=True)
class Plan:
    """A stream of ``len(mask[0])`` columns, cut into calls ``(start, stop, how)``."""

    batch: int
    kv_heads: int
    group: int
    key: int
    value: int
    window: int | None
    segment: int
    mask: tuple[tuple[bool, ...], ...]
    calls: tuple[tuple[int, int, str], ...]
    rule: str = "linear"
    rope: str | None = None
    gate: str = "sigmoid"
    memory: bool = True
    feature: str = "paper"
    seed: int = 0

    @property
    def tokens(self) -> int:
        return len(self.mask[0])

    @property
    def ring(self) -> int:
        return self.window or self.segment

    def real(self) -> Tensor:
        return torch.tensor(self.mask)

    def layer(self) -> dict[str, Any]:
        return {"window": self.window, "segment": self.segment, "gate": self.gate, "rule": self.rule}


class Drawn(NamedTuple):
    """The numbers of a plan, in float64."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    feature: FeatureMap | None
    gates: list[float] | None
    maps: list[loops.Map]


def draw(plan: Plan) -> Drawn:
    generator = torch.Generator().manual_seed(plan.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    heads = plan.kv_heads * plan.group
    q = normal(plan.batch, heads, plan.tokens, plan.key)
    k = normal(plan.batch, plan.kv_heads, plan.tokens, plan.key)
    v = normal(plan.batch, plan.kv_heads, plan.tokens, plan.value)
    beta, scale, bias = normal(heads), normal(plan.kv_heads), normal(plan.kv_heads)
    gates = (1 / (1 + np.exp(-beta.numpy())) if plan.gate == "sigmoid" else np.tanh(beta.numpy())).tolist()
    feature = {
        "paper": None,
        "learned": FeatureMap(scale=scale, bias=bias),
        "dpfp": FeatureMap("dpfp", order=2),
    }[plan.feature]
    maps = {
        "paper": [loops.elu_plus_one()] * plan.kv_heads,
        "learned": [loops.elu_plus_one(*each) for each in zip(scale.tolist(), bias.tolist(), strict=True)],
        "dpfp": [loops.dpfp(2)] * plan.kv_heads,
    }[plan.feature]
    return Drawn(q, k, v, beta if plan.memory else None, feature, gates if plan.memory else None, maps)


def table(positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin ``[..., K]`` of ``positions [...]``."""
    turn = positions[..., None] * 10000.0 ** (-2 * torch.arange(width // 2, dtype=F64) / width)
    both = torch.cat([turn, turn], -1)
    return both.cos(), both.sin()


def rope_of(plan: Plan, start: int, stop: int, fresh: bool) -> tuple[Tensor, Tensor] | None:
    """A call's tables, their positions counted from another number in each call (and row, if per row)."""
    if plan.rope is None:
        return None
    history = 0 if fresh else plan.ring - 1 + start % 2
    if plan.rope == "shared":
        return table(torch.arange(-history, stop - start, dtype=F64) + 3 * start, plan.key)
    real = plan.real()[:, start:stop]
    offset = torch.arange(plan.batch, dtype=F64)[:, None] * 5 + start
    before = torch.arange(-history, 0, dtype=F64).expand(plan.batch, -1)
    # A padded token's row is never read: its position is nonsense on purpose.
    new = torch.where(real, real.cumsum(1) - 1, 77)
    return table(torch.cat([before, new.to(F64)], 1) + offset, plan.key)


def run(plan: Plan, drawn: Drawn | None = None) -> tuple[Tensor, InfiniState]:
    """The calls of the plan, one after the other."""
    d = drawn or draw(plan)
    state, outs = None, []
    options = plan.layer() | {"feature": d.feature, "backend": "reference"}
    for start, stop, how in plan.calls:
        real = plan.real()[:, start:stop]
        if state is None and how != "none":
            state = empty_state(d.k, d.v, ring=plan.ring, memory=plan.memory, feature=d.feature)
        rope = rope_of(plan, start, stop, state is None)
        qkv = [x[:, :, start:stop] for x in (d.q, d.k, d.v)]
        if how == "decode":
            assert state is not None
            outs.append(ops.infini_decode(*qkv, d.beta, state, rope=rope, active=real[:, 0], **options))
            continue
        mask = None if real.all() and start % 2 else real
        out, state = ops.infini_attention(*qkv, d.beta, rope=rope, state=state, padding_mask=mask, **options)
        outs.append(out)
    assert state is not None
    return torch.cat(outs, 2), state


class Expected(NamedTuple):
    """What the loops say, with the size that rounding errors are relative to."""

    out: Tensor
    state: InfiniState
    magnitude: float


def loop(plan: Plan, drawn: Drawn | None = None) -> Expected:
    """Each row by itself, its padding deleted."""
    d = drawn or draw(plan)
    layer = loops.Layer(plan.window, plan.segment, d.maps, d.gates, plan.rope is not None, plan.rule)
    out = np.zeros((plan.batch, plan.kv_heads * plan.group, plan.tokens, plan.value))
    streams = []
    for row in range(plan.batch):
        stream = loops.Stream.start(layer, plan.key, plan.value)
        for t in range(plan.tokens):
            if plan.mask[row][t]:
                q, k, v = (x[row, :, t].numpy() for x in (d.q, d.k, d.v))
                out[row, :, t] = stream.step(q, k, v)
        streams.append(stream)
    stacked = [
        [[getattr(memory, name) for memory in stream.memories] for stream in streams]
        for name in ("matrix", "norm")
    ]
    rings = [
        [stream.ring(getattr(stream, name), plan.kv_heads, width) for stream in streams]
        for name, width in (("keys", plan.key), ("values", plan.value))
    ]
    matrix, norm, keys, values = (torch.from_numpy(np.array(each)) for each in (*stacked, *rings))
    position = torch.tensor([len(stream.keys) for stream in streams])
    memories = (matrix, norm) if plan.memory else (None, None)
    peak = max(memory.peak for stream in streams for memory in stream.memories)
    score = largest(d.q.flatten(0, -2).norm(dim=-1)) * largest(d.k.flatten(0, -2).norm(dim=-1))
    magnitude = (1 + score) * (largest(d.v) + peak)
    return Expected(torch.from_numpy(out), InfiniState(*memories, keys, values, position), magnitude)


def assert_equals_loop(plan: Plan, out: Tensor, state: InfiniState, expected: Expected) -> None:
    """Memory and output to rounding, ring and position exactly."""
    # The delta rule carries the errors of all earlier writes into each further one.
    additions = (plan.tokens * (plan.key + plan.value)) ** 2
    assert_rounding(out, expected.out, additions=additions, magnitude=expected.magnitude)
    for got, wanted in ((state.matrix, expected.state.matrix), (state.norm, expected.state.norm)):
        assert (got is None) == (wanted is None)
        if got is not None and wanted is not None:
            size = expected.magnitude * max(1.0, largest(wanted))
            assert_rounding(got, wanted, additions=additions, magnitude=size)
    assert torch.equal(state.keys, expected.state.keys)
    assert torch.equal(state.values, expected.state.values)
    assert torch.equal(state.position, expected.state.position)


@st.composite
def plans(choose: st.DrawFn, **fixed: Any) -> Plan:
    """Sizes, padding, split and options, all at once; ``fixed`` replaces some."""
    window = choose(st.none() | st.integers(1, 6))
    tokens = choose(st.integers(1, 14))
    batch = choose(st.integers(1, 3))
    row = st.lists(st.booleans(), min_size=tokens, max_size=tokens) | st.just([True] * tokens)
    cuts = sorted(choose(st.sets(st.integers(1, tokens))) | {0, tokens})
    calls = [
        (a, b, choose(st.sampled_from(["none", "prefill", "decode"] if b - a == 1 else ["none", "prefill"])))
        for a, b in pairwise(cuts)
    ]
    drawn = {
        "batch": batch,
        "kv_heads": choose(st.integers(1, 2)),
        "group": choose(st.integers(1, 3)),
        "key": choose(st.sampled_from([2, 4])),
        "value": choose(st.integers(1, 3)),
        "window": window,
        "segment": choose(st.integers(1, window or 4)),
        "mask": tuple(tuple(choose(row)) for _ in range(batch)),
        "calls": tuple(calls),
        "rule": choose(st.sampled_from(["linear", "delta", "gamma"])),
        "rope": choose(st.sampled_from([None, "shared", "rows"])),
        "gate": choose(st.sampled_from(["sigmoid", "tanh"])),
        "memory": choose(st.sampled_from([True, True, False])),
        "feature": choose(st.sampled_from(["paper", "learned", "dpfp"])),
        "seed": choose(st.integers(0, 2**16)),
    }
    return Plan(**(drawn | fixed))
