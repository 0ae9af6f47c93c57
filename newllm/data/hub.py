"""Datasets of the Hugging Face hub: where each lies, what it needs, and how rows become documents."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from newllm.files import one_line, read_rows, replace_file
from newllm.hub import SECONDS

Row = Mapping[str, Any]


class HubSet(NamedTuple):
    """A dataset: ``repo`` and ``config``, the names of its splits (None: it has none), ``column`` and reader.

    ``read`` turns a row into a text, given that the row has ``column``.
    """

    repo: str
    config: str | None
    train: str
    validation: str | None
    column: str
    read: Callable[[Row], str]


class HubTexts(NamedTuple):
    """Documents of a dataset, and the commit that they are of (None: a mirror does not say)."""

    texts: list[str]
    revision: str | None


class HubSource(NamedTuple):
    """A name of the registry: ``what`` it is, its datasets in order of preference, local stand-ins likewise.

    ``group`` makes documents of consecutive texts; ``limits`` are the most documents of training and
    validation, None for all.
    """

    what: str
    sets: tuple[HubSet, ...]
    stand_ins: tuple[str, ...]
    group: Callable[[Iterable[str]], Iterator[str]] = iter
    limits: tuple[int | None, int | None] = (None, None)


def _messages(row: Row) -> str:
    return "\n".join(message["content"] for message in row["messages"])


def _turns(row: Row) -> str:
    return "\n".join(_turn(turn) for turn in row["data"])


def _turn(turn: str | Row) -> str:
    return turn if isinstance(turn, str) else turn.get("content", turn.get("text", ""))


def _instruction(row: Row) -> str:
    parts = [f"{name.capitalize()}: {row[name]}" for name in ("instruction", "context") if row.get(name)]
    return " ".join([*parts, f"Response: {row['response']}"])


def _chosen(row: Row) -> str:
    return " ".join(row["chosen"].split())


def _text(row: Row) -> str:
    return str(row["text"])


def _articles(lines: Iterable[str]) -> Iterator[str]:
    """WikiText's articles from its lines: each begins with a heading like ``= Title =``."""
    article: list[str] = []
    for line in lines:
        if re.fullmatch(r" = [^=].*[^=] = \n?", line) and any(map(str.strip, article)):
            yield "".join(article)
            article = []
        article.append(line)
    if any(map(str.strip, article)):
        yield "".join(article)


def _wikitext(size: str) -> HubSource:
    config = f"wikitext-{size}-raw-v1"
    chosen = HubSet("Salesforce/wikitext", config, "train", "validation", "text", _text)
    return HubSource(f"WikiText-{size}: articles of Wikipedia", (chosen,), ("shakespeare",), _articles)


HUB: dict[str, HubSource] = {
    "ultrachat": HubSource(
        "UltraChat: dialogues between a user and an assistant",
        (
            HubSet(
                "HuggingFaceH4/ultrachat_200k", None, "train_sft", "test_sft", "messages", _messages
            ),
            HubSet("stingning/ultrachat", None, "train", None, "data", _turns),
        ),
        ("chitchat",),
        limits=(50_000, 1000),
    ),
    "dolly": HubSource(
        "Dolly-15k: instructions and answers",
        (HubSet("databricks/databricks-dolly-15k", None, "train", None, "response", _instruction),),
        ("chitchat",),
    ),
    "hh-rlhf": HubSource(
        "HH-RLHF: the preferred dialogues; subset names one of its folders",
        (HubSet("Anthropic/hh-rlhf", None, "train", "test", "chosen", _chosen),),
        ("chitchat",),
    ),
    "wikitext-2": _wikitext("2"),
    "wikitext-103": _wikitext("103"),
    "pg19": HubSource(
        "PG19: books of Project Gutenberg from before 1919",
        (HubSet("emozilla/pg19", None, "train", "validation", "text", _text),),
        ("austen",),
        limits=(1000, 100),
    ),
}  # fmt: skip
"""All hub sources by name."""


