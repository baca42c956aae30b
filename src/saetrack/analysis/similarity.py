"""Exact mean pairwise similarities of many small sets of vectors, without visiting vectors pair by pair in Python.

A set holds ``n`` vectors (the activations or latents at ``n`` positions). Its *similarity matrix* is ``[n, n]`` with a
zero diagonal; the mean over its off-diagonal entries is the progress measure's ``Sbar`` (SAE-Track, arXiv 2412.17626,
Sec. 4). The matrix is kept rather than the mean alone because every Dirichlet replicate of the bootstrap is another
weighting of the same entries (`saetrack.analysis.resampling`).

For cosine the mean equals ``(||sum_j u_j||^2 - n) / (n (n - 1))`` over unit vectors ``u_j``; weighted Jaccard equals
``(|a|_1 + |b|_1 - |a - b|_1) / (|a|_1 + |b|_1 + |a - b|_1)``. The tests hold the results here to both forms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import scipy.sparse
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]

SPARSE_MEASURES = ("cosine", "jaccard", "weighted_jaccard")


def cosine_matrices(vectors: Floats) -> Floats:
    """Cosine of every pair of vectors in each set.

    Args:
        vectors: ``[..., n, d]``. A zero vector has cosine 0 with everything.

    Returns:
        ``[..., n, n]`` with a zero diagonal, in the dtype of ``vectors``.

    Example:
        >>> cosine_matrices(np.array([[2.0, 0.0], [3.0, 0.0], [0.0, 1.0]])).tolist()
        [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    units = vectors / np.where(norms > 0, norms, 1)
    matrices: Floats = units @ np.swapaxes(units, -1, -2)
    index = np.arange(matrices.shape[-1])
    matrices[..., index, index] = 0
    return matrices


class PairSums(NamedTuple):
    """What every similarity of sparse non-negative vectors ``a``, ``b`` of a set can be made from.

    Shapes are ``[sets, n, n]`` for pairs (diagonal zero) and ``[sets, n]`` for single vectors.

    Args:
        product: ``sum_j a_j b_j``.
        both: ``|{j: a_j > 0 and b_j > 0}|``.
        minimum: ``sum_j min(a_j, b_j)``.
        square: ``sum_j a_j^2``.
        active: ``|{j: a_j > 0}|``.
        total: ``sum_j a_j``.
    """

    product: Floats
    both: Floats
    minimum: Floats
    square: Floats
    active: Floats
    total: Floats

    def without_coordinate(self, own: Floats) -> PairSums:
        """The same sums with one coordinate of each set left out.

        Args:
            own: ``[sets, n]``, each vector's value in the coordinate to leave out (a set of one broadcasts).

        Returns:
            The sums over all other coordinates.
        """
        pairs = own[..., :, None], own[..., None, :]
        fires = own > 0
        off = ~np.eye(own.shape[-1], dtype=bool)
        return PairSums(
            product=self.product - off * (pairs[0] * pairs[1]),
            both=self.both - (off & fires[..., :, None] & fires[..., None, :]),
            minimum=self.minimum - off * np.minimum(*pairs),
            # rounding must not leave a vector that fired on nothing else with a tiny norm to divide by
            square=np.where(self.active > fires, np.maximum(self.square - own**2, 0), 0.0),
            active=self.active - fires,
            total=np.where(self.active > fires, np.maximum(self.total - own, 0), 0.0),
        )

    def similarities(self) -> dict[str, Floats]:
        """Similarity matrices by measure.

        ``cosine``; ``jaccard`` = ``|a > 0 and b > 0| / |a > 0 or b > 0|``; ``weighted_jaccard`` =
        ``sum_j min(a_j, b_j) / sum_j max(a_j, b_j)``. Each is 0 where its denominator is (two empty vectors).

        Returns:
            Measure to ``[sets, n, n]``, with the keys of `SPARSE_MEASURES`.
        """
        norm = np.sqrt(self.square)
        union = self.active[..., :, None] + self.active[..., None, :] - self.both
        maximum = self.total[..., :, None] + self.total[..., None, :] - self.minimum
        return {
            "cosine": _ratio(self.product, norm[..., :, None] * norm[..., None, :]),
            "jaccard": _ratio(self.both, union),
            "weighted_jaccard": _ratio(self.minimum, maximum),
        }


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    return np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=denominator > 0)


