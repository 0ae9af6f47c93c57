"""Senri models on slices: the loss and gradients of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from newllm.distributed.line import line_of
from newllm.distributed.senri import parallelize
from newllm.testing import largest
from tests import sequence_models as models
from tests.processes import spawned
from tests.sequence_ranks import ALONE


@pytest.mark.parametrize(
    ("batches", "ways"), [(2, ("plain", "sharded")), (1, ("compiled",))], ids=["parallel", "compiled"]
)
def test_slices_beside_other_dimensions_learn_as_one_process(
    batches: int, ways: tuple[str, ...], tmp_path: Path
) -> None:
    """Batches by two slices: DDP, FSDP2 with activation checkpointing, and compiled DDP."""
    found = spawned(models.every_way, 2 * batches, tmp_path, ways)
    loss, slopes = models.one_process(batches)
    for own_loss, own in (part[way] for part in found for way in ways):
        assert abs(own_loss - loss) <= 64 * torch.finfo(torch.float32).eps * abs(loss)
        assert own.keys() == slopes.keys()
        for name, slope in slopes.items():
            # Sums over 96 tokens of terms that are at most as large as the largest gradient.
            bound = 96 * torch.finfo(torch.float32).eps * max(largest(slope), 1e-2)
            assert largest(own[name] - slope) <= bound, name


def test_models_that_cannot_be_sliced_are_named() -> None:
    with pytest.raises(ValueError, match="model must be a model with InfiniAttention layers, got Linear"):
        parallelize(torch.nn.Linear(2, 2), ALONE)


def test_padding_and_short_gradients_are_refused() -> None:
    model, (ids, _) = models.model_and_batches()
    parallelize(model, ALONE)
    mask = torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0)
    with pytest.raises(ValueError, match="padding_mask must be None over several ranks"):
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    model.model.layers[0].self_attn.bptt_segments = 1
    with pytest.raises(ValueError, match="bptt_segments must be None over several ranks, got 1"):
        model(input_ids=ids, use_cache=False)


def test_a_mesh_of_two_dimensions_is_refused(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "sequence"))
        with pytest.raises(ValueError, match=r"mesh must have one dimension.*got 2: data, sequence"):
            line_of(mesh)
        assert line_of(mesh["sequence"])[1:] == (0, 1)
    finally:
        dist.destroy_process_group()
