"""Calls of the attention operators: the plain case with any of several changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from newllm import ops
from newllm.reference import infini
from newllm.testing import CASES, Draw, Inputs, OpCase, mapped
from newllm.testing.cases import sparse
from newllm.types import FeatureMap

# Few rows and heads: the interpreter takes its time by program.
SIZES = {
    "batch": 1,
    "heads": 2,
    "kv_heads": 1,
    "tokens": 37,
    "key": 16,
    "value": 24,
    "window": 20,
    "segment": 16,
    "before": 43,
}


def _learned(draw: Draw, inputs: Inputs) -> Inputs:
    return {"feature": FeatureMap(scale=draw.normal("kv_heads") + 2, bias=draw.normal("kv_heads"))}


def _open(draw: Draw, inputs: Inputs) -> Inputs:
    """Gates that are all but open, and open exactly; the rest are anywhere."""
    beta = inputs["beta"].clone()
    beta[0], beta[-1] = 4.6, 40
    return {"beta": beta}


def _weights(draw: Draw, inputs: Inputs) -> Inputs:
    tokens, segment = draw.sizes["tokens"], draw.sizes["segment"]
    count = infini.touched_segments(tokens, segment, inputs.get("state") is not None)
    return {"segment_weight": draw.normal("batch", count).abs()}


def _padded(draw: Draw, inputs: Inputs) -> Inputs:
    return {"padding_mask": draw.mask("batch", "tokens")}


def _apart(draw: Draw, inputs: Inputs) -> Inputs:
    """Queries and keys that lie in memory as [B, T, H, D], values with gaps between their columns."""
    apart = {name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "k")}
    return apart | {"v": inputs["v"].repeat_interleave(2, -1)[..., ::2]}


def _stream(draw: Draw, inputs: Inputs) -> Inputs:
    """The state after earlier tokens, in each row another number of them, and tables that reach back."""
    kept = {name: inputs[name] for name in ("beta", "window", "segment", "rule", "feature") if name in inputs}
    before = {name: draw.normal(x.shape[0], x.shape[1], "before", x.shape[3]) for name, x in _qkv(inputs)}
    lengths = draw.sizes["before"] - 7 * torch.arange(draw.sizes["batch"])[:, None] % draw.sizes["before"]
    mask = (torch.arange(draw.sizes["before"]) < lengths).to(draw.device)
    _, state = infini.infini_attention(**before, **kept, padding_mask=mask)
    ring = inputs["window"] or inputs["segment"]
    found: Inputs = {"state": mapped(Tensor.detach, state)}
    if inputs.get("rope") is not None:
        found["rope"] = tables(draw, draw.sizes["tokens"] + ring)
    return found


def _qkv(inputs: Inputs) -> list[tuple[str, Tensor]]:
    return [(name, inputs[name]) for name in ("q", "k", "v")]


def tables(draw: Draw, rows: int) -> tuple[Tensor, Tensor]:
    """cos and sin of positions 0 .. rows - 1."""
    sized = {**draw.sizes, "tokens": rows, "batch": 1, "heads": 1, "kv_heads": 1}
    cos, sin = CASES["infini_attention"].inputs("linear", draw.dtype, device=draw.device, **sized)["rope"]
    return cos, sin


def _by_row(draw: Draw, inputs: Inputs) -> Inputs:
    """Tables whose rows count from different positions."""
    found = (torch.stack([x.roll(row, 0) for row in range(draw.sizes["batch"])]) for x in inputs["rope"])
    return {"rope": tuple(found)}


def _long(draw: Draw, inputs: Inputs) -> Inputs:
    """Later queries whose exponents may leave float16's range, and those behind 64 others float32's.

    Not the latter in float16, where the reference's denominators would leave its range as well.
    """
    q = inputs["q"].clone()
    q[:, :, q.shape[2] // 3 :] *= 8
    if draw.dtype != torch.float16:
        q[:, :, 64:] *= 4
    return {"q": q}


# Applied from left to right: "stream" follows what the memory depends on, "weights" and "by-row" follow it.
CHANGES: dict[str, Inputs | Callable[[Draw, Inputs], Inputs]] = {
    "learned": _learned,
    "delta": {"rule": "delta"},
    "gamma": lambda draw, inputs: {"rule": "gamma", "feature": sparse(draw)},
    "tanh": {"gate": "tanh"},
    "open": _open,
    "local": {"window": None},
    "no-memory": {"beta": None},
    "no-rope": {"rope": None},
    "weights": _weights,
    "cut": {"detach": "segment"},
    "full": {"detach": "full"},
    "two": {"bptt_segments": 2},
    "padded": _padded,
    "apart": _apart,
    "stream": _stream,
    "by-row": _by_row,
    "long": _long,
    # About half of the denominators are below it.
    "clamped": {"eps": 650.0},
}


def _layer(draw: Draw, changes: str) -> Inputs:
    inputs: Inputs = CASES["infini_attention"].variants["linear"](draw)
    for name in changes.split():
        change = CHANGES[name]
        inputs |= change(draw, inputs) if callable(change) else change
    return inputs


def _reference(*args: Any, detach: str = "none", bptt_segments: int | None = None, **inputs: Any) -> Any:
    reach = {"none": bptt_segments, "segment": 1, "full": 0}[detach]
    return infini.infini_attention(*args, **inputs, bptt_segments=reach)


def layer(changes: str) -> OpCase:
    """The layer's case with ``changes``, whose only variant is "changed"."""
    made = {"changed": partial(_layer, changes=changes)}
    return replace(CASES["infini_attention"], reference=_reference, sizes=SIZES, variants=made)


