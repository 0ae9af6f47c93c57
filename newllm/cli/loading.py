"""Models by the names that commands take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from newllm.models.history import HistorySession
    from newllm.models.senri import SenriForCausalLM
    from newllm.models.session import Session
    from newllm.models.streams import Compile, Model

CompileOption = Literal["auto", "none", "graph", "full"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def quiet() -> None:
    """Keep transformers from warning and from drawing bars of its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_stream(model: str, *, dtype: Dtype = "auto", device: str = "auto") -> Session | HistorySession:
    """A conversation with the causal model in a folder or of a hub id, of whatever family.

    Senri and context models keep a state of constant size, any other model its own cache. Raises as
    :func:`load`, but for the kind of the model.
    """
    from newllm.hub import model_folder
    from newllm.models.files import load_model, load_tokenizer
    from newllm.models.history import HistorySession
    from newllm.models.session import Session
    from newllm.models.streams import Model

    quiet()
    folder = model_folder(model)
    tokenizer = load_tokenizer(folder)
    loaded = load_model(folder, dtype=dtype).to(checked_device(device)).eval()
    if isinstance(loaded, Model):
        return Session(loaded, tokenizer, compile=step_mode("auto", loaded))
    return HistorySession(loaded, tokenizer)


def load_streaming(model: str, *, dtype: Dtype = "auto", device: str = "auto") -> tuple[Model, Any]:
    """A model whose state is of constant size, and its tokenizer, ready to answer.

    Raises as :func:`load`, and ``ValueError`` for a model of another kind.
    """
    from newllm.hub import model_folder
    from newllm.models.files import load_streaming_model, load_tokenizer

    quiet()
    folder = model_folder(model)
    tokenizer = load_tokenizer(folder)
    return load_streaming_model(folder, dtype=dtype).to(checked_device(device)).eval(), tokenizer


def step_mode(compile: CompileOption, model: Model) -> Compile:
    """How ``model`` is stepped: ``auto`` replays a CUDA graph where there can be one."""
    if compile != "auto":
        return compile
    return "graph" if model.device.type == "cuda" and model.config.model_type == "senri" else "none"


def load(model: str, *, dtype: Dtype = "auto", device: str = "auto") -> tuple[SenriForCausalLM, Any]:
    """The Senri model in a folder or of a hub id, and its tokenizer, ready to answer.

    ``device`` ``auto`` is the first accelerator, or else the CPU. Raises as
    ``newllm.models.files.load_senri`` and ``load_tokenizer``, and ``ValueError`` for an unknown device.
    """
    from newllm.hub import model_folder
    from newllm.models.files import load_senri, load_tokenizer

    quiet()
    folder = model_folder(model)
    tokenizer = load_tokenizer(folder)
    return load_senri(folder, dtype=dtype).to(checked_device(device)).eval(), tokenizer


def checked_device(name: str) -> str:
    """``name`` if this machine has such a device; ``auto`` is the first accelerator, or else the CPU."""
    from newllm.backend import devices

    found = [str(device) for device in devices()]
    if name == "auto":
        return found[min(1, len(found) - 1)]
    if name not in (*found, "cuda" if len(found) > 1 else "cpu"):
        raise ValueError(f"device must be auto or one of {', '.join(found)}, got {name!r}")
    return name


def source_path(source: str) -> str | Path:
    """What ``newllm convert`` takes: a folder, a file, a hub id, or the name of a fetched model.

    Raises ``FileNotFoundError`` for a model that can be fetched but has not been.
    """
    from newllm.data.corpora import CORPORA, corpus_path, is_fetched

    corpus = CORPORA.get(source)
    if Path(source).exists() or corpus is None or corpus.member is None:
        return source
    if not is_fetched(source):
        raise FileNotFoundError(f"{source} has not been fetched yet: run 'newllm data get {source}'")
    return corpus_path(source)
