"""Calls of the decode operator: a variant of its case with one thing different."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from newllm.testing import CASES, Draw, Inputs, OpCase
from newllm.types import FeatureMap


def changed(name: str, inputs: Inputs) -> Inputs:
    """The inputs of a case with one thing different."""
    kv_heads, beta = inputs["k"].shape[1], inputs["beta"]
    scale = torch.linspace(0.5, 4, kv_heads).to(beta)
    return {
        "plain": lambda: {},
        "tanh": lambda: {"gate": "tanh", "beta": beta / 8, "feature": FeatureMap(scale=scale)},
        "far gates": lambda: {"beta": beta.sign() * torch.linspace(95, 900, len(beta)).to(beta)},
        "bias": lambda: {"feature": FeatureMap(bias=-scale), "rule": "delta"},
        "local": lambda: {"window": None},
        "no memory": lambda: {"beta": None, "state": inputs["state"]._replace(matrix=None, norm=None)},
        "no rope": lambda: {"rope": None},
        "rope by row": lambda: {"rope": tuple(by_row(table, len(inputs["q"])) for table in inputs["rope"])},
    }[name]()


def by_row(table: Tensor, rows: int) -> Tensor:
    """A table ``[B, N, K]`` whose rows differ, with a row too many at the front."""
    shifted = [torch.cat([table[:1], table.roll(row, 0)]) for row in range(rows)]
    return torch.stack(shifted)


def _decode(draw: Draw, variant: str, change: str) -> Inputs:
    inputs = CASES["infini_decode"].variants[variant](draw)
    return {**inputs, **changed(change, inputs)}


def decode(variant: str, change: str) -> OpCase:
    """The operator's case with ``change``, whose only variant is "changed"."""
    made = {"changed": partial(_decode, variant=variant, change=change)}
    return replace(CASES["infini_decode"], variants=made)
