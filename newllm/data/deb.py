"""Debian packages without dpkg: an ``ar`` archive around a compressed tar archive."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

LARGEST = 2**28
"""Bytes that a file in an archive of texts may unpack to."""

_MAGIC = b"!<arch>\n"
_HEADER = 60  # name 16, time 12, owner 6, group 6, mode 8, size 10, end mark 2


def ar_members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of every member of an ``ar`` archive (ar(5), common format).

    Raises ValueError where ``data`` is not an archive or ends early.
    """
    if not data.startswith(_MAGIC):
        raise ValueError("not a Debian package: the ar archive's first line is missing")
    at = len(_MAGIC)
    while at < len(data):
        header = data[at : at + _HEADER]
        if len(header) < _HEADER or not header.endswith(b"`\n"):
            raise ValueError("damaged Debian package: an ar header is cut off")
        if not header[48:58].strip().isdigit():
            raise ValueError(f"damaged Debian package: an ar member has the size {header[48:58]!r}")
        size = int(header[48:58])
        body = data[at + _HEADER : at + _HEADER + size]
        if len(body) < size:
            raise ValueError("damaged Debian package: an ar member is cut off")
        yield header[:16].decode("ascii").strip().rstrip("/"), body
        at += _HEADER + size + size % 2  # members begin at even places


def check_size(name: str, size: int) -> None:
    """Raise ValueError for a member larger than any text: kilobytes can be packed gigabytes."""
    if size > LARGEST:
        raise ValueError(f"{name} unpacks to more than {LARGEST:,} bytes")


def deb_files(path: Path, endings: tuple[str, ...]) -> dict[str, bytes]:
    """The files inside a ``.deb`` whose paths end in ``endings``: ending -> content.

    Raises ValueError where the package is damaged or an ending is not found.
    """
    found: dict[str, bytes] = {}
    for name, body in ar_members(path.read_bytes()):
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(body), mode="r:*") as archive:
                for member in archive:
                    ending = next((ending for ending in endings if member.name.endswith(ending)), None)
                    content = archive.extractfile(member) if ending and member.isfile() else None
                    if ending and content:
                        check_size(member.name, member.size)
                        found[ending] = content.read()
    missing = [ending for ending in endings if ending not in found]
    if missing:
        raise ValueError(f"{path.name} has no file ending in {missing[0]}")
    return found
