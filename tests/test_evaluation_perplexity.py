"""Perplexity by position equals that of one pass; every chunk tells its memory; pictures hold the numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from newllm.evaluation import process
from newllm.evaluation.perplexity import Bin, Chunk, PerplexityReport, log_borders, perplexity_by_position
from newllm.evaluation.plots import perplexity_figure, recall_figure
from newllm.models.session import Session
from newllm.runs import Run
from newllm.testing import assert_rounding, largest
from tests.evaluation_parts import losses_of
from tests.tiny_models import ADDITIONS, VOCABULARY, random_tokens, tiny_senri

PNG = b"\x89PNG\r\n\x1a\n"


def streamed(session: Session, ids: Tensor, **options: Any) -> PerplexityReport:
    return perplexity_by_position(session, ids, progress=False, **options)


@pytest.mark.parametrize("chunk", [1, 7, 64, 200])
def test_perplexity_bins_are_those_of_one_pass(chunk: int) -> None:
    model, ids, borders = tiny_senri().double(), random_tokens(100), [1, 8, 20, 64]
    report = streamed(Session(model, chunk=chunk), ids, bins=borders)
    losses = losses_of(model, ids)
    # Position 0 is predicted by nothing, and so the bin before border 1 is empty.
    pieces = {(1, 8): losses[:7], (8, 20): losses[7:19], (20, 64): losses[19:63], (64, 100): losses[63:]}
    assert [(cell.start, cell.end) for cell in report.bins] == list(pieces)
    assert [cell.tokens for cell in report.bins] == [len(piece) for piece in pieces.values()]
    found = torch.tensor([cell.nll for cell in (*report.bins, report.total)])
    expected = torch.stack([piece.mean() for piece in (*pieces.values(), losses)])
    assert_rounding(found, expected, additions=VOCABULARY, magnitude=ADDITIONS * largest(losses))


def test_perplexity_bins_add_up_to_the_total() -> None:
    report = streamed(Session(tiny_senri(), chunk=16), random_tokens(150))
    total = report.total
    assert (total.start, total.end, total.tokens) == (0, 150, 149)
    assert sum(cell.tokens for cell in report.bins) == total.tokens
    added = math.fsum(cell.nll * cell.tokens for cell in report.bins)
    assert_rounding(
        torch.tensor(added / total.tokens, dtype=torch.float64),
        torch.tensor(total.nll, dtype=torch.float64),
        additions=total.tokens,
        magnitude=total.nll,
    )
    assert total.perplexity == math.exp(total.nll)
    assert total.perplexity_ci95[0] < total.perplexity < total.perplexity_ci95[1]


def test_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    model = tiny_senri()
    nn.init.zeros_(model.lm_head.weight)
    report = streamed(Session(model, chunk=32), random_tokens(90))
    found = torch.tensor([cell.nll for cell in report.bins])
    expected = torch.full_like(found, math.log(VOCABULARY))
    assert_rounding(found, expected, additions=VOCABULARY, magnitude=math.log(VOCABULARY))


def test_log_borders_double_around_the_window() -> None:
    assert log_borders(1024, 10_000) == [64, 128, 256, 512, 1024, 2048, 4096, 8192]
    assert log_borders(1024, 8192) == [64, 128, 256, 512, 1024, 2048, 4096]
    assert log_borders(48, 100) == [24, 48, 96]
    assert log_borders(8, 20) == [8, 16]
    assert log_borders(1024, 64) == []


def test_perplexity_goes_on_where_the_session_is() -> None:
    """A stream in two reports: positions and losses continue, the border token is predicted."""
    model, ids = tiny_senri().double(), random_tokens(60)
    session = Session(model, chunk=16)
    first, second = (streamed(session, part, bins=[50]) for part in (ids[:40], ids[40:]))
    assert [(cell.start, cell.end, cell.tokens) for cell in first.bins] == [(0, 40, 39)]
    assert [(cell.start, cell.end, cell.tokens) for cell in second.bins] == [(40, 50, 10), (50, 60, 10)]
    expected = losses_of(model, ids)[39:].mean()
    assert_rounding(
        torch.tensor(second.total.nll), expected, additions=VOCABULARY, magnitude=ADDITIONS * float(expected)
    )


def test_chunks_tell_tokens_memory_and_state() -> None:
    told: list[Chunk] = []
    report = streamed(Session(tiny_senri(), chunk=6), random_tokens(25), on_chunk=told.append)
    assert report.chunks == tuple(told)
    assert [chunk.tokens for chunk in told] == [6, 12, 18, 24, 25]
    assert len({chunk.state_bytes for chunk in told}) == 1
    assert report.settled() == told[1]
    assert sorted(chunk.seconds for chunk in told) == [chunk.seconds for chunk in told]
    first = streamed(Session(tiny_senri(), chunk=1), random_tokens(2)).chunks[0]
    assert first.nll is None


@pytest.mark.parametrize("bins", [[0, 4], [4, 4], [8, 4]])
def test_perplexity_refuses_borders_that_do_not_rise(bins: list[int]) -> None:
    with pytest.raises(ValueError, match="bins must be rising positions of at least 1"):
        streamed(Session(tiny_senri()), random_tokens(9), bins=bins)


def test_perplexity_refuses_what_has_nothing_to_predict() -> None:
    with pytest.raises(ValueError, match=r"ids must be a row of at least 2 tokens, got shape \[1\]"):
        streamed(Session(tiny_senri()), random_tokens(1))


def test_resident_memory_is_what_is_held() -> None:
    """Memory counts while it is held, in one piece or many, and no longer."""
    for blocks, size in ((1, 8 << 20), (4096, 2048)):
        before = process.resident_bytes()
        held = [torch.ones(size) for _ in range(blocks)]
        grown = process.resident_bytes() - before
        expected = sum(tensor.nbytes for tensor in held)
        assert expected * 3 // 4 < grown < expected * 2
        del held
        assert process.resident_bytes() - before < expected // 4
    assert before > 50 << 20


def test_peak_memory_stands_in_where_the_system_does_not_tell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = process.resident_bytes()
    monkeypatch.setattr(process, "_STATM", tmp_path / "none")
    assert process.resident_bytes() >= now // 2


# Pictures


def small_report() -> PerplexityReport:
    bins = tuple(
        Bin(low, 2 * low, low, nll, (nll - 0.1, nll + 0.1)) for low, nll in ((16, 4.0), (32, 3.5), (64, 3.2))
    )
    chunks = tuple(Chunk(32 * (n + 1), 3.0, 900 << 20, 21 << 20, float(n)) for n in range(4))
    return PerplexityReport(32, bins, Bin(0, 128, 127, 3.4, (3.3, 3.5)), chunks)


def written(folder: Path, figure: Any) -> bytes:
    return Run(folder, {}, seed=0).plot("picture.png", figure).read_bytes()


def test_recall_picture_holds_every_score(tmp_path: Path) -> None:
    table = {"4": {"0.0": 0.25, "1.0": 0.5}, "16": {"0.0": 0.75, "1.0": 1.0}}
    figure = recall_figure({"window": 32, "recall": {"memory": table, "window_only": table}})
    panels = figure.axes[:2]
    assert [axes.get_title() for axes in panels] == ["memory", "window only"]
    for axes in panels:
        assert {text.get_text(): text.get_position() for text in axes.texts} == {
            "0.25": (0, 0),
            "0.50": (0, 1),
            "0.75": (1, 0),
            "1.00": (1, 1),
        }
        assert [label.get_text() for label in axes.get_xticklabels()] == ["4x\n128", "16x\n512"]
    image = written(tmp_path, figure)
    assert image.startswith(PNG)
    assert len(image) > 20_000


def test_perplexity_picture_shows_bins_and_memory(tmp_path: Path) -> None:
    figure = perplexity_figure(small_report())
    upper, lower = figure.axes
    assert list(upper.patches[0].get_data().values) == [math.exp(4.0), math.exp(3.5), math.exp(3.2)]
    resident, state = lower.lines[:2]
    assert list(resident.get_xdata()) == [32, 64, 96, 128]
    assert (set(resident.get_ydata()), set(state.get_ydata())) == ({900.0}, {21.0})
    assert lower.get_xscale() == "log"
    image = written(tmp_path, figure)
    assert image.startswith(PNG)
    assert len(image) > 20_000
