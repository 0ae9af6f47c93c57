"""resolve, use_backend, explain and build_info: who chooses, who wins, and what is said when nothing fits."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
import torch

from newllm import backend
from newllm.backend import build_info, explain, resolve, use_backend

CPU = torch.device("cpu")
OPERATORS = {
    "memory_update",
    "memory_retrieve",
    "memory_scan",
    "window_attention",
    "infini_attention",
    "infini_decode",
    "gemv",
    "context_sweep",
    "context_jacobi",
}


@pytest.fixture(autouse=True)
def automatic() -> Iterator[None]:
    with use_backend(None):
        yield


@pytest.fixture
def fused_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that memory_scan, and it alone, has a fused implementation for the CPU."""
    monkeypatch.setattr(backend, "FUSED", {**backend.FUSED, "memory_scan": frozenset({"cpu"})})


def test_the_operators_are_those_of_the_design() -> None:
    assert set(backend.FUSED) == OPERATORS


def test_automatic_choice_is_fused_only_where_available(fused_scan: None) -> None:
    assert resolve("memory_scan", CPU) == "fused"
    assert resolve("memory_update", CPU) == "reference"
    assert resolve("memory_scan", torch.device("meta")) == "reference"


def test_argument_wins_over_use_backend_wins_over_automatic(fused_scan: None) -> None:
    with use_backend("reference"):
        assert resolve("memory_scan", CPU) == "reference"
        assert resolve("memory_scan", CPU, "fused") == "fused"
    with use_backend("fused"):
        assert resolve("memory_scan", CPU, "reference") == "reference"
    assert resolve("memory_scan", CPU) == "fused"


def test_named_backend_never_falls_back(fused_scan: None) -> None:
    sentence = "backend 'fused' cannot run: memory_update has no fused implementation for device type 'cpu'"
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        resolve("memory_update", CPU, "fused")
    with use_backend("fused"), pytest.raises(RuntimeError, match=re.escape(sentence)):
        resolve("memory_update", CPU)


@pytest.mark.parametrize("name", ["triton", "", "Fused"])
def test_unknown_backend_lists_the_allowed_ones(name: str) -> None:
    sentence = re.escape(f"backend must be one of reference, fused; got {name!r}")
    with pytest.raises(ValueError, match=sentence):
        resolve("memory_scan", CPU, name)
    with pytest.raises(ValueError, match=sentence):
        use_backend(name)
    assert resolve("memory_scan", CPU) == "reference"


def test_unknown_operator_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"op must be one of memory_update, .*; got 'memory_forget'"):
        resolve("memory_forget", CPU)


def test_plain_call_holds_until_the_next(fused_scan: None) -> None:
    use_backend("reference")
    assert resolve("memory_scan", CPU) == "reference"
    use_backend(None)
    assert resolve("memory_scan", CPU) == "fused"


def test_blocks_nest_and_restore_after_an_error(fused_scan: None) -> None:
    with use_backend("reference"):
        with pytest.raises(KeyError), use_backend("fused"):
            raise KeyError("inside")
        assert resolve("memory_scan", CPU) == "reference"
    assert resolve("memory_scan", CPU) == "fused"


def test_resolve_is_traced_whole_and_follows_use_backend(fused_scan: None) -> None:
    def scale(x: torch.Tensor, name: str | None = None) -> torch.Tensor:
        return x * 2 if resolve("memory_scan", x.device, name) == "fused" else x * 3

    compiled = torch.compile(scale, fullgraph=True, backend="aot_eager")
    x = torch.ones(4)
    assert torch.equal(compiled(x), x * 2)
    with use_backend("reference"):
        assert torch.equal(compiled(x), x * 3)
        assert torch.equal(compiled(x, "fused"), x * 2)
    assert torch.equal(compiled(x), x * 2)


def test_explain_covers_every_operator_and_gives_reasons(fused_scan: None) -> None:
    automatic = {choice.op: choice for choice in explain() if choice.device == "cpu"}
    assert set(automatic) == OPERATORS
    assert automatic["memory_scan"][2:] == ("fused", "automatic: memory_scan has a fused implementation")
    assert automatic["infini_decode"].backend == "reference"
    assert "no fused implementation for device type 'cpu'" in automatic["infini_decode"].reason


def test_explain_reports_a_choice_that_cannot_run(fused_scan: None) -> None:
    with use_backend("fused"):
        forced = {choice.op: choice for choice in explain() if choice.device == "cpu"}
    assert forced["memory_scan"][2:] == ("fused", "use_backend('fused')")
    assert forced["memory_update"].backend is None
    assert forced["memory_update"].reason.startswith("use_backend('fused'), but memory_update has no fused")


def test_explain_says_why_no_sweep_runs_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [torch.device("cuda", 0)]
    monkeypatch.setattr(backend, "FUSED", {"context_sweep": frozenset({"cuda"})})
    monkeypatch.setattr(backend, "devices", lambda: found)
    monkeypatch.setattr(backend, "sweep_limit", lambda device: "it is too old")
    why = "context_sweep cannot be fused on cuda:0: it is too old"
    assert explain() == [("context_sweep", "cuda:0", "reference", why)]
    with use_backend("fused"):
        assert explain() == [("context_sweep", "cuda:0", None, f"use_backend('fused'), but {why}")]
    monkeypatch.setattr(backend, "sweep_limit", lambda device: None)
    assert explain()[0].backend == "fused"


@pytest.mark.skipif("cuda" not in backend.FUSED["context_sweep"], reason="built without CUDA")
def test_a_device_that_is_not_there_is_no_error() -> None:
    assert isinstance(backend.sweep_limit(10**6), str)


def test_build_info_can_be_recorded() -> None:
    info = build_info()
    assert set(info) == {"newllm", "python", "torch", "triton", "transformers", "native", "devices"}
    assert json.loads(json.dumps(info)) == info
    assert info["torch"] == torch.__version__
    assert info["native"].startswith(("absent: ", "present, by "))
    assert info["devices"].startswith("cpu (1 threads)")


def test_build_info_names_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise backend.PackageNotFoundError(package)

    monkeypatch.setattr(backend, "version", missing)
    assert build_info()["triton"] == "not installed"
