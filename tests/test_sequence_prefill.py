"""Prompts over ranks: the stream of one process, on every rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from newllm.data.tokenizer import encode
from newllm.distributed.prefill import prefill
from newllm.evaluation.perplexity import perplexity_by_position
from newllm.models import SenriForCausalLM
from newllm.models.session import Session
from newllm.testing import assert_no_worse
from tests import prefill_ranks as ranks, processes
from tests.prefill_ranks import STREAMS
from tests.sequence_ranks import ALONE
from tests.tiny_models import tiny_senri


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What three ranks find."""
    return processes.spawned(ranks.every_stream, 3, tmp_path_factory.mktemp("prefill"))


@pytest.mark.parametrize("name", STREAMS)
def test_the_stream_after_a_prompt_is_that_of_one_process(name: str, found: list[dict[str, Any]]) -> None:
    oracle = ranks.stream_of(name, torch.float64, None)
    baseline = ranks.stream_of(name, torch.float32, None)
    for part in found:
        for key, value in part[name].items():
            assert_no_worse(value, oracle[key], baseline[key], key)


def test_losses_over_ranks_are_those_of_one_process(found: list[dict[str, Any]]) -> None:
    """Of rounds, of what is read by all, and across the borders between both; a stream's first has none."""
    oracle, baseline = ranks.losses_of(torch.float64, None), ranks.losses_of(torch.float32, None)
    for part in found:
        assert part["losses"].isnan().tolist() == [True] + [False] * 129
        assert_no_worse(part["losses"][1:], oracle[1:], baseline[1:])
        assert torch.equal(part["losses"][1:], found[0]["losses"][1:])
        assert part["broken"].isnan().all()


def test_answers_behind_prompts_over_ranks_are_those_of_one_process(found: list[dict[str, Any]]) -> None:
    """Also where the memories are emptied before the answer."""
    oracle, baseline = ranks.answers_of(torch.float64, None), ranks.answers_of(torch.float32, None)
    for part in found:
        for out, exact, one in zip(part["answers"], oracle, baseline, strict=True):
            assert_no_worse(out, exact, one)


def test_all_ranks_go_on_from_the_same_state(found: list[dict[str, Any]]) -> None:
    for name in (*STREAMS, "bits"):
        for key, value in found[0][name].items():
            assert all(torch.equal(part[name][key], value) for part in found), (name, key)


def test_memories_have_the_bits_of_one_process(found: list[dict[str, Any]]) -> None:
    """Given equal keys and values, which projections of single tokens give the first layer."""
    one = ranks.bits_of(None)
    for key in ("matrix of layer 0", "norm of layer 0", "keys of layer 0", "values of layer 0"):
        assert torch.equal(found[0]["bits"][key], one[key]), key


def test_rounds_are_told_and_bounded_by_the_chunk(found: list[dict[str, Any]]) -> None:
    """101 tokens by three ranks of about 16 tokens a round; what is left of segments of 4 by all."""
    assert found[0]["reports"] == [0, 32, 32, 36, 1]


def test_ranks_that_differ_are_told(found: list[dict[str, Any]]) -> None:
    for part in found:
        lengths, sums = part["refused"]
        assert lengths == "text must be the same on all ranks, got tokens of text between 40 and 42"
        assert sums == "text must be the same on all ranks, got sum of text between 820 and 2460"


def test_wrong_sessions_are_named() -> None:
    session = Session(tiny_senri(), batch_size=2)
    with pytest.raises(ValueError, match=r"text must be equally long in all rows, got .* \[2, 1\] tokens"):
        prefill(session, [[1, 2], [3]], mesh=ALONE)
    session.feed([[1, 2], [3]])
    with pytest.raises(ValueError, match=r"session must be in step, got rows that have read \[2, 1\] tokens"):
        prefill(session, [[1, 2], [3, 4]], mesh=ALONE)
    from newllm.models import ContextLMConfig, ContextLMForCausalLM

    sizes = {"vocab_size": 16, "hidden_size": 8, "context_dim": 8}
    other = Session(ContextLMForCausalLM(ContextLMConfig(**sizes)))
    with pytest.raises(TypeError, match="session must be of a SenriForCausalLM, got ContextLMForCausalLM"):
        prefill(other, [1, 2], mesh=ALONE)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a small Senri that reads bytes."""
    from newllm.data.tokenizer import byte_tokenizer

    torch.manual_seed(0)
    folder = tmp_path / "model"
    tiny_senri(vocab_size=264).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_generate_reads_on_all_processes_and_writes_on_the_first(model: Path, tmp_path: Path) -> None:
    words = ["generate", str(model), "--prompt", "once upon a time " * 9, "--max-new-tokens", "5"]
    said = []
    for size, more in ((1, []), (2, ["--sequence-ranks", "2"])):
        folder = tmp_path / str(size)
        folder.mkdir()
        processes.succeeded(processes.command([*words, *more], size, folder), folder)
        log = (folder / "log").read_text()
        assert (log.count("153 tokens read at"), log.count("5 written at")) == (1, 1)
        said.append((folder / "said").read_bytes())
    assert said[0] == said[1] != b""
    refused(words, tmp_path)


def refused(words: list[str], folder: Path) -> None:
    """Two ranks asked of one process are refused in a sentence."""
    wrong = processes.command([*words, "--sequence-ranks", "2"], 1, folder)
    assert processes.exit_codes(wrong) == [2]
    told = "sequence_ranks must be the number of processes, 1, got 2: torchrun --nproc-per-node 2 -m newllm"
    assert told in (folder / "log").read_text()


def test_eval_reads_on_all_processes_and_reports_on_the_first(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("once upon a time there was a stream " * 12)
    words = ["eval", "perplexity", str(model), "--text", str(text), "--chunk", "32", "--out"]
    found = []
    for size, more in ((1, []), (2, ["--sequence-ranks", "2"])):
        folder = tmp_path / str(size)
        folder.mkdir()
        processes.succeeded(processes.command([*words, str(folder), *more], size, folder), folder)
        assert (folder / "said").read_text().count("tokens/s") == 1
        results = json.loads((folder / "results.json").read_text())
        found.append([*results["bins"], results["total"]])
    exact = Session(SenriForCausalLM.from_pretrained(model).double())
    ids = encode(AutoTokenizer.from_pretrained(model), text.read_text())
    report = perplexity_by_position(exact, ids, progress=False)
    cells = [*report.bins, report.total]
    for rows in found:
        assert [(row["start"], row["length"], row["samples"]) for row in rows] == [cell[:3] for cell in cells]
    one, two = (torch.tensor([row["score"] for row in rows]) for rows in found)
    assert_no_worse(two, torch.tensor([cell.perplexity for cell in cells], dtype=torch.float64), one)
    rounds = [json.loads(line)["tokens"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # Seven rounds of about 32 tokens on each of the two.
    assert rounds == [60, 120, 184, 244, 308, 368, 432] and len(ids) == 432
    refused([*words, str(tmp_path)], tmp_path)


def test_passkeys_are_asked_by_all_processes_and_reported_by_the_first(model: Path, tmp_path: Path) -> None:
    """With memories and without."""
    words = ["eval", "passkey", str(model), "--lengths", "[150]", "--depths", "[0.5]", "--samples", "3"]
    more = ["--control", "--batch-tokens", "64", "--sequence-ranks", "2", "--out", str(tmp_path / "out")]
    processes.succeeded(processes.command([*words, *more], 2, tmp_path), tmp_path)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["memory"], row["samples"]) for row in results["rows"]] == [(True, 3), (False, 3)]
    assert (tmp_path / "said").read_text().count("exact recall") == 1
