"""Damaged and hostile files: each is read as something valid or refused in one sentence that names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from newllm.models.session import Session
from newllm.serving.store import SessionStore
from tests.mutant_targets import TARGETS, model
from tests.mutants import MEMORY, SECONDS, attack

# Damaged ones are passed over, with a sentence each.
NEVER_REFUSED = ("phase checkpoint",)
FULL = 1000
# Mutants in the default suite; what takes long to read gets fewer.
SAMPLE = {"gguf": 8, "checkpoint": 20, "options": 20}


def check(name: str, folder: Path, count: int, seed: int) -> dict[str, int]:
    """How many mutants were read and how many refused; no other end is allowed."""
    counts, findings = attack(TARGETS[name], folder, count, seed)
    assert [tuple(finding) for finding in findings] == []
    assert sum(counts.values()) == count
    assert counts["refused"] or name in NEVER_REFUSED
    return counts


def test_a_damaged_session_does_not_hide_the_others(tmp_path: Path) -> None:
    store = SessionStore(tmp_path, model("senri"), most=3)
    session = Session(model("senri"))
    session.feed(torch.arange(1, 6))
    for name in ("one", "two"):
        store.save(name, session.snapshot())
    (tmp_path / "two.safetensors").write_bytes(b"junk")
    assert [store.about(name).tokens for name in store.names()] == [5, None]
    with pytest.raises(ValueError, match=f"^the session file {tmp_path / 'two.safetensors'} cannot be read"):
        store.load("two")
    store.delete("two")
    assert store.names() == ["one"]


@pytest.mark.parametrize("name", TARGETS)
def test_mutants_are_read_or_refused(name: str, tmp_path: Path) -> None:
    check(name, tmp_path / "attack", SAMPLE.get(name, 60), 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_thousand_mutants_are_read_or_refused(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    counts = check(name, tmp_path / "attack", FULL, 0)
    limits = {"seconds_each": SECONDS, "bytes_each": MEMORY}
    for key, value in {"mutants": FULL, "seed": 0, **counts, **limits}.items():
        record_property(key, value)
