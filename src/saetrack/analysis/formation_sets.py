"""The positions that formation is measured on: each feature's strongest, and seeded random sets to compare with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import scipy.sparse
    from numpy.typing import NDArray

    Integers = NDArray[np.integer]

# stored latents sorted at once
_BLOCK = 4_000_000


def top_positions(
    latents: scipy.sparse.csr_array, documents: Integers, n_positions: int, per_document: int = 1
) -> Integers:
    """Positions where each feature is most active, few from any one document.

    Only positions where the feature fires are taken, so a rare feature gets fewer than ``n_positions`` and a silent
    one none. Among equal activations the earlier position wins.

    Args:
        latents: ``[P, d_sae]``, non-negative, no stored zeros.
        documents: ``[P]``, the document of each position.
        n_positions: Most positions of a feature.
        per_document: Most positions of a feature in one document.

    Returns:
        ``[d_sae, n_positions]`` positions, strongest first; -1 where there are no more.

    Example:
        >>> import scipy.sparse as sp
        >>> latents = sp.csr_array([[3.0], [2.0], [0.0], [1.0]])
        >>> top_positions(latents, np.array([0, 0, 1, 1]), n_positions=3).tolist()
        [[0, 3, -1]]
    """
    by_feature = latents.tocsc()
    d_sae = by_feature.shape[1]
    chosen = np.full((d_sae, n_positions), -1, dtype=np.int64)
    start = 0
    while start < d_sae:
        # at least one feature, however dense
        end = int(np.searchsorted(by_feature.indptr, by_feature.indptr[start] + _BLOCK, side="right")) - 1
        end = min(max(end, start + 1), d_sae)
        entries = slice(by_feature.indptr[start], by_feature.indptr[end])
        position, value = by_feature.indices[entries], by_feature.data[entries]
        feature = np.repeat(np.arange(start, end), np.diff(by_feature.indptr[start : end + 1]))
        document = documents[position]
        order = np.lexsort((position, -value, document, feature))
        order = order[_rank_in_run(feature[order], document[order]) < per_document]
        order = order[np.lexsort((position[order], -value[order], feature[order]))]
        rank = _rank_in_run(feature[order])
        order, rank = order[rank < n_positions], rank[rank < n_positions]
        chosen[feature[order], rank] = position[order]
        start = end
    return chosen


def random_sets(
    documents: Integers, n_positions: int, sets: int, rng: np.random.Generator, per_document: int = 1
) -> Integers:
    """Sets of random positions, with as few as possible from any one document.

    Positions are drawn uniformly without replacement; those that would exceed ``per_document`` are passed over
    while there are others. Every leading part of a set is itself such a random set, so one draw serves all sizes.

    Args:
        documents: ``[P]``, the document of each position.
        n_positions: Positions in a set.
        sets: Number of sets.
        rng: Source of the draws.
        per_document: Positions of a set in one document, where the documents suffice.

    Returns:
        ``[sets, n_positions]``.

    Raises:
        ValueError: If there are fewer than ``n_positions`` positions.
    """
    if len(documents) < n_positions:
        raise ValueError(
            f"The selection rows hold {len(documents)} positions, fewer than the {n_positions} of one set. "
            "Raise `selection_rows`, or give the track a longer corpus."
        )
    drawn = np.empty((sets, n_positions), dtype=np.int64)
    for i in range(sets):
        order = rng.permutation(len(documents))
        by_document = np.argsort(documents[order], kind="stable")
        rank = np.empty(len(order), dtype=np.int64)
        rank[by_document] = _rank_in_run(documents[order][by_document])
        drawn[i] = order[np.argsort(rank >= per_document, kind="stable")[:n_positions]]
    return drawn


def _rank_in_run(*keys: Integers) -> Integers:
    """Place of each element in its run of equal keys, from 0."""
    index = np.arange(len(keys[0]))
    new = np.zeros(len(index), dtype=bool)
    new[:1] = True
    for key in keys:
        new[1:] |= key[1:] != key[:-1]
    return index - np.maximum.accumulate(np.where(new, index, 0))
