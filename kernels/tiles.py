"""Tile sizes by kernel and architecture: plain data, nothing is tuned while a program runs."""

import torch

Tiles = dict[str, int]

TILES: dict[str, dict[tuple[int, int] | str, Tiles]] = {
    # BT ring slots or BM columns of the memory a program, BS tokens of a segment at once; PDL: programmatic
    # dependent launch, which overlaps a kernel's start with the end of the one before.
    "_infini_decode_split_kernel": {
        (9, 0): {"BT": 64, "BM": 32, "BS": 32, "PDL": 1, "num_warps": 4, "num_stages": 1},
        "default": {"BT": 64, "BM": 32, "BS": 32, "PDL": 0, "num_warps": 4, "num_stages": 1},
    },
    # BN splits at once.
    "_infini_decode_combine_kernel": {
        (9, 0): {"BN": 16, "PDL": 1, "num_warps": 8},
        "default": {"BN": 16, "PDL": 0, "num_warps": 8},
    },
}


def tiles_of(kernel: str, device: torch.device) -> Tiles:
    """The tile sizes and launch options of ``kernel`` on ``device``."""
    table = TILES[kernel]
    if device.type != "cuda":
        return table["default"]
    return table.get(torch.cuda.get_device_capability(device), table["default"])
