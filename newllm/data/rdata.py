"""R's lazy-load databases (``.rdx`` index, ``.rdb`` blocks) without R.

The formats are described in "R Internals": 1.8 (serialization, XDR form) and 1.5 (lazy loading).
Only what data sets of text need is read: lists, vectors of numbers and strings, and attributes.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from typing import Any

from newllm.data.deb import LARGEST, check_size

_NULL, _REFERENCE, _SYMBOL, _PAIRLIST, _STRING = 254, 255, 1, 2, 9
_LOGICAL, _INTEGER, _REAL, _STRINGS, _LIST = 10, 13, 14, 16, 19
_HAS_ATTRIBUTES, _HAS_TAG = 1 << 9, 1 << 10
_ZLIB_OR_GZIP = zlib.MAX_WBITS + 32
_LATIN1 = 1 << 14  # bit 2 of a string's own sixteen flags, which begin at bit 12


class _Stream:
    """A serialised R object; every ``read_*`` takes what comes next."""

    def __init__(self, data: bytes) -> None:
        if data[:2] != b"X\n":
            raise ValueError("not an R object: only the XDR serialisation is read")
        self._data = data
        self._at = 2
        self._symbols: list[str] = []
        version, _writer, _oldest_reader = (self._integer() for _ in range(3))
        if version == 3:
            self._take(self._integer())  # the name of the writer's native encoding
        elif version != 2:
            raise ValueError(f"R serialisation version {version} is not known, only 2 and 3")

    def _take(self, size: int) -> bytes:
        piece = self._data[self._at : self._at + size] if size >= 0 else b""
        if len(piece) != size:
            raise ValueError("damaged R object: it is cut off")
        self._at += size
        return piece

    def _integer(self) -> int:
        return int.from_bytes(self._take(4), "big", signed=True)

    def read_item(self) -> Any:
        """The next object: str, list, dict (named lists and pairlists) or None."""
        flags = self._integer()
        kind = flags & 255
        if kind == _NULL:
            return None
        if kind == _REFERENCE:
            return self._symbols[(flags >> 8) - 1]
        if kind == _SYMBOL:
            self._symbols.append(self.read_item())
            return self._symbols[-1]
        if kind == _STRING:
            return self._read_string(flags)
        if kind == _PAIRLIST:
            return self._read_pairlist(flags)
        return self._read_vector(kind, bool(flags & _HAS_ATTRIBUTES))

    def _read_string(self, flags: int) -> str | None:
        size = self._integer()
        if size < 0:  # NA
            return None
        return self._take(size).decode("latin-1" if flags & _LATIN1 else "utf-8")

    def _read_pairlist(self, flags: int) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        while flags & 255 == _PAIRLIST:
            if flags & _HAS_ATTRIBUTES:
                self.read_item()
            tag = self.read_item() if flags & _HAS_TAG else str(len(pairs))
            pairs[tag] = self.read_item()
            flags = self._integer()
        return pairs

    def _read_vector(self, kind: int, has_attributes: bool) -> Any:
        size = self._integer()
        values: list[Any]
        if kind in (_LOGICAL, _INTEGER):
            values = list(struct.unpack(f">{size}i", self._take(4 * size)))
        elif kind == _REAL:
            values = list(struct.unpack(f">{size}d", self._take(8 * size)))
        elif kind in (_STRINGS, _LIST):
            values = [self.read_item() for _ in range(size)]
        else:
            raise ValueError(f"R objects of type {kind} are not read, only lists and vectors")
        names = (self.read_item() or {}).get("names") if has_attributes else None
        return dict(zip(names, values, strict=True)) if names else values


def read_object(data: bytes) -> Any:
    """One R object from its XDR serialisation, versions 2 and 3.

    Vectors and lists become lists, or dicts where they have names; strings become ``str`` and NA
    strings ``None``. Raises ValueError for any other type and for damaged data.
    """
    return _Stream(data).read_item()


def read_database(index: bytes, blocks: bytes) -> dict[str, Any]:
    """All variables of a lazy-load database: name -> object, as :func:`read_object` gives them.

    ``index`` is the content of the ``.rdx`` file, ``blocks`` that of the ``.rdb`` file.
    """
    table = read_object(_unpacked(zlib.decompressobj(_ZLIB_OR_GZIP), index, LARGEST))
    (compression,) = table["compressed"]
    return {
        name: read_object(_decompress(blocks[start : start + size], compression))
        for name, (start, size) in table["variables"].items()
    }


def _decompress(block: bytes, compression: int) -> bytes:
    """A block is its unpacked size (4 bytes) and, unless it is zlib's (1), a letter, then the data."""
    letter, body = (b"", block[4:]) if compression == 1 else (block[4:5], block[5:])
    size = int.from_bytes(block[:4], "big")
    if letter == b"":
        return _unpacked(zlib.decompressobj(), body, size)
    if letter == b"2":
        return _unpacked(bz2.BZ2Decompressor(), body, size)
    if letter == b"Z":
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
        return _unpacked(lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters), body, size)
    if letter == b"0":
        return body
    raise ValueError(f"R data compressed as {letter!r} are not read")


def _unpacked(decoder: Any, data: bytes, size: int) -> bytes:
    """At most ``size`` bytes; more are not unpacked."""
    check_size("R data", size)
    unpacked: bytes = decoder.decompress(data, size)
    return unpacked
