"""A driver of a Hopper GPU that is not there: enough to bind arguments and to compile."""

from __future__ import annotations

import torch
from triton.backends.compiler import GPUTarget


class Hopper:
    """The part of a driver that compiling needs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return device

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")
