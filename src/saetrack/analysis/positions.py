"""Choosing positions of a split: no repeated contexts, at most one in a document, spread over a feature's activations.

Positions of one document resemble each other whatever a feature does, and two positions with equal text before them
have equal activations. Either would make a feature's positions look alike for a reason that is not the feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import scipy.sparse
    from numpy.typing import NDArray

    from .base import SplitObservation

    Floats = NDArray[np.floating]
    Integers = NDArray[np.integer]
    Bools = NDArray[np.bool_]

CONTEXT_TOKENS = 10  # two positions count as repeats of each other when so many tokens up to them are equal
TOP_SHARE = 0.01  # of the positions at which a feature fires: half of its set is drawn from these, the strongest


def first_of_context(split: SplitObservation, length: int = CONTEXT_TOKENS) -> Bools:
    """Whether a position is the first one with its context, the last ``length`` tokens up to and with its own.

    Near the start of a row the context is shorter, and equals only another such one.

    Args:
        split: Rows and positions.
        length: Tokens of a context.

    Returns:
        ``[P]``.
    """
    row, column = split.positions.T
    columns = column[:, None] - np.arange(length)
    tokens = split.rows.tokens.astype(np.int64)
    context = np.where(columns >= 0, tokens[row[:, None], columns.clip(0)], -1)  # [P, length]
    first = np.zeros(len(context), dtype=bool)
    # equal rows as equal bytes: sorting those is much faster than np.unique(axis=0)
    keys = np.ascontiguousarray(context, dtype=np.int32).view(np.dtype((np.void, 4 * length))).ravel()
    first[np.unique(keys, return_index=True)[1]] = True
    return first


def firing_quantiles(latents: scipy.sparse.csr_array, shares: tuple[float, ...]) -> Floats:
    """Quantiles of each feature's activations over the positions at which it fires.

    Args:
        latents: ``[P, d_sae]``, no stored zeros.
        shares: Between 0 and 1.

    Returns:
        ``[len(shares), d_sae]``, each an activation that occurs; infinite for a feature that never fires.
    """
    columns = latents.tocsc()
    lengths = np.diff(columns.indptr)
    feature = np.repeat(np.arange(len(lengths)), lengths)
    ordered = np.append(columns.data[np.lexsort((columns.data, feature))], np.inf)
    place = np.ceil(np.asarray(shares)[:, None] * lengths).astype(np.int64) - 1
    quantiles: Floats = np.where(lengths > 0, ordered[columns.indptr[:-1] + place.clip(0)], np.inf)
    return quantiles


def spread_positions(
    split: SplitObservation, usable: Bools, median: Floats, top: Floats, count: int, rng: np.random.Generator
) -> Integers:
    """Positions of every feature: half from its strongest, half spread evenly over what is above its median.

    Half of the places are drawn among activations of at least ``top``, the others uniformly among those of at least
    ``median``, which is uniform over the upper quantiles. Where there are too few strong ones the others take their
    places. No document gives two positions.

    Args:
        split: Latents and documents of the positions.
        usable: ``[P]``, the positions that may be chosen.
        median: ``[d_sae]`` activations, from another split, or the choice would depend on what is measured.
        top: ``[d_sae]``, likewise.
        count: Most positions of a feature.
        rng: Source of the draws.

    Returns:
        ``[d_sae, count]``; -1 where a feature fires in too few documents.
    """
    latents = split.latents
    position = np.repeat(np.arange(latents.shape[0]), np.diff(latents.indptr))
    feature, value = latents.indices, latents.data
    eligible = usable[position] & (value >= median[feature])
    position, feature, value = position[eligible], feature[eligible], value[eligible]
    document = split.documents[position]
    priority = rng.random(len(position))
    chosen = np.full((latents.shape[1], 2 * count), -1, dtype=np.int64)

    strong = np.flatnonzero(value >= top[feature])
    picked, rank = _pick(feature[strong], document[strong], priority[strong], count // 2)
    picked = strong[picked]
    chosen[feature[picked], rank] = position[picked]
    in_document = feature.astype(np.int64) * (int(document.max(initial=0)) + 1) + document
    rest = np.flatnonzero(~np.isin(in_document, in_document[picked]))
    picked, rank = _pick(feature[rest], document[rest], priority[rest], count)
    picked = rest[picked]
    chosen[feature[picked], count + rank] = position[picked]
    used_first = np.argsort(chosen < 0, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(chosen, used_first, axis=1)


@dataclass(frozen=True)
class Kinds:
    """Positions by a key, for many draws of `matched_positions`.

    Args:
        kind: Number of each position's key ``[P]``; 16 bits wide where they suffice, for these are sorted by radix.
        size: Positions of each kind.
    """

    kind: Integers
    size: Integers

    @classmethod
    def of(cls, keys: Integers) -> Kinds:
        """Those of keys ``[P]``."""
        kinds, kind = np.unique(keys, return_inverse=True)
        narrow = len(kinds) <= np.iinfo(np.uint16).max
        return cls(kind.astype(np.uint16) if narrow else kind, np.bincount(kind))


def matched_positions(members: Integers, kinds: Kinds, rng: np.random.Generator) -> Integers:
    """One random set for each feature with the same keys (tokens, or columns) at other positions.

    Positions with the same key stand on a ring in random order; all members of a feature with that key move on by one
    random number of places. So they stay distinct and none stays where it is, unless its key occurs nowhere else.

    Args:
        members: ``[F, n]`` positions, -1 for unused places.
        kinds: Of the keys that must be equal.
        rng: Source of the draw.

    Returns:
        ``[F, n]``, -1 where ``members`` is.
    """
    kind, size = kinds.kind, kinds.size
    start = np.cumsum(size) - size
    shuffled = rng.permutation(len(kind))
    ring = shuffled[np.argsort(kind[shuffled], kind="stable")]
    place = np.empty(len(kind), dtype=np.int64)
    place[ring] = np.arange(len(kind)) - start[kind[ring]]
    mine = kind[members]
    # one number for each feature and key: a random multiplier of the feature hashes the key
    multiplier = rng.integers(1, 2**31, size=(len(members), 1)) * 2 + 1
    hashed = (multiplier * (rng.permutation(len(size))[mine] + 1)) % (2**31 - 1)
    step = 1 + (hashed / (2**31 - 1) * (size[mine] - 1)).astype(np.int64)
    drawn = ring[start[mine] + (place[members] + step) % size[mine]]
    return np.where(members >= 0, drawn, -1)


def _pick(feature: Integers, document: Integers, priority: Floats, count: int) -> tuple[Integers, Integers]:
    """Entries of highest priority, one for a feature and document and ``count`` for a feature; and their ranks."""
    order = np.lexsort((-priority, document, feature))
    best = np.ones(len(order), dtype=bool)
    best[1:] = (np.diff(feature[order]) != 0) | (np.diff(document[order]) != 0)
    order = order[best]
    order = order[np.lexsort((-priority[order], feature[order]))]
    index = np.arange(len(order))
    new = np.ones(len(order), dtype=bool)
    new[1:] = np.diff(feature[order]) != 0
    rank = index - np.maximum.accumulate(np.where(new, index, 0))
    return order[rank < count], rank[rank < count]