def _window(draw: Draw, changes: str) -> Inputs:
    inputs = _layer(draw, changes)
    return {name: x for name, x in inputs.items() if name != "beta"}


def window(changes: str) -> OpCase:
    """The same for window attention."""
    made = {"changed": partial(_window, changes=changes)}
    return replace(CASES["window_attention"], sizes=SIZES, variants=made)


def judge(
    case: OpCase, dtype: torch.dtype, device: str, *, seed: int = 0, draws: int = 1, **sizes: int
) -> None:
    """Hold the fused operator of a case to the error rule, over so many draws from ``seed`` on."""
    if dtype == torch.float16:
        # Beyond this the reference's own sums leave float16's range.
        most = 10000 // sizes.get("key", 64)
        sizes |= {name: min(n, most) for name, n in sizes.items() if name in ("tokens", "segment", "before")}
    inputs, *others = (
        case.inputs("changed", dtype, device=device, seed=seed + i, **sizes) for i in range(draws)
    )
    function = partial(case.public, backend="fused")
    case.judge(inputs, dtype, function=function, gradients=has_gradients(inputs, dtype), others=others)


def has_gradients(inputs: Inputs, dtype: torch.dtype) -> bool:
    """Whether the error rule can judge the gradients of a call."""
    state = inputs.get("state")
    if dtype != torch.float16 or inputs.get("beta") is None:
        return True
    # A float16 reference divides by eps where the memory is empty: its gradient overflows.
    return state is not None and bool(state.norm.any((1, 2)).all())


def in_calls(
    cuts: tuple[int, ...],
    *,
    rope: tuple[Tensor, Tensor] | None = None,
    padding_mask: Tensor | None = None,
    backend: str = "fused",
    decode: bool = False,
    **inputs: Any,
) -> Any:
    """The layer's results from one call for each pair of ``cuts``; with ``decode`` lone tokens by steps."""
    qkv = {name: inputs.pop(name) for name in ("q", "k", "v")}
    batch, _, tokens, _ = qkv["q"].shape
    device = qkv["q"].device
    real = (
        torch.ones(batch, tokens, dtype=torch.bool, device=device) if padding_mask is None else padding_mask
    )
    history = torch.arange(1 - (inputs["window"] or inputs["segment"]), 0, device=device)
    state, outs = None, []
    for start, end in pairwise(cuts):
        index = real[:, start:end].cumsum(1) - 1
        if state is not None:
            index = torch.cat([history.expand(batch, -1), index], 1) + state.position[:, None]
        call: Inputs = {name: x[:, :, start:end] for name, x in qkv.items()} | {"state": state}
        if rope is not None:
            call["rope"] = tuple(table[index.clamp(min=0)] for table in rope)
        if decode and state is not None and end - start == 1:
            outs.append(ops.infini_decode(**call, **inputs, active=real[:, start], backend=backend))
            continue
        mask = {} if padding_mask is None else {"padding_mask": real[:, start:end]}
        out, state = ops.infini_attention(**call, **mask, **inputs, backend=backend)
        outs.append(out)
    return torch.cat(outs, 2), state


class Launches:
    """The names of the kernels that run, and nothing of the reference that does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from newllm.kernels import rotate

        self.names: list[str] = []
        kind = type(rotate._rotate_kernel)
        run = kind.run

        def counted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            self.names.append(kernel.fn.__name__)
            return run(kernel, *args, **kwargs)

        monkeypatch.setattr(kind, "run", counted)
        for module, names in REFERENCE.items():
            for name in names:
                monkeypatch.setattr(f"newllm.reference.{module}.{name}", partial(_refuse, name))


REFERENCE = {
    "infini": ("local_attention", "scan", "read", "write_segments", "feature_map", "mix"),
    "window": ("local_attention", "rotate"),
    "memory": ("scan", "read", "memory_update", "memory_scan", "memory_retrieve"),
}


def _refuse(name: str, *args: Any, **kwargs: Any) -> None:
    raise AssertionError(f"the reference's {name} ran")
