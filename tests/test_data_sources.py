"""Sources: every hub schema through fixtures of its form, stand-ins, fixed validation documents."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from newllm.cli import main
from newllm.data import hub, sources
from newllm.data.documents import documents, numbered, split, without
from newllm.data.hub import HUB
from newllm.data.sentences import KINDS, sentences
from newllm.data.sources import coverage, open_source
from newllm.data.text import load_documents

MIRROR = Path(__file__).parent / "hub_fixtures"
WIKI = " = {0} = \n {0} is a place . It has <unk> houses . \n = = History = = \n It is old . \n"


def opened(name: str, tmp_path: Path, **options: Any) -> sources.Corpus:
    return open_source(name, mirror=MIRROR, cache_dir=tmp_path, **options)


def test_row_57_ultrachat_keeps_dialogues_whole_and_apart(tmp_path: Path) -> None:
    corpus = opened("ultrachat", tmp_path)
    bees = "How do bees find home?\nBy the sun.\nAnd by landmarks.\nAt night?\nThey stay in."
    # The third dialogue is also one of validation, so nobody trains on it.
    assert corpus.train.texts == (bees, "Name a prime.\nSeven.")
    assert corpus.validation.texts == ("Held?\nOut.", "What is tea?\nLeaves in water.")
    assert (corpus.read, corpus.stand_in) == ("HuggingFaceH4/ultrachat_200k", None)


def test_row_57_the_other_ultrachat_has_lists_of_turns(tmp_path: Path) -> None:
    """With the first dataset missing, the second one is read, by its own column."""
    (tmp_path / "stingning").symlink_to(MIRROR / "stingning")
    corpus = open_source("ultrachat", mirror=tmp_path, cache_dir=tmp_path)
    everything = {f"Question {i}?\nAnswer {i}." for i in range(20)}
    assert {*corpus.train.texts, *corpus.validation.texts} == everything
    assert corpus.read == "stingning/ultrachat"
    turns = {"data": [{"content": "a"}, {"text": "b"}, "c"]}
    assert HUB["ultrachat"].sets[1].read(turns) == "a\nb\nc"


def test_row_57_shuffling_moves_documents_not_tokens() -> None:
    whole = numbered("x", [f"document {i}" for i in range(20)])
    mixed = whole.shuffled(3)
    assert mixed.texts != whole.texts
    assert Counter(mixed.texts) == Counter(whole.texts)
    assert mixed == whole.shuffled(3) != whole.shuffled(4)
    parts = [whole.every(index, 3).texts for index in range(3)]
    assert parts[1] == whole.texts[1::3]
    assert sorted(sum(parts, ())) == sorted(whole.texts)
    with pytest.raises(ValueError, match="index must be from 0 to 2, got 3"):
        whole.every(3, 3)


def test_row_58_dolly_with_and_without_context(tmp_path: Path) -> None:
    corpus = opened("dolly", tmp_path)
    texts = {*corpus.train.texts, *corpus.validation.texts}
    assert len(texts) == 20
    assert {
        "Instruction: When did the bridge open? Context: The bridge opened in 1907. Response: In 1907.",
        "Instruction: Give me three colours. Response: Red, green, blue.",
        "Instruction: Count to 3. Response: 1 2 3",
    } <= texts
    assert corpus.validation.texts and not {*corpus.train.texts} & {*corpus.validation.texts}


def test_row_58_hh_rlhf_takes_a_subset_and_collapses_spaces(tmp_path: Path) -> None:
    corpus = opened("hh-rlhf", tmp_path, subset="helpful-base")
    assert corpus.train.texts == tuple(
        f"Human: helpful-base train {i}? Assistant: Yes, of course." for i in range(4)
    )
    assert corpus.validation.texts == tuple(
        f"Human: helpful-base test {i}? Assistant: Yes, of course." for i in range(2)
    )
    assert {text.split()[1] for text in opened("hh-rlhf", tmp_path).train.texts} == {
        "harmless-base",
        "helpful-base",
    }
    with pytest.raises(ValueError, match="Anthropic/hh-rlhf has no split 'train' in 'helpless'"):
        opened("hh-rlhf", tmp_path, subset="helpless")


@pytest.mark.parametrize(
    ("name", "titles"),
    [("wikitext-2", ["Aldermere", "Brook"]), ("wikitext-103", ["Aldermere", "Brook", "Castle"])],
)
def test_row_58_wikitext_lines_become_articles(name: str, titles: list[str], tmp_path: Path) -> None:
    corpus = opened(name, tmp_path)
    assert corpus.train.texts == tuple(WIKI.format(title) for title in titles)
    assert corpus.validation.texts == (WIKI.format("Vale"),)


def test_row_58_pg19_books_and_limits(tmp_path: Path) -> None:
    corpus = opened("pg19", tmp_path, limit=2)
    assert corpus.train.texts == tuple(f"CHAPTER I.\r\n\r\nIt was {year}.\r\n" for year in (1850, 1851))
    assert corpus.validation.titles == ("0", "1")
    assert HUB["pg19"].limits == (1000, 100)


def test_dataset_without_its_column_is_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "databricks" / "databricks-dolly-15k"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"question": "?", "answer": "!"}\n')
    with pytest.raises(ValueError, match="lacks the column 'response'; it has answer, question"):
        open_source("dolly", mirror=tmp_path, cache_dir=tmp_path)
    with pytest.raises(ConnectionError, match=r"pg19 is out of reach .*has no folder emozilla/pg19"):
        open_source("pg19", mirror=tmp_path, cache_dir=tmp_path)


def test_stand_in_is_named_and_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(hub, "_hub_commit", lambda repo, revision: asked.append(repo) or "")
    corpus = open_source("pg19", cache_dir=tmp_path)
    assert asked == ["emozilla/pg19"]
    said = (
        "pg19 could not be reached: using embedded in its place (newllm data get austen gives a closer one)"
    )
    assert corpus.stand_in == said
    assert corpus.said().startswith(f"{said}; data: embedded: training ")
    record = corpus.record()
    assert (record["asked"], record["read"], record["stand_in"]) == ("pg19", "embedded", said)
    assert json.dumps(record)
    with pytest.raises(
        ConnectionError, match=r"pg19 is out of reach .emozilla/pg19: the hub does not answer, and no copy"
    ):
        open_source("pg19", offline="error", cache_dir=tmp_path)


def test_what_the_hub_gave_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = hub._rows
    monkeypatch.setattr(hub, "_hub_commit", lambda repo, revision: "0123abc")
    monkeypatch.setattr(hub, "_rows", lambda path, *rest: rows(str(MIRROR / path), *rest))
    first = open_source("pg19", cache_dir=tmp_path, offline="error", limit=2)
    monkeypatch.setattr(hub, "_hub_commit", lambda repo, revision: pytest.fail("asked twice"))
    assert open_source("pg19", cache_dir=tmp_path, offline="error", limit=2) == first
    assert first.record()["revision"] == "0123abc"
    assert not list((tmp_path / "hub").rglob(".*"))


def test_hub_dataset_is_pinned_and_its_commit_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commits = {None: "aaa", "v1": "bbb"}
    asked, rows = [], hub._rows

    def from_mirror(path: str, *rest: Any) -> Any:
        asked.append(rest[-1])
        if rest[-1] == "v2":
            raise ConnectionError("no network")
        return rows(str(MIRROR / path), *rest[:-1])

    monkeypatch.setattr(hub, "_hub_commit", lambda repo, revision: commits.get(revision, revision))
    monkeypatch.setattr(hub, "_rows", from_mirror)
    pinned = open_source("pg19", cache_dir=tmp_path, limit=2, revision="v1")
    newest = open_source("pg19", cache_dir=tmp_path, limit=2)
    assert (pinned.record()["revision"], newest.record()["revision"]) == ("bbb", "aaa")
    # The validation documents are of the very commit that the training documents are of.
    assert asked == ["bbb", "bbb", "aaa", "aaa"]
    monkeypatch.setattr(hub, "_hub_commit", lambda repo, revision: "")
    with pytest.raises(ConnectionError, match="pg19 is out of reach"):
        open_source("pg19", cache_dir=tmp_path, limit=2, revision="v2")


def test_row_60_validation_is_a_fixed_choice(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(400)]
    train, validation = split(numbered("x", texts))
    assert sorted((*train.texts, *validation.texts)) == sorted(texts)
    assert 20 <= len(validation.texts) <= 60
    fewer_train, fewer = split(numbered("x", texts[:200]))
    # However many are read: a document never changes sides.
    assert {*fewer.texts} <= {*validation.texts} and not {*fewer_train.texts} & {*validation.texts}
    doubled_train, doubled = split(numbered("x", texts * 2))
    assert not {*doubled_train.texts} & {*doubled.texts}
    books = documents("b", ["one", "two", "three"], ["1", "2", "3"])
    assert [part.titles for part in split(books, ("two",), ("three",))] == [("one",), ("two",)]
    head, tail = split(numbered("one", ["line\n" * 100]))
    assert (head.joined() + tail.joined(), len(tail.joined())) == ("line\n" * 100, 50 - 5)
    assert without(books, tail) is books


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_text_of_one_line_has_validation(end: str) -> None:
    head, tail = split(numbered("one", ["word " * 20 + end]))
    assert (head.joined(), tail.joined()) == ("word " * 18, "word " * 2 + end)


def test_a_few_documents_leave_something_to_train_on() -> None:
    """Of 100 texts some are held out by their hash; two of those alone must not all be."""
    _, held = split(numbered("x", [f"text {i}" for i in range(100)]))
    train, validation = split(numbered("x", held.texts[:2]))
    assert (train.texts, validation.texts) == (held.texts[1:2], held.texts[:1])


def test_row_60_auto_split_is_refused_and_files_are_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"validation must not be 'auto_split'.*'fixed' or a text file"):
        open_source("sentences", validation="auto_split", cache_dir=tmp_path)
    file = tmp_path / "held" / "validation.txt"
    made = open_source("sentences", validation=str(file), cache_dir=tmp_path)
    written = file.read_text()
    assert written == made.validation.joined()
    same = open_source("sentences", validation=str(file), cache_dir=tmp_path)
    assert same.record() == made.record()
    again = open_source("sentences", validation=str(file), cache_dir=tmp_path, limit=100)
    assert file.read_text() == written
    assert (len(again.train.texts), again.validation.joined()) == (100, written)
    assert not [text for text in again.train.texts if text in written]


def test_validation_files_of_json_lines_keep_documents_and_column(tmp_path: Path) -> None:
    source, file = tmp_path / "notes.jsonl", tmp_path / "held.jsonl"
    source.write_text("\n".join(json.dumps({"body": f"note {i}\nof two lines"}) for i in range(100)))
    options: dict[str, Any] = {"column": "body", "validation": str(file), "cache_dir": tmp_path}
    made, again = (open_source(str(source), **options) for _ in range(2))
    assert made.record() == again.record()
    assert made.validation.texts == split(load_documents(str(source), column="body"))[1].texts


def test_row_60_coverage_counts_tokens_and_types() -> None:
    found = coverage(np.array([1, 2, 3]), np.array([1, 1, 9, 2]))
    assert found == {"tokens": 0.75, "types": 2 / 3}
    assert coverage(np.array([1]), np.array([], dtype=np.int64)) == {"tokens": 1.0, "types": 1.0}


def test_row_61_500_sentences_of_six_kinds() -> None:
    made = sentences()
    assert Counter(kind for kind, _ in made) == KINDS
    assert sum(KINDS.values()) == len(made) == 500
    assert made == sentences() != sentences(seed=1)
    assert all(text[0].isupper() and text.endswith(".") for _, text in made)
    assert load_documents("sentences").texts == tuple(text for _, text in made)


def test_jsonl_files_and_folders(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"body": "one\\n"}\n\n{"body": "two"}\n')
    found = load_documents(str(file), column="body")
    assert (found.texts, found.titles) == (("one\n", "two"), ("rows.jsonl:1", "rows.jsonl:3"))
    (tmp_path / "plain.txt").write_text("zero")
    assert load_documents(str(tmp_path), column="body").texts == ("zero", "one\n", "two")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1 lacks the column 'text' with a text; it has body$"):
        load_documents(str(file))
    file.write_text("{no\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1 cannot be read: "):
        load_documents(str(file))


def test_several_sources_are_read_one_after_another(tmp_path: Path) -> None:
    for name in ("a+b", "c"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} {n}"}}\n' for n in range(20)))
    # A file may have the sign in its name.
    own = [open_source(str(tmp_path / name)) for name in ("a+b.jsonl", "c.jsonl")]
    (tmp_path / "a+b.jsonl").rename(tmp_path / "a.jsonl")
    both = open_source("+".join(str(tmp_path / f"{name}.jsonl") for name in "ac"))
    assert both.train.texts == own[0].train.texts + own[1].train.texts
    assert both.validation.texts == own[0].validation.texts + own[1].validation.texts


def test_datasets_of_the_hub_can_be_joined_too(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text("".join(f'{{"text": "own {n}"}}\n' for n in range(20)))
    own, chat = str(tmp_path / "own.jsonl"), opened("ultrachat", tmp_path)
    both = opened(f"{own}+ultrachat", tmp_path)
    assert both.train.texts == open_source(own).train.texts + chat.train.texts
    assert (both.asked, both.read) == (f"{own}+ultrachat", f"{own}+{chat.read}")
    assert (both.stand_in, both.revision) == (None, chat.revision)


def test_hash_of_documents_covers_their_borders() -> None:
    assert numbered("a", ["xy", "z"]).sha256 != numbered("a", ["x", "yz"]).sha256
    text = b"x"
    assert numbered("a", ["x"]).sha256 == hashlib.sha256((1).to_bytes(8, "big") + text).hexdigest()


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"name": "ultrachatt"}, ValueError, "did you mean 'ultrachat'"),
        ({"name": "embedded+ultrachatt"}, ValueError, "did you mean 'ultrachat'"),
        ({"name": "none/file.txt"}, FileNotFoundError, "no file or folder none/file.txt"),
        (
            {"name": "sentences", "offline": "yes"},
            ValueError,
            "offline must be one of auto, error, got 'yes'",
        ),
        (
            {"name": "ultrachat+dolly", "revision": "v1"},
            ValueError,
            "revision must be that of one dataset, got 'v1' for 'ultrachat\\+dolly'",
        ),
        ({"name": "sentences", "limit": 0}, ValueError, "limit must be at least 1, got 0"),
    ],
)
def test_sources_refuse(words: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        open_source(**words, cache_dir=tmp_path)


def test_sources_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["data", "sources"]) == 0
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("│")}
    assert {*sources.SOURCES} <= lines.keys()
    assert "emozilla/pg19" in lines["pg19"] and "austen" in lines["pg19"]
