"""Tile sizes and launch options of every kernel, by architecture: data, nothing is tuned at run time."""

from functools import cache

import torch

Tiles = dict[str, int]
# (widest row in elements, bytes of an element) -> tiles; by compute capability, or "default".
ByWidth = dict[tuple[int, int], Tiles]
ByDevice = dict[tuple[int, int] | str, ByWidth]


def _attention(rows: int, columns: int, warps: int, stages: int, registers: int | None = None) -> Tiles:
    """BT queries by BS keys a step, and at most so many registers a thread."""
    limit = {} if registers is None else {"maxnreg": registers}
    return {"BT": rows, "BS": columns, "num_warps": warps, "num_stages": stages, **limit}


def _memory(tokens: int, columns: int, warps: int, stages: int) -> Tiles:
    """BT tokens a step, BV columns of a matrix a program."""
    return {"BT": tokens, "BV": columns, "num_warps": warps, "num_stages": stages}


def _any_width(**tiles: int) -> ByWidth:
    return {(256, 2): tiles, (256, 4): tiles}


def _vector(rows: int, warps: int) -> Tiles:
    """BN rows of a matrix a program, which holds them whole."""
    return {"BN": rows, "num_warps": warps, "num_stages": 1}


def _vectors(elements: int, num_warps: int) -> Tiles:
    """As few rows of a matrix and vectors as tensor cores take, C times BC of their elements a step."""
    return {"BN": 16, "BB": 16, "C": num_warps, "BC": elements, "num_warps": num_warps, "num_stages": 1}


# "default" fits into 99 KB of shared memory.
_ATTENTION: dict[str, ByDevice] = {
    "_infini_attention_forward_kernel": {
        (9, 0): {
            (64, 2): _attention(64, 64, 4, 3),
            (128, 2): _attention(64, 64, 4, 3),
            (256, 2): _attention(64, 32, 8, 2),
            (128, 4): _attention(32, 32, 4, 2),
            (256, 4): _attention(16, 32, 4, 1),
        },
        "default": {
            (128, 2): _attention(64, 64, 4, 2),
            (256, 2): _attention(64, 32, 8, 1),
            (128, 4): _attention(32, 32, 4, 1),
            (256, 4): _attention(16, 16, 4, 1),
        },
    },
    "_infini_attention_backward_keys_kernel": {
        (9, 0): {
            (64, 2): _attention(64, 64, 4, 3),
            (128, 2): _attention(64, 64, 4, 2),
            (256, 2): _attention(32, 64, 8, 1),
            (128, 4): _attention(32, 32, 4, 1),
            (256, 4): _attention(16, 16, 4, 1),
        },
        "default": {
            (64, 2): _attention(64, 64, 4, 1),
            (128, 2): _attention(32, 64, 4, 1),
            (256, 2): _attention(16, 32, 4, 1),
            (128, 4): _attention(16, 32, 4, 1),
            (256, 4): _attention(16, 16, 4, 1),
        },
    },
    "_infini_attention_backward_queries_kernel": {
        (9, 0): {
            (64, 2): _attention(64, 64, 4, 2),
            (128, 2): _attention(64, 64, 4, 2),
            (256, 2): _attention(64, 32, 8, 1),
            (128, 4): _attention(32, 32, 4, 1),
            (256, 4): _attention(16, 16, 4, 1),
        },
        "default": {
            (64, 2): _attention(64, 64, 4, 1),
            (128, 2): _attention(64, 32, 4, 1),
            (256, 2): _attention(32, 16, 4, 1),
            (128, 4): _attention(32, 16, 4, 1),
            (256, 4): _attention(16, 16, 4, 1),
        },
    },
    # Of float32 alone.
    "_infini_attention_backward_slopes_kernel": {
        (9, 0): {(128, 4): _attention(32, 32, 4, 1), (256, 4): _attention(16, 16, 4, 1)},
        "default": {(128, 4): _attention(32, 16, 4, 1), (256, 4): _attention(16, 16, 4, 1)},
    },
    # BT queries by BS columns of the memory's gradient.
    "_infini_attention_backward_prepare_kernel": {
        (9, 0): {
            (64, 2): _attention(64, 64, 4, 1, registers=168),
            (128, 2): _attention(64, 128, 4, 1),
            (256, 2): _attention(32, 64, 8, 1),
            (128, 4): _attention(16, 64, 4, 1),
            (256, 4): _attention(16, 32, 4, 1),
        },
        "default": {
            (64, 2): _attention(32, 64, 4, 1),
            (128, 2): _attention(32, 64, 4, 1),
            (256, 2): _attention(16, 32, 8, 1),
            (128, 4): _attention(16, 32, 4, 1),
            (256, 4): _attention(16, 16, 4, 1),
        },
    },
    "_infini_attention_backward_recall_kernel": {
        (9, 0): {
            (64, 2): _attention(64, 64, 4, 3),
            (128, 2): _attention(32, 128, 4, 3),
            (256, 2): _attention(32, 64, 8, 1),
            (128, 4): _attention(16, 64, 4, 1),
            (256, 4): _attention(16, 32, 4, 1),
        },
        "default": {
            (64, 2): _attention(32, 64, 4, 1),
            (128, 2): _attention(32, 64, 8, 1),
            (256, 2): _attention(16, 32, 8, 1),
            (128, 4): _attention(16, 32, 4, 1),
            (256, 4): _attention(16, 16, 4, 1),
        },
    },
}

