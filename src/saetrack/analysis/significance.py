"""Whether something is larger than its random sets: maxT over LLM checkpoints, Benjamini-Hochberg over features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import false_discovery_control

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]
    Bools = NDArray[np.bool_]


class MaxT:
    """Compares values with random draws, one LLM checkpoint at a time, keeping only the draws' maxima.

    At each checkpoint values and draws are standardised by the draws, ``Z = (value - mean_b) / sd_b``. The largest
    ``Z`` of a draw over the checkpoints, with equal sets at each, is what chance does anywhere (Westfall & Young 1993):
    ``p(t) = (1 + #{b: max_s Z_b(s) >= Z(t)}) / (B + 1)`` holds for all checkpoints together.

    Args:
        shape: ``(features, draws)``.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self._largest = np.full(shape, -np.inf, dtype=np.float32)  # all that is kept of the draws: 4 F B bytes

    def add(self, values: Floats, draws: Floats) -> Floats:
        """Take in one checkpoint.

        Args:
            values: ``[F]``.
            draws: ``[F, B]``.

        Returns:
            ``Z``, ``[F]``; 0 where the draws do not vary.
        """
        mean, spread = draws.mean(axis=1), draws.std(axis=1, ddof=1)
        scale = np.where(spread > 0, spread, np.inf)
        np.maximum(self._largest, (draws - mean[:, None]) / scale[:, None], out=self._largest)
        z: Floats = (values - mean) / scale
        return z

    def p_values(self, z: Floats) -> Floats:
        """Values of p at every checkpoint, adjusted over all of them.

        Args:
            z: ``[T, F]``, what `add` returned, of every checkpoint.
        """
        ordered = np.sort(self._largest, axis=1)
        features, draws = ordered.shape
        below = np.zeros(z.shape, dtype=np.int64)
        for i in range(features):
            below[:, i] = np.searchsorted(ordered[i], z[:, i].astype(np.float32))
        p: Floats = (1 + draws - below) / (draws + 1)
        return p


def discoveries(p: Floats, level: float) -> tuple[Floats, Bools]:
    """Features with a discovery anywhere, and the checkpoints at which they have it.

    Over features the false discovery rate of ``min_t p`` is held at ``level`` (Benjamini & Hochberg 1995). Inside a
    feature that passes, checkpoints count at ``level`` times the share that passes (Benjamini & Bogomolov 2014).

    Args:
        p: ``[T, F]``, from `MaxT.p_values`.
        level: Rate of false discoveries.

    Returns:
        q ``[F]``, the smallest rate at which the feature would pass, and where it is significant ``[T, F]``.
    """
    if not p.size:
        return np.ones(p.shape[1]), np.zeros(p.shape, dtype=bool)
    q = false_discovery_control(p.min(axis=0))
    passed = q <= level
    return q, passed & (p <= level * passed.mean())
