"""Matching by what latents do: which latent of one SAE goes with which of another, by their correlation on one text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse
import torch

from saetrack.lm.outliers import spread, take, within

from .controls import scratch_controls
from .matching import LatentCorrelation, match
from .resampling import bootstrap_mean_of_rows, share_of, with_interval

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from saetrack.track import Snapshot, Track

    from .base import SplitObservation

    Floats = NDArray[np.floating]

SHARED = 0.7
"""Correlation from which on two matched latents count as one feature, as for the cosines of dictionaries."""


@dataclass(frozen=True)
class Matched:
    """The latents of two SAEs, matched one to one.

    Args:
        similarity: Correlation of each pair at the index of its latent in the first SAE, ``[d_sae]``; NaN elsewhere.
        kept_index: Pairs of equal index.
        null: Mean correlation after the positions of one side have been permuted.
    """

    similarity: Floats
    kept_index: int
    null: float


def match_latents(
    a: scipy.sparse.csr_array, b: scipy.sparse.csr_array, least: float, rng: np.random.Generator
) -> Matched:
    """Match the live latents of two SAEs one to one, so that the sum of their correlations is largest.

    Args:
        a: Latents ``[P, m]``.
        b: Latents ``[P, n]`` at the same positions.
        least: Share of positions that a live latent fires on more often.
        rng: Of the null's permutation.

    Returns:
        The pairs, none where a side has no live latent, and their null, for any two matchings find some correlation.
    """
    similarity = np.full(a.shape[1], np.nan)
    live = [np.flatnonzero(np.bincount(x.indices, minlength=x.shape[1]) > least * x.shape[0]) for x in (a, b)]
    if not all(map(len, live)):
        return Matched(similarity, 0, np.nan)
    left, right = (scipy.sparse.csr_array(x.tocsc()[:, use]) for x, use in zip((a, b), live, strict=True))
    found = match(LatentCorrelation(left, right))
    chance = match(LatentCorrelation(left, right[rng.permutation(right.shape[0])]))
    same = int((live[0][found.left] == live[1][found.right]).sum())
    similarity[live[0][found.left]] = found.similarity
    return Matched(similarity, same, float(chance.similarity.mean()))


def matching_row(comparison: str, found: Sequence[Matched], seed: int, replicates: int) -> dict[str, Any]:
    """A row of the table ``matching``: means over pairs of SAEs, with 95 % intervals over the matched latents.

    ``matched`` is the mean correlation and its interval a bootstrap of the latents of the first SAE, the same in all
    pairs; the matching is not made anew, and other SAEs would add to it. Shares have Wilson's interval, for as many
    latents as one pair of SAEs has: ``shared_share``, of pairs of at least 0.7, and between neighbours ``kept_index``.

    Args:
        comparison: Which SAEs.
        found: From `match_latents`.
        seed: Of the bootstrap.
        replicates: Bootstrap replicates.
    """
    similarity = np.stack([pair.similarity for pair in found])
    count = float(np.isfinite(similarity).sum(axis=1).mean())
    row: dict[str, Any] = {"comparison": comparison, "pairs": len(found), "features": count}
    matched = bootstrap_mean_of_rows(similarity, np.random.default_rng([seed, 2]), replicates)
    row |= with_interval("matched", matched) | {"null": float(np.mean([pair.null for pair in found]))}
    shared = float((similarity >= SHARED).sum(axis=1).mean())
    row |= with_interval("shared_share", share_of(shared, count))
    # of independent SAEs indices say nothing
    same = float(np.mean([pair.kept_index for pair in found])) if comparison == "previous" else np.nan
    return row | with_interval("kept_index", share_of(same, count))


def match_with_scratch(
    track: Track, snapshot: Snapshot, split: SplitObservation, least: float, rng: np.random.Generator
) -> dict[str, list[Matched]]:
    """Latents of a snapshot matched with those of SAEs from scratch on its LLM checkpoint, and those with each other.

    Returns:
        Those of each kind of pair: ``scratch-next`` or ``scratch-first``, by the budget of the fresh SAEs, and
        ``seeds-...``, those with each other: the ceiling.
    """
    matched = {}
    for budget, controls in scratch_controls(track).items():
        found = [latents_of(c.at(snapshot.step), split) for c in controls if snapshot.step in c.steps]
        pairs = {f"scratch-{budget}": [(split.latents, x) for x in found], f"seeds-{budget}": [*combinations(found, 2)]}
        for name, of in pairs.items():
            if of:
                matched[name] = [match_latents(*pair, least, rng) for pair in of]
    return matched


def latents_of(snapshot: Snapshot, split: SplitObservation) -> scipy.sparse.csr_array:
    """Latents of another SAE on the activations of a split."""
    x = torch.from_numpy(split.activations)
    mask = within(x, snapshot.norm_limit)
    with torch.inference_mode():
        return spread(snapshot.sae().encode_sparse(take(x, mask)), mask)
