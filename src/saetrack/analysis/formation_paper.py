"""The progress measure as the paper takes it, and the same corrected, on the paper's positions.

SAE-Track (arXiv 2412.17626, Sec. 4) takes the positions at which the last SAE's latent is largest, ``Sbar`` of raw
activations or of whole latent vectors there, and subtracts ``Sbar`` of uniform random positions. Those positions are
chosen on the outcome and the feature's own latent alone makes them alike: with independent sparse codes (2,048 latents,
30 active) it gives 0.165 by cosine, and 0 without it. Beside each measure stands one without that fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .columns import top_positions
from .formation_sets import random_sets
from .resampling import dirichlet_pair_weights, population_table
from .similarity import SPARSE_MEASURES, cosine_matrices, mean_similarity, own_values, pair_weights, sparse_pair_sums

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .base import SplitObservation

    Bools = NDArray[np.bool_]
    Floats = NDArray[np.floating]
    Integers = NDArray[np.integer]

ACTIVATION_MEASURES = ("activation_cosine", "activation_cosine_centred")
FEATURE_MEASURES = tuple(f"feature_{name}" for name in SPARSE_MEASURES)
WITHOUT_OWN = tuple(f"{name}_without_own" for name in FEATURE_MEASURES)
MEASURES = ACTIVATION_MEASURES + FEATURE_MEASURES + WITHOUT_OWN

NULL_BAND = (0.025, 0.975)
N_POSITIONS, MIN_POSITIONS = 25, 10  # the paper's number; fewer than ten say nothing
RANDOM_SETS, REPLICATES = 50, 200
# features whose pairs are held at once
_BLOCK = 256


@dataclass(frozen=True)
class PaperSets:
    """Which positions belong to which feature, the same at every LLM checkpoint.

    Args:
        features: ``[F]``, index of each feature that is computed.
        members: ``[F, n]`` positions, strongest first, -1 in places that are not used.
        sizes: ``[F]``, places in use.
        random: ``[B, n]`` positions of the random sets.
        pair_replicates: Size to ``[R, n * n]`` weights of the Dirichlet bootstrap.
    """

    features: Integers
    members: Integers
    sizes: Integers
    random: Integers
    pair_replicates: dict[int, Floats]

    @classmethod
    def choose(cls, split: SplitObservation, seed: int) -> PaperSets:
        """The strongest positions of the last snapshot, at most one of a document, and random sets.

        Args:
            split: The last snapshot. The paper chooses and measures on the same text, and so does this.
            seed: Of the random sets and of the bootstrap weights.
        """
        rng = np.random.default_rng([seed, 3])
        members, _ = top_positions(split.latents, split.documents, N_POSITIONS)
        random = random_sets(split.documents, N_POSITIONS, RANDOM_SETS, rng)
        sizes = (members >= 0).sum(axis=1)
        features = np.flatnonzero(sizes >= MIN_POSITIONS)
        weights = {
            int(n): dirichlet_pair_weights(int(n), N_POSITIONS, REPLICATES, rng) for n in np.unique(sizes[features])
        }
        return cls(features, members[features], sizes[features], random, weights)


@dataclass(frozen=True)
class Progress:
    """One measure of all features at one LLM checkpoint.

    Args:
        value: ``[F]``, ``M_i = Sbar(P_i) - mean_b Sbar(R_b)``.
        error: ``[F]``, standard error of ``Sbar(P_i)`` from the Dirichlet bootstrap over positions.
        null_low: ``[F]``, 2.5 % quantile of ``Sbar(R_b) - mean_b`` at the feature's own set size.
        null_high: ``[F]``, 97.5 % quantile.
    """

    value: Floats
    error: Floats
    null_low: Floats
    null_high: Floats

    def of(self, use: Bools) -> Progress:
        """That of some features."""
        return Progress(self.value[use], self.error[use], self.null_low[use], self.null_high[use])


def measure_paper(split: SplitObservation, sets: PaperSets) -> dict[str, Progress]:
    """All progress measures at one LLM checkpoint.

    Args:
        split: Activations and latents at all positions.
        sets: The positions of each feature and of the random sets.

    Returns:
        Measure to its values, with the keys of `MEASURES`.
    """
    n_features = len(sets.features)
    similarity = {name: np.zeros(n_features) for name in MEASURES}
    error = {name: np.zeros(n_features) for name in MEASURES}
    mean = split.activations.mean(axis=0, dtype=np.float64).astype(np.float32)
    for start in range(0, n_features, _BLOCK):
        block = slice(start, start + _BLOCK)
        for name, matrices in _matrices(split, mean, sets.members[block], sets.features[block]):
            similarity[name][block] = mean_similarity(matrices, sets.sizes[block])
            error[name][block] = _standard_errors(matrices, sets.sizes[block], sets.pair_replicates)
    results = {}
    for name, baseline in _baselines(split, mean, sets).items():
        centre = baseline.mean(axis=1)
        low, high = np.quantile(baseline, NULL_BAND, axis=1) - centre
        # kept for every checkpoint until the end, so in half the memory
        kept = [a.astype(np.float32) for a in (similarity[name] - centre, error[name], low, high)]
        results[name] = Progress(*kept)
    return results


def _matrices(
    split: SplitObservation, mean: Floats, members: Integers, features: Integers | None
) -> Iterator[tuple[str, Floats]]:
    """Similarity matrices of every measure; without ``features`` those that leave out an own coordinate are not made.

    Unused places hold zeros in the feature-space matrices but not in the others: `mean_similarity` masks them.
    """
    vectors = split.activations[members]
    yield ACTIVATION_MEASURES[0], cosine_matrices(vectors)
    yield ACTIVATION_MEASURES[1], cosine_matrices(vectors - mean)
    sums = sparse_pair_sums(split.latents, members)
    for name, matrices in sums.similarities().items():
        yield f"feature_{name}", matrices
    if features is not None:
        own = own_values(split.latents, members, features)
        for name, matrices in sums.without_coordinate(own).similarities().items():
            yield f"feature_{name}_without_own", matrices


def _standard_errors(matrices: Floats, sizes: Integers, pair_replicates: dict[int, Floats]) -> Floats:
    errors = np.zeros(len(sizes))
    flat = matrices.reshape(len(sizes), -1)
    for size in np.unique(sizes):
        which = sizes == size
        weights = pair_replicates[int(size)].astype(flat.dtype, copy=False)
        errors[which] = (flat[which] @ weights.T).std(axis=1, ddof=1)
    return errors


def _baselines(split: SplitObservation, mean: Floats, sets: PaperSets) -> dict[str, Floats]:
    """Random sets for every measure, ``[F, B]`` at each feature's own set size."""
    n = sets.members.shape[1]
    sizes, which_size = np.unique(sets.sizes, return_inverse=True)
    weights = pair_weights(sizes, n).reshape(-1, n * n)
    found: dict[str, Floats] = {}
    for name, matrices in _matrices(split, mean, sets.random, features=None):
        by_size = weights @ matrices.reshape(len(matrices), -1).T  # [sizes, B]
        found[name] = by_size[which_size]
    without_own = _baselines_without_own(split, sets, {name: found[name] for name in FEATURE_MEASURES})
    return found | {f"{name}_without_own": values for name, values in without_own.items()}


