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
# Context sweeps: no heads, no window. The last shape of a CPU shows how many sweeps Jacobi's method takes.
CONVERGENCE = "convergence"


def _sweep(width: int, batch: int, tokens: int, name: str = "d{} B{}") -> Shape:
    return Shape(name.format(width, batch), batch, 1, 1, tokens, width, 0, 0)


_CPU = "CPU d{} B{}"
SWEEPS: Shapes = {
    "cuda": (
        *(_sweep(width, 1, 2048) for width in (128, 256, 512, 768, 1024, 2048)),
        *(_sweep(768, batch, 2048) for batch in (8, 16, 64, 112, 128)),
        _sweep(768, 1, 32768, "d{} B{} 32K"),
        _sweep(64, 1, 512, CONVERGENCE),
    ),
    "cpu": (
        *(_sweep(width, 1, 2048 if width == 768 else 256, _CPU) for width in (64, 128, 256, 512, 768, 1024)),
        *(_sweep(768, batch, 64, _CPU) for batch in (4, 16, 64)),
        _sweep(64, 1, 512, CONVERGENCE),
    ),
}
LONG: Shapes = {"cuda": (_8B._replace(name="8B 1M", tokens=2**20),), "cpu": (_SMALL._replace(tokens=4096),)}
