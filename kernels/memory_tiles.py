"""Tile sizes of the memory's kernels, by architecture and by the widest row: plain data."""

from __future__ import annotations

import torch

from newllm.kernels.common import padded

Tiles = dict[str, int]
# (widest row in elements, bytes of an element) -> tiles.
ByWidth = dict[tuple[int, int], Tiles]


def _tile(tokens: int, columns: int, warps: int, stages: int) -> Tiles:
    return {"BT": tokens, "BV": columns, "num_warps": warps, "num_stages": stages}


# BT tokens a step, BV columns of a matrix a program. "default" fits into 99 KB of shared memory.
_FOLD: dict[tuple[int, int] | str, ByWidth] = {
    (9, 0): {
        (64, 2): _tile(64, 64, 4, 4),
        (128, 2): _tile(64, 128, 8, 3),
        (256, 2): _tile(32, 64, 8, 3),
        (64, 4): _tile(32, 64, 4, 3),
        (128, 4): _tile(32, 64, 8, 2),
        (256, 4): _tile(16, 32, 8, 2),
    },
    "default": {
        (128, 2): _tile(64, 64, 4, 2),
        (256, 2): _tile(32, 64, 8, 2),
        (128, 4): _tile(32, 64, 8, 1),
        (256, 4): _tile(16, 32, 8, 1),
    },
}
_BACKWARD: dict[tuple[int, int] | str, ByWidth] = {
    (9, 0): {
        (64, 2): _tile(64, 64, 4, 2),
        (128, 2): _tile(64, 128, 8, 2),
        (256, 2): _tile(32, 64, 8, 1),
        (128, 4): _tile(16, 64, 8, 1),
        (256, 4): _tile(16, 16, 8, 1),
    },
    "default": {
        (128, 2): _tile(32, 64, 4, 1),
        (256, 2): _tile(16, 32, 8, 1),
        (128, 4): _tile(16, 32, 8, 1),
        (256, 4): _tile(16, 16, 8, 1),
    },
}
# BV columns of a matrix a program, BT of the correction's a step, for keys of so many bytes.
_DELTA: dict[tuple[int, int] | str, ByWidth] = {
    (9, 0): {
        (128, 2): _tile(128, 16, 4, 3),
        (256, 2): _tile(32, 16, 8, 2),
        (128, 4): _tile(32, 16, 8, 2),
        (256, 4): _tile(16, 16, 8, 2),
    },
    "default": {
        (128, 2): _tile(32, 16, 4, 2),
        (256, 2): _tile(32, 16, 8, 2),
        (128, 4): _tile(32, 16, 8, 2),
        (256, 4): _tile(16, 16, 8, 2),
    },
}

MEMORY: dict[str, dict[tuple[int, int] | str, ByWidth]] = {
    "_memory_fold_forward_kernel": _FOLD,
    "_memory_fold_forward_correction_kernel": _FOLD,
    "_memory_fold_backward_kernel": _BACKWARD,
    "_memory_fold_backward_norm_kernel": _BACKWARD,
    "_memory_retrieve_forward_kernel": _BACKWARD,
    "_memory_retrieve_backward_queries_kernel": _BACKWARD,
    "_memory_retrieve_backward_memory_kernel": _FOLD,
    "_memory_scan_delta_kernel": _DELTA,
    "_memory_scan_backward_step_kernel": _DELTA,
}

# Elements of a program of the linear scan; tokens of a program that loads the matrices of a segment once;
# programs that fill a device, for calls without segments, which are cut into as many parts as that takes.
ELEMENTS, CHUNK, PROGRAMS = 512, 512, 256


def memory_tiles(kernel: str, device: torch.device, dtype: torch.dtype, *, width: int, columns: int) -> Tiles:
    """Launch options of ``kernel`` for rows of ``width`` elements; BV no more than ``columns`` need."""
    table = MEMORY[kernel]
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else "default"
    by_width = table.get(capability, table["default"])
    sizes = next(by_width[key] for key in sorted(by_width) if key[0] >= width and key[1] == dtype.itemsize)
    return {**sizes, "BV": min(sizes["BV"], padded(columns))}


def even_chunk(tokens: int, heads: int) -> int:
    """Tokens of a part when ``tokens`` of each of ``heads`` are cut into parts that fill the device."""
    parts = max(1, PROGRAMS // heads)
    return -(-tokens // (64 * parts)) * 64
