"""What users could take instead. Each is called in the way and the layout that suits it best.

Queries and keys of attention peers are rotated beforehand, outside the timing; GQA is given to those that
know it and repeated keys and values to those that do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from newllm import backend as backends
from newllm.measuring import work
from newllm.measuring.entries import Entry, Prepared
from newllm.measuring.loops import segment_loop
from newllm.measuring.ours import Site, layer_inputs, qkv
from newllm.measuring.serving import llama_entries
from newllm.measuring.shapes import Shape
from newllm.measuring.sweeping import layer_of_torch_entries, loop_entries
from newllm.measuring.work import Work
from newllm.testing import Inputs


class Peer(NamedTuple):
    """An implementation by others: the ``module`` that must be installed, the ``device`` type it needs."""

    title: str
    module: str
    device: str | None
    entries: Callable[[Shape, Site], Iterator[Entry]]


def _attention_inputs(shape: Shape, site: Site) -> Inputs:
    return {name: x.contiguous() for name, x in qkv(shape, site.source()).items()}


def _tokens_first(inputs: Inputs) -> Inputs:
    """``[B, H, T, D]`` -> ``[B, T, H, D]``."""
    return {name: x.transpose(1, 2).contiguous() for name, x in inputs.items()}


def _attention_work(shape: Shape, site: Site, reach: int | None) -> Callable[[str], Work]:
    return partial(work.attention, shape, reach=reach, itemsize=site.dtype.itemsize)


def _flex(shape: Shape, site: Site) -> Iterator[Entry]:
    def prepare() -> Prepared:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def band(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (query - key < shape.window)

        mask = create_block_mask(band, None, None, shape.tokens, shape.tokens, device=site.device.type)
        compiled = torch.compile(flex_attention, dynamic=False)
        attend = partial(compiled, block_mask=mask, enable_gqa=shape.heads != shape.kv_heads)
        return Prepared(lambda q, k, v: attend(q, k, v), _attention_inputs(shape, site))

    least = _attention_work(shape, site, shape.window)
    yield Entry("window_attention", "FlexAttention", "window", shape, prepare, least)


def _flash(shape: Shape, site: Site) -> Iterator[Entry]:
    def prepare() -> Prepared:
        from flash_attn.cute.interface import flash_attn_func

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
            out = flash_attn_func(q, k, v, causal=True, window_size=(shape.window - 1, 0))
            return out[0] if isinstance(out, tuple) else out

        version = backends.version_of("flash-attn-4")
        return Prepared(attend, _tokens_first(_attention_inputs(shape, site)), detail=lambda: version)

    least = _attention_work(shape, site, shape.window)
    yield Entry("window_attention", "FA4", "window", shape, prepare, least)


class FullAttention:
    """Causal SDPA by the first of torch's backends that takes the size; ``taken`` names it."""

    def __init__(self) -> None:
        self.taken: str | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``[B, H, T, D]`` of q, from k and v of as many or fewer heads."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        order = ["CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]
        for name in order if self.taken is None else [self.taken]:
            with sdpa_kernel(getattr(SDPBackend, name)):
                try:
                    out = F.scaled_dot_product_attention(
                        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
                    )
                except RuntimeError:
                    if name in (order[-1], self.taken):
                        raise
                    continue
            self.taken = name
            return out
        raise AssertionError("the last backend returns or raises")


def _sdpa(shape: Shape, site: Site) -> Iterator[Entry]:
    def prepare() -> Prepared:
        attend = FullAttention()
        return Prepared(attend, _attention_inputs(shape, site), detail=lambda: attend.taken)

    yield Entry("full attention", "SDPA", "causal", shape, prepare, _attention_work(shape, site, None))


def _fla_inputs(shape: Shape, site: Site) -> Inputs:
    """q, k and v ``[B, T, H, D]``: every query head has keys and values of its own."""
    return _tokens_first(_attention_inputs(shape._replace(kv_heads=shape.heads), site))


def _linear(shape: Shape, site: Site) -> Iterator[Entry]:
    def prepare() -> Prepared:
        from fla.ops.linear_attn import chunk_linear_attn

        inputs = _fla_inputs(shape, site)
        inputs |= {name: F.elu(inputs[name]) + 1 for name in ("q", "k")}
        attend = partial(chunk_linear_attn, scale=1.0, normalize=True)
        return Prepared(lambda q, k, v: attend(q, k, v)[0], inputs, detail=_fla_version)

    yield Entry("linear attention", "fla", "normalised", shape, prepare, _fla_work(shape, site))


