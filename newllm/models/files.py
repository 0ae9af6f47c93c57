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

from newllm.files import read_json, reading, writing
from newllm.hub import model_folder, pinned_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from newllm.models.senri import SenriForCausalLM
    from newllm.models.streams import Model

# Fields of configurations that are sizes of weights, and that count layers of them.
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "head_dim", "embed_dim", "context_dim", "hidden_dim",
    "num_attention_heads", "num_key_value_heads", "input_tokens",
)  # fmt: skip
_LAYERS = ("num_hidden_layers", "token_layers")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary file or folder name beside ``path`` that takes its place when the block succeeds.

    Raises ``OSError`` as ``newllm.files.writing``.
    """
    with writing(path):
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

    Only safetensors and JSON are read. The configuration of a model of the hub keeps its exact revision as
    ``base_model``, and so does all that is made of it.

    Raises ``FileNotFoundError`` where there is none, ``ValueError`` for a checkpoint that cannot be read.
    """
    from transformers import AutoModelForCausalLM

    import newllm.models.senri  # noqa: F401 # registers its classes

    folder = model_folder(path)
    _check_folder(folder)
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    model, info = _read(AutoModelForCausalLM, folder, **options)
    if (pinned := pinned_name(folder)) is not None:
        model.config.base_model = pinned
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"the checkpoint {path} lacks {len(missing)} weights, the first is {missing[0]}")
    return model


def _check_folder(folder: Path) -> None:
    """Raise ``ValueError`` for a model that brings in more than its own weights, or claims more of them."""
    config = read_json(folder / "config.json", "the configuration")
    if not isinstance(config, dict):
        raise ValueError(f"the configuration {folder / 'config.json'} must be a JSON object")
    if "/" in str(config.get("attn_implementation")):
        raise ValueError(
            f"the checkpoint {folder} asks for code of the hub (attn_implementation "
            f"{str(config['attn_implementation'])[:80]!r}): remove that from its config.json"
        )
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"the checkpoint {folder} is an adapter of another model: merge the two first")
    files = list(folder.glob("*.safetensors"))
    with reading("the checkpoint", folder):
        tensors = sum(_tensors_in(file) for file in files)
    # A model is built before its weights are read: without these bounds a number could exhaust the machine.
    bits = 8 * sum(file.stat().st_size for file in files)
    for name, bound in {**dict.fromkeys(_SIZES, bits), **dict.fromkeys(_LAYERS, tensors)}.items():
        if files and isinstance(value := config.get(name), int) and value > bound:
            raise ValueError(f"the checkpoint {folder} has too few weights for {name} {str(value)[:40]}")


def _tensors_in(file: Path) -> int:
    from safetensors import safe_open

    with safe_open(file, "pt") as weights:
        return len(weights.keys())


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
    tokenizer = _read(AutoTokenizer, folder)
    with reading("the checkpoint", folder):
        # Settings of the wrong type show only when it is used.
        tokenizer.decode(tokenizer("a b")["input_ids"])
    return tokenizer


def _read(auto: Any, folder: Path, **options: Any) -> Any:
    """``auto.from_pretrained`` of data alone, its many failures said in one sentence."""
    with reading("the checkpoint", folder):
        # None would ask on the terminal whether to run what the folder holds.
        return auto.from_pretrained(str(folder), trust_remote_code=False, **options)
