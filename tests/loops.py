"""The equations as loops in float64: one token, one head, one row at a time, without a batch or padding.

Nothing here is shared with newllm. Vectors are numpy arrays of one head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

Vector = np.ndarray
Map = Callable[[Vector], Vector]


def elu_plus_one(scale: float = 1.0, bias: float = 0.0) -> Map:
    """sigma(u) = ELU(scale u + bias) + 1."""

    def sigma(u: Vector) -> Vector:
        x = [scale * each + bias for each in u]
        return np.array([each + 1 if each > 0 else math.exp(each) for each in x])

    return sigma


def dpfp(order: int) -> Map:
    """Products of the parts of [u, -u] above zero with their neighbours up to ``order`` places away."""

    def phi(u: Vector) -> Vector:
        halves = [max(each, 0.0) for each in (*u, *-u)]
        n = len(halves)
        return np.array([halves[i] * halves[(i - j) % n] for j in range(1, order + 1) for i in range(n)])

    return phi


@dataclass
class Memory:
    """One memory: matrix F x V, norm F, and how many tokens the norm holds."""

    sigma: Map
    matrix: np.ndarray
    norm: Vector
    rule: str = "linear"
    eps: float = 1e-6
    count: int = 0
    guarded: bool = False
    peak: float = 0.0  # the largest readout if nothing cancelled: what rounding errors are relative to

    @classmethod
    def empty(cls, sigma: Map, key: int, value: int, **options: object) -> Memory:
        features = len(sigma(np.zeros(key)))
        return cls(sigma, np.zeros((features, value)), np.zeros(features), **options)  # type: ignore[arg-type]

    def read(self, query: Vector) -> Vector:
        phi = self.sigma(query)
        numerator, denominator = np.zeros(self.matrix.shape[1]), 0.0
        for f, part in enumerate(phi):
            numerator += part * self.matrix[f]
            denominator += part * self.norm[f]
        self.peak = max(self.peak, float((phi @ abs(self.matrix)).max()) / max(denominator, self.eps))
        return numerator / max(denominator, self.eps)

    def write(self, tokens: Sequence[tuple[Vector, Vector]], weight: float = 1.0) -> None:
        """Add a segment; every token of it meets the memory as it was before the segment."""
        matrix, norm = self.matrix.copy(), self.norm.copy()
        eta = min(1.0, self.count / len(tokens)) if self.guarded and tokens else 1.0
        for key, value in tokens:
            phi = self.sigma(key)
            known = 0 * value if self.rule == "linear" else eta * self.read(key)
            matrix += weight * np.outer(phi, value - known)
            norm += weight * self.novelty(phi) * phi
        self.matrix, self.norm, self.count = matrix, norm, self.count + len(tokens)

    def novelty(self, phi: Vector) -> float:
        if self.rule != "gamma":
            return 1.0
        return max(0.0, 1.0 - float(phi @ self.norm) / max(float(phi @ phi), self.eps))


def rotated(x: Vector, angle: float) -> Vector:
    """Pairs (x_i, x_{i + K/2}) turned by angle * 10000^(-2i/K)."""
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
        turn = angle * 10000.0 ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(turn) - x[i + half] * math.sin(turn)
        out[i + half] = x[i + half] * math.cos(turn) + x[i] * math.sin(turn)
    return out


def attend(query: Vector, seen: Sequence[tuple[int, Vector, Vector]], rope: bool) -> Vector:
    """Softmax attention to (distance, key, value): only the distance enters the rotation."""
    scores = [
        float(query @ (rotated(key, -distance) if rope else key)) / math.sqrt(len(query))
        for distance, key, _ in seen
    ]
    peak = max(scores)
    weights = [math.exp(score - peak) for score in scores]
    total = sum(weights)
    return sum((w / total * value for w, (_, _, value) in zip(weights, seen, strict=True)), 0 * seen[0][2])


@dataclass
class Layer:
    """What an Infini layer is told once: sizes, gates of its query heads, feature maps of its memories."""

    window: int | None
    segment: int
    maps: list[Map]
    gates: list[float] | None = None
    rope: bool = False
    rule: str = "linear"
    eps: float = 1e-6


@dataclass
class Stream:
    """One row through one layer, token by token; ``keys[t][h]`` and ``values[t][h]`` are all it ever saw."""

    layer: Layer
    memories: list[Memory]
    keys: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def start(cls, layer: Layer, key: int, value: int) -> Stream:
        memories = [Memory.empty(m, key, value, rule=layer.rule, eps=layer.eps) for m in layer.maps]
        return cls(layer, memories)

    def step(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """q ``[H, K]``, k ``[Hkv, K]``, v ``[Hkv, V]`` of the next token -> ``[H, V]``."""
        self.keys.append(k)
        self.values.append(v)
        out = np.array([self.head(h, q[h], h * len(k) // len(q)) for h in range(len(q))])
        if len(self.keys) % self.layer.segment == 0 and self.layer.gates is not None:
            for h, memory in enumerate(self.memories):
                whole = range(len(self.keys) - self.layer.segment, len(self.keys))
                memory.write([(self.keys[t][h], self.values[t][h]) for t in whole])
        return out

    def head(self, h: int, query: Vector, shared: int) -> Vector:
        """Query head h, which reads key/value head ``shared``."""
        now = len(self.keys) - 1
        window = self.layer.window
        first = now // self.layer.segment * self.layer.segment if window is None else now - window + 1
        visible = range(max(0, first), now + 1)
        seen = [(now - t, self.keys[t][shared], self.values[t][shared]) for t in visible]
        local = attend(query, seen, self.layer.rope)
        if self.layer.gates is None:
            return local
        g = self.layer.gates[h]
        return g * self.memories[shared].read(query) + (1 - g) * local

    def ring(self, tokens: list[np.ndarray], heads: int, width: int) -> np.ndarray:
        """The last R of ``tokens``, token n in slot n mod R, zeros where none has been: ``[Hkv, R, D]``."""
        size = self.layer.window or self.layer.segment
        ring = np.zeros((heads, size, width))
        for n, token in enumerate(tokens):
            ring[:, n % size] = token
        return ring
