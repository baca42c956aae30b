"""When a stage has trained enough: the curve of held-out FVU, and what it says."""

from __future__ import annotations

Curve = list[tuple[int, float]]
"""Tokens trained in the stage, and FVU on the held-out activations there, by increasing tokens."""

_POINTS = 11


def check_points(batches: int) -> list[int]:
    """After which batches of a stage the FVU is taken: each a factor of sqrt(2) after the one before.

    Example:
        >>> check_points(100)
        [3, 4, 6, 9, 12, 18, 25, 35, 50, 71, 100]
    """
    return sorted({max(1, round(batches * 2 ** (-i / 2))) for i in range(_POINTS)})


def has_converged(curve: Curve, tolerance: float, after: int = 0) -> bool:
    """Whether twice the tokens lowered the FVU by less than a share of it.

    The last point is compared with the one at about half its tokens. A criterion in doublings needs no scale of
    its own: the same tolerance means the same for a stage of a thousand steps and of a million.

    Args:
        curve: What was seen so far.
        tolerance: Least relative fall of FVU by a doubling of the tokens that is worth going on for.
        after: Points of fewer tokens do not count, as those while the learning rate still rises.

    Example:
        >>> has_converged([(100, 0.50), (200, 0.30)], 0.05), has_converged([(100, 0.50), (200, 0.49)], 0.05)
        (False, True)
    """
    tokens, now = curve[-1]
    half = [fvu for at, fvu in curve if at >= after and 1.8 * at <= tokens]  # the points are rounded to batches
    return bool(half) and now > (1 - tolerance) * half[-1]
