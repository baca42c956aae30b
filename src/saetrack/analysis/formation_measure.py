"""How alike the positions of every feature are at one LLM checkpoint, beside three kinds of random sets.

Memory kept between checkpoints, for F features and false ones, B draws, R replicates, T checkpoints, n positions:
``2 * 4 F B n`` bytes of matched sets, ``3 * 4 F B`` of their maxima and ``4 T F R`` of replicates. At the defaults
2,048 features over 8 checkpoints take 280 MB; lower ``draws`` and ``replicates`` for a wide SAE.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .coherence import dirichlet_progress, matched_means, mean_cosine, mean_cosine_by_size, unit_vectors
from .formation_sets import BASELINES, FormationSets
from .significance import MaxT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]

_NULL_BAND = (0.025, 0.975)


@dataclass(frozen=True)
class Measured:
    """One LLM checkpoint. Everything is ``[F]`` but the replicates.

    Args:
        similarity: ``Sbar(P_i)``, mean pairwise cosine of the centred activations.
        baseline: Baseline to the mean of its random sets.
        null_low: Baseline to the 2.5 % quantile of its random sets less their mean.
        null_high: The 97.5 % quantile.
        z: Baseline to ``(similarity - mean_b) / sd_b``.
        replicates: ``[F, R]``, Dirichlet replicates of the progress against the baseline that counts.
    """

    similarity: Floats
    baseline: dict[str, Floats]
    null_low: dict[str, Floats]
    null_high: dict[str, Floats]
    z: dict[str, Floats]
    replicates: Floats

    def progress(self, baseline: str) -> Floats:
        """``M_i = Sbar(P_i) - mean_b Sbar(R_b)``, ``[F]``."""
        return self.similarity - self.baseline[baseline]


class FormationMeter:
    """Measures one LLM checkpoint after the other on the same positions, random sets and documents' weights.

    Args:
        sets: The positions.
        baseline: The baseline that counts for times and status.
        replicates: Number of Dirichlet replicates.
        seed: Of the documents' weights.
    """

    def __init__(self, sets: FormationSets, baseline: str, replicates: int, seed: int) -> None:
        self.sets = sets
        self.baseline = baseline
        draws = (len(sets.features), len(sets.random))
        self.max_t = {name: MaxT(draws) for name in BASELINES}
        documents = int(sets.documents.max(initial=-1)) + 1
        weights = np.random.default_rng([seed, 2]).exponential(size=(replicates, documents))
        self._weights = np.vstack([np.ones(documents), weights])

    def measure(self, activations: Floats, centre: Floats) -> Measured:
        """Measure one LLM checkpoint.

        Args:
            activations: ``[P, d_in]`` on the evaluation rows.
            centre: ``[d_in]``, their mean over all positions: without it their cosine is mostly that of the mean.
        """
        sets = self.sets
        units = unit_vectors(activations, centre)
        similarity = mean_cosine(units, sets.members)
        means, lows, highs, z = {}, {}, {}, {}
        for name in BASELINES:
            if name == "uniform":
                drawn = mean_cosine_by_size(units, sets.random, sets.sizes)
            else:
                drawn = mean_cosine(units, sets.matched[name])
            means[name] = drawn.mean(axis=1)
            lows[name], highs[name] = np.quantile(drawn, _NULL_BAND, axis=1) - means[name]
            z[name] = self.max_t[name].add(similarity, drawn)
        progress = similarity - means[self.baseline]
        expected = matched_means(units, sets.keys[self.baseline])
        replicates = dirichlet_progress(units, expected, sets.members, self._weights, sets.documents)
        # the first has equal weights: it is the estimate, but for pairs that a random set cannot hold twice
        replicates = replicates[:, 1:] + (progress[:, None] - replicates[:, :1])
        return Measured(similarity, means, lows, highs, z, replicates.astype(np.float32))
