"""Optimiser groups: the memory's own parameters need a higher rate than the rest, and no decay."""

from __future__ import annotations

from typing import Any

from torch import nn

MEMORY_MODULES = ("memory_gate", "memory_feature", "memory_decay")


def memory_owners(model: nn.Module) -> set[str]:
    """Names of the attention layers with a memory."""
    return {
        name for name, module in model.named_modules() if getattr(module, "memory_gate", None) is not None
    }


def freeze_features(model: nn.Module) -> None:
    """Leave the parameters of the memories' feature maps as they are."""
    for name, parameter in model.named_parameters():
        if "memory_feature" in name.split("."):
            parameter.requires_grad_(False)


def outside_memory(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that do not belong to attention layers with a memory.

    Raises:
        ValueError: for a model without a memory.
    """
    owners = tuple(f"{owner}." for owner in memory_owners(model))
    if not owners:
        raise ValueError("train.memory_first needs a model with a memory")
    return [parameter for name, parameter in model.named_parameters() if not name.startswith(owners)]


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.0,
    memory_multiplier: float = 10.0,
    memory_layer_multiplier: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups for a torch optimiser: matrices, vectors without decay, layers with memory, gates and features.

    Gates stay near their start at ordinary rates and under decay, so gates and feature parameters get
    ``lr * memory_multiplier`` and none. The other parameters of attention layers with a memory get
    ``lr * memory_layer_multiplier``. Empty groups are left out; each group has a ``name``.
    """
    owners = memory_owners(model)
    rates = {"memory": lr * memory_multiplier, "memory_layer": lr * memory_layer_multiplier, "": lr}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if any(module in name.split(".") for module in MEMORY_MODULES):
            key = ("memory", False)
        else:
            owned = memory_layer_multiplier != 1.0 and any(name.startswith(f"{owner}.") for owner in owners)
            key = ("memory_layer" if owned else "", parameter.ndim > 1)
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "name": "_".join(filter(None, (kind, "decay" if decays else "plain"))),
            "params": parameters,
            "lr": rates[kind],
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (kind, decays), parameters in groups.items()
    ]
