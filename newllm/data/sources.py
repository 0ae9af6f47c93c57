"""What can be trained on, by one name: hub datasets with their stand-ins, and texts of this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from newllm.data.corpora import default_cache_dir, is_fetched
from newllm.data.documents import Documents, numbered, split, together, without
from newllm.data.hub import HUB, HubSource, hub_texts
from newllm.data.readers import READERS
from newllm.data.text import EMBEDDED, LOCAL, load_documents, unknown
from newllm.files import one_line, replace_file

Offline = Literal["auto", "error"]
SOURCES = (*HUB, *LOCAL)
"""All names that :func:`open_source` knows besides files and folders."""

# Corpora of books: which of them nobody trains on.
_VALIDATION = {"austen": ("persuasion",)}
_TEST = {"austen": ("northangerabbey",)}


class Corpus(NamedTuple):
    """What is trained on: ``train`` and ``validation`` documents that share no text.

    ``asked`` is the name asked for; ``stand_in`` says why another text was ``read``, None if it was not.
    ``revision`` is the commit of a dataset of the hub, joined by ``+`` where there are several.
    """

    asked: str
    read: str
    stand_in: str | None
    train: Documents
    validation: Documents
    revision: str | None = None

    def said(self) -> str:
        """One line for the screen: what was really read."""
        sizes = ", ".join(
            f"{name} {len(part.texts):,} documents, {part.characters:,} characters"
            for name, part in (("training", self.train), ("validation", self.validation))
        )
        return f"{f'{self.stand_in}; ' if self.stand_in else ''}data: {self.read}: {sizes}"

    def record(self) -> dict[str, object]:
        """The same for a run's files."""
        parts = {
            name: {"documents": len(part.texts), "characters": part.characters, "sha256": part.sha256}
            for name, part in (("train", self.train), ("validation", self.validation))
        }
        read = {"asked": self.asked, "read": self.read, "revision": self.revision}
        return {**read, "stand_in": self.stand_in, **parts}


def open_source(
    name: str,
    *,
    offline: Offline = "auto",
    limit: int | None = None,
    subset: str | None = None,
    revision: str | None = None,
    column: str = "text",
    validation: str = "fixed",
    mirror: Path | str | None = None,
    cache_dir: Path | str | None = None,
) -> Corpus:
    """The documents named ``name``, in training and validation; ``austen+kjv`` are those of both.

    A hub dataset is taken from ``mirror``, from what was read before, or from the hub, which is asked once;
    failing all, a stand-in of this machine takes its place and says so, unless ``offline`` is ``"error"`` or
    a ``revision`` is asked for: a commit, tag or branch of the dataset. ``limit`` is the most training
    documents, ``subset`` a folder of the dataset, ``column`` the text's in JSONL files. ``validation`` is
    ``"fixed"`` (the dataset's own validation documents, or a fixed choice), or a text or JSONL file: read
    where it exists, written from the fixed choice first where it does not.

    Raises ``ValueError`` for unknown names, for a ``revision`` of several datasets and for
    ``validation="auto_split"``, which would test on what was trained; ``ConnectionError`` for a dataset out
    of reach under ``offline="error"``; and as :func:`newllm.data.text.load_documents` and
    :func:`newllm.data.hub.hub_texts`.
    """
    if offline not in get_args(Offline):
        raise ValueError(f"offline must be one of {', '.join(get_args(Offline))}, got {offline!r}")
    if validation == "auto_split":
        raise ValueError(
            "validation must not be 'auto_split': it would be cut from the training text; it must be 'fixed' "
            "or a text file"
        )
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    joined = "+" in name and not Path(name).expanduser().exists()
    names = name.split("+") if joined else [name]
    if revision is not None and sum(part in HUB for part in names) > 1:
        raise ValueError(f"revision must be that of one dataset, got {revision!r} for {name!r}")
    found = [
        _from_hub(part, offline, limit, subset, revision, mirror, cache)
        if part in HUB
        else _local(part, column, cache)
        for part in names
    ]
    corpus = _together(found) if joined else found[0]
    corpus = corpus._replace(train=corpus.train.first(limit))
    return corpus if validation == "fixed" else _with_file(corpus, Path(validation), column)


