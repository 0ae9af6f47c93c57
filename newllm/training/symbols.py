"""Training and judging models on tasks over symbols."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from newllm.data.recall.symbols import SymbolTask
from newllm.data.streams import IGNORED


class SymbolBatches:
    """Batches of ``rows`` sequences of the ``tasks``, one task after another in equal shares of ``steps``.

    Each is a dict of ``input_ids`` and ``targets`` ``[rows, T]``, a function of its number and ``seed``.
    """

    def __init__(self, tasks: list[SymbolTask], *, rows: int, steps: int, seed: int) -> None:
        self.tasks, self.rows, self.steps, self.seed = tasks, rows, steps, seed

    def batch(self, index: int) -> dict[str, Tensor]:
        """Batch ``index``."""
        task = self.tasks[min(index * len(self.tasks) // self.steps, len(self.tasks) - 1)]
        # Tests are drawn from even seeds.
        generator = torch.Generator().manual_seed(2 * (self.seed * 1_000_003 + index) + 1)
        ids, targets = task.draw(self.rows, generator)
        return {"input_ids": ids, "targets": targets}


@torch.inference_mode()
def state_bytes(model: PreTrainedModel) -> int:
    """Bytes of one stream's state, of all layers."""
    outputs: Any = model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=True)
    return sum(layer.state.nbytes() for layer in outputs.past_key_values.layers)


@torch.inference_mode()
def accuracy(
    model: PreTrainedModel, task: SymbolTask, *, samples: int, seed: int, rows: int = 64
) -> list[float]:
    """Share of right targets in each of ``samples`` sequences that no training has seen."""
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(2 * seed)
    shares: list[float] = []
    while len(shares) < samples:
        ids, targets = task.draw(min(rows, samples - len(shares)), generator)
        outputs: Any = model(input_ids=ids.to(model.device), use_cache=False)
        asked = targets != IGNORED
        right = (outputs.logits.argmax(-1).cpu() == targets) & asked
        shares += (right.sum(1) / asked.sum(1)).tolist()
    model.train(was_training)
    return shares
