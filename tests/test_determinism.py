"""The same call gives the same bits: a sample of the thousand runs, and no atomics on the way."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from source_tree import ROOT, sources

from tests.determinism_parts import CONFIGURATIONS, Configuration, bits, differing, repeated
from tests.row_families import FAMILIES

# Triton's, CUDA's, PTX's. (The CPU sweeps' barrier is made of std::atomic; no number passes through it.)
ATOMIC = re.compile(
    r"\btl\.atomic_|\batomic[A-Z]\w*\(|\b__nv_atomic|\b(atom|red)\.(global|shared|relaxed|release|acq|add)"
)
ADDS_IN_ANY_ORDER = re.compile(
    r"\.(scatter_add|index_add|scatter_reduce|put)_?\(|accumulate=True|\bbincount\(|\bhistc\("
)


def test_there_are_configurations_of_every_operator() -> None:
    assert len(CONFIGURATIONS) == len({each.name for each in CONFIGURATIONS}) == 22
    assert {each.family for each in CONFIGURATIONS} == {*FAMILIES}
    assert {each.dtype for each in CONFIGURATIONS} == {torch.float32, torch.bfloat16, torch.float16}


@pytest.mark.no_poison
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda each: each.name)
def test_runs_are_equal_bit_for_bit(configuration: Configuration) -> None:
    assert repeated(configuration, "cuda" if torch.cuda.is_available() else "cpu", 2) == []


def test_what_differs_is_noticed() -> None:
    calls = itertools.count()
    found = differing(lambda: {"x": torch.zeros(2), "y": torch.tensor(-0.0 if next(calls) == 2 else 0.0)}, 5)
    assert found == ["y in run 3"]
    assert torch.equal(bits(torch.tensor(torch.nan)), bits(torch.tensor(torch.nan)))


def test_no_atomics_stand_on_the_default_path() -> None:
    """Sums in the order of arrival would differ from run to run."""
    compiled = sources("kernels/") + sources("csrc/", suffixes=(".cu", ".cuh", ".h", ".cpp"))
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in compiled}
    assert [name for name, text in texts.items() if ATOMIC.search(text)] == []
    python = {
        name: (ROOT / name).read_text(encoding="utf-8")
        for name in sources("newllm/reference/", "newllm/ops/")
    }
    assert [name for name, text in python.items() if ADDS_IN_ANY_ORDER.search(text)] == []


@pytest.mark.parametrize(
    "line",
    [
        "tl.atomic_add(p, x)",
        "atomicAdd(&sum, x);",
        'asm("red.global.add.f32 [%0], %1;")',
        "atom.global.add.f32 r, a",
    ],
)
def test_an_atomic_would_be_noticed(line: str) -> None:
    assert ATOMIC.search(line)
