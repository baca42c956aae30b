"""How alike the vectors of a set are: mean pairwise cosine, its Dirichlet replicates, and matched random sets.

With unit vectors ``u_j`` the mean over pairs is ``(||sum_j u_j||^2 - n) / (n (n - 1))``, so a set costs one sum of its
vectors and no pair is visited.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from .positions import Kinds, matched_positions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]
    Integers = NDArray[np.integer]

# vectors of members held at once: _BLOCK * n_positions * d_in * 4 bytes
_BLOCK = 64
# sets summed at once: _SETS * (n_positions + d_in) * 4 bytes
_SETS = 8192


def unit_vectors(vectors: Floats, centre: Floats | None = None) -> torch.Tensor:
    """Rows of unit length, and one row of zeros at the end, which index -1 finds: an unused place adds nothing.

    Args:
        vectors: ``[P, d]``.
        centre: ``[d]``, taken off first.

    Returns:
        ``[P + 1, d]`` float32.
    """
    rows = torch.from_numpy(np.asarray(vectors, dtype=np.float32))
    if centre is not None:
        rows = rows - torch.from_numpy(centre.astype(np.float32))
    return torch.cat([torch.nn.functional.normalize(rows, dim=1), torch.zeros(1, rows.shape[1])])


def mean_cosine(units: torch.Tensor, members: Integers) -> Floats:
    """Mean cosine over the pairs of each set.

    Args:
        units: From `unit_vectors`.
        members: ``[..., n]`` positions, -1 for unused places; at least two are used.

    Returns:
        ``[...]``, float64.
    """
    flat = members.reshape(-1, members.shape[-1])
    mean = np.empty(len(flat))
    for start in range(0, len(flat), _SETS):
        part = flat[start : start + _SETS]
        index = torch.from_numpy(np.where(part < 0, part.dtype.type(len(units) - 1), part))
        total = torch.nn.functional.embedding_bag(index, units, mode="sum").square().sum(1).double().numpy()
        n = (part >= 0).sum(axis=1)
        mean[start : start + _SETS] = (total - n) / (n * (n - 1.0))
    return mean.reshape(members.shape[:-1])


def mean_cosine_by_size(units: torch.Tensor, sets: Integers, sizes: Integers) -> Floats:
    """Mean cosine of the leading parts of full sets: uniform random sets serve features of every size.

    Args:
        units: From `unit_vectors`.
        sets: ``[B, n]`` positions, all used.
        sizes: ``[F]``, each from 2 to n.

    Returns:
        ``[F, B]``: row i takes the first ``sizes[i]`` members of each set.
    """
    distinct, which = np.unique(sizes, return_inverse=True)
    values = np.empty((len(distinct), len(sets)))
    for row, size in enumerate(distinct):
        values[row] = mean_cosine(units, sets[:, :size])
    return values[which]


def matched_sets(members: Integers, keys: Integers, draws: int, seed: tuple[int, ...]) -> Integers:
    """Random sets that match each feature's set in a key, drawn once for all LLM checkpoints.

    Returns:
        ``[F, draws, n]`` int32, -1 for unused places.
    """
    rng, kinds = np.random.default_rng(seed), Kinds.of(keys)
    sets = np.empty((len(members), draws, members.shape[1]), dtype=np.int32)
    for draw in range(draws):
        sets[:, draw] = matched_positions(members, kinds, rng)
    return sets


def matched_means(units: torch.Tensor, keys: Integers) -> torch.Tensor:
    """Mean of the unit vectors at the other positions with the same key: what a matched random position is on average.

    Args:
        units: From `unit_vectors`, ``[P + 1, d]``.
        keys: ``[P]``. A position alone with its key gets zeros.

    Returns:
        ``[P + 1, d]``, the last row zeros.
    """
    kinds, kind = np.unique(keys, return_inverse=True)
    index = torch.from_numpy(kind)
    sums = torch.zeros(len(kinds), units.shape[1]).index_add_(0, index, units[:-1])
    others = torch.bincount(index, minlength=len(kinds))[index, None] - 1
    means = (sums[index] - units[:-1]) / others.clamp(min=1)
    return torch.cat([means, units[-1:]])


def dirichlet_progress(
    units: torch.Tensor, means: torch.Tensor, members: Integers, weights: Floats, document: Integers
) -> Floats:
    r"""Replicates of progress in the Dirichlet (Bayesian, multiplier) bootstrap over documents.

    A replicate is ``sum_{a != b} w_a w_b (u_a . u_b - m_a . m_b) / sum_{a != b} w_a w_b`` with ``w_a`` the weight of
    the member's document, exponential variates (Dirichlet when divided by their sum), and ``m_a`` the mean of what a
    random set has in its place: with other documents a feature has other tokens, and so have the sets that match it.
    Drawing members with replacement would pair a vector with itself, a bias upwards of ``(1 - mean) / n``.

    Args:
        units: From `unit_vectors`.
        means: From `matched_means`.
        members: ``[F, n]``, -1 for unused places.
        weights: ``[R, D]`` weights of the documents, the same for every feature and LLM checkpoint.
        document: ``[P]``, the column of ``weights`` for each position.

    Returns:
        ``[F, R]`` float32.
    """
    table = torch.from_numpy(np.hstack([weights, np.zeros((len(weights), 1))]).astype(np.float32).T)  # [D + 1, R]
    column = torch.from_numpy(np.where(members >= 0, document[members], weights.shape[1]))
    index = torch.from_numpy(np.where(members < 0, len(units) - 1, members))
    found = np.empty((len(members), len(weights)), dtype=np.float32)
    for start in range(0, len(members), _BLOCK):
        block = slice(start, start + _BLOCK)
        vectors, expected = units[index[block]], means[index[block]]  # [f, n, d]
        excess = vectors @ vectors.transpose(1, 2) - expected @ expected.transpose(1, 2)
        excess.diagonal(dim1=1, dim2=2).zero_()
        w = table[column[block]].transpose(1, 2)  # [f, R, n]
        pairs = w.sum(2).square() - w.square().sum(2)
        found[block] = (((w @ excess) * w).sum(2) / pairs).numpy()
    return found
