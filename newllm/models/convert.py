"""From an ordinary Llama-family checkpoint to Senri."""

from __future__ import annotations

import copy
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from newllm.files import reading
from newllm.models.files import load_model, load_tokenizer
from newllm.models.senri import SenriConfig, SenriForCausalLM
from newllm.ops.checks import FLOATS
from newllm.spelling import did_you_mean


def convert(
    model_or_path: PreTrainedModel | str | Path,
    *,
    window: int = 1024,
    segment: int | None = None,
    memory_layers: list[int] | None = None,
    dtype: torch.dtype | str = "auto",
    **options: Any,
) -> SenriForCausalLM:
    """Give a Llama, SmolLM, Mistral, Qwen2 or Qwen3 model a sliding window and a memory.

    The result is the base model bit for bit on texts within ``window`` (and within the window that a Mistral
    or Qwen2 model may have of its own): its gates are exactly shut, and learn from the first step.

    Args:
        model_or_path: a model, a folder, a hub id, or a GGUF file (or a folder that holds one).
        window: keys a query sees. segment: tokens folded into the memory at once (None: ``window``).
        memory_layers: layers with a memory (None: see ``SenriConfig``).
        dtype: of the weights; ``auto`` keeps the checkpoint's (float32 from GGUF).
        options: further fields of ``SenriConfig``; ``gate`` is ``tanh`` unless given.

    Raises:
        FileNotFoundError: where there is no model. ValueError: for an unreadable checkpoint, another
            family, an unknown option or dtype, or sizes that do not fit.
    """
    _check_options(dtype, options)
    if isinstance(model_or_path, PreTrainedModel):
        base: Any = model_or_path
        weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    else:
        base = load_base(model_or_path, dtype=dtype)
        weights = base.state_dict()
    chosen = {"gate": "tanh", **options}
    config = SenriConfig.from_base(
        base.config, sliding_window=window, segment=segment, memory_layers=memory_layers, **chosen
    )
    model: SenriForCausalLM = SenriForCausalLM.from_pretrained(
        None, config=config, state_dict=weights, dtype=base.dtype if dtype == "auto" else dtype
    )
    model.generation_config = copy.deepcopy(base.generation_config)
    return model.to(base.device)


def _check_options(dtype: torch.dtype | str, options: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless all is known: a configuration keeps what it does not know, unused."""
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and kind not in FLOATS:
        allowed = "auto, float16, bfloat16, float32 or float64"
        raise ValueError(f"dtype must be {allowed}, got {dtype!r}")
    names = [*signature(convert).parameters, *(field.name for field in fields(SenriConfig))]
    for name in options:
        if name not in names or name == "sliding_window":
            own = ["window"] if name == "sliding_window" else names
            hint = did_you_mean(name, own) or ", nor a field of SenriConfig"
            raise ValueError(f"{name!r} is no option of convert{hint}")


def load_base(path: str | Path, *, dtype: torch.dtype | str = "auto") -> Any:
    """The model to convert, from a folder, a hub id or GGUF.

    Raises as ``convert``.
    """
    gguf = gguf_file(path)
    if gguf is None:
        return load_model(path, dtype=dtype)
    from transformers import AutoModelForCausalLM, GgufConfig

    return _read_gguf(
        AutoModelForCausalLM,
        gguf,
        dtype=torch.float32 if dtype == "auto" else dtype,
        # Otherwise the model counts as quantised and can be neither saved nor trained.
        quantization_config=GgufConfig(dequantize=True),
    )


def load_base_tokenizer(path: str | Path) -> Any:
    """The tokenizer that belongs to ``load_base(path)``.

    Raises as ``convert``.
    """
    gguf = gguf_file(path)
    if gguf is None:
        return load_tokenizer(path)
    from transformers import AutoTokenizer

    return _read_gguf(AutoTokenizer, gguf)


def _read_gguf(auto: Any, gguf: Path, **options: Any) -> Any:
    """``auto.from_pretrained`` of a GGUF file.

    Raises ``RuntimeError`` without the package gguf, ``ValueError`` for a file that cannot be read.
    """
    options |= {"gguf_file": gguf.name, "trust_remote_code": False}
    try:
        with reading("the GGUF file", gguf):
            _check_blocks(gguf)
            return auto.from_pretrained(str(gguf.parent), **options)
    except ImportError as error:
        raise RuntimeError("reading GGUF files needs the package gguf: pip install gguf") from error


def _check_blocks(gguf: Path) -> None:
    """Raise ``ValueError`` unless there are at most as many layers as tensors: all would be given names."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    kind = reader.fields["general.architecture"].contents()
    layers = reader.fields[f"{kind}.block_count"].contents()
    if not 0 < int(layers) <= len(reader.tensors):
        raise ValueError(f"it holds {len(reader.tensors)} tensors for {layers} layers")


def gguf_file(path: str | Path) -> Path | None:
    """The GGUF file that ``path`` names or, as a folder without a config.json, holds.

    Raises ``ValueError`` when a folder holds several.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"there is no GGUF file {path}")
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(
            f"{path} holds {len(files)} GGUF files: name one of {', '.join(f.name for f in files)}"
        )
    return files[0] if files else None
