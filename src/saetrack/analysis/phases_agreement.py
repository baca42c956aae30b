"""How far two segmentations agree, and in which order features reach their semantic, formation and drift times."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.stats

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]
    Integers = NDArray[np.integer]


def covering(first: Floats, second: Floats, start: float, end: float) -> float:
    """Mean overlap of each of the first segmentation's phases with its best match in the second, weighted by length.

    ``sum_A |A| / |U| max_B |A n B| / |A u B|`` (Arbelaez et al. 2011, IEEE TPAMI 33, 898-916); 1 when they are equal.

    Args:
        first: Boundaries, increasing, between ``start`` and ``end``; lengths are in their unit.
        second: Boundaries of the other.
        start: Of the first phase.
        end: Of the last phase.
    """
    a, b = np.r_[start, first, end], np.r_[start, second, end]
    low = np.maximum(a[:-1, None], b[None, :-1])
    high = np.minimum(a[1:, None], b[None, 1:])
    overlap = np.maximum(high - low, 0.0)  # [phases of the first, phases of the second]
    lengths = np.diff(a)
    union = lengths[:, None] + np.diff(b)[None, :] - overlap
    return float((lengths * (overlap / union).max(axis=1)).sum() / (end - start))


def adjusted_rand(first: Integers, second: Integers) -> float:
    """Adjusted Rand index of two labellings ``[n]`` (Hubert & Arabie 1985): 0 by chance, 1 when they are equal.

    NaN when neither has more than one label: they cannot but agree.
    """
    table = np.zeros((int(first.max()) + 1, int(second.max()) + 1))
    np.add.at(table, (first, second), 1)

    def pairs(counts: Floats) -> float:
        return float((counts * (counts - 1)).sum() / 2)

    together, rows, columns = pairs(table), pairs(table.sum(axis=1)), pairs(table.sum(axis=0))
    expected = rows * columns / pairs(np.array([float(len(first))]))
    most = (rows + columns) / 2
    one_label = len(table) == 1 and table.shape[1] == 1
    return float("nan") if one_label else (together - expected) / (most - expected)


def boundary_distance(first: Floats, second: Floats) -> Floats:
    """Mean distance of each boundary to the nearest one of the other segmentation, both ways.

    Args:
        first: ``[..., A]``.
        second: ``[..., B]``, the same leading shape.

    Returns:
        ``[...]``, in the unit of the boundaries; NaN where one has none.
    """
    if first.shape[-1] == 0 or second.shape[-1] == 0:
        return np.full(first.shape[:-1], np.nan)
    apart = np.abs(first[..., :, None] - second[..., None, :])
    distance: Floats = (apart.min(axis=-1).mean(axis=-1) + apart.min(axis=-2).mean(axis=-1)) / 2
    return distance


def order_of_times(
    first: Floats, second: Floats, place: Floats, replicates: int, rng: np.random.Generator
) -> dict[str, tuple[float, float, float]]:
    """Whether features come in the same order by two times, and how much later the second is.

    A time is only known to lie between two checkpoints. The median lag of the middles hardly varies over the bootstrap,
    so the interval of the lag runs from that of the least lags that the checkpoints allow to that of the largest.

    Args:
        first: For each feature ``[F]`` the index of the checkpoint by which its time has come; NaN for none.
        second: The same of its other time.
        place: Of the checkpoints on the axis, ``log10(step + 1)`` ``[T]``; the first interval begins at 0.
        replicates: Bootstrap replicates over features.
        rng: Source of the draws.

    Returns:
        ``tau`` (Kendall's tau_b; features in the same interval are tied) and ``lag`` (median of second minus first,
        in the unit of the axis), each with low and high of the 95 % interval. NaN where fewer than two features
        have both times or, for tau, where all share one.
    """
    known = np.isfinite(first) & np.isfinite(second)
    a, b = first[known].astype(np.int64), second[known].astype(np.int64)
    if len(a) < 2:
        return dict.fromkeys(("tau", "lag"), (np.nan, np.nan, np.nan))
    drawn = rng.integers(len(a), size=(replicates, len(a)))
    after, by = np.r_[0.0, place[:-1]], place
    middle = np.r_[place[0], (place[:-1] + place[1:]) / 2]
    least, most = np.median((after[b] - by[a])[drawn], axis=1), np.median((by[b] - after[a])[drawn], axis=1)
    tau = [scipy.stats.kendalltau(a[rows], b[rows]).statistic for rows in (np.arange(len(a)), *drawn)]
    return {
        "tau": (float(tau[0]), *_interval(np.array(tau[1:]))),
        "lag": (float(np.median(middle[b] - middle[a])), _interval(least)[0], _interval(most)[1]),
    }


def _interval(replicates: Floats) -> tuple[float, float]:
    known = replicates[np.isfinite(replicates)]
    if len(known) == 0:
        return np.nan, np.nan
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)
