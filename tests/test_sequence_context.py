"""Context sweeps over ranks: the recurrence of one process, with a certificate."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from newllm import ops
from newllm.distributed.context import _shoot, sequence_sweep
from newllm.reference.context import NotContracting
from newllm.testing import assert_rounding, largest
from tests import sequence_ranks as ranks
from tests.processes import spawned
from tests.sequence_ranks import ALONE


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return spawned(ranks.every_sweep, 3, tmp_path_factory.mktemp("sweeps"))


@pytest.fixture(scope="module")
def one() -> dict[str, Tensor]:
    x, params = ranks.context_inputs(0.1)
    slope = torch.linspace(-1, 1, 60, dtype=x.dtype)[:, None].expand(2, -1, 4)
    return ranks.swept(x, params, partial(ops.context_sweep, method="sequential"), slope)[0]


def whole(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    joins: dict[str, Any] = {"last": lambda each: each[-1], "contexts": partial(torch.cat, dim=1)}
    joins["gradient of x"] = joins["contexts"]
    return {name: joins.get(name, sum)([part[name] for part in parts]) for name in parts[0]}


def test_ranks_that_agree_are_within_their_certificate(found: list[Any], one: dict[str, Tensor]) -> None:
    """Two passes, since contexts forget within a slice; later tokens are nearer than the border's jump."""
    infos = [part[1e-9, None][1] for part in found]
    assert {(info.method, info.sweeps) for info in infos} == {("block", 2)}
    assert len({float(info.residual) for info in infos}) == 1
    assert 0 < infos[0].residual <= 1e-9
    many = whole([part[1e-9, None][0] for part in found])
    assert largest(many["contexts"] - one["contexts"]) <= 2 * infos[0].residual
    for name, slope in many.items():
        assert largest(slope - one[name]) <= 1e-9 * max(1.0, largest(one[name])), name


def test_ranks_take_turns_where_borders_do_not_agree(found: list[Any], one: dict[str, Tensor]) -> None:
    infos = [part[0.0, 2][1] for part in found]
    assert {(info.method, info.sweeps, float(info.residual)) for info in infos} == {("sequential", 3, 0.0)}
    many = whole([part[0.0, 2][0] for part in found])
    assert torch.equal(many["contexts"], one["contexts"])
    assert torch.equal(many["last"], one["last"])
    for name, slope in many.items():
        assert_rounding(slope, one[name], additions=120, magnitude=max(1.0, largest(one[name])))


def test_without_a_way_back_all_ranks_refuse(found: list[Any]) -> None:
    for part in found:
        assert "ranks differ by" in part["refused"]
        assert "after 2 sweeps, and tol is 0" in part["refused"]


@pytest.mark.parametrize("back", [False, True], ids=["forwards", "backwards"])
def test_a_nan_at_a_border_is_no_agreement(back: bool) -> None:
    """Whatever the largest over ranks makes of it."""
    lost = SimpleNamespace(wait=lambda: torch.full((1, 4), torch.nan))
    line = SimpleNamespace(
        size=2,
        first=True,
        last=False,
        shift=lambda *_, back: lost,
        largest=partial(torch.nan_to_num, nan=0.0),
    )
    call: Any = SimpleNamespace(line=line, sweeps=4, tol=1e-5, fallback=False)
    with pytest.raises(NotContracting):
        _shoot(call, lambda entering: entering, torch.zeros(1, 4), back=back)


def test_a_single_rank_sweeps_once() -> None:
    x, params = ranks.context_inputs(1.0)
    contexts, last, info = sequence_sweep(x, params, mesh=ALONE)
    expected = ops.context_sweep(x, params, method="sequential")
    assert torch.equal(contexts, expected[0])
    assert torch.equal(last, expected[1])
    assert (info.method, info.sweeps) == ("block", 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tol": -1.0}, "tol must be 0 or more"),
        ({"sweeps": 0}, "sweeps must be at least 1 or None, got 0"),
        ({"x": torch.zeros(2, 0, 3)}, r"x must be of shape \[B, T, E\]"),
        ({"mesh": 3}, "mesh must be a DeviceMesh or a ProcessGroup, got int"),
    ],
)
def test_wrong_choices_are_named(changes: dict[str, Any], message: str) -> None:
    x, params = ranks.context_inputs(1.0)
    with pytest.raises((TypeError, ValueError), match=message):
        sequence_sweep(**{"x": x, "params": params, "mesh": ALONE, **changes})
