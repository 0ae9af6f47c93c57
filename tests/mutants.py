"""Damaged files: seeded mutants of whole ones, each read in a child process with little time and memory."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 20.0
MEMORY = 2 * 2**30
LONGEST_MESSAGE = 1500

_NUMBERS: tuple[Any, ...] = (
    -1, 0, 1, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308,
    math.inf, -math.inf, math.nan,
)  # fmt: skip
_WORDS = (
    "",
    "\x00",
    "../../../etc/passwd",
    "/etc/passwd",
    "\ud800",
    "F64",
    "BOOL",
    "x" * 100_000,
    "None",
    "[",
    "é",
)


class Target(NamedTuple):
    """Something read from disk: ``write`` makes a whole one in an empty folder, ``read`` opens and checks it.

    ``read`` is given the folder; it may raise AssertionError for an object that should have been refused.
    """

    write: Callable[[Path], object]
    read: Callable[[Path], object]


class Finding(NamedTuple):
    """A mutant that was neither refused in one sentence nor read as something valid."""

    number: int
    what: str
    happened: str


# Mutations of bytes


def flip_bits(data: bytearray, lots: random.Random) -> None:
    for _ in range(lots.choice((1, 1, 2, 8))):
        place = lots.randrange(_reach(data, lots))
        data[place] ^= 1 << lots.randrange(8)


def truncate(data: bytearray, lots: random.Random) -> None:
    del data[lots.randrange(len(data)) :]


def extend(data: bytearray, lots: random.Random) -> None:
    data += lots.randbytes(lots.randint(1, 200))


def insert(data: bytearray, lots: random.Random) -> None:
    place = lots.randrange(_reach(data, lots))
    data[place:place] = lots.randbytes(lots.randint(1, 9))


def blank(data: bytearray, lots: random.Random) -> None:
    place = lots.randrange(_reach(data, lots))
    size = min(lots.randint(1, 64), len(data) - place)
    data[place : place + size] = bytes([lots.choice((0, 255))]) * size


def repeat(data: bytearray, lots: random.Random) -> None:
    place = lots.randrange(_reach(data, lots))
    data[place:place] = data[place : place + lots.randint(1, 500)]


def huge_number(data: bytearray, lots: random.Random) -> None:
    kind = lots.choice(("<I", ">I", "<Q", ">Q", "<H"))
    size = struct.calcsize(kind)
    value = lots.choice((2 ** (8 * size) - 1, 2 ** (8 * size - 1), 2 ** (8 * size - 1) - 1, 2 ** (4 * size)))
    place = lots.randrange(_reach(data, lots))
    data[place : place + size] = struct.pack(kind, value)


def digits(data: bytearray, lots: random.Random) -> None:
    """Another number in the place of one that is written in digits."""
    places = [place for place, byte in enumerate(data) if 48 <= byte < 58]
    if places:
        place = lots.choice(places)
        data[place : place + 1] = str(lots.choice(_NUMBERS)).encode()


def _reach(data: bytearray, lots: random.Random) -> int:
    """Headers are hit as often as all the rest."""
    return lots.choice((len(data), min(len(data), 400)))


BYTES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    flip_bits, flip_bits, truncate, extend, insert, blank, repeat, huge_number, digits,
)  # fmt: skip


# Mutations of what a text says


def wild(lots: random.Random) -> Any:
    """A value that nobody expects."""
    kind = lots.randrange(7)
    if kind < 2:
        return lots.choice(_NUMBERS)
    if kind == 2:
        return lots.choice(_WORDS)
    if kind == 3:
        return lots.choice((None, True, False, [], {}, [[]], {"": {}}))
    if kind == 4:
        return [lots.choice(_NUMBERS) for _ in range(lots.choice((1, 3, 2000)))]
    if kind == 5:
        return {lots.choice(_WORDS): lots.choice(_NUMBERS)}
    value: Any = lots.choice(_NUMBERS)
    for _ in range(lots.choice((3, 90))):
        value = [value] if lots.random() < 0.5 else {"a": value}
    return value


def nodes(value: Any) -> list[tuple[Any, Any]]:
    """All places in a JSON value, as (container, key)."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [pair for key in keys for pair in [(value, key), *nodes(value[key])]]


def mutated_value(value: Any, lots: random.Random) -> Any:
    """A JSON value with one to three entries replaced, removed, doubled or exchanged."""
    for _ in range(lots.choice((1, 1, 2, 3))):
        places = nodes(value)
        if not places or lots.random() < 0.03:
            return wild(lots)
        container, key = lots.choice(places)
        kind = lots.randrange(8)
        if kind == 0:
            del container[key]
        elif kind == 1:
            other, place = lots.choice(places)
            container[key], other[place] = json.loads(json.dumps([other[place], container[key]]))
        elif kind == 2 and isinstance(container, list):
            container.insert(lots.randint(0, len(container)), container[key])
        elif kind == 3 and isinstance(container, dict):
            container[lots.choice((*_WORDS, f"{key}x"))] = wild(lots)
        else:
            container[key] = wild(lots)
    return value


def mutated_json(data: bytes, lots: random.Random) -> bytes:
    """JSON, or lines of it, that says something else; or is nested more deeply than anyone reads."""
    if lots.random() < 0.04:
        depth = lots.choice((1000, 100_000))
        return lots.choice((b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth))
    text = data.decode("utf-8")
    try:
        return json.dumps(mutated_value(json.loads(text), lots)).encode()
    except json.JSONDecodeError:
        lines = text.splitlines()
        place = lots.randrange(len(lines))
        try:
            lines[place] = json.dumps(mutated_value(json.loads(lines[place]), lots))
        except json.JSONDecodeError:
            number = "1" + "0" * 5000
            lines[place] = lots.choice(("{", "[" * 100_000, number, f'{{"text": {number}}}', '"\\ud800"'))
        return "\n".join(lines).encode()