def _delta(shape: Shape, site: Site) -> Iterator[Entry]:
    def prepare() -> Prepared:
        from fla.ops.delta_rule import chunk_delta_rule

        inputs = _fla_inputs(shape, site)
        inputs["k"] = F.normalize(inputs["k"], dim=-1)
        rate = site.source().normal(shape.batch, shape.tokens, shape.heads).sigmoid()
        return Prepared(lambda q, k, v: chunk_delta_rule(q, k, v, rate)[0], inputs, detail=_fla_version)

    yield Entry("delta rule", "fla", "chunk", shape, prepare, _fla_work(shape, site))


def _fla_version() -> str:
    return backends.version_of("flash-linear-attention")


def _fla_work(shape: Shape, site: Site) -> Callable[[str], Work]:
    own_keys = shape._replace(kv_heads=shape.heads)
    return partial(work.memory, own_keys, filled=True, itemsize=site.dtype.itemsize)


def _loop_inputs(shape: Shape, site: Site) -> Inputs:
    inputs = layer_inputs(shape, site.source(), rule="linear", continued=False)
    (cos, sin), feature = inputs["rope"], inputs["feature"]
    tensors = {name: inputs[name].contiguous() for name in ("q", "k", "v", "beta")}
    return {**tensors, "scale": feature.scale, "bias": feature.bias, "cos": cos, "sin": sin}


def _loop(shape: Shape, site: Site, *, compiled: bool) -> Iterator[Entry]:
    def prepare() -> Prepared:
        function = torch.compile(segment_loop, dynamic=False) if compiled else segment_loop
        function = partial(function, window=shape.window, segment=shape.segment)
        return Prepared(function, _loop_inputs(shape, site), ("cos", "sin"))

    least = partial(work.layer, shape, filled=False, itemsize=site.dtype.itemsize)
    impl = "compiled segment loop" if compiled else "segment loop"
    # Compiling the unrolled loop takes longer than all the rest: once, for the direction that training needs.
    directions = (work.BOTH,) if compiled else work.DIRECTIONS
    yield Entry("infini_attention", impl, "linear", shape, prepare, least, directions)


PEERS = {
    "flex": Peer("FlexAttention", "torch", "cuda", _flex),
    "fa4": Peer("FA4", "flash_attn.cute", "cuda", _flash),
    "sdpa": Peer("SDPA", "torch", None, _sdpa),
    "fla-linear": Peer("fla linear attention", "fla", "cuda", _linear),
    "fla-delta": Peer("fla delta rule", "fla", "cuda", _delta),
    "loop": Peer("segment loop", "torch", None, partial(_loop, compiled=False)),
    "eager-loop": Peer("eager loop", "torch", None, partial(loop_entries, hoisted=False)),
    "hoisted-loop": Peer("hoisted loop", "torch", None, partial(loop_entries, hoisted=True)),
    "graph-loop": Peer(
        "compiled hoisted loop", "torch", "cuda", partial(loop_entries, hoisted=True, compiled=True)
    ),
    "lstm": Peer("LSTM", "torch", None, partial(layer_of_torch_entries, kind="LSTM")),
    "gru": Peer("GRU", "torch", None, partial(layer_of_torch_entries, kind="GRU")),
    "hf-llama": Peer("HF Llama", "transformers", None, llama_entries),
    "compiled-loop": Peer("compiled segment loop", "torch", "cuda", partial(_loop, compiled=True)),
}


def chosen(names: str, offered: tuple[str, ...]) -> tuple[str, ...]:
    """The peers that ``names`` asks for among those ``offered``: ``all``, ``none`` or a list with commas.

    Raises ValueError for an unknown name.
    """
    if names in ("all", "none"):
        return offered if names == "all" else ()
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in PEERS:
            raise ValueError(f"peers must be all, none or some of {', '.join(PEERS)}; got {name!r}")
    return tuple(name for name in offered if name in wanted)


def refusal(peer: Peer, device: torch.device) -> str | None:
    """Why ``peer`` cannot run on ``device`` here; None where it can."""
    if peer.device not in (None, device.type):
        return f"{peer.title}: needs a {peer.device} device"
    if not backends.installed(peer.module):
        return f"{peer.title}: {peer.module} is not installed"
    return None
