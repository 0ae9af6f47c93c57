"""How sure a measured number is."""

from __future__ import annotations

import math
from statistics import NormalDist

_Z95 = NormalDist().inv_cdf(0.975)


def wilson95(successes: int, samples: int) -> tuple[float, float]:
    """95 % interval of a share, by Wilson's score (1927): unlike the plain one it has a width at 0 and 1.

    Raises ``ValueError`` unless 0 <= ``successes`` <= ``samples`` and ``samples`` >= 1.
    """
    if samples < 1 or not 0 <= successes <= samples:
        raise ValueError(f"successes must be between 0 and samples, at least 1, got {successes} of {samples}")
    share, spread = successes / samples, _Z95**2 / samples
    centre = share + spread / 2
    half = _Z95 * math.sqrt(share * (1 - share) / samples + spread / (4 * samples))
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    # At none and at all one end is 0 or 1 by definition; rounding must not push it past them.
    return (0.0 if successes == 0 else low), (1.0 if successes == samples else high)


def mean95(total: float, squares: float, count: int) -> tuple[float, float]:
    """95 % interval of the mean of ``count`` independent values, given their sum and sum of squares.

    A single value shows no spread: its interval is itself.
    """
    mean = total / count
    variance = max(0.0, squares - total * mean) / max(1, count - 1)
    half = _Z95 * math.sqrt(variance / count)
    return mean - half, mean + half
