"""The guards of conftest.py are really on."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from threading import Thread

import pytest
import torch
from hypothesis import given, strategies as st

from tests.processes import device_share


def uninitialised() -> list[torch.Tensor]:
    x = torch.zeros(2, 3, dtype=torch.bfloat16)
    return [torch.empty(3), torch.empty_like(x), x.new_empty(4), torch.empty_strided((2,), (1,))]


def test_uninitialised_memory_is_nan() -> None:
    assert all(x.isnan().all() for x in uninitialised())


@given(st.integers(1, 5))
def test_uninitialised_memory_is_nan_under_hypothesis(n: int) -> None:
    assert torch.empty(n, dtype=torch.float64).isnan().all()


@pytest.mark.no_poison
def test_marker_switches_the_poison_off() -> None:
    assert not torch.are_deterministic_algorithms_enabled()


def test_hub_is_offline() -> None:
    import huggingface_hub.constants

    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert huggingface_hub.constants.HF_HUB_OFFLINE


def test_tests_start_from_the_same_seed(seed: int) -> None:
    drawn = torch.rand(3)
    torch.manual_seed(seed)
    assert torch.equal(drawn, torch.rand(3))


def gate_is_open(folder: Path) -> bool:
    with open(folder / "newllm-gate.lock", "w") as gate:
        try:
            fcntl.flock(gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_who_waits_to_have_the_device_alone_comes_before_later_ones(tmp_path: Path) -> None:
    order = []

    def hold(name: str, alone: bool) -> None:
        with device_share(tmp_path, alone=alone):
            order.append(name)

    threads = [Thread(target=hold, args=each) for each in (("alone", True), ("later", False))]
    with device_share(tmp_path, alone=False):
        hold("together", False)
        threads[0].start()
        end = time.monotonic() + 10
        while gate_is_open(tmp_path) and time.monotonic() < end:
            time.sleep(0.001)
        threads[1].start()
        time.sleep(0.05)
        order.append("first")
    for thread in threads:
        thread.join()
    assert order == ["together", "first", "alone", "later"]