def mutated_safetensors(data: bytes, lots: random.Random) -> bytes:
    """Other names, shapes, types and places in a header whose length is right."""
    size = int.from_bytes(data[:8], "little")
    header = mutated_json(data[8 : 8 + size], lots)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def mutated_npy(data: bytes, lots: random.Random) -> bytes:
    """Another shape or type in the header of an array, of the same length."""
    header = data[10 : data.index(b"\n")].decode()
    wrong = lots.choice(("-1", "0", "3", "99999999999999", "2, 2", "True", "1e9", "[]", "()", "'x'"))
    kinds = ("<f8", "|O", "<i2", ">u2", "|S4", "<M8[s]", "|V2", "nothing", "<c16", "<u8")
    shape = lots.choice((f"({wrong},)", f"({wrong})", "()"))
    kind = lots.choice(kinds) if lots.random() < 0.6 else "<u2"
    text = (
        f"{{'descr': '{kind}', 'fortran_order': {lots.choice(('False', 'True', '3'))}, 'shape': {shape}, }}"
    )
    return data[:10] + text.ljust(len(header)).encode() + data[data.index(b"\n") :]


STRUCTURED: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": mutated_json,
    ".jsonl": mutated_json,
    ".safetensors": mutated_safetensors,
    ".npy": mutated_npy,
}


def mutate(folder: Path, lots: random.Random) -> str:
    """Damage one of the files in ``folder`` (sometimes two); what was done."""
    done = []
    for _ in range(lots.choice((1, 1, 1, 2))):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
        if not files:
            break
        path = lots.choice(files)
        done.append(f"{path.relative_to(folder)}: {_damaged(path, files, lots)}")
    return "; ".join(done)


def _damaged(path: Path, files: list[Path], lots: random.Random) -> str:
    kind = lots.random()
    if kind < 0.03:
        path.unlink()
        return "removed"
    if kind < 0.06:
        path.write_bytes(b"")
        return "emptied"
    if kind < 0.09:
        other = lots.choice(files)
        path.write_bytes(other.read_bytes())
        return f"now the content of {other.name}"
    structured = STRUCTURED.get(path.suffix)
    if structured is not None and lots.random() < 0.6:
        try:
            path.write_bytes(structured(path.read_bytes(), lots))
        except (ValueError, KeyError, TypeError, RecursionError):
            path.write_bytes(b"{}")
        return structured.__name__
    change, data = lots.choice(BYTES), bytearray(path.read_bytes())
    change(data, lots)
    path.write_bytes(data)
    return change.__name__


# Reading them


def attack(target: Target, folder: Path, count: int, seed: int) -> tuple[Counter[str], list[Finding]]:
    """Read ``count`` mutants of ``target``: how many were read and refused, and what went otherwise.

    Mutant ``number`` depends on ``seed`` and ``number`` alone. They are read in forked children whose memory
    and time are limited, so that one that kills or stops its reader costs no more than itself.
    """
    whole = folder / "whole"
    whole.mkdir(parents=True)
    target.write(whole)
    target.read(whole)
    counts: Counter[str] = Counter()
    findings: list[Finding] = []
    number = 0
    while number < count:
        for line in _in_child(target, folder, range(number, count), seed):
            kind, what, happened = json.loads(line)
            if kind in ("read", "refused"):
                counts[kind] += 1
            else:
                findings.append(Finding(number, what, happened))
            number += 1
    return counts, findings


def mutant(folder: Path, number: int, seed: int) -> tuple[Path, str]:
    """The folder with mutant ``number`` of what lies in ``folder / "whole"``, and what was done to it."""
    place = folder / "mutant"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder / "whole", place)
    return place, mutate(place, random.Random(f"{seed}:{number}"))


def _in_child(target: Target, folder: Path, numbers: range, seed: int) -> list[str]:
    """A line per mutant, up to the one that ended the child."""
    report = folder / "report"
    report.write_text("")
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        try:
            _read_all(target, folder, numbers, seed, report)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    lines = report.read_text().splitlines()
    if len(lines) < len(numbers):
        number = numbers[len(lines)]
        end = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
        _, what = mutant(folder, number, seed)
        lines.append(json.dumps(["died", what, f"the reader ended by {end} (14 is out of time, 6 an abort)"]))
    return lines


def _read_all(target: Target, folder: Path, numbers: range, seed: int, report: Path) -> None:
    log = os.open(folder / "noise", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with report.open("a") as file:
        for number in numbers:
            place, what = mutant(folder, number, seed)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            kind, happened = _outcome(target, place)
            signal.setitimer(signal.ITIMER_REAL, 0)
            file.write(json.dumps([kind, what, happened]) + "\n")
            file.flush()


def _outcome(target: Target, place: Path) -> tuple[str, str]:
    try:
        target.read(place)
    except (ValueError, OSError) as error:
        said = str(error)
        if str(place) not in said:
            return (
                "nameless",
                f"{type(error).__name__} without the file: {said[:300]}{_where(error)}",
            )
        if len(said) > LONGEST_MESSAGE or "\n" in said.strip():
            return "wordy", f"{len(said)} characters: {said[:300]}{_where(error)}"
        if isinstance(error, UnicodeError | json.JSONDecodeError):
            return "raw", f"{type(error).__name__}: {said[:300]}{_where(error)}"
        return "refused", ""
    except BaseException as error:  # noqa: BLE001 # panics of Rust code are no Exception
        return "raised", f"{type(error).__name__}: {str(error)[:300]}{_where(error)}"
    return "read", ""


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return " @ " + " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))
