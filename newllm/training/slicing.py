"""Training on slices of sequences: which ranks share one, and what each of them reads."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from newllm.data.streams import IGNORED, Batch
from newllm.distributed.line import Line, line_of
from newllm.distributed.senri import parallelize
from newllm.distributed.sequence_parallel import slice_bounds
from newllm.training.losses import target_weight, targets_of


class Slicing:
    """The ranks that share this process's sequences: ``ranks`` of ``processes`` in a row.

    Raises:
        ValueError: for ranks that do not divide the processes, a model without Infini-attention, or states
            that are carried from batch to batch.
    """

    def __init__(self, model: nn.Module, ranks: int, processes: int, device: str, *, carry: bool) -> None:
        if processes % ranks:
            raise ValueError(f"train.sequence_ranks must divide the {processes} processes, got {ranks}")
        if carry:
            raise ValueError(f"train.sequence_ranks must be 1 where states are carried, got {ranks}")
        mesh = init_device_mesh(device, (processes // ranks, ranks), mesh_dim_names=("data", "sequence"))
        self.line: Line = line_of(mesh["sequence"])
        parallelize(model, self.line)
        config: Any = model.config
        self.window, self.segment = config.sliding_window, config.segment

    def own(self, batch: Batch) -> Batch:
        """This rank's part of a batch; the mean of all ranks' losses is that of the whole batch.

        Raises ``ValueError`` for padding, and for sequences that cannot be sliced.
        """
        mask = batch.get("attention_mask")
        if mask is not None and not bool(mask.all()):
            raise ValueError("attention_mask must be all ones for sequences sliced over ranks, got padding")
        targets, weight = targets_of(batch), target_weight(batch)
        if weight is None:
            valid = targets != IGNORED
            weight = valid / valid.sum()
        bounds = slice_bounds(targets.shape[1], self.line.size, segment=self.segment, window=self.window)
        first, end = bounds[self.line.rank]
        whole = {
            "input_ids": batch["input_ids"],
            "targets": targets,
            "target_weight": weight * self.line.size,
        }
        part = {name: x[:, first:end] for name, x in whole.items()}
        if "segment_weight" in batch:
            steps = slice(first // self.segment, end // self.segment)
            part["segment_weight"] = batch["segment_weight"][:, steps]
        return part