def hub_texts(
    source: HubSource,
    chosen: HubSet,
    split: str,
    *,
    limit: int | None = None,
    subset: str | None = None,
    revision: str | None = None,
    mirror: Path | str | None = None,
    cache_dir: Path,
) -> HubTexts:
    """At most ``limit`` documents of ``split`` of a dataset.

    ``revision`` pins the dataset to a commit, tag or branch (None: its newest). ``mirror`` is a folder that
    holds datasets as ``owner/name``; without one, what was read before is taken from ``cache_dir``, then the
    hub is asked once, then the local cache of ``datasets``.

    Raises ``FileNotFoundError`` where a mirror lacks the dataset, ``ConnectionError`` where the hub cannot be
    reached and nothing lies here, ``ValueError`` for a dataset that lacks the split or the column, or a copy
    that is damaged.
    """
    if mirror is not None:
        folder = Path(mirror) / chosen.repo
        if not folder.is_dir():
            raise FileNotFoundError(f"the mirror {mirror} has no folder {chosen.repo}")
        return HubTexts(_documents(source, chosen, _rows(str(folder), chosen, split, subset), limit), None)
    parts = (chosen.config, split, subset, None if limit is None else str(limit), revision)
    name = "-".join(filter(None, parts)).replace("/", "--")
    copy = cache_dir / "hub" / chosen.repo.replace("/", "--") / f"{name}.jsonl"
    if copy.is_file():
        # The first line is the commit, the others are documents.
        commit, *texts = read_rows(copy, str) or [""]
        return HubTexts(texts, commit or None)
    commit = _hub_commit(chosen.repo, revision)
    reached, pinned = bool(commit), commit or revision
    try:
        with _offline(not reached):
            rows = _rows(chosen.repo, chosen, split, subset, reached, pinned)
            texts = _documents(source, chosen, rows, limit)
    except ConnectionError as error:
        if reached:
            raise
        raise ConnectionError("the hub does not answer, and no copy lies on this machine") from error
    lines = "".join(f"{json.dumps(text)}\n" for text in (pinned or "", *texts))
    replace_file(copy, lambda file: file.write_text(lines, encoding="utf-8"))
    return HubTexts(texts, pinned)


def _rows(
    path: str,
    chosen: HubSet,
    split: str,
    subset: str | None,
    streaming: bool = True,
    revision: str | None = None,
) -> Iterator[Row]:
    import datasets

    bar = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(
            path, chosen.config, split=split, data_dir=subset, streaming=streaming, revision=revision
        )
    except (ValueError, FileNotFoundError) as error:
        where = f"the dataset {chosen.repo} has no split {split!r}"
        raise ValueError(f"{where}{f' in {subset!r}' if subset else ''}: {one_line(error)}") from error
    finally:
        if bar:
            datasets.enable_progress_bars()
    return iter(found)


def _documents(source: HubSource, chosen: HubSet, rows: Iterator[Row], limit: int | None) -> list[str]:
    from tqdm import tqdm

    def texts() -> Iterator[str]:
        for row in rows:
            if row.get(chosen.column) is None:
                raise ValueError(
                    f"the dataset {chosen.repo} lacks the column {chosen.column!r}; it has "
                    f"{', '.join(sorted(row))}"
                )
            yield chosen.read(row)

    found = []
    for text in tqdm(source.group(texts()), desc=chosen.repo, unit="document", total=limit, delay=1):
        if text.strip():
            found.append(text)
        if len(found) == limit:
            break
    return found


def _hub_commit(repo: str, revision: str | None) -> str:
    """The commit that ``revision`` of ``repo`` is, by the hub, asked once; empty where it does not say."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined] # of its HTTP client

    try:
        return HfApi().dataset_info(repo, revision=revision, timeout=SECONDS).sha or ""
    except (HTTPError, OSError):
        return ""


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Keep ``datasets`` from asking again, five times and for 23 seconds."""
    import datasets
    from huggingface_hub import constants

    places: tuple[Any, ...] = (constants, datasets.config)
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = wanted or place.HF_HUB_OFFLINE
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value
