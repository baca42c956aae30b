"""Statistics of the columns of a sparse matrix of latents, for all features at once.

All take ``latents`` of shape ``[P, d_sae]`` with no stored zeros (P positions), and cost a few passes over its entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]
    Integers = NDArray[np.integer]


@dataclass(frozen=True)
class TokenStatistics:
    """How each feature's activation is distributed over the vocabulary. All are ``[d_sae]``.

    Args:
        firing_positions: Number of positions at which the feature fires.
        entropy: Bits; NaN for a feature that never fires.
        entropy_chao_shen: The same, corrected for tokens not seen.
        top_token: Token id with most activation mass, the smallest id among equals; -1 for a silent feature.
        top_token_share: Its share of the mass; NaN for a silent feature.
    """

    firing_positions: Integers
    entropy: Floats
    entropy_chao_shen: Floats
    top_token: Integers
    top_token_share: Floats


def token_statistics(latents: scipy.sparse.csr_array, tokens: Integers) -> TokenStatistics:
    """Distribution of activation mass over tokens, ``p(v) = sum_{tokens[n] = v} f_n / sum_n f_n``, for every feature.

    Plain entropy is ``-sum_v p log2 p``. It is too low for a feature with few firing positions, which cannot show all
    of its tokens. The correction is that of Chao & Shen (2003), "Nonparametric estimation of Shannon's index of
    diversity when there are unseen species in sample", ``-sum_v C p log2(C p) / (1 - (1 - C p)^n)``, with n the
    feature's firing positions and coverage ``C = 1 - f1 / n``, f1 the number of tokens seen at exactly one of them
    (n - 1 when all are, as the estimator is undefined there). Theirs is for counts; here p is by activation mass, n and
    f1 by positions, which agree when all activations are equal. It treats positions as independent.

    Args:
        latents: ``[P, d_sae]``, entries positive.
        tokens: Token id at every position, ``[P]``.
    """
    width = latents.shape[1]
    vocabulary = int(tokens.max()) + 1 if len(tokens) else 0
    places = np.arange(len(tokens) + 1)
    # one row per position with a single 1 at its token; transposed, it sums positions by token
    by_token = scipy.sparse.csr_array((np.ones(len(tokens)), tokens, places), shape=(len(tokens), vocabulary)).T.tocsr()
    ones = scipy.sparse.csr_array((np.ones(latents.nnz), latents.indices, latents.indptr), shape=latents.shape)
    mass = (by_token @ latents.astype(np.float64)).tocsc()  # [V, d_sae]
    counts = (by_token @ ones).tocsc()
    column = np.repeat(np.arange(width), np.diff(mass.indptr))
    n = np.bincount(column, weights=counts.data, minlength=width)
    total = np.bincount(column, weights=mass.data, minlength=width)
    p = mass.data / total[column]
    entropy = -np.bincount(column, weights=p * np.log2(p), minlength=width)

    once = np.bincount(column, weights=counts.data == 1, minlength=width)
    once = np.where(once == n, n - 1, once)
    silent = n == 0
    coverage = 1 - once / np.where(silent, 1, n)
    cp = coverage[column] * p
    corrected = -np.bincount(column, weights=cp * np.log2(cp) / (1 - (1 - cp) ** n[column]), minlength=width)

    top, share = _column_maxima(mass.indptr, p)
    top_token = np.where(silent, -1, mass.indices[np.minimum(top, max(mass.nnz - 1, 0))] if mass.nnz else -1)
    # rounding may leave -1e-16 for a feature with one token
    plain_bits = np.where(silent, np.nan, np.maximum(entropy, 0))
    corrected_bits = np.where(silent, np.nan, np.maximum(corrected, 0))
    return TokenStatistics(n.astype(np.int64), plain_bits, corrected_bits, top_token, share)


def token_share(latents: scipy.sparse.csr_array, tokens: Integers, chosen: Integers) -> Floats:
    """Share of each feature's activation mass that lies on one chosen token.

    Args:
        latents: ``[P, d_sae]``.
        tokens: ``[P]``.
        chosen: A token id for each feature, ``[d_sae]``; -1 for none.

    Returns:
        ``[d_sae]``; NaN where the feature never fires here or has no token.
    """
    width = latents.shape[1]
    row = np.repeat(np.arange(latents.shape[0]), np.diff(latents.indptr))
    values = latents.data.astype(np.float64)
    total = np.bincount(latents.indices, weights=values, minlength=width)
    hit = np.bincount(latents.indices, weights=values * (tokens[row] == chosen[latents.indices]), minlength=width)
    return np.divide(hit, total, out=np.full(width, np.nan), where=(total > 0) & (chosen >= 0))


def top_positions(latents: scipy.sparse.csr_array, documents: Integers, count: int) -> tuple[Integers, Floats]:
    """The positions with each feature's largest activations, at most one of a document.

    A document's largest activation stands for it; among equal activations the first position wins.

    Args:
        latents: ``[P, d_sae]``, entries positive.
        documents: Document at every position, ``[P]``.
        count: Positions wanted for each feature.

    Returns:
        Positions ``[d_sae, count]``, -1 where a feature fires in fewer documents, and their activations, 0 there; in
        descending order of activation.
    """
    columns = latents.tocsc()
    columns.sort_indices()
    width = latents.shape[1]
    positions = np.full((width, count), -1, dtype=np.int64)
    values = np.zeros((width, count), dtype=np.float32)
    column = np.repeat(np.arange(width), np.diff(columns.indptr))
    document = documents[columns.indices]
    left = columns.data.copy()
    # one pass for each rank: take every column's maximum, then strike out its document. No sort of all entries.
    for rank in range(count):
        best, value = _column_maxima(columns.indptr, left)
        found = value > 0  # NaN, for an empty column, is not
        positions[found, rank] = columns.indices[best[found]]
        values[found, rank] = value[found]
        taken = np.full(width, -1, dtype=np.int64)
        taken[found] = document[best[found]]
        left[document == taken[column]] = 0
    return positions, values


def values_at(latents: scipy.sparse.csr_array, positions: Integers, features: Integers) -> Floats:
    """Entries of ``latents`` at pairs of position and feature; 0 where none is stored.

    Args:
        latents: ``[P, d_sae]``, indices sorted.
        positions: Any shape.
        features: A shape that broadcasts with it.

    Returns:
        float32, of the broadcast shape.
    """
    shape = np.broadcast_shapes(np.shape(positions), np.shape(features))
    if latents.nnz == 0:
        return np.zeros(shape, dtype=np.float32)
    width = latents.shape[1]
    row = np.repeat(np.arange(latents.shape[0], dtype=np.int64), np.diff(latents.indptr))
    keys = row * width + latents.indices  # increasing, as rows are in order and indices sorted
    wanted = np.broadcast_to(positions * np.int64(width) + features, shape)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    found: Floats = np.where(keys[place] == wanted, latents.data[place], np.float32(0))
    return found


def _column_maxima(indptr: Integers, data: Floats) -> tuple[Integers, Floats]:
    """Index into ``data`` of each column's first maximum (0 for an empty column), and the maximum (NaN there)."""
    width = len(indptr) - 1
    best, value = np.zeros(width, dtype=np.int64), np.full(width, np.nan, dtype=data.dtype)
    lengths = np.diff(indptr)
    some = lengths > 0
    if not some.any():
        return best, value
    starts = indptr[:-1][some]
    value[some] = np.maximum.reduceat(data, starts)
    at_maximum = np.flatnonzero(data == np.repeat(value[some], lengths[some]))
    # the first of them at or after the start of the column is in the column, as each has one
    best[some] = at_maximum[np.searchsorted(at_maximum, starts)]
    return best, value
