"""Work beside the caller's: its result, its errors, and who does it."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch
from torch import Tensor

from newllm.distributed.beside import beside

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("name", DEVICES)
def test_work_beside_others_has_its_own_result(name: str) -> None:
    """However memory is used again while it lies between the two."""
    device = torch.device(name)
    x = torch.randn(256, 256, device=device, requires_grad=True)

    def work(scale: float) -> tuple[Tensor, list[Tensor]]:
        product = x @ x
        return product * scale, [product.sum(0)]

    for scale in range(1, 9):
        pending = beside(partial(work, scale), device, waits=True)
        noise = [torch.randn(256, 256, device=device) @ x.detach() for _ in range(4)]
        (product, (total,)), (same, (expected,)) = pending(), work(scale)
        del pending
        noise += [torch.full_like(x, 7.0) for _ in range(4)]
        assert torch.equal(product, same)
        assert torch.equal(total, expected)
        # A thread of its own begins with gradients on; the operator around has none.
        assert name != "cpu" or not product.requires_grad


@pytest.mark.gpu
def test_work_beside_others_uses_its_memory_again() -> None:
    """However often it is called: a new stream would have to get its memory from the device."""
    device = torch.device("cuda", torch.cuda.current_device())
    reserved = []
    for _ in range(40):
        beside(partial(torch.zeros, 2**24, device=device), device, waits=True)()
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[2:] == reserved[2:3] * 38


def test_work_that_waits_for_nobody_is_done_at_once() -> None:
    done: list[int] = []
    here = threading.get_ident()

    def work() -> int:
        done.append(threading.get_ident())
        return 5

    finish = beside(work, torch.device("cpu"), waits=False)
    assert done == [here]
    assert finish() == 5
    assert beside(work, torch.device("cpu"), waits=True)() == 5
    assert done[1] != here


def test_errors_reach_the_caller() -> None:
    def work() -> None:
        raise RuntimeError("rank 1 has ended")

    with pytest.raises(RuntimeError, match="rank 1 has ended"):
        beside(work, torch.device("cpu"), waits=True)()
