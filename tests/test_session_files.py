"""Sessions on disk: continued as if never interrupted, whole or not at all, for their own model only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from newllm import Session
from newllm.models import SenriForCausalLM, session_file
from tests.tiny_models import random_tokens, tiny_senri


@pytest.fixture
def model() -> SenriForCausalLM:
    """A tiny model with open gates."""
    return tiny_senri()


def talked(model: SenriForCausalLM, batch_size: int = 1) -> Session:
    """A session that has read and said something."""
    session = Session(model, batch_size=batch_size)
    session.generate(random_tokens(batch_size, 21), max_new_tokens=4)
    return session


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_loaded_session_goes_on_as_if_never_interrupted(
    batch_size: int, model: SenriForCausalLM, tmp_path: Path
) -> None:
    session = talked(model, batch_size)
    session.save(tmp_path / "kept" / "session.safetensors")
    again = Session(model, batch_size=batch_size)
    again.load(tmp_path / "kept" / "session.safetensors")
    assert (again.tokens, again.pending) == (session.tokens, session.pending)
    assert again.generate(max_new_tokens=20) == session.generate(max_new_tokens=20)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["session.safetensors"]


def test_size_of_the_file_does_not_depend_on_the_length(model: SenriForCausalLM, tmp_path: Path) -> None:
    session, sizes = Session(model), set()
    for tokens in (100, 900, 20_000):
        session.feed(random_tokens(tokens))
        session.save(tmp_path / "session")
        sizes.add((tmp_path / "session").stat().st_size)
    assert len(sizes) == 1


def test_session_that_read_nothing_survives_too(model: SenriForCausalLM, tmp_path: Path) -> None:
    Session(model).save(tmp_path / "session")
    session = talked(model)
    session.load(tmp_path / "session")
    assert session.tokens == [0]
    assert session.state_bytes == 0


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def other_file(path: Path) -> None:
    path.write_text("words")


def other_tensors(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def without_a_part(path: Path) -> None:
    kept = {name: tensor for name, tensor in load_file(path).items() if name != "1.keys"}
    save_file(kept, path, metadata_of(path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shortened, "the session file {} cannot be read: "),
        (emptied, "the session file {} cannot be read: "),
        (other_file, "the session file {} cannot be read: "),
        (without_a_part, "the session file {} is damaged: it lacks 1.keys"),
        (other_tensors, "{} must be a file of Session.save, got another safetensors file"),
        (Path.unlink, "there is no session file {}"),
    ],
)
def test_file_that_cannot_be_read_leaves_the_session_as_it_was(
    damage: Callable[[Path], None], message: str, model: SenriForCausalLM, tmp_path: Path
) -> None:
    session, path = talked(model), tmp_path / "session"
    session.save(path)
    damage(path)
    kind = FileNotFoundError if damage is Path.unlink else ValueError
    with pytest.raises(kind) as error:
        session.load(path)
    assert str(error.value).startswith(message.format(path))
    assert session.tokens == [24]
    assert session.generate(max_new_tokens=5)


def test_files_of_other_models_are_refused(model: SenriForCausalLM, tmp_path: Path) -> None:
    talked(model).save(tmp_path / "session")
    trained = tiny_senri()
    trained.load_state_dict(model.state_dict())
    with torch.no_grad():
        trained.model.layers[2].self_attn.k_proj.weight[0, 0] += 1
    for other, what in (
        (tiny_senri(segment=2), "segment must be 2, got 4"),
        (tiny_senri(memory_layers=[1]), r"memory_layers must be \[1\], got \[0, 2\]"),
        (model_in_bfloat16(model), r"dtype must be torch.bfloat16, got torch.float32"),
        (trained, "weights must be [0-9a-f]+, got [0-9a-f]+"),
    ):
        with pytest.raises(ValueError, match=f"session is of another model: {what}$"):
            Session(other).load(tmp_path / "session")
    with pytest.raises(ValueError, match="snapshot must hold 2 rows, got 1"):
        Session(model, batch_size=2).load(tmp_path / "session")


@pytest.mark.parametrize("part", ["v_proj", "k_norm", "memory_feature", "memory_decay"])
def test_files_from_before_a_change_of_what_makes_states_are_refused(part: str, tmp_path: Path) -> None:
    model = tiny_senri(memory_decay=0.7, qk_norm=True)
    for parameter in model.model.layers[2].self_attn.get_submodule(part).parameters():
        talked(model).save(tmp_path / "session")
        with torch.no_grad():
            parameter.mul_(2)
        with pytest.raises(ValueError, match="session is of another model: weights must be"):
            Session(model).load(tmp_path / "session")


def test_file_of_a_model_that_has_changed_its_dtype_is_read(model: SenriForCausalLM, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        session = talked(model.to(dtype))
        session.save(tmp_path / "session")
        again = Session(model)
        again.load(tmp_path / "session")
        assert again.generate(max_new_tokens=5) == session.generate(max_new_tokens=5)


def test_an_option_that_the_file_does_not_know_has_its_default(tmp_path: Path) -> None:
    path, plain, other = tmp_path / "session", tiny_senri(), tiny_senri(short_conv=2)
    for model, accepted in ((plain, True), (other, False)):
        talked(model).save(path)
        [(key, written)] = metadata_of(path).items()
        older = {name: value for name, value in json.loads(written).items() if name != "short_conv"}
        save_file(load_file(path), path, {key: json.dumps(older)})
        session = Session(model)
        if accepted:
            session.load(path)
            assert session.tokens == [24]
            continue
        with pytest.raises(ValueError, match="short_conv must be 2, got None"):
            session.load(path)


def model_in_bfloat16(model: SenriForCausalLM) -> SenriForCausalLM:
    other = tiny_senri().bfloat16()
    other.load_state_dict(model.state_dict())
    return other


def test_failure_to_save_leaves_the_old_file(
    model: SenriForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, path = talked(model), tmp_path / "session"
    session.save(path)
    before = tree(tmp_path)

    def full_disk(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(session_file, "save_file", full_disk)
    session.feed(random_tokens(3))
    for place in (path, tmp_path / "new"):
        with pytest.raises(OSError, match="No space left on device"):
            session.save(place)
        assert tree(tmp_path) == before
