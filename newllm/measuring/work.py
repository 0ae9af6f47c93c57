"""The least work of an operator, and the time it takes at the ceilings measured in the same run."""

from __future__ import annotations

from typing import NamedTuple

import torch

from newllm.measuring.shapes import Shape
from newllm.measuring.timing import Clock

FORWARD, BOTH = "fwd", "fwd+bwd"
DIRECTIONS = (FORWARD, BOTH)


class Work(NamedTuple):
    """Floating-point operations of the matrix products, and bytes that must be read or written."""

    flops: float
    bytes: float

    def __add__(self, other: object) -> Work:
        assert isinstance(other, Work)
        return Work(self.flops + other.flops, self.bytes + other.bytes)


class Ceilings(NamedTuple):
    """What the device reaches: FLOP/s in a large matrix product, bytes/s in a large copy."""

    flops: float
    bandwidth: float

    def floor_ms(self, work: Work) -> float:
        """No implementation of ``work`` is faster than this."""
        return 1e3 * max(work.flops / self.flops, work.bytes / self.bandwidth)


def measure_ceilings(clock: Clock, dtype: torch.dtype) -> Ceilings:
    """Ceilings of the clock's device; the product is of ``dtype``, reading and writing both count."""
    size, length = (8192, 2**30) if clock.device.type == "cuda" else (1024, 2**24)
    left, right = (torch.randn(size, size, device=clock.device, dtype=dtype) for _ in range(2))
    source = torch.zeros(length, device=clock.device)
    target = torch.empty_like(source)
    timed = clock.race(
        {"product": lambda: left @ right, "copy": lambda: target.copy_(source)}, seconds=1, rounds=(5, 30)
    )
    return Ceilings(2e3 * size**3 / timed["product"].ms, 2e3 * source.nbytes / timed["copy"].ms)


def attention(shape: Shape, direction: str, reach: int | None, itemsize: int) -> Work:
    """Causal attention to the last ``reach`` keys (None: to all): two products forward, five backward."""
    reach = min(reach or shape.tokens, shape.tokens)
    pairs = shape.tokens * reach - reach * (reach - 1) // 2
    products = 4 * shape.batch * shape.heads * pairs * shape.width
    return Work(products * (3.5 if direction == BOTH else 1), _streams(shape, direction, itemsize))


def memory(shape: Shape, direction: str, *, filled: bool, itemsize: int) -> Work:
    """Reading and writing the memory; before the first segment there is nothing to read unless ``filled``."""
    read = shape.query * (1 if filled else max(0, 1 - shape.segment / shape.tokens))
    products = 2 * shape.width * (read + shape.key)
    return Work(products * (3 if direction == BOTH else 1), _streams(shape, direction, itemsize))


def layer(shape: Shape, direction: str, *, filled: bool, itemsize: int) -> Work:
    """The whole layer, q, k and v being read once."""
    window = attention(shape, direction, shape.window, itemsize)
    return window + memory(shape, direction, filled=filled, itemsize=itemsize)._replace(bytes=0)


def write(shape: Shape, direction: str, itemsize: int, states: int = 1) -> Work:
    """Keys and values into ``states`` memories: one of a single update, one per segment of a scan."""
    stored = 4 * shape.batch * shape.kv_heads * shape.width * (shape.width + 1) * states
    factor, tensors = (3, 6) if direction == BOTH else (1, 2)
    return Work(2 * shape.width * shape.key * factor, tensors * shape.key * itemsize + stored)


def read(shape: Shape, direction: str, itemsize: int) -> Work:
    """Queries from one memory."""
    factor, tensors = (3, 5) if direction == BOTH else (1, 2)
    return Work(2 * shape.width * shape.query * factor, tensors * shape.query * itemsize)


def recurrence(shape: Shape, direction: str, itemsize: int) -> Work:
    """A context layer over all tokens: a product of the input and one of the context, thrice backward."""
    size, weights = shape.batch * shape.tokens * shape.width, shape.width**2
    factor, tensors = (3, 5) if direction == BOTH else (1, 2)
    return Work(4 * size * shape.width * factor, (tensors * size + 2 * weights) * itemsize)


def token(shape: Shape, itemsize: int) -> Work:
    """One token of one layer: the ring and the memory are read once."""
    ring = 2 * shape.batch * shape.kv_heads * shape.window * shape.width
    matrix = shape.batch * shape.kv_heads * shape.width * (shape.width + 1)
    products = shape.batch * shape.heads * shape.width * (4 * shape.window + 2 * shape.width)
    return Work(products, ring * itemsize + 4 * matrix)


def _streams(shape: Shape, direction: str, itemsize: int) -> float:
    """Bytes of q, k, v and the output; backward reads these and a gradient and writes three."""
    forward = 2 * shape.query + 2 * shape.key
    backward = 4 * shape.query + 4 * shape.key
    return itemsize * (forward + (backward if direction == BOTH else 0))
