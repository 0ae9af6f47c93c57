"""Models and tokenizers on disk: read with clear errors, written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary file or folder name beside ``path`` that takes its place when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        temporary = workplace / path.name
        yield temporary
        if path.is_dir() and temporary.is_dir():
            os.replace(path, workplace / "replaced")
        os.replace(temporary, path)
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
    """Raise ``FileExistsError`` when ``out`` holds something and ``overwrite`` is False."""
    if out.exists() and not overwrite and (out.is_file() or any(out.iterdir())):
        raise FileExistsError(f"out {out} exists: name another folder or pass --overwrite")


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


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model folder or hub id.

    Raises ``FileNotFoundError`` where there is none, ``ValueError`` for one that cannot be read.
    """
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        raise FileNotFoundError(
            f"the folder {path} holds no tokenizer (tokenizer.json or tokenizer_config.json)"
        )
    return _read(AutoTokenizer, path)


def _read(auto: Any, path: str | Path, **options: Any) -> Any:
    """``auto.from_pretrained``, its many failures said in one sentence."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    folder = Path(path)
    if folder.is_file():
        raise ValueError(f"{path} must be a model folder or hub id, got a file")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the folder {path} holds no model (no config.json)")
    if not folder.exists() and str(path).count("/") > 1:
        raise FileNotFoundError(f"there is no model folder {path}")
    try:
        return auto.from_pretrained(str(path), **options)
    except (SafetensorError, StrictDataclassError, ValueError, KeyError, RuntimeError, EOFError) as error:
        raise ValueError(f"the checkpoint {path} cannot be read: {_sentence(error)}") from error
    except OSError as error:
        if folder.is_dir():
            raise ValueError(f"the checkpoint {path} cannot be read: {_sentence(error)}") from error
        raise FileNotFoundError(
            f"{path} is neither a model folder nor a hub id that can be reached: {_sentence(error)}"
        ) from error


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
