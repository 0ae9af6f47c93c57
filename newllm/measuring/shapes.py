"""The sizes at which layers are measured."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """A layer's sizes; in decoding ``tokens`` are those before the new one."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    tokens: int
    width: int
    window: int = 1024
    segment: int = 1024

    @property
    def query(self) -> int:
        """Elements of the queries, and of the output."""
        return self.batch * self.heads * self.tokens * self.width

    @property
    def key(self) -> int:
        """Elements of the keys, and of the values."""
        return self.batch * self.kv_heads * self.tokens * self.width

    def slice(self) -> Shape:
        """As few rows and tokens as still cross window and segment borders at odd places: for judging."""
        tokens = min(self.tokens, 2 * self.window + self.window // 2 + 3)
        return self._replace(batch=min(self.batch, 2), tokens=tokens)


Shapes = dict[str, tuple[Shape, ...]]

_8B = Shape("8B", 1, 32, 8, 32768, 128)
_SMOLLM = Shape("SmolLM", 8, 9, 3, 8192, 64)
_SMALL = Shape("small", 1, 4, 2, 512, 32, 64, 64)

# Device type -> shapes of the layer; a CPU measures what it can in seconds.
LAYERS: Shapes = {"cuda": (_8B, _SMOLLM), "cpu": (_SMALL,)}
DECODES: Shapes = {
    device: tuple(
        base._replace(name=f"{base.name} {length}", tokens=tokens)
        for length, tokens in (("4K", 4106), ("1M", 1_000_010))
    )
    for device, base in (("cuda", _8B), ("cpu", _SMALL))
}
# Context sweeps: no heads, no window. Two shapes are for Jacobi's: how many it takes, and the time of one.
CONVERGENCE = "convergence"
JACOBI = "d768 B1 100K"


def _sweep(width: int, batch: int, tokens: int, name: str = "d{} B{}") -> Shape:
    return Shape(name.format(width, batch), batch, 1, 1, tokens, width, 0, 0)


_CPU = "CPU d{} B{}"
SWEEPS: Shapes = {
    "cuda": (
        *(_sweep(width, 1, 2048) for width in (128, 256, 512, 768, 1024, 2048)),
        *(_sweep(768, batch, 2048) for batch in (8, 16, 64, 112, 128)),
        _sweep(768, 1, 32768, "d{} B{} 32K"),
        _sweep(768, 1, 100_000, JACOBI),
        _sweep(64, 1, 512, CONVERGENCE),
    ),
    "cpu": (
        *(_sweep(width, 1, 2048 if width == 768 else 256, _CPU) for width in (64, 128, 256, 512, 768, 1024)),
        *(_sweep(768, batch, 64, _CPU) for batch in (4, 16, 64)),
        _sweep(64, 1, 512, CONVERGENCE),
    ),
}
_SERVED = {
    "cuda": {
        "B1 4K": (1, 4096),
        "B1 128K": (1, 2**17),
        "B1 1M": (1, 2**20),
        "B64 32K": (64, 2**15),
        "prefill 1M": (1, 2**20),
        "state": (1, 4096),
        "generate 4K": (1, 4096),
    },
    "cpu": {
        "B1 4K": (1, 300),
        "B1 1M": (1, 3000),
        "B64 32K": (4, 300),
        "prefill 1M": (1, 3000),
        "state": (1, 300),
        "generate 4K": (1, 300),
    },
}
# Whole models of the shape of SmolLM2-135M; a CPU's small ones stand for the lengths that they are named by.
SERVES: Shapes = {
    device: tuple(
        base._replace(name=name, batch=batch, tokens=tokens)
        for name, (batch, tokens) in _SERVED[device].items()
    )
    for device, base in (("cuda", _SMOLLM), ("cpu", _SMALL))
}
LONG: Shapes = {"cuda": (_8B._replace(name="8B 1M", tokens=2**20),), "cpu": (_SMALL._replace(tokens=4096),)}
