"""Matching by what latents do: which latent of one SAE goes with which of another, by their correlation on one text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse
import torch

from saetrack.lm.outliers import spread, take, within

from .controls import scratch_controls
from .matching import LatentCorrelation, match

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from saetrack.track import Snapshot, Track

    from .base import SplitObservation

    Bools = NDArray[np.bool_]

SHARED = 0.7
"""Correlation from which on two matched latents count as one feature, as for the cosines of dictionaries."""


def match_latents(
    a: scipy.sparse.csr_array, b: scipy.sparse.csr_array, least: float, rng: np.random.Generator
) -> dict[str, Any]:
    """Match the live latents of two SAEs one to one, so that the sum of their correlations is largest.

    Args:
        a: Latents ``[P, m]``.
        b: Latents ``[P, n]`` at the same positions.
        least: Share of positions that a live latent fires on more often.
        rng: Of the null's permutation.

    Returns:
        ``features`` matched; ``matched``, the mean correlation of the pairs; ``null``, the same after the positions of
        one side have been permuted, for any two matchings find some correlation; ``shared_share``, of pairs of at
        least 0.7; ``kept_index``, of pairs of equal index. NaN where a side has no live latent.
    """
    live = [np.flatnonzero(np.bincount(x.indices, minlength=x.shape[1]) > least * x.shape[0]) for x in (a, b)]
    if not all(map(len, live)):
        return {"features": 0, **dict.fromkeys(("matched", "null", "shared_share", "kept_index"), np.nan)}
    left, right = (scipy.sparse.csr_array(x.tocsc()[:, use]) for x, use in zip((a, b), live, strict=True))
    found = match(LatentCorrelation(left, right))
    chance = match(LatentCorrelation(left, right[rng.permutation(right.shape[0])]))
    return {
        "features": len(found.left),
        "matched": float(found.similarity.mean()),
        "null": float(chance.similarity.mean()),
        "shared_share": float((found.similarity >= SHARED).mean()),
        "kept_index": float((live[0][found.left] == live[1][found.right]).mean()),
    }


def match_with_scratch(
    track: Track, snapshot: Snapshot, split: SplitObservation, least: float, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Latents of a snapshot matched with those of SAEs from scratch on its LLM checkpoint, and those with each other.

    Returns:
        A row for each kind of pair, the mean over pairs of what `match_latents` gives: ``scratch-next`` or
        ``scratch-first``, by the budget of the fresh SAEs, and ``seeds-...``, those with each other: the ceiling.
    """
    rows = []
    for budget, controls in scratch_controls(track).items():
        found = [_latents(c.at(snapshot.step), split) for c in controls if snapshot.step in c.steps]
        pairs = {f"scratch-{budget}": [(split.latents, x) for x in found], f"seeds-{budget}": [*combinations(found, 2)]}
        for name, of in pairs.items():
            if of:
                rows.append({"comparison": name, **_mean([match_latents(*pair, least, rng) for pair in of])})
    return rows


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name != "kept_index"}
    return {"pairs": len(rows), **means, "kept_index": np.nan}  # of independent SAEs indices say nothing


def _latents(snapshot: Snapshot, split: SplitObservation) -> scipy.sparse.csr_array:
    """Latents of another SAE on the activations of a split."""
    x = torch.from_numpy(split.activations)
    mask = within(x, snapshot.norm_limit)
    with torch.inference_mode():
        return spread(snapshot.sae().encode_sparse(take(x, mask)), mask)