_FOLD: ByDevice = {
    (9, 0): {
        (64, 2): _memory(64, 64, 4, 4),
        (128, 2): _memory(32, 128, 4, 4),
        (256, 2): _memory(32, 64, 8, 3),
        (64, 4): _memory(32, 64, 4, 3),
        (128, 4): _memory(32, 64, 8, 2),
        (256, 4): _memory(16, 32, 8, 2),
    },
    "default": {
        (128, 2): _memory(64, 64, 4, 2),
        (256, 2): _memory(32, 64, 8, 2),
        (128, 4): _memory(32, 64, 8, 1),
        (256, 4): _memory(16, 32, 8, 1),
    },
}
_BACKWARD: ByDevice = {
    (9, 0): {
        (64, 2): _memory(64, 64, 4, 2),
        (128, 2): _memory(64, 128, 8, 2),
        (256, 2): _memory(32, 64, 8, 1),
        (128, 4): _memory(16, 64, 8, 1),
        (256, 4): _memory(16, 16, 8, 1),
    },
    "default": {
        (128, 2): _memory(32, 64, 4, 1),
        (256, 2): _memory(16, 32, 8, 1),
        (128, 4): _memory(16, 32, 8, 1),
        (256, 4): _memory(16, 16, 8, 1),
    },
}
# BV columns of a matrix a program, BT of the correction's a step, for keys of so many bytes.
_DELTA: ByDevice = {
    (9, 0): {
        (128, 2): _memory(128, 16, 4, 3),
        (256, 2): _memory(32, 16, 8, 2),
        (128, 4): _memory(32, 16, 8, 2),
        (256, 4): _memory(16, 16, 8, 2),
    },
    "default": {
        (128, 2): _memory(32, 16, 4, 2),
        (256, 2): _memory(32, 16, 8, 2),
        (128, 4): _memory(32, 16, 8, 2),
        (256, 4): _memory(16, 16, 8, 2),
    },
}


def _chain(tokens: int, stages: int) -> Tiles:
    """BT tokens a step, of which STAGES are under way: few programs, each with a multiprocessor to itself."""
    return {"BT": tokens, "STAGES": stages, "num_warps": 8}


_GAMMA: ByDevice = {
    (9, 0): {
        (64, 2): _chain(128, 4),
        (128, 2): _chain(64, 4),
        (256, 2): _chain(32, 4),
        (128, 4): _chain(32, 4),
        (256, 4): _chain(16, 4),
    },
    "default": {
        (128, 2): _chain(64, 3),
        (256, 2): _chain(32, 3),
        (128, 4): _chain(32, 3),
        (256, 4): _chain(16, 3),
    },
}

TILES: dict[str, ByDevice] = {
    **_ATTENTION,
    "_memory_fold_forward_kernel": _FOLD,
    "_memory_fold_forward_correction_kernel": _FOLD,
    "_memory_fold_backward_kernel": {
        **_BACKWARD,
        (9, 0): {**_BACKWARD[9, 0], (128, 2): _memory(32, 128, 4, 3)},
    },
    "_memory_fold_backward_norm_kernel": _BACKWARD,
    "_memory_retrieve_forward_kernel": _BACKWARD,
    "_memory_retrieve_backward_queries_kernel": _BACKWARD,
    "_memory_retrieve_backward_memory_kernel": _FOLD,
    "_memory_scan_delta_kernel": _DELTA,
    "_memory_scan_gamma_kernel": _GAMMA,
    "_memory_scan_backward_step_kernel": _DELTA,
    # BT ring slots or BM columns of the memory a program, BS tokens of a segment at once.
    "_infini_decode_split_kernel": {"default": _any_width(BT=64, BM=32, BS=32, num_warps=4, num_stages=1)},
    # BN splits at once.
    "_infini_decode_combine_kernel": {
        (9, 0): _any_width(BN=16, num_warps=1),
        "default": _any_width(BN=16, num_warps=8),
    },
    # By the length of the vectors.
    "_gemv_kernel": {
        "default": {
            (256, 2): _vector(16, 4),
            (1024, 2): _vector(4, 4),
            (2048, 2): _vector(8, 8),
            (4096, 2): _vector(4, 8),
            (16384, 2): _vector(2, 16),
            (256, 4): _vector(16, 4),
            (1024, 4): _vector(4, 8),
            (4096, 4): _vector(2, 8),
            (16384, 4): _vector(1, 16),
        }
    },
    "_gemv_together_kernel": {
        (9, 0): {(16384, 2): _vectors(256, 4)},
        "default": {(16384, 2): _vectors(128, 8)},
    },
}

# Elements of a program of the linear scan; tokens of a program that loads the matrices of a segment once.
ELEMENTS, CHUNK = 512, 512
# Programs that fill a device, for calls without segments, which are cut into as many parts as that takes:
# those that write a memory, whose parts are to be added up, and those that read one.
WRITERS, READERS = 128, 256


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """A GPU's compute capability, (0, 0) of another device; asked by every launch, so not anew."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def tiles_of(kernel: str, device: torch.device, width: int, itemsize: int) -> Tiles:
    """Tiles of ``kernel`` on ``device`` for rows of ``width`` elements of ``itemsize`` bytes."""
    by_device = TILES[kernel]
    by_width = by_device.get(capability(device), by_device["default"])
    return next(by_width[key] for key in sorted(by_width) if key[0] >= width and key[1] == itemsize)


def dependent_launch(device: torch.device) -> Tiles:
    """Options of a kernel that starts while the previous one ends; PDL says whether there is such a thing."""
    return {"PDL": 1, "launch_pdl": 1} if capability(device) >= (9, 0) else {"PDL": 0}
