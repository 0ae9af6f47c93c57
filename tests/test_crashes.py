"""Killed or out of disk at any moment: nothing half-written is taken for whole, and the next run finishes."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from newllm.cli.loading import quiet
from newllm.data import fetch, hub, token_cache
from newllm.data.corpora import CORPORA, Corpus, get, is_fetched
from newllm.data.documents import numbered
from newllm.data.fetch import Package
from newllm.data.hub import HUB, hub_texts
from newllm.data.token_cache import cached_tokens
from newllm.data.vocabularies import open_tokenizer
from newllm.evaluation.rows import RowFile
from newllm.models.convert import convert
from newllm.models.files import load_senri, load_tokenizer, save_model
from newllm.models.session import Session
from newllm.runs import Run
from newllm.serving.store import SessionStore
from newllm.training.checkpoints import Checkpoints
from newllm.training.config import TrainConfig
from newllm.training.phase_checkpoints import PhaseCheckpoints
from tests.crashes import Activity, crashed, drawn, measured
from tests.mutant_targets import conversation, model
from tests.tiny_models import tiny_base
from tests.training_parts import SENTENCE, rows, trainer, weights

CONFIG = TrainConfig(steps=4, lr=1e-2, warmup_steps=1, log_steps=1, save_steps=2, eval_steps=2)
TEXT = numbered("x", [SENTENCE * count for count in (3, 1, 40)])

# Training


def train(folder: Path) -> Any:
    made = trainer(folder / "run", CONFIG, judged=True, resume=True)
    made.fit(resume=True)
    return made


@cache
def trained() -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Weights and log of a training that nothing disturbed."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        made = trainer(Path(folder) / "run", replace(CONFIG), judged=True)
        made.fit()
        return weights(made), rows(Path(folder) / "run")


def check_training(folder: Path) -> None:
    whole, log = trained()
    newest, complaints = Checkpoints(folder / "run" / "checkpoints").newest()
    assert complaints == []
    assert newest is None or newest.name in ("checkpoint-2", "checkpoint-4")
    for name in ("best", "last"):
        if (folder / "run" / name).exists():
            found = load_senri(folder / "run" / name).state_dict()
            assert name == "best" or all(torch.equal(found[key], whole[key]) for key in whole)
    if (folder / "run" / "last").exists():
        assert [row for row in rows(folder / "run") if "train_loss" not in row] == [
            row for row in log if "train_loss" not in row
        ]


# Phases


def run_phases(folder: Path) -> None:
    keep = PhaseCheckpoints(folder / "phases", seconds=0, resume=True)
    for stage in ("one", "two"):
        if keep.result(stage) is None:
            state = keep.begin(stage) or {"sum": torch.zeros(200), "step": 0}
            while state["step"] < 3:
                state = {"sum": state["sum"] + keep.rounds, "step": state["step"] + 1}
                keep.reached(lambda state=state: state)
            keep.finish(stage, state["sum"])
    both = [float(keep.result(stage)[0]) for stage in ("one", "two")]
    Run(folder / "run", {}, seed=0).result("phases.json", both)


def check_phases(folder: Path) -> None:
    keep = PhaseCheckpoints(folder / "phases", resume=True)
    assert keep.complaints == []
    assert 0 <= keep.rounds <= 6
    result = folder / "run" / "phases.json"
    # Rounds 0, 1, 2 of the first stage and 3, 4, 5 of the second.
    assert not result.exists() or json.loads(result.read_text()) == [3.0, 12.0]


# Data


def tokenise(folder: Path) -> None:
    cached_tokens(TEXT, open_tokenizer("bpe:300", TEXT, cache_dir=folder), cache_dir=folder, progress=False)


def check_tokens(folder: Path) -> None:
    for file in (folder / "tokenizers").glob("[!.]*.json"):
        made = open_tokenizer("bpe:300", TEXT, cache_dir=folder)
        assert file.name.startswith("bpe-300-") and made.decode(made(SENTENCE)["input_ids"]) == SENTENCE
        for whole in (folder / "tokens").glob("[!.]*"):
            found = token_cache._open(whole, len(TEXT.texts))
            texts = [made.decode(found.document(place)[:-1]) for place in range(found.documents)]
            assert texts == list(TEXT.texts)


def begin_converting(folder: Path) -> None:
    torch.manual_seed(1)
    save_model(convert(tiny_base("llama"), window=8), conversation().tokenizer, folder / "model")


def run_converting(folder: Path) -> None:
    torch.manual_seed(2)
    save_model(
        convert(tiny_base("llama"), window=16), conversation().tokenizer, folder / "model", overwrite=True
    )


def check_converting(folder: Path) -> None:
    # Between two renames the old folder waits under another name.
    found, *_ = [place for place in (folder / "model", *folder.glob(".model-*/replaced")) if place.exists()]
    assert load_senri(found).config.sliding_window in (8, 16)
    load_tokenizer(found)


CONTENT = bytes(range(256)) * 40


def run_fetching(folder: Path) -> None:
    package = Package("pip", "tiny", "1", "tiny-1.whl", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    CORPORA["tiny"] = Corpus("tiny", "a tiny text", "none", package)
    script = "with open('tiny-1.whl', 'wb') as f:\n    for _ in range(40): f.write(bytes(range(256)))\n"
    fetch.CLIENTS["pip"] = (sys.executable, "-S", "-c", script)
    get("tiny", cache_dir=folder, progress=False)
    assert is_fetched("tiny", cache_dir=folder)


def check_fetching(folder: Path) -> None:
    file = folder / "tiny" / "tiny-1.whl"
    assert not file.exists() or file.read_bytes() == CONTENT


def run_hub(folder: Path) -> None:
    source = HUB["dolly"]
    hub._hub_commit = lambda repo, revision: "0123abc"
    hub._rows = lambda *_: iter([{"response": text, "instruction": "?"} for text in TEXT.texts])
    hub_texts(source, source.sets[0], "train", cache_dir=folder)


def check_hub(folder: Path) -> None:
    for _ in (folder / "hub").rglob("[!.]*.jsonl"):
        found = hub_texts(HUB["dolly"], HUB["dolly"].sets[0], "train", cache_dir=folder)
        assert (len(found.texts), found.revision) == (3, "0123abc")


# Sessions and results


def begin_sessions(folder: Path) -> None:
    session, talk = Session(model("senri")), conversation()
    session.feed(torch.arange(1, 6))
    session.save(folder / "one.safetensors")
    talk.feed(torch.arange(1, 6))
    talk.save(folder / "talk.json")


def run_sessions(folder: Path) -> None:
    session, talk = Session(model("senri")), conversation()
    session.load(folder / "one.safetensors")
    talk.load(folder / "talk.json")
    if session.tokens == [5]:
        session.feed(torch.arange(1, 4))
        session.save(folder / "one.safetensors")
    if talk.tokens == [5]:
        talk.feed(torch.arange(1, 4))
        talk.save(folder / "talk.json")
    SessionStore(folder, model("senri"), most=9).copy("one", "fork")


def check_sessions(folder: Path) -> None:
    store = SessionStore(folder, model("senri"), most=9)
    assert store.names() in (["one"], ["fork", "one"])
    for name in store.names():
        session = Session(model("senri"))
        session.load(folder / f"{name}.safetensors")
        assert session.tokens in ([5], [8]) and store.about(name).tokens in (5, 8)
    talk = conversation()
    talk.load(folder / "talk.json")
    assert talk.tokens in ([5], [8])


def run_results(folder: Path) -> None:
    results = Run(folder, {"options": list(range(50))}, seed=0, resume=True)
    for step in range(len(results.rows()), 5):
        results.rewind(step)
        results.log(step=step, note="x" * 100)
    results.result("results.json", {"values": list(range(200))})
    file = RowFile(folder / "rows.jsonl")
    for step in range(len(file.rows), 5):
        file.append({"suite": "x", "step": step, "note": "y" * 100})
    assert [row["step"] for row in (*results.rows(), *file.rows)] == [*range(5)] * 2


def check_results(folder: Path) -> None:
    for found in (Run(folder, {}, seed=0, writes=False).rows(), RowFile(folder / "rows.jsonl").rows):
        assert [row["step"] for row in found] == [*range(len(found))]
    results = folder / "results.json"
    assert not results.exists() or json.loads(results.read_text())["values"] == [*range(200)]


ACTIVITIES: dict[str, Activity] = {
    "training": Activity(train, check_training),
    "phases": Activity(run_phases, check_phases),
    "tokenising": Activity(tokenise, check_tokens),
    "converting": Activity(run_converting, check_converting, begin_converting),
    # Of what the client could not write the package is named.
    "fetching": Activity(run_fetching, check_fetching, names="tiny"),
    "hub": Activity(run_hub, check_hub),
    "sessions": Activity(run_sessions, check_sessions, begin_sessions),
    "results": Activity(run_results, check_results),
}
SAMPLE = {"training": 2, "converting": 4, "fetching": 4}
FULL = {"training": 30}


@pytest.fixture(autouse=True)
def no_bars() -> None:
    """Progress bars stay out of the way."""
    quiet()


def check(name: str, folder: Path, crashes: range, record: Callable[[str, object], None]) -> None:
    activity = ACTIVITIES[name]
    operations, largest = measured(activity, folder / "undisturbed")
    ends: Counter[str] = Counter()
    for seed in crashes:
        crash = drawn(seed, operations, largest)
        try:
            ends[f"{crash.kind}: {crashed(activity, folder / str(seed), crash)}"] += 1
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {crash}: {error}") from error
    record("operations", operations)
    record("largest_file", largest)
    for end, count in {"crashes": len(crashes), **ends}.items():
        record(end, count)


@pytest.mark.parametrize("name", ACTIVITIES)
def test_crashes_leave_nothing_half_written(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    check(name, tmp_path, range(SAMPLE.get(name, 8)), record_property)


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTIVITIES)
def test_many_crashes_leave_nothing_half_written(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    check(name, tmp_path, range(1000, 1000 + FULL.get(name, 100)), record_property)
