"""One-to-one matching of two dictionaries' latents, and random dictionaries to compare it with.

A *similarity* is a matrix ``[m, n]`` that is given in blocks of rows, for it may be too large to hold: the signed
cosine of decoder rows or encoder columns, or the Pearson correlation of latents on the same tokens. The matching is
the one with the largest sum (Hungarian). Its mean over the matched pairs is PW-MCC (arXiv 2505.20254); it is well
above zero for dictionaries that have nothing in common, so it says something only beside random dictionaries.

Memory: ``8 m n`` bytes up to `DENSE_FEATURES` latents; above that the matching chooses among each latent's
`CANDIDATES` most similar ones, from both sides, and holds about ``2 * 32 * (m + n)`` of them, with blocks of
64 MB beside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import scipy.sparse
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from .drift_geometry import unit_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Floats = NDArray[np.floating]
    Integers = NDArray[np.integer]

DENSE_FEATURES = 16_384
"""Largest number of latents of either side up to which every pair may be matched."""
CANDIDATES = 32
"""Above that, how many most similar latents of the other side each latent may be matched with."""
_BLOCK = 16_000_000  # float32 numbers in a block


class Similarity(Protocol):
    """A matrix of similarities, by blocks of rows."""

    shape: tuple[int, int]

    def rows(self, start: int, stop: int) -> Floats:
        """Rows ``start`` to ``stop``, ``[stop - start, n]`` float32."""


class CosineSimilarity:
    """Signed cosines of unit rows.

    Args:
        a: ``[m, d]`` unit rows.
        b: ``[n, d]`` unit rows.
    """

    def __init__(self, a: Floats, b: Floats) -> None:
        self.a, self.b, self.shape = a, b, (len(a), len(b))

    def rows(self, start: int, stop: int) -> Floats:
        """Rows ``start`` to ``stop``, ``[stop - start, n]``."""
        block: Floats = self.a[start:stop] @ self.b.T
        return block


class LatentCorrelation:
    """Pearson correlations of the columns of two sparse matrices of latents on the same tokens.

    ``(sum_p a_pi b_pj / P - mean_i mean_j) / (sd_i sd_j)``: only the first term needs pairs, and it is a product of
    sparse matrices. A constant column correlates 0 with everything.

    Args:
        a: ``[P, m]``.
        b: ``[P, n]``.
    """

    def __init__(self, a: scipy.sparse.csr_array, b: scipy.sparse.csr_array) -> None:
        self.shape = (a.shape[1], b.shape[1])
        self._tokens = a.shape[0]
        self._a, self._b = a.T.tocsr(), b
        self._mean_a, self._inverse_a = _moments(a)
        self._mean_b, self._inverse_b = _moments(b)

    def rows(self, start: int, stop: int) -> Floats:
        """Rows ``start`` to ``stop``, ``[stop - start, n]`` float32."""
        block: Floats = (self._a[start:stop] @ self._b).toarray() / np.float32(self._tokens)
        block -= np.outer(self._mean_a[start:stop], self._mean_b)
        block *= self._inverse_a[start:stop, None]
        block *= self._inverse_b
        return block


def _moments(latents: scipy.sparse.csr_array) -> tuple[Floats, Floats]:
    """Mean and 1 / standard deviation of every column, float32; 0 for the inverse where a column is constant."""
    mean = np.asarray(latents.sum(axis=0, dtype=np.float64)) / latents.shape[0]
    variance = np.asarray(latents.power(2).sum(axis=0, dtype=np.float64)) / latents.shape[0] - mean**2
    varies = variance > 1e-12 * mean**2
    inverse = np.divide(1.0, np.sqrt(np.where(varies, variance, 1.0)), where=varies, out=np.zeros(len(mean)))
    return mean.astype(np.float32), inverse.astype(np.float32)


@dataclass(frozen=True)
class Matching:
    """Which latent of one dictionary goes with which of the other.

    Args:
        left: Indices into the rows of the similarity, increasing, ``[min(m, n)]``.
        right: The column matched with each, ``[min(m, n)]``.
        similarity: Theirs, ``[min(m, n)]``; its mean is PW-MCC.
    """

    left: Integers
    right: Integers
    similarity: Floats


def match(similarity: Similarity, dense_features: int = DENSE_FEATURES) -> Matching:
    """The one-to-one matching with the largest total similarity.

    Args:
        similarity: ``[m, n]``.
        dense_features: Largest m or n for which every pair is considered. Above it a pair is a candidate when
            either is among the other's most similar, or when both have the same place (so that no matching is
            worse than that of equal indices).

    Returns:
        ``min(m, n)`` pairs.

    Example:
        >>> a = np.eye(3, dtype=np.float32)
        >>> match(CosineSimilarity(a, a[[2, 0, 1]])).right.tolist()
        [1, 2, 0]
    """
    if max(similarity.shape) > dense_features and min(similarity.shape):
        return _match_candidates(similarity)
    whole = np.concatenate([block for _, block in _blocks(similarity)])
    left, right = linear_sum_assignment(whole, maximize=True)
    return Matching(left, right, whole[left, right])


def _blocks(similarity: Similarity) -> Iterator[tuple[int, Floats]]:
    m, n = similarity.shape
    size = max(1, _BLOCK // max(n, 1))
    for start in range(0, max(m, 1), size):
        yield start, similarity.rows(start, min(start + size, m))


def _match_candidates(similarity: Similarity) -> Matching:
    m, n = similarity.shape
    k_right, k_left = min(CANDIDATES, n), min(CANDIDATES, m)
    best = np.full((k_left, n), -np.inf, dtype=np.float32)  # of every column so far, and their rows
    best_row = np.zeros((k_left, n), dtype=np.int64)
    found: list[tuple[Integers, Integers, Floats]] = []
    same_place = np.arange(min(m, n))
    for start, block in _blocks(similarity):
        chosen = np.argpartition(block, n - k_right, axis=1)[:, n - k_right :]
        rows = np.repeat(np.arange(start, start + len(block)), k_right)
        found.append((rows, chosen.ravel(), np.take_along_axis(block, chosen, axis=1).ravel()))
        inside = same_place[(same_place >= start) & (same_place < start + len(block))]
        found.append((inside, inside, block[inside - start, inside]))
        values = np.concatenate([best, block])
        origin = np.concatenate([best_row, np.broadcast_to(np.arange(start, start + len(block))[:, None], block.shape)])
        top = np.argpartition(values, len(values) - k_left, axis=0)[len(values) - k_left :]
        best, best_row = np.take_along_axis(values, top, axis=0), np.take_along_axis(origin, top, axis=0)
    found.append((best_row.ravel(), np.tile(np.arange(n), k_left), best.ravel()))
    row, column, value = (np.concatenate(part) for part in zip(*found, strict=True))
    _, first = np.unique(row * np.int64(n) + column, return_index=True)
    # scipy leaves out zeros and wants the least sum: 2 - similarity is positive for everything up to 1
    cost = scipy.sparse.csr_array((2.0 - value[first].astype(np.float64), (row[first], column[first])), shape=(m, n))
    left, right = min_weight_full_bipartite_matching(cost)
    order = np.argsort(left)
    left, right = left[order], right[order]
    return Matching(left, right, 2.0 - cost[left, right])


@dataclass(frozen=True)
class Relations:
    """Which latents are most similar to which, without asking for one-to-one.

    Args:
        parent: The most similar row of every column, ``[n]``.
        parent_similarity: Theirs, ``[n]``.
        child: The most similar column of every row, ``[m]``.
        child_similarity: Theirs, ``[m]``.
    """

    parent: Integers
    parent_similarity: Floats
    child: Integers
    child_similarity: Floats

    def splits(self, least: float) -> Integers:
        """Rows that are the parent of two or more columns, each at a similarity of at least ``least``."""
        return _chosen_twice(self.parent[self.parent_similarity >= least])

    def merges(self, least: float) -> Integers:
        """Columns that are the child of two or more rows, each at a similarity of at least ``least``."""
        return _chosen_twice(self.child[self.child_similarity >= least])


def _chosen_twice(chosen: Integers) -> Integers:
    values, counts = np.unique(chosen, return_counts=True)
    return values[counts > 1]


def relate(similarity: Similarity) -> Relations:
    """Every latent's most similar one of the other side.

    Args:
        similarity: ``[m, n]``. Where one of them is 0 those of the other side have a similarity of minus infinity.
    """
    m, n = similarity.shape
    parent, best = np.zeros(n, dtype=np.int64), np.full(n, -np.inf, dtype=np.float32)
    child, child_best = np.zeros(m, dtype=np.int64), np.full(m, -np.inf, dtype=np.float32)
    for start, block in _blocks(similarity) if m and n else ():
        stop = start + len(block)
        child[start:stop], child_best[start:stop] = block.argmax(axis=1), block.max(axis=1)
        row, value = block.argmax(axis=0), block.max(axis=0)
        better = value > best
        parent[better], best[better] = row[better] + start, value[better]
    return Relations(parent, best, child, child_best)


def directional_covariance(rows: Floats, iterations: int = 6, shrinkage: float = 1e-3) -> Floats:
    """Covariance of the Gaussian whose draws, scaled to norm 1, are spread over directions as these rows are.

    Tyler's estimator (1987), the maximum likelihood for an angular central Gaussian, as a fixed point from the second
    moment: ``V <- d / m sum_i x_i x_i^T / (x_i^T V^-1 x_i)``. The second moment of unit rows itself is too flat:
    scaling draws from it to norm 1 flattens once more, and PW-MCC of such dictionaries would come out too low.

    Args:
        rows: ``[m, d]``, their lengths do not matter; more rows than dimensions.
        iterations: Of the fixed point; each shrinks the error by about d / m.
        shrinkage: Towards a multiple of the identity, which keeps V invertible.

    Returns:
        ``[d, d]`` float64, with trace d.
    """
    units = unit_rows(rows).astype(np.float64)
    d = units.shape[1]
    weighted = units
    for iteration in range(iterations + 1):
        moment = weighted.T @ units
        covariance: Floats = (1 - shrinkage) * d * moment / np.trace(moment) + shrinkage * np.eye(d)
        if iteration < iterations:
            lengths = np.einsum("md,md->m", units, np.linalg.solve(covariance, units.T).T)
            weighted = units / lengths[:, None]
    return covariance


def random_rows(covariance: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Rows of a random dictionary: Gaussian with mean 0, before they are scaled to norm 1.

    Args:
        covariance: ``[d, d]``, symmetric and positive semi-definite.
        count: Number of rows.
        rng: Source of the draws.

    Returns:
        ``[count, d]`` float32.
    """
    values, vectors = np.linalg.eigh(np.asarray(covariance, dtype=np.float64))
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    rows: Floats = (rng.standard_normal((count, len(root))) @ root.T).astype(np.float32)
    return rows
