"""Sessions on disk: one safetensors file, checked against the model it is loaded for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from newllm.models.files import written_whole
from newllm.models.senri.configuration import SenriConfig
from newllm.models.session import Snapshot
from newllm.types import InfiniState

# What must agree between the model that wrote a session and the one that reads it.
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


def write_snapshot(snapshot: Snapshot, config: SenriConfig, path: Path) -> None:
    """Write ``snapshot`` to ``path``, whole or not at all."""
    tensors = {"pending": snapshot.pending, "recent": snapshot.recent.contiguous()}
    if snapshot.hidden is not None:
        tensors["hidden"] = snapshot.hidden
    for layer, state in enumerate(snapshot.states):
        fields = {} if state is None else state._asdict()
        tensors |= {f"{layer}.{name}": tensor for name, tensor in fields.items() if tensor is not None}
    metadata = {"newllm_session": json.dumps(_shape_of(config))}
    with written_whole(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)


def read_snapshot(path: Path, config: SenriConfig, device: torch.device) -> Snapshot:
    """The snapshot in ``path``.

    Raises ``FileNotFoundError``, or ``ValueError`` for a damaged file or one of another model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no session file {path}")
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # not a dict
    except SafetensorError as error:
        raise ValueError(f"the session file {path} is damaged: {error}") from error
    if "newllm_session" not in metadata:
        raise ValueError(f"{path} must be a file of Session.save, got another safetensors file")
    written, expected = json.loads(metadata["newllm_session"]), _shape_of(config)
    for name, value in expected.items():
        if written.get(name) != value:
            raise ValueError(
                f"the session file {path} is of another model: {name} must be {value}, "
                f"got {written.get(name)}"
            )
    states = tuple(_state(tensors, layer) for layer in range(config.num_hidden_layers))
    return Snapshot(states, tensors.get("hidden"), tensors["pending"], tensors["recent"])


def _state(tensors: dict[str, Tensor], layer: int) -> InfiniState | None:
    if f"{layer}.position" not in tensors:
        return None
    fields: dict[str, Any] = {name: tensors.get(f"{layer}.{name}") for name in InfiniState._fields}
    return InfiniState(**fields)


def _shape_of(config: SenriConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _SHAPING}
