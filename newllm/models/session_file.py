"""Sessions on disk: one safetensors file, checked against the model it is loaded for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from newllm.models.files import written_whole
from newllm.models.senri.modeling import SenriForCausalLM
from newllm.models.session import Snapshot
from newllm.types import InfiniState

# Fields of the configuration that must agree between a session's writer and its reader.
_SHAPING = (
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
    "vocab_size",
)


def write_snapshot(snapshot: Snapshot, model: SenriForCausalLM, path: Path) -> None:
    """Write ``snapshot`` to ``path``, whole or not at all."""
    tensors = {"pending": snapshot.pending, "recent": snapshot.recent}
    if snapshot.hidden is not None:
        tensors["hidden"] = snapshot.hidden
    for layer, state in enumerate(snapshot.states):
        fields = {} if state is None else state._asdict()
        tensors |= {f"{layer}.{name}": tensor for name, tensor in fields.items() if tensor is not None}
    metadata = {"newllm_session": json.dumps({**_identity(model), "tensors": sorted(tensors)})}
    with written_whole(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)


def read_snapshot(path: Path, model: SenriForCausalLM) -> Snapshot:
    """The snapshot in ``path``, on the device of ``model``.

    Raises ``FileNotFoundError``, or ``ValueError`` for a damaged file or one of another model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no session file {path}")
    try:
        with safe_open(path, "pt", device=str(model.device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # not a dict
    except SafetensorError as error:
        raise ValueError(f"the session file {path} is damaged: {error}") from error
    if "newllm_session" not in metadata:
        raise ValueError(f"{path} must be a file of Session.save, got another safetensors file")
    written = json.loads(metadata["newllm_session"])
    for name, value in _identity(model).items():
        if written.get(name) != value:
            raise ValueError(
                f"the session file {path} is of another model: {name} must be {value}, "
                f"got {written.get(name)}"
            )
    lacking = [name for name in written["tensors"] if name not in tensors]
    if lacking:
        raise ValueError(f"the session file {path} is damaged: it lacks {lacking[0]}")
    states = tuple(_state(tensors, layer) for layer in range(model.config.num_hidden_layers))
    return Snapshot(states, tensors.get("hidden"), tensors["pending"], tensors["recent"])


def _state(tensors: dict[str, Tensor], layer: int) -> InfiniState | None:
    if f"{layer}.position" not in tensors:
        return None
    fields: dict[str, Any] = {name: tensors.get(f"{layer}.{name}") for name in InfiniState._fields}
    return InfiniState(**fields)


def _identity(model: SenriForCausalLM) -> dict[str, Any]:
    """What must agree: sizes, dtype, and the weights that make keys, by their hash."""
    weights = hashlib.sha256()
    for name, weight in model.named_parameters():
        if "k_proj" in name:
            weights.update(weight.detach().float().cpu().numpy().tobytes())
    sizes = {name: getattr(model.config, name) for name in _SHAPING}
    return {**sizes, "dtype": str(model.dtype), "weights": weights.hexdigest()[:16]}
