"""Models and tokenizers on disk: read with clear errors, written whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from newllm.models.senri import SenriForCausalLM
    from newllm.models.streams import Model

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_SECONDS = 5.0
_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary file or folder name beside ``path`` that takes its place when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        temporary, replaced = workplace / path.name, workplace / "replaced"
        yield temporary
        if path.is_dir() and temporary.is_dir():
            os.replace(path, replaced)
        try:
            os.replace(temporary, path)
        except OSError:
            if replaced.is_dir():
                os.replace(replaced, path)
            raise
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, out: Path, *, overwrite: bool = False
) -> None:
    """Write a model folder that ``from_pretrained`` reads.

    Raises ``FileExistsError`` when ``out`` exists and is not empty, unless ``overwrite``.
    """
    check_free(out, overwrite)
    with written_whole(out) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


def check_free(out: Path, overwrite: bool) -> None:
    """Raise ``FileExistsError`` when ``out`` is a file, or a folder with content and not to ``overwrite``."""
    if out.is_file():
        raise FileExistsError(f"out {out} must be a folder, got a file")
    if out.exists() and not overwrite and any(out.iterdir()):
        raise FileExistsError(
            f"out {out} is not empty: name another folder (--out), or replace it (--overwrite)"
        )


def load_model(path: str | Path, *, dtype: torch.dtype | str = "auto") -> Any:
    """A causal model from a folder or hub id, without a silent wait for the network.

    Raises ``FileNotFoundError`` where there is none, ``ValueError`` for a checkpoint that cannot be read.
    """
    from transformers import AutoModelForCausalLM

    import newllm.models.senri  # noqa: F401 # registers its classes

    model, info = _read(AutoModelForCausalLM, path, dtype=dtype, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"the checkpoint {path} lacks {len(missing)} weights, the first is {missing[0]}")
    return model


def load_senri(path: str | Path, *, dtype: torch.dtype | str = "auto") -> SenriForCausalLM:
    """A Senri model from a folder or hub id.

    Raises as ``load_model``, and ``ValueError`` for a model of another kind.
    """
    model: SenriForCausalLM = _of_kind(path, ("senri",), "a Senri model", dtype)
    return model


def load_streaming_model(path: str | Path, *, dtype: torch.dtype | str = "auto") -> Model:
    """A model that a ``Session`` can read with: Senri, Context LM or Context-KV. Raises as ``load_senri``."""
    kinds = ("senri", "context_lm", "context_kv")
    model: Model = _of_kind(path, kinds, "a Senri or context model", dtype)
    return model


def _of_kind(path: str | Path, kinds: tuple[str, ...], wanted: str, dtype: torch.dtype | str) -> Any:
    from transformers import AutoConfig

    import newllm.models.senri  # noqa: F401 # registers its classes

    folder = model_folder(path)
    kind = _read(AutoConfig, folder).model_type
    if kind not in kinds:
        raise ValueError(f"{path} must be {wanted}, got a {kind} model: make one of it by newllm convert")
    return load_model(folder, dtype=dtype)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model folder or hub id.

    Raises ``FileNotFoundError`` where there is none, ``ValueError`` for one that cannot be read.
    """
    from transformers import AutoTokenizer

    folder = model_folder(path)
    if not any(folder.glob("tokenizer*")):
        raise FileNotFoundError(
            f"the folder {path} holds no tokenizer (tokenizer.json or tokenizer_config.json)"
        )
    return _read(AutoTokenizer, folder)


def model_folder(path: str | Path) -> Path:
    """The folder ``path``, or the local copy of the hub model of that id, fetched or renewed if it can be.

    The hub is asked once and given a few seconds: transformers itself would retry for a minute or two.

    Raises ``FileNotFoundError`` where there is neither, ``ValueError`` for a file.
    """
    folder = Path(path)
    if folder.is_file():
        raise ValueError(f"{path} must be a model folder or hub id, got a file")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the folder {path} holds no model (no config.json)")
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(str(path)):
        raise FileNotFoundError(f"there is no model folder {path} (a hub id has the form owner/name)")
    return _hub_folder(str(path))


def _hub_folder(name: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined] # HTTPError is of its HTTP client
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    why = "the hub could not be reached"
    try:
        HfApi().model_info(name, timeout=_HUB_SECONDS)
        reached = True
    except RepositoryNotFoundError:
        reached, why = False, "the hub has none of that name, or only a private one"
    except (HTTPError, OSError) as error:
        reached, why = False, f"{why} ({one_line(error)})"
    try:
        return Path(snapshot_download(name, allow_patterns=_MODEL_FILES, local_files_only=not reached))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is neither a model folder nor in the local cache of hub models, and {why}"
        ) from error
    except HTTPError as error:
        raise ConnectionError(f"the hub model {name} could not be fetched: {one_line(error)}") from error


def _read(auto: Any, path: str | Path, **options: Any) -> Any:
    """``auto.from_pretrained``, its many failures said in one sentence."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    folder = model_folder(path)
    try:
        return auto.from_pretrained(str(folder), **options)
    except (
        SafetensorError,
        StrictDataclassError,
        ValueError,
        KeyError,
        RuntimeError,
        EOFError,
        OSError,
    ) as error:
        raise ValueError(f"the checkpoint {path} cannot be read: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """What ``error`` says, on one line and not too long."""
    return " ".join(str(error).split())[:300]
