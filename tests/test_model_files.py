"""Models on disk and on the hub: written whole or not at all, and never waited for in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

from newllm.data.tokenizer import byte_tokenizer
from newllm.hub import model_folder
from newllm.models.files import (
    load_model,
    load_senri,
    load_tokenizer,
    save_model,
    written_whole,
)
from tests.tiny_models import random_tokens, tiny_base, tiny_senri


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Written whole or not at all


def test_file_takes_its_place_when_it_is_done(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "file"
    for text in ("first", "second"):
        with written_whole(path) as temporary:
            temporary.write_text(text)
            assert temporary.parent.parent == path.parent
        assert path.read_text() == text
        assert [child.name for child in path.parent.iterdir()] == ["file"]


def write_half(path: Path, error: BaseException) -> NoReturn:
    with written_whole(path) as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("half")
        raise error


def test_failure_and_interruption_leave_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").write_text("old")
    for error in (OSError("full"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            write_half(path, error)
        assert tree(tmp_path) == {str(path / "old"): b"old"}
    with written_whole(path) as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("whole")
    assert tree(tmp_path) == {str(path / "new"): b"whole"}


def test_folder_comes_back_when_its_successor_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    path, replace = tmp_path / "model", os.replace
    path.mkdir()
    (path / "old").write_text("old")

    def refuse(source: Path, target: Path) -> None:
        if target == path and source.name == "model":
            raise OSError("busy")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="busy"), written_whole(path) as temporary:
        temporary.mkdir()
    assert tree(tmp_path) == {str(path / "old"): b"old"}


def test_model_and_tokenizer_come_back(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    model, ids = tiny_senri(vocab_size=len(tokenizer)), random_tokens(1, 20)
    save_model(model, tokenizer, tmp_path / "out")
    again = load_senri(tmp_path / "out")
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert load_tokenizer(tmp_path / "out").encode("Hä") == tokenizer.encode("Hä")
    assert load_senri(tmp_path / "out", dtype="bfloat16").dtype == torch.bfloat16


def test_model_replaces_nothing_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_senri()
    (tmp_path / "file").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=f"out {tmp_path / 'file'} must be a folder, got a file"):
            save_model(model, None, tmp_path / "file", overwrite=overwrite)
    with pytest.raises(FileExistsError, match=f"out {tmp_path} is not empty: name another folder"):
        save_model(model, None, tmp_path)
    (tmp_path / "empty").mkdir()
    save_model(model, None, tmp_path / "empty")
    before = tree(tmp_path)

    def full_disk(*_: Any, **__: Any) -> NoReturn:
        raise OSError("No space left on device")

    tokenizer = byte_tokenizer()
    monkeypatch.setattr(tokenizer, "save_pretrained", full_disk)
    for out in ("empty", "new"):
        with pytest.raises(OSError, match="No space left on device"):
            save_model(model, tokenizer, tmp_path / out, overwrite=True)
        assert tree(tmp_path) == before


# What cannot be loaded


def test_other_models_are_no_senri(tmp_path: Path) -> None:
    tiny_base("qwen3").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=f"^{tmp_path} must be a Senri model, got a qwen3 model: make one of it"
    ):
        load_senri(tmp_path)


def test_missing_tokenizer_is_told(tmp_path: Path) -> None:
    tiny_senri().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"^the folder {tmp_path} holds no tokenizer "):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=f"^the checkpoint {tmp_path} cannot be read: "):
        load_tokenizer(tmp_path)


def test_what_is_neither_a_folder_nor_an_id_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=f"^{tmp_path / 'file'} must be a model folder or hub id, got a file$"
    ):
        model_folder(tmp_path / "file")
    for path in (tmp_path / "none", "none", "a b/c", "../a/b"):
        with pytest.raises(FileNotFoundError, match=r"^there is no model folder .* the form owner/name"):
            model_folder(path)


# The hub


class Hub:
    """Stands for the hub's two entrances, and counts the visits."""

    def __init__(self, answer: Exception | None = None) -> None:
        self.answer, self.visits = answer, [0, 0]
        self.timeouts: list[float] = []

    def model_info(self, name: str, revision: str | None, timeout: float) -> None:
        self.visits[0] += 1
        self.timeouts.append(timeout)
        if self.answer is not None:
            raise self.answer

    def snapshot_download(self, name: str, *, local_files_only: bool, **_: Any) -> str:
        assert local_files_only == (self.answer is not None)
        self.visits[1] += 1
        raise errors.LocalEntryNotFoundError("not in the cache")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (errors.HTTPError("no route to host"), r"the hub could not be reached \(no route to host\)$"),  # type: ignore[attr-defined]
        (ConnectionError("offline mode"), r"the hub could not be reached \(offline mode\)$"),
        (
            errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError),
            "the hub has none of that name, or only a private one$",
        ),
        (TimeoutError("took too long"), r"the hub could not be reached \(took too long\)$"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_hub_is_asked_once_and_briefly(answer: Exception, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(answer)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    with pytest.raises(FileNotFoundError, match=f"^owner/name is neither a model folder nor .*, and {why}"):
        load_model("owner/name")
    assert hub.visits == [1, 1]
    assert hub.timeouts[0] <= 5


def test_model_that_was_fetched_once_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--owner--name"
    model, ids = tiny_base("llama"), random_tokens(1, 9)
    model.save_pretrained(repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with torch.no_grad():
        assert torch.equal(load_model("owner/name")(ids).logits, model(ids).logits)


def test_checkpoint_whose_config_is_of_no_known_kind_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    with pytest.raises(ValueError, match=f"^the checkpoint {tmp_path} cannot be read: "):
        load_senri(tmp_path)
