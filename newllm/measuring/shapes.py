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
LONG: Shapes = {"cuda": (_8B._replace(name="8B 1M", tokens=2**20),), "cpu": (_SMALL._replace(tokens=4096),)}
