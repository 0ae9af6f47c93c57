"""Losses that keep contexts apart, of a batch ``X [n, C]`` with mean row m; each returns a scalar."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_VARIANCE_EPS, _COVARIANCE_WEIGHT, _CENTROID_WEIGHT = 1e-4, 0.04, 0.1


class Diversity(NamedTuple):
    """A loss and what it asks for."""

    loss: Callable[[Tensor], Tensor]
    description: str


def mcdl(x: Tensor) -> Tensor:
    """-||X - m||_F / n: contexts away from their mean."""
    return -torch.linalg.matrix_norm(x - x.mean(0)) / len(x)


def oacd(x: Tensor) -> Tensor:
    """MCDL plus a tenth of ||m||^2: the mean at the origin too."""
    return mcdl(x) + _CENTROID_WEIGHT * x.mean(0).square().sum()


def odcm(x: Tensor) -> Tensor:
    """A hinge on each number's standard deviation at 1, and squared covariances between numbers over C."""
    covariance = x.T.cov()
    apart = covariance - covariance.diagonal().diag()
    return _hinge(covariance) + _COVARIANCE_WEIGHT * apart.square().sum() / x.shape[1]


def w_mse(x: Tensor) -> Tensor:
    """The hinge of ODCM, and the mean squared distance of the covariance from the identity."""
    covariance = x.T.cov()
    identity = torch.eye(len(covariance), dtype=x.dtype, device=x.device)
    return _hinge(covariance) + _COVARIANCE_WEIGHT * (covariance - identity).square().mean()


def sdl(x: Tensor) -> Tensor:
    """The spectral norm's share of the nuclear norm: no direction above the others."""
    values = torch.linalg.svdvals(x - x.mean(0))
    return values[0] / values.sum()


def nuc(x: Tensor) -> Tensor:
    """-||X - m||_* / n: many directions."""
    return -torch.linalg.svdvals(x - x.mean(0)).sum() / len(x)


def _hinge(covariance: Tensor) -> Tensor:
    return (1 - (covariance.diagonal() + _VARIANCE_EPS).sqrt()).relu().mean()


DIVERSITY: dict[str, Diversity] = {
    "oacd": Diversity(oacd, "away from the mean, and the mean at the origin"),
    "mcdl": Diversity(mcdl, "away from the mean"),
    "odcm": Diversity(odcm, "unit variances, no covariances"),
    "w_mse": Diversity(w_mse, "covariance near the identity"),
    "sdl": Diversity(sdl, "no direction above the others"),
    "nuc": Diversity(nuc, "large nuclear norm"),
}
"""Diversity losses by name."""


def diversity_loss(name: str) -> Callable[[Tensor], Tensor]:
    """The loss ``name``; raises ``ValueError`` for an unknown one."""
    if name not in DIVERSITY:
        raise ValueError(f"diversity must be one of {', '.join(DIVERSITY)}, got {name!r}")
    return DIVERSITY[name].loss
