"""Values that cross room borders: states and parameters of the operators, as plain NamedTuples.

Sizes: B batch, H query heads, Hkv key/value heads, T tokens, K key width, V value width,
F feature width (K for ``elu1``, ``2 * K * order`` for ``dpfp``), R ring length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

Rule = Literal["linear", "delta", "gamma"]
GateKind = Literal["sigmoid", "tanh"]
Detach = Literal["none", "segment", "full"]


class FeatureMap(NamedTuple):
    """How keys and queries become non-negative memory features.

    ``kind="elu1"`` is sigma(u) = ELU(scale * u + bias) + 1 with ``scale`` and ``bias`` of shape
    ``[Hkv]``; ``None`` stands for the paper's 1 and 0 (Munkhdalai et al. 2024, eq. 3 ff.).
    ``kind="dpfp"`` is the deterministic parameter-free projection of the given ``order``
    (Schlag et al. 2021, eq. 37).

    ``write [Hkv, K]`` and ``write_bias [Hkv]`` (both or neither) are a write gate: the features of a key
    count sigmoid(write . k + write_bias) times, those of queries once.
    """

    kind: Literal["elu1", "dpfp"] = "elu1"
    scale: Tensor | None = None
    bias: Tensor | None = None
    order: int | None = None
    write: Tensor | None = None
    write_bias: Tensor | None = None


class MemoryState(NamedTuple):
    """An associative memory: ``matrix [B, Hkv, F, V]``, ``norm [B, Hkv, F]``, both float32.

    ``count [B]`` (int64) is the number of real tokens in ``norm``; the delta rule's guard needs it.
    ``None`` means that the guard is off.
    """

    matrix: Tensor
    norm: Tensor
    count: Tensor | None = None  # type: ignore[assignment] # shadows tuple.count


class InfiniState(NamedTuple):
    """All that an Infini-attention layer remembers of a stream.

    ``matrix [B, Hkv, F, V]`` and ``norm [B, Hkv, F]`` (float32) hold whole segments only; both are
    ``None`` for a layer without memory. ``keys [B, Hkv, R, K]`` and ``values [B, Hkv, R, V]`` are a
    ring of un-rotated projections, a row's token n in slot ``n % R``. ``position [B]`` (int64)
    counts the row's real tokens. ``recent [B, taps - 1, C]`` is what a short convolution of ``taps`` taps
    over C channels read last; the operators leave it alone.
    """

    matrix: Tensor | None
    norm: Tensor | None
    keys: Tensor
    values: Tensor
    position: Tensor
    recent: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> InfiniState:
        """The state with ``function`` applied to each tensor it has."""
        return InfiniState(*(None if part is None else function(part) for part in self))  # type: ignore[arg-type]

    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(tensor.nbytes for tensor in self if tensor is not None)


class ContextState(NamedTuple):
    """All that a model of contexts remembers of a stream; C context width, E embedding width, M slots.

    ``context [B, C]`` (float32, or float64 of a float64 model) after the last token, of all blocks side by
    side; ``position [B]`` (int64) counts the row's real tokens. ``recent [B, k - 1, E]`` holds the last
    embeddings of a block that reads k. ``keys`` and ``values`` ``[B, M, E]`` are those of earlier contexts,
    ``slots [B, M]`` (int64) their positions, -1 for none. What a model does not need is ``None``.
    """

    context: Tensor
    position: Tensor
    recent: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    slots: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> ContextState:
        """The state with ``function`` applied to each tensor it has."""
        return ContextState(*(None if part is None else function(part) for part in self))  # type: ignore[arg-type]

    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(tensor.nbytes for tensor in self if tensor is not None)


class ContextParams(NamedTuple):
    """Parameters of L context layers, stacked; C context width, E input width.

    ``weight_c [L, C, C]`` and ``weight_x [L, C, E]`` are the two column blocks of a layer's linear map
    on ``[c ; x]``, ``bias [L, C]`` its bias. ``ln_weight`` and ``ln_bias`` ``[L, C]`` belong to the
    layer norms. All have the same floating dtype.
    """

    weight_c: Tensor
    weight_x: Tensor
    bias: Tensor
    ln_weight: Tensor
    ln_bias: Tensor


class GatedParams(NamedTuple):
    """Parameters of the gated context update; H hidden width, N hidden layers after the first.

    The network on ``[x ; c]`` has N + 1 Linear-ReLU layers. Its first is split by columns into
    ``weight_x [H, E]`` and ``weight_c [H, C]``, with ``bias [H]``; the others are stacked in
    ``weight_h [N, H, H]`` and ``bias_h [N, H]`` (N may be 0). Forget gate, input gate and candidate
    read its output: ``weight_f``, ``weight_i``, ``weight_d`` ``[C, H]`` and ``bias_f``, ``bias_i``,
    ``bias_d`` ``[C]``. ``ln_weight`` and ``ln_bias`` ``[C]`` belong to the layer norm. All tensors have
    the same floating dtype. ``clamp`` bounds the absolute value of the result; ``None`` leaves it free.
    """

    weight_x: Tensor
    weight_c: Tensor
    bias: Tensor
    weight_h: Tensor
    bias_h: Tensor
    weight_f: Tensor
    weight_i: Tensor
    weight_d: Tensor
    bias_f: Tensor
    bias_i: Tensor
    bias_d: Tensor
    ln_weight: Tensor
    ln_bias: Tensor
    clamp: float | None = None


class SweepInfo(NamedTuple):
    """How a context sweep was computed.

    ``method`` is the one that produced the result ("sequential" where "block" fell back), ``sweeps``
    the number of passes over the sequence, given-up ones included. ``residual`` and ``rho`` are detached
    scalar tensors, so reading them is up to the caller. ``residual`` is the largest change in the last
    Jacobi sweep, the largest jump at a chunk border of a block sweep, 0 for the sequential definition.
    ``rho`` estimates by what a token multiplies a small difference between two contexts, NaN where the
    method does not show it: below 1 the recurrence forgets where it began.
    """

    method: Literal["sequential", "block", "jacobi"]
    sweeps: int
    residual: Tensor
    rho: Tensor