def coverage(train: np.ndarray, validation: np.ndarray) -> dict[str, float]:
    """How well the training ids cover the validation ids, both ``[N]``.

    ``tokens`` is the share of validation tokens, ``types`` that of distinct ids, that occur in training.
    """
    known = np.unique(train)
    if len(validation) == 0:
        return {"tokens": 1.0, "types": 1.0}
    return {
        "tokens": float(np.isin(validation, known).mean()),
        "types": float(np.isin(np.unique(validation), known).mean()),
    }


def _together(found: list[Corpus]) -> Corpus:
    """Sources joined by ``+``, each with its own choice of documents to judge by."""
    asked, read = ("+".join(getattr(corpus, name) for corpus in found) for name in ("asked", "read"))
    train, validation = (
        together(read, (getattr(corpus, part) for corpus in found)) for part in ("train", "validation")
    )
    stand_ins = "; ".join(corpus.stand_in for corpus in found if corpus.stand_in) or None
    revisions = "+".join(corpus.revision for corpus in found if corpus.revision) or None
    return Corpus(asked, read, stand_ins, without(train, validation), validation, revisions)


def _local(name: str, column: str, cache: Path) -> Corpus:
    if not (name in LOCAL or name.partition(":")[0] in READERS or Path(name).expanduser().exists()):
        raise unknown(name, SOURCES)
    whole = load_documents(name, column=column, cache_dir=cache)
    train, validation = split(whole, _VALIDATION.get(name, ()), _TEST.get(name, ()))
    return Corpus(name, name, None, train, validation)


def _from_hub(
    name: str,
    offline: Offline,
    limit: int | None,
    subset: str | None,
    revision: str | None,
    mirror: Path | str | None,
    cache: Path,
) -> Corpus:
    source, failures = HUB[name], []
    where: Any = {"subset": subset, "mirror": mirror, "cache_dir": cache}
    for chosen in source.sets:
        most, validating = source.limits
        wanted = most if limit is None else limit
        try:
            found = hub_texts(source, chosen, chosen.train, limit=wanted, revision=revision, **where)
            # Of the same commit, whatever has become of the dataset in between.
            where["revision"] = found.revision or revision
            own = chosen.validation and hub_texts(
                source, chosen, chosen.validation, limit=validating, **where
            )
        except OSError as error:
            failures.append(f"{chosen.repo}: {one_line(error)}")
            continue
        train = numbered(chosen.repo, found.texts)
        if not own:
            return Corpus(name, chosen.repo, None, *split(train), found.revision)
        held = numbered(chosen.repo, own.texts)
        return Corpus(name, chosen.repo, None, without(train, held), held, found.revision)
    if offline == "error" or mirror is not None or revision is not None:
        raise ConnectionError(f"{name} is out of reach ({'; '.join(failures)})")
    return _stand_in(name, source, cache)


def _stand_in(name: str, source: HubSource, cache: Path) -> Corpus:
    usable = [other for other in source.stand_ins if is_fetched(other, cache_dir=cache)]
    other = usable[0] if usable else EMBEDDED
    corpus = _local(other, "text", cache)
    hint = "" if usable else f" (newllm data get {source.stand_ins[0]} gives a closer one)"
    why = f"{name} could not be reached: using {other} in its place{hint}"
    return corpus._replace(asked=name, stand_in=why)


def _with_file(corpus: Corpus, path: Path, column: str) -> Corpus:
    """``corpus`` with the validation documents of a file, which is written where it is missing.

    What was written is read as well: a later run, which finds the file, must see the same documents.
    """
    if not path.exists():
        held = corpus.validation
        lines = [json.dumps({column: text}) for text in held.texts]
        content = "\n".join(lines) if path.suffix == ".jsonl" else held.joined()
        replace_file(path, lambda file: file.write_text(content, encoding="utf-8"))
    held = load_documents(str(path), column=column)
    known: Sequence[str] = held.texts
    kept = [i for i, text in enumerate(corpus.train.texts) if not any(text in other for other in known)]
    return corpus._replace(train=corpus.train.chosen(kept), validation=held)