def sparse_pair_sums(latents: scipy.sparse.csr_array, members: NDArray[np.integer]) -> PairSums:
    """Sums over pairs of sparse rows inside each of many small sets.

    Only pairs of entries that share a latent are visited: at most ``(n - 1) / 2`` for each stored entry, however
    wide the rows are. Memory is a few arrays of the size of the sets' entries plus ``[sets, n, n]``, so give the
    sets in blocks.

    Args:
        latents: ``[P, d_sae]``, non-negative, no stored zeros.
        members: ``[sets, n]`` row numbers; negative ones are unused places and give zeros.

    Returns:
        The sums, float64.
    """
    sets, n = members.shape
    slots = np.flatnonzero(members.ravel() >= 0)
    rows = latents[members.ravel()[slots]]
    lengths = np.diff(rows.indptr)
    # by latent, and within a latent by place: the entries of one set that share a latent then lie side by side
    by_latent = rows.tocsc()
    latent = np.repeat(np.arange(by_latent.shape[1]), np.diff(by_latent.indptr))
    slot, value = slots[by_latent.indices], by_latent.data.astype(np.float64)
    which_set, place = np.divmod(slot, n)
    new = np.ones(len(value), dtype=bool)
    new[1:] = (latent[1:] != latent[:-1]) | (which_set[1:] != which_set[:-1])
    run = np.cumsum(new)

    sums = np.zeros((3, sets * n * n))
    first = np.arange(len(value))
    for shift in range(1, n):
        first = first[first + shift < len(value)]
        first = first[run[first + shift] == run[first]]
        if not len(first):
            break
        second = first + shift
        pair = slot[first] * n + place[second]
        a, b = value[first], value[second]
        sums[0] += np.bincount(pair, weights=a * b, minlength=sums.shape[1])
        sums[1] += np.bincount(pair, minlength=sums.shape[1])
        sums[2] += np.bincount(pair, weights=np.minimum(a, b), minlength=sums.shape[1])
    upper = sums.reshape(3, sets, n, n)
    product, both, minimum = upper + np.swapaxes(upper, -1, -2)

    square, active, total = np.zeros((3, sets * n))
    entry_slot, data = np.repeat(slots, lengths), rows.data.astype(np.float64)
    square += np.bincount(entry_slot, weights=data**2, minlength=sets * n)
    active += np.bincount(entry_slot, minlength=sets * n)
    total += np.bincount(entry_slot, weights=data, minlength=sets * n)
    shape = (sets, n)
    return PairSums(product, both, minimum, square.reshape(shape), active.reshape(shape), total.reshape(shape))


def own_values(latents: scipy.sparse.csr_array, members: NDArray[np.integer], features: NDArray[np.integer]) -> Floats:
    """Each set's values in one coordinate of its own.

    Args:
        latents: ``[P, d_sae]``.
        members: ``[sets, n]`` row numbers, negative for unused places.
        features: ``[sets]``, the coordinate of each set.

    Returns:
        ``[sets, n]`` float64, 0 at unused places.
    """
    values = np.zeros(members.shape)
    used = members >= 0
    if used.any():  # scipy gives a sparse array for no entries, a dense one otherwise
        values[used] = latents[members[used], np.broadcast_to(features[:, None], members.shape)[used]]
    return values


def pair_weights(sizes: NDArray[np.integer], n: int) -> Floats:
    """Weights that make the mean over the ordered pairs of the first ``size`` members.

    Args:
        sizes: ``[sets]``, each at least 2.
        n: Places in a set.

    Returns:
        ``[sets, n, n]``: ``1 / (size (size - 1))`` for pairs of different members, else 0. Each sums to 1.
    """
    used = np.arange(n) < np.asarray(sizes)[:, None]
    pairs = used[:, :, None] & used[:, None, :] & ~np.eye(n, dtype=bool)
    return pairs / (sizes * (sizes - 1.0))[:, None, None]


def mean_similarity(matrices: Floats, sizes: NDArray[np.integer]) -> Floats:
    """Mean over the off-diagonal entries of each similarity matrix.

    Args:
        matrices: ``[sets, n, n]``.
        sizes: ``[sets]``, the number of members in use, each at least 2.

    Returns:
        ``[sets]`` float64.
    """
    mean: Floats = np.einsum("sij,sij->s", matrices, pair_weights(sizes, matrices.shape[-1]))
    return mean
