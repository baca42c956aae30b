"""Segmentation of many short series at once: phases of constant level, how many, and against what they must win."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]
    Integers = NDArray[np.integer]

MIN_LENGTH = 3
"""Fewest rates in a phase."""

MOST_PHASES = 5

_RANDOM_WALKS = 2000
_EXACT = 1e-9  # of the total; what is left below that is rounding


@dataclass(frozen=True)
class Segmentations:
    """The best segmentations of each of S series into 1, 2, ... phases.

    Args:
        residual: Weighted sum of squared residuals ``[S, K]``.
        boundaries: For each number of phases k, ``[S, k - 1]``: the place at which each later phase begins.
        score: mBIC over that of one phase ``[S, K]``, in nats; the higher the better, 0 for one phase.
    """

    residual: Floats
    boundaries: list[Integers]
    score: Floats

    @property
    def best(self) -> Integers:
        """Number of phases with the highest score ``[S]``."""
        best: Integers = self.score.argmax(axis=1) + 1
        return best


def segment(series: Floats, weights: Floats) -> Segmentations:
    """Cut each series into phases of constant level, exactly, by dynamic programming over all series at once.

    Phases have at least `MIN_LENGTH` places, and there are at most `MOST_PHASES`. The cost of a phase is its weighted
    sum of squared residuals. ruptures' ``Dynp`` could do the same, but takes one series at a time:
    the nulls and the bootstraps of a track are some ten thousand, and took it over a hundred times as long.

    The score is that of Zhang & Siegmund (2007, Biometrics 63, 22-32) with the noise estimated from the residuals:
    ``(n - 2m) / 2 log(RSS_1 / RSS_K) - (3 m log n + sum_k log(n_k / n)) / 2`` for m = K - 1 boundaries. The likelihood
    has n - 2m degrees of freedom and not n, as each boundary takes a level and a place: with n, three planted phases
    in 29 rates are found to be four or five in 13 % of series; with n - 2m in less than 1 %.

    Args:
        series: ``[S, n]``.
        weights: Inverse variances, up to a factor, ``[n]`` or ``[S, n]``.

    Raises:
        ValueError: If the series are too short for one phase.
    """
    n = series.shape[1]
    if n < MIN_LENGTH:
        raise ValueError(f"A series of {n} rates cannot be cut; a phase has at least {MIN_LENGTH}.")
    cost = _costs(series, np.broadcast_to(weights, series.shape))
    best, came_from = [cost[:, 0, :]], []  # of the first e places, for each number of phases: [S, n + 1]
    for _ in range(1, min(MOST_PHASES, n // MIN_LENGTH)):
        total = best[-1][:, :, None] + cost
        came_from.append(total.argmin(axis=1))
        best.append(np.take_along_axis(total, came_from[-1][:, None], axis=1)[:, 0])
    residual = np.stack([cost_to[:, n] for cost_to in best], axis=1)
    residual = np.maximum(residual, np.maximum(_EXACT * residual[:, :1], np.finfo(np.float64).tiny))
    boundaries = [_trace(came_from[:k], n, len(series)) for k in range(len(best))]
    score = np.stack([_score(residual[:, 0] / residual[:, k], boundaries[k], n) for k in range(len(best))], axis=1)
    return Segmentations(residual, boundaries, score)


def _costs(series: Floats, weights: Floats) -> Floats:
    """Cost of a phase from place s to before e ``[S, n + 1, n + 1]``; infinite where it is too short."""
    series = series - np.average(series, axis=1, weights=weights)[:, None]  # against cancellation below
    sums = [np.pad(np.cumsum(weights * series**power, axis=1), ((0, 0), (1, 0))) for power in range(3)]
    mass, first, second = (s[:, None, :] - s[:, :, None] for s in sums)
    place = np.arange(series.shape[1] + 1)
    long_enough = place[None, :] - place[:, None] >= MIN_LENGTH
    cost = second - first**2 / np.where(long_enough, mass, 1.0)
    return np.where(long_enough, np.maximum(cost, 0.0), np.inf)


def _trace(came_from: list[Integers], n: int, count: int) -> Integers:
    """Where the phases begin, back from the end."""
    end = np.full(count, n)
    starts: list[Integers] = []
    for step in reversed(came_from):
        end = step[np.arange(count), end]
        starts.append(end)
    return np.stack(starts[::-1], axis=1) if starts else np.zeros((count, 0), dtype=np.int64)


def _score(ratio: Floats, boundaries: Integers, n: int) -> Floats:
    m = boundaries.shape[1]
    lengths = np.diff(boundaries, axis=1, prepend=0, append=n)
    penalty = 3 * m * np.log(n) + np.log(lengths / n).sum(axis=1)
    score: Floats = ((n - 2 * m) * np.log(ratio) - penalty) / 2
    return score


def levels(series: Floats, weights: Floats, boundaries: Integers) -> Floats:
    """The fitted level at every place ``[n]`` of one series, given where its later phases begin."""
    label = labels(boundaries, len(series))
    mean = np.bincount(label, weights * series) / np.bincount(label, weights)
    fitted: Floats = mean[label]
    return fitted


def labels(boundaries: Integers, n: int) -> Integers:
    """Number of the phase at every place ``[n]``, from 0.

    Example:
        >>> labels(np.array([3]), 5).tolist()
        [0, 0, 0, 1, 1]
    """
    return np.searchsorted(boundaries, np.arange(n), side="right")


def advantage(series: Floats, weights: Floats, found: Segmentations) -> Floats:
    """How much better phases fit than a smooth curve with as many free numbers: ``log(RSS_curve / RSS_K)``.

    K levels and K - 1 places are 2K - 1 numbers, so the curve is the polynomial of degree 2K - 2 over the places. A
    trend, however strong, is fitted better by the curve.

    Args:
        series: ``[S, n]``.
        weights: ``[n]``.
        found: Their segmentations.

    Returns:
        ``[S, K]``; 0 for one phase.
    """
    n = series.shape[1]
    scaled = (series - np.average(series, axis=1, weights=weights)[:, None]) * np.sqrt(weights)
    place = np.linspace(-1, 1, n)
    columns = []
    for k in range(found.residual.shape[1]):
        powers = np.polynomial.legendre.legvander(place, 2 * k) * np.sqrt(weights)[:, None]
        basis = np.linalg.qr(powers)[0]  # [n, 2k + 1]
        rest = np.square(scaled - scaled @ basis @ basis.T).sum(axis=1)
        columns.append(np.log(np.maximum(rest, _EXACT * found.residual[:, 0]) / found.residual[:, k]))
    stacked = np.stack(columns, axis=1)
    stacked[:, 0] = 0.0  # the same model, apart from rounding
    return stacked


def random_walk_advantage(weights: Floats, rng: np.random.Generator, quantile: float = 0.95) -> float:
    """The `advantage` that random walks of the same length reach, each at its own best number of phases.

    Where rates wander, some cut always fits; permuting them in time would hide that, as it makes them independent.

    Args:
        weights: ``[n]``.
        rng: Source of the walks.
        quantile: Of the walks.
    """
    walks = rng.normal(size=(_RANDOM_WALKS, len(weights))).cumsum(axis=1)
    found = segment(walks, weights)
    reached = advantage(walks, weights, found)[np.arange(_RANDOM_WALKS), found.best - 1]
    return float(np.quantile(reached, quantile))
