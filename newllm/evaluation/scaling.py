"""How perplexity falls with tokens: power laws, with saturation, and over sliding windows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

Points = Sequence[tuple[float, float]]
"""Training tokens and best validation perplexity."""

LEAST_POINTS = 3
"""Two points lie on every law: they show nothing about it."""

_TREND = 0.01
_GRID, _ROUNDS = 200, 6


class PowerLaw(NamedTuple):
    """ln PPL = ln A + alpha ln tokens, least squares over ``points``; ``p_value``, two-sided, is of alpha."""

    alpha: float
    A: float
    r_squared: float
    p_value: float
    std_err: float
    points: int


class Saturation(NamedTuple):
    """PPL = floor + A tokens^-a, by least squares of ln PPL - floor over a floor that is searched."""

    floor: float
    A: float
    a: float
    r_squared: float
    points: int


def power_law(points: Points) -> PowerLaw | None:
    """The law through ``points``; None for fewer than three that are finite and above 0."""
    tokens, values = _finite(points)
    if len(tokens) < LEAST_POINTS:
        return None
    x, y = np.log(tokens), np.log(values)
    centred = x - x.mean()
    spread = float((centred**2).sum())
    if spread == 0:
        return None
    alpha = float((centred * (y - y.mean())).sum() / spread)
    residual = float(((y - y.mean() - alpha * centred) ** 2).sum())
    whole = float(((y - y.mean()) ** 2).sum())
    degrees = len(x) - 2
    error = math.sqrt(residual / degrees / spread)
    intercept = float(y.mean() - alpha * x.mean())
    explained = 1 - residual / whole if whole else 1.0
    return PowerLaw(alpha, math.exp(intercept), explained, t_test(alpha, error, degrees), error, len(x))


def t_test(value: float, error: float, degrees: int) -> float:
    """The two-sided p-value of ``value`` with its standard ``error``, by Student's t of integer ``degrees``.

    Series of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    if error == 0:
        return 0.0 if value else 1.0
    angle = math.atan(abs(value) / error / math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    term = 1.0 if degrees % 2 == 0 else cosine
    total = term if degrees > 1 else 0.0
    for k in range(1 if degrees % 2 == 0 else 2, degrees - 1, 2):
        term *= cosine**2 * k / (k + 1)
        total += term
    inside = sine * total if degrees % 2 == 0 else 2 / math.pi * (angle + sine * total)
    return max(0.0, 1 - inside)


def saturation(points: Points) -> Saturation | None:
    """The law with a floor; None for fewer than four finite points, which it would fit whatever they are."""
    tokens, values = _finite(points)
    if len(tokens) <= LEAST_POINTS:
        return None
    low, high = 0.0, float(values.min()) * (1 - 1e-9)
    for _ in range(_ROUNDS):
        floors = np.linspace(low, high, _GRID)
        errors = [_above(tokens, values, floor)[2] for floor in floors]
        best = int(np.argmin(errors))
        low, high = floors[max(0, best - 1)], floors[min(_GRID - 1, best + 1)]
    floor = float(floors[best])
    alpha, scale, error = _above(tokens, values, floor)
    whole = float(((values - values.mean()) ** 2).sum())
    return Saturation(floor, scale, -alpha, 1 - error / whole if whole else 1.0, len(tokens))


def _above(tokens: Any, values: Any, floor: float) -> tuple[float, float, float]:
    """alpha and A above ``floor``, and the squared error in perplexity."""
    alpha, intercept = np.polyfit(np.log(tokens), np.log(values - floor), 1)
    fitted = floor + math.exp(intercept) * tokens**alpha
    return float(alpha), math.exp(intercept), float(((values - fitted) ** 2).sum())


def _finite(points: Points) -> tuple[Any, Any]:
    kept = [
        (float(n), float(p)) for n, p in points if math.isfinite(n) and math.isfinite(p) and n > 0 and p > 0
    ]
    return np.array([n for n, _ in kept]), np.array([p for _, p in kept])


def sample_sizes(first: int, multiplier: float, window_size: int, windows: int) -> list[int]:
    """Samples of every experiment: ``first * multiplier^k`` for as many as the windows need.

    Raises ``ValueError`` for sizes that do not grow, or windows of fewer than three points.
    """
    if window_size < LEAST_POINTS or windows < 1:
        raise ValueError(
            f"window_size must be at least {LEAST_POINTS} and num_windows at least 1, got {window_size} "
            f"and {windows}"
        )
    sizes = [int(first * multiplier**k) for k in range(window_size + windows - 1)]
    if sizes[0] < 1 or any(b <= a for a, b in pairwise(sizes)):
        raise ValueError(f"init_samples and multiplier must make sizes that grow from 1, got {sizes}")
    return sizes


def alpha_windows(results: Sequence[Mapping[str, Any]], window_size: int) -> list[dict[str, Any]]:
    """The law in each window of ``window_size`` successive ``results``, as in ``alpha_progression.json``.

    A result has ``num_samples``, ``train_tokens`` and ``val_ppl`` (None or not finite where it failed). A
    window with failed results has no fit but the ``missing`` samples.
    """
    ordered = sorted(results, key=lambda row: row["num_samples"])
    windows = []
    for start in range(max(1, len(ordered) - window_size + 1)):
        rows = ordered[start : start + window_size]
        missing = [row["num_samples"] for row in rows if not _usable(row)]
        short = window_size - len(rows)
        fit = None
        if not missing and not short:
            fit = power_law([(row["train_tokens"], row["val_ppl"]) for row in rows])
        windows.append(
            {
                "window_index": start,
                "sample_range": [rows[0]["num_samples"], rows[-1]["num_samples"]],
                "token_range": [rows[0]["train_tokens"], rows[-1]["train_tokens"]],
                "samples_in_window": [row["num_samples"] for row in rows],
                **{name: None if fit is None else getattr(fit, name) for name in _FITTED},
                "points": len(rows) - len(missing),
                "window_size": window_size,
                "missing": missing,
                "note": None if fit is not None else _why(len(rows) - len(missing), window_size),
            }
        )
    return windows


_FITTED = ("alpha", "A", "r_squared", "p_value", "std_err")


def _usable(row: Mapping[str, Any]) -> bool:
    value = row["val_ppl"]
    return value is not None and math.isfinite(value)


def _why(points: int, window_size: int) -> str:
    return f"no fit: {points} of the window's {window_size} points"


def trend(windows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """From the first fitted window to the last: IMPROVING below -0.01, DEGRADING above 0.01, else STABLE.

    UNKNOWN with fewer than two fits.
    """
    found = [window["alpha"] for window in windows if window["alpha"] is not None]
    if len(found) < 2:
        return {"trend": "UNKNOWN", "change": None, "percent": None, "fits": len(found)}
    change = found[-1] - found[0]
    said = "IMPROVING" if change < -_TREND else "DEGRADING" if change > _TREND else "STABLE"
    return {"trend": said, "change": change, "percent": 100 * change / abs(found[0]), "fits": len(found)}
