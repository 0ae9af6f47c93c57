"""Snapshots: of the model at hand alone, refused before anything is written."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from newllm import Session
from newllm.evaluation.control import remove_memories
from newllm.models import SenriForCausalLM
from newllm.models.session import Snapshot
from tests.test_session import exact_senri, said
from tests.tiny_models import random_tokens, tiny_senri


def other_snapshots() -> list[tuple[Snapshot, str]]:
    """Snapshots that a session of ``exact_senri`` cannot go on from, and what it says of them."""
    shape, dtype = "snapshot must be of a model of this shape: ", "torch.float64"
    mine = read(exact_senri())
    last = mine.states[-1]
    assert last is not None
    return [
        (read(tiny_senri(num_hidden_layers=4)), "snapshot must hold 3 layers, got 4"),
        (read(exact_senri(), 2), "snapshot must hold 1 rows, got 2"),
        (
            read(tiny_senri(sliding_window=16).double()),
            f"{shape}0.keys must be {dtype} [1, 2, 8, 8], got {dtype} [1, 2, 16, 8]",
        ),
        (read(tiny_senri()), f"{shape}hidden must be {dtype} [1, 32], got torch.float32 [1, 32]"),
        (read(tiny_senri(memory_layers=[1]).double()), f"{shape}it lacks 0.matrix"),
        (read(tiny_senri(memory_layers=[0, 1, 2]).double()), f"{shape}it holds '1.matrix'"),
        (read(tiny_senri(short_conv=2).double()), f"{shape}it holds '0.recent'"),
        (
            read(tiny_senri(feature="dpfp").double()),
            f"{shape}0.matrix must be {dtype} [1, 2, 8, 8], got {dtype} [1, 2, 16, 8]",
        ),
        (
            mine._replace(recent=mine.recent[:, 1:]),
            f"{shape}recent must be torch.int64 [1, 50], got torch.int64 [1, 49]",
        ),
        (mine._replace(states=(*mine.states[:-1], None)), f"{shape}it lacks 2.keys"),
        (
            mine._replace(states=(*mine.states[:-1], last._replace(keys=last.keys.float()))),
            f"{shape}2.keys must be {dtype} [1, 2, 8, 8], got torch.float32 [1, 2, 8, 8]",
        ),
    ]


def read(model: SenriForCausalLM, rows: int = 1) -> Snapshot:
    """What a session remembers after a few tokens."""
    session = Session(model, batch_size=rows)
    session.feed(random_tokens(rows, 9))
    return session.snapshot()


def test_snapshot_of_another_shape_is_refused() -> None:
    session = Session(exact_senri())
    said(session, random_tokens(9), 3)
    before = session.snapshot().tensors()
    for other, message in other_snapshots():
        for one in (session, Session(exact_senri())):
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                one.restore(other)
            assert one.tokens == ([11] if one is session else [0])
    after = session.snapshot().tensors()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_session_forks_when_its_model_has_lost_its_memories() -> None:
    model = tiny_senri()
    whole = read(model)
    Session(model).restore(whole)
    remove_memories(model)
    session = Session(model)
    with pytest.raises(ValueError, match=r"it holds '0\.matrix'$"):
        session.restore(whole)
    session.feed(random_tokens(9))
    assert said(session.fork()) == said(session)


def test_session_forks_under_autocast() -> None:
    session = Session(tiny_senri())
    with torch.autocast("cpu", torch.bfloat16):
        session.feed(random_tokens(9))
        assert said(session.fork()) == said(session)


def test_session_stays_on_the_device_of_its_model() -> None:
    snapshot, session = read(exact_senri()), Session(exact_senri())
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        session.restore(snapshot.map(lambda tensor: tensor.to("meta")))
    assert session.tokens == [0]
    session.restore(snapshot)
    assert session.tokens == [9]


@pytest.mark.gpu
def test_snapshot_goes_on_from_another_device() -> None:
    model = tiny_senri()
    snapshot = read(model)
    session, moved = Session(model.to("cuda")), snapshot.map(Tensor.cuda)
    session.restore(snapshot)
    expected = Session(model)
    expected.restore(moved)
    assert {tensor.device.type for tensor in session.snapshot().tensors().values()} == {"cuda"}
    assert said(session) == said(expected)
