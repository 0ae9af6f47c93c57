"""Named GPUs as data, and the rules by which batch size and learning rate follow from them."""

from __future__ import annotations

import math
from typing import NamedTuple

BASE_ROWS = 32
BASE_PARAMETERS = 2_740_000
_LINEAR_BELOW = 256
_TOKENS_PER_ROW = 256


class Profile(NamedTuple):
    """A machine: accelerator ``memory`` in GB (0: none), and what fits it.

    ``rows``, ``lr``, ``layers`` and ``context`` (the width of a context vector) are those of a context model
    of 2.7 million parameters on samples of 32 tokens; ``lm_rows`` are rows of 256 tokens for a language model
    with a vocabulary of 50,000.
    """

    memory: int
    rows: int
    lr: float
    layers: int
    context: int
    lm_rows: int


PROFILES: dict[str, Profile] = {
    "cpu": Profile(0, 16, 1e-4, 11, 512, 4),
    "t4": Profile(16, 512, 1e-4, 11, 512, 32),
    "l4": Profile(24, 2048, 8e-4, 11, 512, 128),
    "a100": Profile(40, 4096, 1.1e-3, 11, 512, 512),
    "advanced-l4": Profile(24, 2048, 4e-4, 12, 512, 128),
    "advanced-a100": Profile(40, 4096, 6e-4, 12, 512, 512),
    "h100": Profile(80, 8192, 1.6e-3, 11, 512, 1024),
}
"""The profiles by name; ``advanced-*`` are for larger models. ``lm_rows`` of cpu and h100 are our choice."""


def find_profile(name: str, memory: float) -> tuple[str, Profile]:
    """The profile ``name``; ``auto`` is the largest plain one that ``memory`` (GB of one accelerator) holds.

    A device is counted as one of a size when it has nine tenths of it.

    Raises ``ValueError`` for an unknown name.
    """
    if name == "auto":
        fitting = {
            key: profile for key, profile in PROFILES.items()
            if not key.startswith("advanced") and 0.9 * profile.memory <= memory
        }  # fmt: skip
        name = max(fitting, key=lambda key: fitting[key].memory)
    if name not in PROFILES:
        raise ValueError(f"profile must be auto or one of {', '.join(PROFILES)}, got {name!r}")
    return name, PROFILES[name]


def rate_for_rows(lr: float, rows: int, base_rows: int = BASE_ROWS) -> float:
    """The learning rate for ``rows`` a batch, ``lr`` being that of ``base_rows``.

    In proportion below 256 rows, from there on with the square root; it steps down where the rules meet.
    """
    factor = rows / base_rows
    return lr * (factor if rows < _LINEAR_BELOW else math.sqrt(factor))


def rate_for_size(lr: float, parameters: int, base_parameters: int = BASE_PARAMETERS) -> float:
    """The learning rate for a model of ``parameters``, ``lr`` being that of ``base_parameters``."""
    return lr / math.sqrt(parameters / base_parameters)


def rows_for_length(profile: Profile, length: int) -> int:
    """Rows of ``length`` tokens in a batch of a language model: the profile's tokens, at least one row."""
    return max(1, profile.lm_rows * _TOKENS_PER_ROW // length)
