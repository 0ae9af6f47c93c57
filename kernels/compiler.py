"""Which ptxas compiles the kernels: not the one that forgets half an address."""

import warnings

import torch
from triton import knobs

# Before it, in kernels with many scalars, ptxas computes addresses of warp-group products from registers that
# nothing has written: what is read is then another address, or none.
FIRST_SOUND = (12, 9)


def choose_ptxas() -> None:
    """Let Triton compile for Hopper with the ptxas that it has for later devices, if its first is too old.

    For the whole process, as ``TRITON_PTXAS_PATH`` does; to be called before a kernel is compiled. Warns
    where there is no other.
    """
    if torch.version.hip:
        return
    chosen = knobs.nvidia.ptxas
    if _version(chosen) >= FIRST_SOUND:
        return
    newer = getattr(knobs.nvidia, "ptxas_blackwell", chosen)
    if _version(newer) >= FIRST_SOUND:
        knobs.nvidia.ptxas = newer.path
        return
    warnings.warn(
        f"ptxas {chosen.version} at {chosen.path} miscompiles kernels for Hopper devices: take Triton 3.7 or "
        "later, or let TRITON_PTXAS_PATH name a ptxas of CUDA 12.9 or later",
        stacklevel=2,
    )


def _version(tool: knobs.NvidiaTool) -> tuple[int, ...]:
    return tuple(map(int, tool.version.split(".")))
