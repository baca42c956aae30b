"""Bootstraps that analyses share: over the positions of a feature, and over features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

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
    rows, features = values.shape
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)
    counts = known.sum(axis=1)
    mean = np.divide(filled.sum(axis=1), counts, out=np.full(rows, np.nan), where=counts > 0)
    if features == 0:
        return mean, mean.copy(), mean.copy()
    means = np.full((replicates, rows), np.nan)
    block = max(1, _BLOCK // features)
    for start in range(0, replicates, block):
        stop = min(start + block, replicates)
        drawn = np.stack(
            [np.bincount(rng.integers(features, size=features), minlength=features) for _ in range(start, stop)]
        ).astype(np.float64)
        weight = drawn @ known.T
        np.divide(drawn @ filled.T, weight, out=means[start:stop], where=weight > 0)
    interval = np.full((2, rows), np.nan)
    some = counts > 0
    if some.any():
        interval[:, some] = np.nanquantile(means[:, some], [(1 - coverage) / 2, (1 + coverage) / 2], axis=0)
    return mean, interval[0], interval[1]
