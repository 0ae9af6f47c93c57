"""Sessions on disk: one safetensors file, checked against the model it is loaded for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from newllm.files import read_row, reading
from newllm.models.files import written_whole
from newllm.models.layout import ALWAYS, misfit
from newllm.models.senri.modeling import SenriForCausalLM
from newllm.models.streams import Model, Snapshot, State, made_by
from newllm.types import ContextState, InfiniState

# Fields of the configuration that must agree between a session's writer and its reader, by kind of model.
_SHAPING = {
    "senri": (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "sliding_window",
        "segment",
        "memory_layers",
        "rule",
        "feature",
        "feature_order",
        "short_conv",
        "share_memory",
        "vocab_size",
    ),
    "context_lm": ("cell", "embed_dim", "context_dim", "num_hidden_layers", "input_tokens", "vocab_size"),
    "context_kv": ("embed_dim", "context_dims", "chunk_size", "slot_kind", "max_contexts", "vocab_size"),
}
_KEY = "newllm_session"
# A sample of the weights that states are made with, by parts of their names: those that write to them, not
# the embeddings, norms and MLPs before those.
_STATE_WEIGHTS = (
    "k_proj",
    "k_norm",
    "v_proj",
    "memory_feature",
    "memory_decay",
    "short_conv",
    "recurrent",
    "context_block",
    "attention.",
)


def write_snapshot(snapshot: Snapshot, model: Model, path: Path) -> None:
    """Write ``snapshot`` to ``path``, whole or not at all."""
    metadata = {_KEY: json.dumps(_identity(model))}
    tensors = {name: tensor.contiguous() for name, tensor in snapshot.tensors().items()}
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata)


def read_snapshot(path: Path, model: Model) -> Snapshot:
    """The snapshot in ``path``, on the device of ``model``, of which every tensor is what the model makes.

    Raises ``FileNotFoundError``, or ``ValueError`` for a damaged file or one of another model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no session file {path}")
    with reading("the session file", path), safe_open(path, "pt", device=str(model.device)) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # not a dict
    if _KEY not in metadata:
        raise ValueError(f"{path} must be a file of Session.save, got another safetensors file")
    # What a writer did not know of yet is as it always was.
    known = type(model.config)().to_dict() | read_row(metadata[_KEY], f"the session file {path}", dict)
    for name, value in _identity(model).items():
        if known.get(name) != value:
            raise ValueError(
                f"the session file {path} is of another model: {name} must be {value}, "
                f"got {str(known.get(name))[:80]}"
            )
    wrong = _damage(tensors, model)
    if wrong is not None:
        raise ValueError(f"the session file {path} is damaged: {wrong}")
    kind = InfiniState if isinstance(model, SenriForCausalLM) else ContextState
    layers = model.config.num_hidden_layers if kind is InfiniState else 1
    states = tuple(_state(kind, tensors, layer) for layer in range(layers))
    return Snapshot(states, tensors.get("hidden"), tensors["pending"], tensors["recent"])


def tokens_in(path: Path) -> int:
    """Tokens that the one-row session in ``path`` has read, without loading the rest.

    Raises ``ValueError`` for a damaged file.
    """
    with reading("the session file", path), safe_open(path, "pt") as file:
        names = file.keys()
        return int(file.get_tensor("0.position")[0]) if "0.position" in names else 0


def _state(kind: Any, tensors: dict[str, Tensor], layer: int) -> State | None:
    if f"{layer}.position" not in tensors:
        return None
    state: State = kind(**{name: tensors.get(f"{layer}.{name}") for name in kind._fields})
    return state


def _damage(tensors: Mapping[str, Tensor], model: Model) -> str | None:
    """In what the tensors of a file differ from those that ``model`` makes, None if in nothing."""
    pending = tensors.get("pending")
    rows = 1 if pending is None or pending.ndim == 0 else max(1, len(pending))
    if (wrong := misfit(tensors, made_by(model).tensors(), rows)) is not None:
        return wrong
    for name, found in tensors.items():
        # -1 is no token.
        least, most = 0 if name.endswith("position") else -1, 2**62
        if name in ALWAYS:
            most = model.config.vocab_size - 1
        if found.is_floating_point() and not bool(found.isfinite().all()):
            return f"{name} must be finite"
        if not found.is_floating_point() and bool(((found < least) | (found > most)).any()):
            return f"{name} must be from {least} to {most}"
    return None


# What identifies a model until its weights change: hashing them takes longer than writing a state.
_KNOWN: WeakKeyDictionary[Model, tuple[Any, dict[str, Any]]] = WeakKeyDictionary()


def _identity(model: Model) -> dict[str, Any]:
    """What must agree: sizes, dtype, and the weights that make states, by their hash."""
    weights = {
        name: weight
        for name, weight in model.named_parameters()
        if any(part in name for part in _STATE_WEIGHTS) and "lm_head" not in name
    }
    unchanged = tuple((weight.data_ptr(), weight._version) for weight in weights.values())
    known = _KNOWN.get(model)
    if known is None or known[0] != unchanged:
        hashed = hashlib.sha256()
        for weight in weights.values():
            hashed.update(weight.detach().float().cpu().numpy().tobytes())
        sizes = {name: getattr(model.config, name) for name in _SHAPING[model.config.model_type]}
        found = {**sizes, "dtype": str(model.dtype), "weights": hashed.hexdigest()[:16]}
        known = _KNOWN[model] = (unchanged, found)
    return known[1]
