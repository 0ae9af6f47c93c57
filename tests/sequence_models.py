"""Senri on slices in several processes: beside DDP and FSDP2, with checkpointing and under compile."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from newllm.distributed.senri import parallelize
from newllm.distributed.sequence_parallel import slice_bounds
from newllm.training.losses import batch_loss
from newllm.training.scratch import scratch_model
from tests.sequence_ranks import meeting
from tests.training_parts import SMALL


def model_and_batches() -> tuple[Any, list[Tensor]]:
    """A small Senri whose gates are open, and two batches of two sequences."""
    model: Any = scratch_model(SMALL, seed=0)[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "memory_gate" in name:
                parameter.fill_(0.5)
    draw = torch.Generator().manual_seed(1)
    return model, [torch.randint(256, (2, 48), generator=draw) for _ in range(2)]


def one_process(count: int) -> tuple[float, dict[str, Tensor]]:
    """The mean loss of the first ``count`` batches, and its gradients."""
    model, batches = model_and_batches()
    losses = [_loss(model, ids, 0, 48) for ids in batches[:count]]
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def _loss(model: Any, ids: Tensor, first: int, end: int) -> Tensor:
    targets = ids.roll(-1, 1)
    part = {"input_ids": ids[:, first:end], "targets": targets[:, first:end]}
    return batch_loss(model(input_ids=part["input_ids"], use_cache=False).logits, part)


def every_way(rank: int, size: int, folder: str, ways: tuple[str, ...]) -> None:
    """Loss and gradients on a mesh of ``size / 2`` batches by two slices, in each of ``ways``."""
    with meeting(rank, size, folder):
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "sequence"))
        found = {}
        for way in ways:
            model, batches = model_and_batches()
            parallelize(model, mesh["sequence"])
            ids = batches[mesh.get_local_rank("data")]
            bounds = slice_bounds(48, 2, segment=8, window=8)[mesh.get_local_rank("sequence")]
            if way == "sharded":
                new = hasattr(model, "activation_checkpointing_enable")
                getattr(model, f"{'activation' if new else 'gradient'}_checkpointing_enable")()
                for layer in model.model.layers:
                    fully_shard(layer)
                fully_shard(model)
                wrapped: Any = model.train()
            else:
                wrapped = DistributedDataParallel(model)
            run = torch.compile(wrapped, backend="aot_eager") if way == "compiled" else wrapped
            loss = _loss(run, ids, *bounds)
            loss.backward()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            found[way] = float(mean) / size, {name: _whole(p.grad) for name, p in model.named_parameters()}
        torch.save(found, f"{folder}/{rank}.pt")


def _whole(gradient: Any) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
