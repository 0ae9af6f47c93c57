"""Streams: packed blocks, ordered documents with reset flags, needles among them, all by number alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from newllm.data.passkey import byte_passkey
from newllm.data.streams import IGNORED, Batch, Needles, OrderedStreams, PackedBlocks
from newllm.data.token_cache import Tokens
from newllm.data.tokenizer import KEY_TOKEN, QUESTION_TOKEN

PASSKEY = byte_passkey("the quick brown fox jumps over the lazy dog " * 40, key_length=3)


def tokens(*sizes: int) -> Tokens:
    """Documents of these sizes; ids count upwards over all."""
    borders = np.cumsum([0, *sizes])
    return Tokens(np.arange(borders[-1], dtype=np.uint16), borders)


def same(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_packed_blocks_cover_an_epoch_without_overlap() -> None:
    data = PackedBlocks(tokens(1000), rows=3, length=10, seed=1)
    seen = torch.cat([data.batch(i)["input_ids"] for i in range(len(data))])
    assert len(seen.flatten().unique()) == seen.numel() >= 960
    assert (seen.diff() == 1).all()
    starts = seen[:, 0] % 10
    assert len(starts.unique()) == 1
    second = torch.cat([data.batch(len(data) + i)["input_ids"] for i in range(len(data))])
    assert not torch.equal(seen, second)
    for number in (0, 5, 40):
        batch = data.batch(number)
        assert torch.equal(batch["targets"], batch["input_ids"] + 1)


def test_unshuffled_blocks_come_in_order() -> None:
    data = PackedBlocks(tokens(65), rows=2, length=10, shuffle=False)
    first = data.batch(0)["input_ids"]
    assert first.flatten().tolist() == list(range(20))
    assert len(data) == 2


@pytest.mark.parametrize("kind", [PackedBlocks, OrderedStreams])
@pytest.mark.parametrize("needles", [None, Needles(PASSKEY, 0.5, segment=8)], ids=["text", "needles"])
def test_batches_depend_on_their_number_alone(kind: Any, needles: Needles | None) -> None:
    """To the token: whoever starts at batch 17 reads what the others read there."""

    def made(seed: int = 3) -> Any:
        return kind(tokens(70, 40, 300, 7), rows=2, length=24, seed=seed, needles=needles)

    one, other = made(), made()
    straight = [one.batch(i) for i in range(30)]
    for number in (17, 4, 29, 0):
        assert same(other.batch(number), straight[number])
    assert any(not same(made(4).batch(i), straight[i]) for i in range(5))


def test_row_81_packed_needles_lie_whole_inside_the_length() -> None:
    text = tokens(5000)
    data = PackedBlocks(
        text._replace(ids=text.ids % 256), rows=8, length=40, needles=Needles(PASSKEY, 0.25, segment=8)
    )
    batches = [data.batch(i) for i in range(100)]
    rows = torch.cat([batch["input_ids"] for batch in batches])
    targets = torch.cat([batch["targets"] for batch in batches])
    marked = (rows == QUESTION_TOKEN).sum(1) * (rows == KEY_TOKEN).sum(1) == 1
    # 800 rows with probability a quarter: five standard deviations.
    assert abs(int(marked.sum()) - 200) < 62
    assert len(marked.view(100, 8).unique(dim=0)) > 20 and len(targets[marked][:, -3:].unique(dim=0)) > 100
    for ids, wanted in zip(rows[marked], targets[marked], strict=True):
        key = int((ids == KEY_TOKEN).nonzero()[0, 0])
        assert torch.equal(wanted[-3:], ids[key + 1 : key + 4])
        assert int(ids[-3]) == QUESTION_TOKEN
        assert torch.equal(wanted[:-1], ids[1:])


def test_row_81_loss_may_lie_on_the_answer_alone() -> None:
    needles = Needles(PASSKEY, 1.0, answer_only=True, segment=8)
    targets = PackedBlocks(tokens(500), rows=4, length=40, needles=needles).batch(0)["targets"]
    assert (targets[:, :-3] == IGNORED).all()
    assert ((targets[:, -3:] >= ord("0")) & (targets[:, -3:] <= ord("9"))).all()
    everything = Needles(PASSKEY, 0.01)
    assert (everything.ratio, everything.answer_only) == (0.01, False)


def test_ordered_rows_read_documents_whole_and_in_order() -> None:
    sizes = (50, 21, 100, 33, 8)
    text = tokens(*sizes)
    data = OrderedStreams(text, rows=2, length=16, seed=2)
    read: list[list[int]] = []
    current: list[list[int]] = [[], []]
    for index in range(40):
        batch = data.batch(index)
        for row in range(2):
            ids, wanted = batch["input_ids"][row], batch["targets"][row]
            kept = batch["attention_mask"][row]
            if batch["reset"][row]:
                read.append(current[row])
                current[row] = []
            current[row] += ids[kept].tolist()
            assert torch.equal(wanted[kept], ids[kept] + 1)
            assert (wanted[~kept] == IGNORED).all()
    whole = [text.document(place)[:-1].tolist() for place in range(len(sizes))]
    finished = [document for document in read if document]
    assert all(document in whole for document in finished)
    assert len(finished) > len(sizes)


def test_every_epoch_reads_every_document_once() -> None:
    data = OrderedStreams(tokens(5, 9, 12, 3, 8, 1), rows=1, length=16, seed=2)
    firsts = [int(data.batch(index)["input_ids"][0, 0]) for index in range(10)]
    assert {*firsts[:5]} == {*firsts[5:]} == {0, 5, 14, 26, 29}
    assert firsts[:5] != firsts[5:]


def test_sets_are_streams_of_their_own() -> None:
    """Two sets of one row read what one set of two rows reads, block by block."""
    text = tokens(50, 21, 100, 33, 8)
    together = OrderedStreams(text, rows=2, length=16, seed=2)
    apart = OrderedStreams(text, rows=1, length=16, sets=2, seed=2)
    for time in range(12):
        both = together.batch(time)
        for chosen in range(2):
            one = apart.batch(2 * time + chosen)
            assert all(torch.equal(one[name][0], both[name][chosen]) for name in both)


def test_row_81_needles_are_documents_of_ordered_streams() -> None:
    needles = Needles(PASSKEY, 1.0, answer_only=True, segment=8, blocks=3)
    data = OrderedStreams(tokens(50), rows=1, length=16, needles=needles)
    first, second, last, other = (data.batch(index) for index in range(4))
    assert [bool(batch["reset"][0]) for batch in (first, second, last, other)] == [True, False, False, True]
    ids = torch.cat([batch["input_ids"][0] for batch in (first, second, last)])
    key = int((ids == KEY_TOKEN).nonzero()[0, 0])
    assert torch.equal(last["targets"][0, -3:], ids[key + 1 : key + 4])
    assert (first["targets"] == IGNORED).all()


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (PackedBlocks, {"length": 50}, "length 50 needs 51 tokens of text, got 50"),
        (PackedBlocks, {"rows": 0}, "rows must be at least 1, got 0"),
        (OrderedStreams, {"sets": 0}, "sets must be at least 1, got 0"),
        (OrderedStreams, {"tokens": tokens(1, 1)}, "no document of two tokens"),
        (PackedBlocks, {"needles": Needles(PASSKEY, 2.0)}, "ratio must be between 0 and 1, got 2"),
        (PackedBlocks, {"needles": Needles(PASSKEY), "length": 5}, "too short for a passkey prompt"),
    ],
)
def test_streams_refuse(kind: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**{"tokens": tokens(50), "rows": 2, "length": 8, **change})
