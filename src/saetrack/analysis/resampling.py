"""Bootstraps that analyses share: over the positions of a feature, and over features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]

# replicates x features held at once
_BLOCK = 4_000_000


def dirichlet_pair_weights(size: int, n: int, replicates: int, rng: np.random.Generator) -> Floats:
    r"""Weights on pairs for the Dirichlet (Bayesian, multiplier) bootstrap of a mean pairwise similarity.

    With ``w ~ Dir(1, ..., 1)`` over the members, a replicate is ``sum_{a != b} w_a w_b s_ab / (1 - sum_a w_a^2)``,
    for cosine ``(||sum_a w_a u_a||^2 - sum_a w_a^2) / (1 - sum_a w_a^2)``. Drawing members with replacement instead
    would pair a vector with itself, which biases the mean upwards by ``(1 - Sbar) / n``.

    Args:
        size: Members in use, at least 2.
        n: Places in a set.
        replicates: Number of replicates.
        rng: One stream for all sizes gives every size its own draw.

    Returns:
        ``[replicates, n * n]``; the product with a flattened similarity matrix is the replicate.
    """
    weights = np.zeros((replicates, n))
    weights[:, :size] = rng.dirichlet(np.ones(size), replicates)
    pairs = weights[:, :, None] * weights[:, None, :]
    index = np.arange(n)
    pairs[:, index, index] = 0
    pairs /= pairs.sum(axis=(1, 2), keepdims=True)
    return pairs.reshape(replicates, n * n)


def bootstrap_means(
    values: Floats, rng: np.random.Generator, replicates: int = 500, coverage: float = 0.95
) -> tuple[Floats, Floats, Floats]:
    """Mean over features, with a percentile interval from resampling the features.

    All rows are resampled with the same draws, so their intervals can be compared.

    Args:
        values: ``[rows, features]``; NaN entries are left out.
        rng: Source of the draws.
        replicates: Number of bootstrap replicates.
        coverage: Share of the replicates inside the interval.

    Returns:
        Mean, low and high, each ``[rows]``; NaN where a row has no value.
    """
    rows = len(values)
    counts = np.isfinite(values).sum(axis=1)
    mean = np.divide(np.nansum(values, axis=1), counts, out=np.full(rows, np.nan), where=counts > 0)
    interval = np.full((2, rows), np.nan)
    some = counts > 0
    if some.any():
        means = bootstrap_replicates(values, rng, replicates)
        interval[:, some] = np.nanquantile(means[:, some], [(1 - coverage) / 2, (1 + coverage) / 2], axis=0)
    return mean, interval[0], interval[1]


def bootstrap_mean_of_rows(
    values: Floats, rng: np.random.Generator, replicates: int = 500
) -> tuple[float, float, float]:
    """Mean over rows of their means over features, with the 95 % interval from resampling features, alike in all rows.

    Args:
        values: ``[rows, features]``; NaN entries are left out.
        rng: Source of the draws.
        replicates: Number of bootstrap replicates.

    Returns:
        Mean, low and high; NaN without any value.
    """
    known = values[np.isfinite(values).any(axis=1)]
    if not known.size:
        return np.nan, np.nan, np.nan
    low, high = np.nanquantile(bootstrap_replicates(known, rng, replicates).mean(axis=1), [0.025, 0.975])
    return float(np.nanmean(known, axis=1).mean()), float(low), float(high)


def bootstrap_replicates(values: Floats, rng: np.random.Generator, replicates: int) -> Floats:
    """Means over features of resampled features, ``[replicates, rows]``.

    The same generator and number of features give the same draws, so that several tables can be resampled together.

    Args:
        values: ``[rows, features]``; NaN entries are left out.
        rng: Source of the draws.
        replicates: Number of bootstrap replicates.
    """
    rows, features = values.shape
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)
    means = np.full((replicates, rows), np.nan)
    block = max(1, _BLOCK // features)
    for start in range(0, replicates, block):
        stop = min(start + block, replicates)
        drawn = np.stack(
            [np.bincount(rng.integers(features, size=features), minlength=features) for _ in range(start, stop)]
        ).astype(np.float64)
        weight = drawn @ known.T
        np.divide(drawn @ filled.T, weight, out=means[start:stop], where=weight > 0)
    return means


def population_table(steps: list[int], values: Floats, rng: np.random.Generator, replicates: int) -> pd.DataFrame:
    """Mean over features with its interval from a bootstrap over features, and quartiles, by step.

    Args:
        steps: LLM steps.
        values: ``[T, F]``.
        rng: Source of the draws.
        replicates: Bootstrap replicates.
    """
    mean, low, high = bootstrap_means(values.astype(np.float64), rng, replicates)
    quartiles = np.quantile(values, [0.25, 0.5, 0.75], axis=1) if values.size else np.full((3, len(steps)), np.nan)
    return pd.DataFrame(
        {
            "step": steps,
            "mean": mean,
            "low": low,
            "high": high,
            "q25": quartiles[0],
            "median": quartiles[1],
            "q75": quartiles[2],
            "n_features": values.shape[1],
        }
    )


def share_of(count: float, of: float) -> tuple[float, float, float]:
    """One share with its interval, as `share_interval` gives them."""
    share, low, high = share_interval(np.array([count]), np.array([of]))
    return float(share[0]), float(low[0]), float(high[0])


def with_interval(name: str, values: tuple[float, float, float]) -> dict[str, float]:
    """Mean, low and high as the columns of a table: ``name``, ``name_low`` and ``name_high``."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def share_interval(counts: NDArray[np.integer], of: NDArray[np.integer]) -> tuple[Floats, Floats, Floats]:
    """Shares with Wilson's 95 % interval (Wilson 1927), which does not shrink to nothing at 0 and 1.

    Args:
        counts: ``[N]``.
        of: ``[N]``, what they are counted out of.

    Returns:
        Share, low and high ``[N]``; NaN where ``of`` is 0.

    Example:
        >>> [round(float(x[0]), 3) for x in share_interval(np.array([0]), np.array([10]))]
        [0.0, 0.0, 0.278]
    """
    z = 1.959964
    n = np.where(of > 0, of, np.nan)
    share = counts / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return share, np.maximum(centre - half, 0.0), np.minimum(centre + half, 1.0)
