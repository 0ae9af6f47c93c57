"""Sequences sliced over ranks: the numbers of one process, constant traffic, and clear failures."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from newllm import ops
from newllm.distributed.line import Line, line_of
from newllm.distributed.sequence_parallel import sequence_attention, slice_bounds, traffic
from newllm.testing import assert_no_worse, assert_rounding, largest
from newllm.types import InfiniState
from tests import sequence_ranks as ranks
from tests.contracts import Looking
from tests.processes import spawned
from tests.sequence_ranks import ALONE, CASES, SIZES

WHOLE = (0, SIZES["tokens"])
KINDS = ("even", "uneven")
LINEAR = ("linear", "linear wide", "linear bfloat16")


@pytest.fixture(scope="module", params=[2, 3, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What 2, 3 and 4 ranks compute of every case."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    return spawned(ranks.every_case, request.param, folder)


@pytest.fixture(scope="module")
def references() -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Oracle and baseline of every case."""
    return {name: (ranks.one_process(name), ranks.one_process(name, CASES[name][0])) for name in CASES}


def judge(found: dict[str, Tensor], references: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    oracle, baseline = references
    assert found.keys() == oracle.keys()
    for name, out in found.items():
        assert_no_worse(out, oracle[name], baseline[name], name)


@pytest.mark.parametrize(("name", "kind"), [*product(CASES, KINDS)])
def test_ranks_obey_the_error_rule_of_one_process(
    name: str, kind: str, found: list[Any], references: dict[str, Any]
) -> None:
    judge(ranks.joined([part[name, kind] for part in found]), references[name])


@pytest.mark.parametrize("name", CASES)
def test_a_single_rank_obeys_the_error_rule(name: str, references: dict[str, Any]) -> None:
    judge(ranks.one_slice(name, ALONE, WHOLE), references[name])


@pytest.mark.parametrize(("name", "kind"), [*product(LINEAR, KINDS)])
def test_linear_rule_has_the_same_bits_for_any_number_of_ranks(
    name: str, kind: str, found: list[Any]
) -> None:
    """Given equal q, k and v: output and memory, of any slices."""
    one = ranks.one_slice(name, ALONE, WHOLE)
    many = ranks.joined([part[name, kind] for part in found])
    for result in ("out", "matrix", "norm"):
        assert torch.equal(many[result], one[result]), result


def test_linear_rule_has_the_bits_of_the_whole_layer(found: list[Any]) -> None:
    """Where segments are as long as the window, that of one process is computed in the same pieces."""
    given = ranks.inputs("linear")
    given["rope"] = tuple(table[given["window"] :] for table in given["rope"])
    out, state = ranks.called(ops.infini_attention, given)
    many = ranks.joined([part["linear", "even"] for part in found])
    assert torch.equal(many["out"], out)
    assert state.matrix is not None
    assert torch.equal(many["matrix"], state.matrix)
    assert state.norm is not None
    assert torch.equal(many["norm"], state.norm)


def test_bytes_sent_are_the_formulas_whatever_the_length(found: list[Any]) -> None:
    formula = traffic(1, 2, 8, 8, window=8, dtype=torch.float32)
    assert formula == (2 * 8 * 16 * 4, 2 * 8 * 9 * 4)
    for rank, part in enumerate(found):
        right, left = rank < len(found) - 1, rank > 0
        expected = {"forward": formula.forward * right, "backward": formula.forward * left}
        assert part["bytes"] == [expected, expected]


def test_processes_outside_a_mesh_are_told(found: list[Any]) -> None:
    assert found[0]["outside"] == "mesh must hold this process, rank 0, got a group without it"


def test_traffic_counts_dtype_features_and_layers_without_memory() -> None:
    eight_billion = traffic(1, 8, 128, 128, window=1024, dtype=torch.bfloat16)
    assert eight_billion == (8 * 1024 * 256 * 2, 8 * 128 * 129 * 4)
    assert traffic(1, 8, 128, 128, window=None, dtype=torch.bfloat16).halo == 0
    assert traffic(3, 8, 128, 128, window=2, dtype=torch.float64, memory=False) == (3 * 8 * 2 * 256 * 8, 0)


def test_slices_are_as_even_as_whole_segments_allow() -> None:
    assert slice_bounds(48, 3, segment=4, window=8) == [(0, 16), (16, 32), (32, 48)]
    assert slice_bounds(28, 3, segment=4, window=8) == [(0, 8), (8, 16), (16, 28)]
    assert slice_bounds(4, 1, segment=4, window=8) == [(0, 4)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: slice_bounds(46, 2, segment=4, window=8),
            r"tokens must be a multiple of segment \(4\), got 46",
        ),
        (
            lambda: slice_bounds(16, 4, segment=4, window=8),
            "tokens must be enough for slices of at least 8 tokens .* on each of 4 ranks, got 16",
        ),
        (lambda: slice_bounds(16, 0, segment=4, window=8), "ranks must be at least 1, got 0"),
        (lambda: line_of("sequence"), "mesh must be a DeviceMesh or a ProcessGroup, got str"),  # type: ignore[arg-type]
    ],
)
def test_wrong_choices_are_named(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 10}, r"the slice of rank 1 must be a multiple of segment \(4\) long, got 10 tokens"),
        ({"tokens": 4}, "the slice of rank 1 must be at least 8 tokens long .*, got 4 tokens"),
        ({"rule": "gamma"}, "rule must be one of 'linear', 'delta', got 'gamma'"),
        ({"rope": (torch.ones(16, 8),) * 2}, "rope's rows must be at least 24"),
        ({"state": "short"}, r"state.position must be at a border of segments \(4\) .*, got \[4\]"),
        ({"state": "learned"}, "state must be detached"),
        ({"segment_weight": torch.ones(1, 3)}, r"segment_weight must be of shape \[1, 4\], got \[1, 3\]"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_slices_are_named(changes: dict[str, Any], message: str) -> None:
    """Before anything is sent: the second of two ranks needs no first one to say so."""
    tokens, options = changes.get("tokens", 16), {"window": 8, "segment": 4, **changes}
    options.pop("tokens", None)
    q, k, v = (torch.randn(1, heads, tokens, 8) for heads in (4, 2, 2))
    if "state" in options:
        part = (x[:, :, :4] for x in (q, k, v))
        state = ops.infini_attention(*part, torch.zeros(4), window=8, segment=4)[1]
        learned = torch.zeros(1, 2, 8, 8, requires_grad=True)
        options["state"] = state._replace(matrix=learned) if options["state"] == "learned" else state
    with pytest.raises(ValueError, match=message):
        sequence_attention(q, k, v, torch.zeros(4), mesh=Line("", 1, 2), **options)


def test_a_stream_goes_on_over_ranks() -> None:
    """One call over all tokens, or a second that begins with the state of the first."""
    given = ranks.inputs("linear wide") | {"rope": None}
    given.pop("segment_weight")
    whole, state = ranks.called(sequence_attention, given, mesh=ALONE)
    outs, carried = [], None
    for first, end in ((0, 16), (16, 48)):
        part = {name: x[:, :, first:end] if name in "qkv" else x for name, x in given.items()}
        out, carried = ranks.called(sequence_attention, part, mesh=ALONE, state=carried)
        outs.append(out)
    assert torch.equal(torch.cat(outs, 2), whole)
    assert isinstance(carried, InfiniState)
    for found, expected in zip(carried, state, strict=True):
        assert found is expected or torch.equal(found, expected)


def test_a_slice_ends_with_the_ring_of_the_whole_sequence() -> None:
    """Where its last tokens lie in it depends on how many tokens came before."""
    q, k, v = (torch.randn(1, heads, 40, 4) for heads in (2, 1, 1))
    options: dict[str, Any] = {"window": 7, "segment": 4}
    state = ops.infini_attention(q, k, v, torch.zeros(2), **options)[1]
    part = (x[:, :, 24:] for x in (q, k, v))
    after = sequence_attention(*part, torch.zeros(2), mesh=ALONE, start=24, **options)[1]
    for name in ("keys", "values", "position"):
        assert torch.equal(getattr(after, name), getattr(state, name)), name


@pytest.mark.parametrize("name", ["linear", "delta", "no memory"])
def test_contract_holds_under_opcheck(name: str) -> None:
    with Looking() as looking:
        ranks.called(sequence_attention, ranks.inputs(name), mesh=ALONE)
    given = looking.calls["sequence_attention"]
    args = [x.requires_grad_() if isinstance(x, Tensor) and index < 4 else x for index, x in enumerate(given)]
    torch.library.opcheck(torch.ops.newllm.sequence_attention.default, tuple(args))


@pytest.mark.parametrize("how", ["ends", "hangs", "ends before a prompt"])
def test_a_lost_rank_stops_the_others_in_time(how: str, tmp_path: Path) -> None:
    """Neighbours on both sides say which rank and what was to be exchanged, soon after their patience."""
    said = spawned(ranks.lost, 3, tmp_path, how)
    for rank in (0, 2):
        message, seconds = said[rank]
        assert f"sequence parallelism stops: rank {rank} could not exchange" in message
        assert re.search(r"with rank .*\b1\b.* of its line, which has ended, hangs", message)
        assert seconds < 3 * ranks.PATIENCE


def test_messages_travel_while_the_window_is_computed(tmp_path: Path) -> None:
    """The rank at the far end waits for two hops or for its own window, whichever is longer; not for both.

    Of layers whose work begins when the memory has come, only the first waits: ranks then run askew.
    """
    seconds = torch.tensor(spawned(ranks.overlapped, 3, tmp_path))
    way, margin = 2 * ranks.HOP, ranks.HOP
    assert float(seconds[:, :2].min()) >= ranks.WORK
    assert float(seconds[:, :2].max()) < max(way, ranks.WORK) + margin
    deep = ranks.LAYERS * ranks.WORK
    assert deep + way <= float(seconds[:, 2].max()) < deep + way + margin


@pytest.mark.parametrize(
    ("rule", "window", "segment"), [("linear", 32, 32), ("delta", 32, 32), ("linear", 24, 16)]
)
def test_kernels_go_on_behind_earlier_keys(rule: str, window: int, segment: int, fused_device: str) -> None:
    """A slice behind another's keys and memory: the bits of one call, and the reference's gradients.

    The window need not be a multiple of the segment.
    """
    q, k, v = (torch.randn(1, heads, 96, 8, device=fused_device) for heads in (2, 1, 1))
    beta = torch.tensor([-1.0, 1.0], device=fused_device)
    options: dict[str, Any] = {"mesh": ALONE, "window": window, "segment": segment, "rule": rule}
    angles = torch.arange(96.0 + window, device=fused_device)[:, None] * torch.tensor(
        2 * [1, 0.1, 0.01, 0.001]
    )
    rope = angles.cos(), angles.sin()
    whole, state = sequence_attention(q, k, v, beta, rope=rope, backend="fused", **options)
    first, after_first = ([x[..., part, :] for x in rope] for part in (slice(32 + window), slice(32, None)))
    parts = (x[:, :, :32] for x in (q, k, v))
    _, before = sequence_attention(*parts, beta, rope=tuple(first), backend="fused", **options)
    options["rope"] = tuple(after_first)
    found = {}
    for backend in ("fused", "reference"):
        parts = [x[:, :, 32:].clone().requires_grad_() for x in (q, k, v)]
        out, after = sequence_attention(*parts, beta, state=before, backend=backend, **options)
        found[backend] = [out, after.matrix, *torch.autograd.grad(out.sum(), parts)]
    if window % segment == 0:
        # Tiles of keys lie alike.
        assert torch.equal(found["fused"][0], whole[:, :, 32:])
    assert state.matrix is not None
    assert torch.equal(found["fused"][1], state.matrix)
    for out, expected in zip(found["fused"], found["reference"], strict=True):
        # Sums over a window and a segment, both in float32.
        assert_rounding(out, expected, additions=64, magnitude=max(1.0, largest(expected)))
