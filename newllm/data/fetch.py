"""Fetching one file through an ordinary package client (pip or apt-get), with progress."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal, NamedTuple

Client = Literal["pip", "apt"]

CLIENTS: dict[str, tuple[str, ...]] = {"pip": (sys.executable, "-m", "pip"), "apt": ("apt-get",)}
"""The command that each client is started with."""

_POLL_SECONDS = 0.1


class Package(NamedTuple):
    """One pinned download: ``name`` and ``version`` for ``client``, which yields ``file``.

    ``size`` is in bytes, ``sha256`` in lower-case hexadecimal digits; both are those of ``file``.
    """

    client: Client
    name: str
    version: str
    file: str
    size: int
    sha256: str


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, as lower-case hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Raise ValueError unless the file ``path`` has the ``expected`` SHA-256."""
    found = file_sha256(path)
    if found != expected:
        raise ValueError(f"{path.name} has sha256 {found}, expected {expected}; nothing was kept")


def fetch(package: Package, folder: Path, *, progress: bool = True) -> Path:
    """Download ``package`` into the existing, empty ``folder`` and return the checked file.

    Raises FileNotFoundError when the client is missing, ConnectionError when it fails (with what
    it said last) and ValueError when the file has another SHA-256.
    """
    if package.client == "pip":
        _run(_pip_command(package, folder), package, folder, progress)
    else:
        _apt_download(package, folder, progress)
    path = folder / package.file
    if not path.is_file():
        raise ConnectionError(f"{package.client} finished but did not deliver {package.file}")
    check_sha256(path, package.sha256)
    return path


def _pip_command(package: Package, folder: Path) -> list[str]:
    # The hash goes to pip too: pip asks a source archive for its metadata, which runs its setup.py,
    # and must not do so with a file that nobody knows.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    form = "--only-binary" if package.file.endswith(".whl") else "--no-binary"
    what = [f"--requirement={requirements}", "--no-deps", f"{form}={package.name}", f"--dest={folder}"]
    how = ["--retries=1", "--timeout=15", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    return [*CLIENTS["pip"], "download", *what, *how]


def _apt_download(package: Package, folder: Path, progress: bool) -> None:
    options = ["-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=15"]
    download = [*CLIENTS["apt"], *options, "download", f"{package.name}={package.version}"]
    try:
        _run(download, package, folder, progress)
    except ConnectionError as error:
        # Old package lists are the usual cause, and only root may renew them.
        if os.geteuid() != 0:
            raise ConnectionError(f"{error}; 'sudo apt-get update' may help") from error
        _run([*CLIENTS["apt"], *options, "update"], package, folder, progress)
        _run(download, package, folder, progress)


def _run(command: list[str], package: Package, folder: Path, progress: bool) -> None:
    log = folder / "client.log"
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(folder), "LC_ALL": "C"},
            )  # fmt: skip
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{command[0]} is needed to fetch {package.name} and is not on this machine; "
                f"{package.file} from another machine will do as well"
            ) from error
        _wait(process, package, folder, progress)
    if process.returncode != 0:
        raise _failure(package, log.read_text(errors="replace"))


def _wait(process: subprocess.Popen[bytes], package: Package, folder: Path, progress: bool) -> None:
    from tqdm import tqdm

    look = {"unit": "B", "unit_scale": True, "mininterval": 0.5}
    try:
        with tqdm(total=package.size, desc=package.name, disable=not progress, **look) as bar:
            while process.poll() is None:
                bar.update(min(_arrived(folder, package.file), package.size) - bar.n)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_SECONDS)
            bar.update(min(_arrived(folder, package.file), package.size) - bar.n)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _arrived(folder: Path, name: str) -> int:
    sizes = [0]
    for path in folder.rglob(name):
        with contextlib.suppress(FileNotFoundError):
            sizes.append(path.stat().st_size)
    return max(sizes)


def _failure(package: Package, log: str) -> OSError | ValueError:
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["it said nothing"]
    said = next((line for line in reversed(lines) if line.startswith(("ERROR", "E:"))), lines[-1])
    if "DO NOT MATCH THE HASHES" in said:
        return ValueError(f"{package.file} has another sha256 than {package.sha256}; nothing was kept")
    if "No module named pip" in said:
        return FileNotFoundError(
            f"pip is needed to fetch {package.name} and is not installed; run '{sys.executable} -m ensurepip'"
        )
    return ConnectionError(
        f"{package.client} could not fetch {package.name} {package.version} (is there a network?): {said}"
    )
