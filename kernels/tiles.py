"""Tile sizes by kernel and architecture: plain data, nothing is tuned while a program runs."""

import torch

Tiles = dict[str, int]
# (widest row in elements, bytes of an element) -> tiles.
ByWidth = dict[tuple[int, int], Tiles]


def _tile(rows: int, columns: int, warps: int, stages: int) -> Tiles:
    return {"BT": rows, "BS": columns, "num_warps": warps, "num_stages": stages}


# BT queries by BS keys a step. "default" fits into 99 KB of shared memory.
ATTENTION: dict[str, dict[tuple[int, int] | str, ByWidth]] = {
    "_infini_attention_forward_kernel": {
        (9, 0): {
            (64, 2): _tile(64, 64, 4, 2),
            (128, 2): _tile(64, 64, 4, 3),
            (256, 2): _tile(64, 32, 8, 2),
            (128, 4): _tile(32, 32, 4, 2),
            (256, 4): _tile(16, 32, 4, 1),
        },
        "default": {
            (128, 2): _tile(64, 64, 4, 2),
            (256, 2): _tile(64, 32, 8, 1),
            (128, 4): _tile(32, 32, 4, 1),
            (256, 4): _tile(16, 16, 4, 1),
        },
    },
    "_infini_attention_backward_keys_kernel": {
        (9, 0): {
            (64, 2): _tile(64, 64, 4, 2),
            (128, 2): _tile(64, 64, 4, 2),
            (256, 2): _tile(32, 64, 8, 1),
            (128, 4): _tile(32, 32, 4, 1),
            (256, 4): _tile(16, 16, 4, 1),
        },
        "default": {
            (64, 2): _tile(64, 64, 4, 1),
            (128, 2): _tile(32, 64, 4, 1),
            (256, 2): _tile(16, 32, 4, 1),
            (128, 4): _tile(16, 32, 4, 1),
            (256, 4): _tile(16, 16, 4, 1),
        },
    },
    "_infini_attention_backward_queries_kernel": {
        (9, 0): {
            (64, 2): _tile(64, 64, 4, 2),
            (128, 2): _tile(64, 64, 4, 2),
            (256, 2): _tile(64, 32, 8, 1),
            (128, 4): _tile(32, 32, 4, 1),
            (256, 4): _tile(16, 16, 4, 1),
        },
        "default": {
            (64, 2): _tile(64, 64, 4, 1),
            (128, 2): _tile(64, 32, 4, 1),
            (256, 2): _tile(32, 16, 4, 1),
            (128, 4): _tile(32, 16, 4, 1),
            (256, 4): _tile(16, 16, 4, 1),
        },
    },
    # BT queries by BS columns of the memory's gradient.
    "_infini_attention_backward_recall_kernel": {
        (9, 0): {
            (64, 2): _tile(64, 64, 4, 2),
            (128, 2): _tile(64, 128, 8, 1),
            (256, 2): _tile(32, 64, 8, 1),
            (128, 4): _tile(16, 64, 4, 1),
            (256, 4): _tile(16, 32, 4, 1),
        },
        "default": {
            (64, 2): _tile(32, 64, 4, 1),
            (128, 2): _tile(32, 64, 8, 1),
            (256, 2): _tile(16, 32, 8, 1),
            (128, 4): _tile(16, 32, 4, 1),
            (256, 4): _tile(16, 16, 4, 1),
        },
    },
}

TILES: dict[str, dict[tuple[int, int] | str, Tiles]] = {
    # BT ring slots or BM columns of the memory a program, BS tokens of a segment at once; PDL: programmatic
    # dependent launch, which overlaps a kernel's start with the end of the one before.
    "_infini_decode_split_kernel": {
        (9, 0): {"BT": 64, "BM": 32, "BS": 32, "PDL": 1, "num_warps": 4, "num_stages": 1},
        "default": {"BT": 64, "BM": 32, "BS": 32, "PDL": 0, "num_warps": 4, "num_stages": 1},
    },
    # BN splits at once.
    "_infini_decode_combine_kernel": {
        (9, 0): {"BN": 16, "PDL": 1, "num_warps": 1},
        "default": {"BN": 16, "PDL": 0, "num_warps": 8},
    },
}


def tiles_of(kernel: str, device: torch.device) -> Tiles:
    """The tile sizes and launch options of ``kernel`` on ``device``."""
    table = TILES[kernel]
    if device.type != "cuda":
        return table["default"]
    return table.get(torch.cuda.get_device_capability(device), table["default"])


def attention_tiles(kernel: str, device: torch.device, width: int, itemsize: int) -> Tiles:
    """The same for a kernel of the attention, whose rows are ``width`` elements of ``itemsize`` bytes."""
    table = ATTENTION[kernel]
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else "default"
    by_width = table.get(capability, table["default"])
    return next(by_width[key] for key in sorted(by_width) if key[0] >= width and key[1] == itemsize)