def _baselines_without_own(split: SplitObservation, sets: PaperSets, with_own: dict[str, Floats]) -> dict[str, Floats]:
    """The random sets as each feature sees them with its own coordinate left out.

    A latent that fires on a third of all tokens makes random positions similar too, so leaving it out of the
    feature's set alone would lower ``M_i`` below zero. Only latents that fire in a random set change its value.
    """
    baselines = {name: values.copy() for name, values in with_own.items()}
    place = np.full(split.latents.shape[1], -1)
    place[sets.features] = np.arange(len(sets.features))
    for b, members in enumerate(sets.random):
        rows = split.latents[members].tocsc()
        active = np.flatnonzero((np.diff(rows.indptr) > 0) & (place >= 0))
        if not len(active):
            continue
        sums = sparse_pair_sums(split.latents, members[None])
        for start in range(0, len(active), _BLOCK):
            latents = active[start : start + _BLOCK]
            own = rows[:, latents].toarray().T.astype(np.float64)  # [latents, n]
            where = place[latents]
            for name, matrices in sums.without_coordinate(own).similarities().items():
                baselines[f"feature_{name}"][where, b] = mean_similarity(matrices, sets.sizes[where])
    return baselines


def paper_tables(
    sets: PaperSets, by_step: dict[int, dict[str, Progress]], rng: np.random.Generator, counts: Bools | None = None
) -> dict[str, pd.DataFrame]:
    """Tables ``paper``, by feature and step, and ``paper_population``, their mean with interval and null by step.

    Args:
        sets: The positions.
        by_step: LLM step to its measures.
        rng: Source of the bootstrap over features.
        counts: ``[d_sae]``, the features that are asked for; all, if not given.
    """
    steps = sorted(by_step)
    use = np.ones(len(sets.features), dtype=bool) if counts is None else counts[sets.features]
    columns: dict[str, Any] = {
        "feature": np.tile(sets.features[use], len(steps)),
        "step": np.repeat(steps, use.sum()),
    }
    rows = []
    for name in MEASURES:
        found = [by_step[step][name].of(use) for step in steps]
        values = np.stack([p.value for p in found])
        columns[name] = values.ravel()
        columns[f"{name}_se"] = np.concatenate([p.error for p in found])
        table = population_table(steps, values, rng, REPLICATES)
        table["null_low"] = [p.null_low.mean() if p.null_low.size else np.nan for p in found]
        table["null_high"] = [p.null_high.mean() if p.null_high.size else np.nan for p in found]
        rows.append(table.assign(measure=name))
    return {"paper": pd.DataFrame(columns), "paper_population": pd.concat(rows, ignore_index=True)}
