"""Processes cut off at a seeded moment: killed between file operations or inside a write, or out of disk."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# What touches the file system; the moments between which a process can be killed.
_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
_DONE, _TOLD, _WRONG = 0, 3, 4
KINDS = ("killed between", "killed inside", "disk full between", "disk full inside")


class Activity(NamedTuple):
    """Something that writes: ``run`` does it in a folder, ``check`` looks at what lies there.

    ``check`` is called after every crash, and then again after ``run`` was let to finish: it asserts that all
    that can be read is whole. ``begin`` makes what is there before; ``names`` is what an error must name,
    None for a file in the folder.
    """

    run: Callable[[Path], object]
    check: Callable[[Path], object]
    begin: Callable[[Path], object] = lambda folder: None
    names: str | None = None


class Crash(NamedTuple):
    """How a process is cut off: one of KINDS at file operation or byte ``at``."""

    kind: str
    at: int


def drawn(seed: int, operations: int, largest: int) -> Crash:
    """A crash at random, among as many ``operations`` and bytes of the ``largest`` file as there are."""
    lots = random.Random(f"crash {seed}")
    kind = KINDS[seed % len(KINDS)]
    return Crash(kind, lots.randrange(operations) if kind.endswith("between") else lots.randrange(largest))


def measured(activity: Activity, folder: Path) -> tuple[int, int]:
    """File operations of an undisturbed run in the new ``folder``, and bytes of its largest file."""
    folder.mkdir(parents=True)
    activity.begin(folder)
    report = folder.with_name(f"{folder.name}.operations")
    status = _child(activity, folder, Crash("counted", 0), report)
    assert status == (0, _DONE), (status, report.read_text())
    activity.check(folder)
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return int(report.read_text()), max(sizes)


def crashed(activity: Activity, folder: Path, crash: Crash) -> str:
    """Run ``activity`` in the new ``folder`` into ``crash``, look, let it finish, and look again.

    Returns how it ended: killed, told (an OSError that names a file in ``folder``) or done.
    """
    folder.mkdir(parents=True)
    activity.begin(folder)
    report = folder.with_name(f"{folder.name}.report")
    signalled, code = _child(activity, folder, crash, report)
    end = {_DONE: "done", _TOLD: "told"}.get(code, "wrong") if not signalled else "killed"
    assert end != "wrong", report.read_text()
    assert signalled in (0, signal.SIGKILL, signal.SIGXFSZ), (signalled, report.read_text())
    activity.check(folder)
    assert _child(activity, folder, Crash("counted", 0), report) == (0, _DONE), report.read_text()
    activity.check(folder)
    return end


def _child(activity: Activity, folder: Path, crash: Crash, report: Path) -> tuple[int, int]:
    """Signal and exit code of a forked process that runs ``activity`` into ``crash``."""
    report.write_text("")
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = _WRONG
        try:
            code = _run(activity, folder, crash, report)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return (os.WTERMSIG(status), 0) if os.WIFSIGNALED(status) else (0, os.WEXITSTATUS(status))


def _run(activity: Activity, folder: Path, crash: Crash, report: Path) -> int:
    said = os.open(report, os.O_WRONLY)
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    counted = _Moments(folder, crash)
    sys.addaudithook(counted)
    if crash.kind.endswith("inside"):
        # Past the limit the kernel ends the process in the middle of its write, or the write fails.
        killed = crash.kind.startswith("killed")
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if killed else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (crash.at, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        activity.run(folder)
    except OSError as error:
        named = (activity.names or str(folder)) in str(error)
        code = _TOLD if named else _WRONG
        text = "" if named else f"an OSError that names no file of {folder}:\n{traceback.format_exc()}"
    except BaseException:  # noqa: BLE001 # whatever it is, it is reported
        code, text = _WRONG, traceback.format_exc()
    else:
        code, text = _DONE, str(counted.seen)
    counted.armed = False
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    os.write(said, text.encode())
    return code


class _Moments:
    """An audit hook that counts operations that change ``folder`` and strikes at the one that was drawn."""

    def __init__(self, folder: Path, crash: Crash) -> None:
        self.folder, self.crash = str(folder), crash
        self.seen, self.armed = 0, True

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed or event not in _EVENTS or not self._changes(event, arguments):
            return
        self.seen += 1
        if self.seen - 1 < self.crash.at:
            return
        if self.crash.kind == "killed between":
            os.kill(os.getpid(), signal.SIGKILL)
        # What takes no room still works on a full disk.
        if self.crash.kind == "disk full between" and event in ("open", "os.mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

    def _changes(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if not str(arguments[0]).startswith(self.folder):
            return False
        return event != "open" or bool(int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
