"""Causal: what the LLM's loss does when a feature is ablated, against another direction of the same size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from .base import AnalysisResult, Observation, Probe, SweepAnalysis
from .causal_figures import CAPTIONS, effects_figure, features_figure
from .causal_measure import MEASURES, Ablations, Targets, ablate, documents_with_firing, sample_by_frequency
from .causal_tables import LEVEL, QUANTITIES, causal_population, causal_summary, effect_table, estimate, feature_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from saetrack.track import Snapshot, Track

    from .base import SplitObservation

    Floats = NDArray[np.floating]
    Integers = NDArray[np.integer]
    Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class _Seen:
    step: int
    frequency: Floats  # [F], on the evaluation rows
    ablations: Ablations


class Causal(SweepAnalysis):
    """What the LLM does without a feature: mean-ablated at each checkpoint, against another direction of the same size.

    In evaluation rows in which feature i fires, the activation x at every position but BOS becomes
    ``x - (z_i - m_i) d_i``: z_i is the latent there, m_i its mean over the selection rows of that checkpoint, d_i the
    decoder row. The reconstruction error and all other features stay. Rows in which the feature never fires are not
    run: mean ablation moves all their positions by the same ``m_i d_i``, which takes nothing out that the feature said.

    Two measures, summed over the row and divided by the number of firings, in nats for each time the feature fires:
    ``loss``, the rise of the cross entropy of the text (below 0: the LLM did better without it), and ``divergence``,
    the Kullback-Leibler divergence of the predictions from the LLM's own. The second is never below 0, and is what the
    first would be on average if the LLM's probabilities were right; as it does not hang on which token came next, it
    is many times as precise.

    The null is the same ablation with d_i exchanged for the decoder row of another feature that lives at that
    checkpoint, at d_i's length, drawn anew for every row; the excess is effect minus null on the same rows. Intervals
    are from a Dirichlet bootstrap over documents, with the same weights at every checkpoint and for every feature. The
    test of the excess flips the sign of documents' differences, the same flips everywhere: maxT over checkpoints,
    Benjamini-Hochberg over the features drawn and apart from them over those named, for each measure. It says that the
    feature's direction does more than such directions do on average.

    Cost, in rows run through the LLM at each checkpoint: at most 3 for each feature and row, ``rows`` of them for each
    feature. Memory: ``4 * rows_per_forward * context * vocabulary`` floats.

    Args:
        sample: Features drawn, one from each of so many strata of firing frequency, from those that fire in at least
            ``min_documents`` documents of the selection rows at the last checkpoint. 0 for named ones only.
        features: Features taken beside the sample, by index; they are not in the curves of the population.
        rows: Rows that each feature is ablated in, at most, from as many documents as possible.
        min_documents: Fewer documents with a firing in those rows, and there is no estimate.
        text_rows: Token rows of each split that are looked at; all there are, if fewer.
        rows_per_forward: Rows in one forward.
        replicates: Bootstrap replicates, and sign flips.
        seed: Seed of every draw.

    Raises:
        ValueError: If an argument is out of range, or ``features`` names one that the track does not have.
    """

    restrictable: ClassVar[bool] = True

    def __init__(
        self,
        sample: int = 24,
        features: list[int] | None = None,
        rows: int = 8,
        min_documents: int = 5,
        text_rows: int = 128,
        rows_per_forward: int = 16,
        replicates: int = 999,
        seed: int = 0,
    ) -> None:
        given = {"sample": sample, "rows": rows, "min_documents": min_documents, "text_rows": text_rows}
        given |= {"rows_per_forward": rows_per_forward, "replicates": replicates}
        least = {"sample": 0, "min_documents": 2, "replicates": 99}
        for name, value in given.items():
            if value < least.get(name, 1):
                raise ValueError(f"causal's {name} is {value}; expected {least.get(name, 1)} or more.")
        if rows < min_documents:
            raise ValueError(
                f"causal's rows is {rows}, less than its min_documents, {min_documents}: no feature could be estimated."
            )
        if not sample and not features:
            raise ValueError("causal's sample is 0 and its features names none; give one of them.")
        self.settings: dict[str, Any] = {**given, "features": sorted(set(features or ())), "seed": seed}

    def begin(self, track: Track) -> Probe:
        """Forget what was seen, and ask for rows of both splits and for the LLM."""
        track.indices(self.settings["features"])
        self._seen: list[_Seen] = []
        self._features: Integers | None = None
        self._eligible = 0
        return Probe(self.settings["text_rows"], self.settings["text_rows"], llm=True)

    def observe(self, snapshot: Snapshot, observation: Observation) -> None:
        """Ablate at one checkpoint; at the first that is shown, the last of training, choose the features."""
        selection, evaluation, llm = observation.selection, observation.evaluation, observation.llm
        assert selection is not None  # begin asked for all three; the type checker cannot know
        assert evaluation is not None
        assert llm is not None
        frequency = _frequency(selection)
        if self._features is None:
            enough = np.flatnonzero(documents_with_firing(selection) >= self.settings["min_documents"])
            rng = np.random.default_rng(self.settings["seed"])
            drawn = sample_by_frequency(frequency, enough, self.settings["sample"], rng)
            named = np.setdiff1d(np.array(self.settings["features"], dtype=np.int64), drawn)
            self._features, self._eligible = np.concatenate([drawn, named]), len(enough)
            self._sampled = np.arange(len(self._features)) < len(drawn)
        others = np.flatnonzero(frequency)
        if len(others) < 2:
            raise ValueError(f"{len(others)} features of {snapshot.path} fire; a null direction needs another one.")
        sums = np.asarray(selection.latents[:, self._features].sum(axis=0), dtype=np.float64)
        means = sums / len(selection.positions)
        targets = Targets(self._features, means, snapshot.tensor("W_dec").float(), others)
        ablations = ablate(
            llm,
            evaluation,
            targets,
            self.settings["rows"],
            seed=self.settings["seed"],
            rows_per_forward=self.settings["rows_per_forward"],
        )
        self._seen.append(_Seen(snapshot.step, _frequency(evaluation)[self._features], ablations))

    def finish(self) -> AnalysisResult:
        """Tables of effects by feature and checkpoint, of tests by feature, of the population, and two figures."""
        if not self._seen or self._features is None:
            raise RuntimeError("Causal.finish was called before observe: nothing was seen yet.")
        seen = sorted(self._seen, key=lambda s: s.step)
        steps = [s.step for s in seen]
        frequency = np.stack([s.frequency for s in seen])
        replicates, seed = self.settings["replicates"], self.settings["seed"]
        ablations, min_documents = [s.ablations for s in seen], self.settings["min_documents"]
        effects, features, populations = [], [], []
        for measure in MEASURES:
            estimates = estimate(ablations, measure, min_documents, replicates, seed, self._sampled)
            table = effect_table(steps, self._features, self._sampled, frequency, estimates)
            effects.append(table.assign(measure=measure))
            features.append(feature_table(self._features, self._sampled, estimates).assign(measure=measure))
            table = causal_population(steps, estimates, self._counted(), replicates, seed)
            populations.append(table.assign(measure=measure))
        causal, population = pd.concat(effects, ignore_index=True), pd.concat(populations, ignore_index=True)
        return AnalysisResult(
            tables={
                "causal": causal,
                "features": pd.concat(features, ignore_index=True),
                "population": population,
            },
            figures={"effects": effects_figure(population, steps), "features": features_figure(causal, steps)},
            scalars={
                f"{measure}_{quantity}": _by_step(population, measure, quantity)
                for measure in MEASURES
                for quantity in (*QUANTITIES, "significant")
            },
            settings={
                **self.settings,
                "drawn": self._features[self._sampled],
                "eligible": self._eligible,
                "inclusion_probability": self._sampled.sum() / self._eligible if self._eligible else None,
                "split": "evaluation; means and choice on selection",
                "null": "decoder row of another living feature, a new one for every row, at the feature's length",
                "unit": "nats for each firing",
                "level": LEVEL,
            },
            summary=causal_summary(population),
            captions=CAPTIONS,
        )

    def _counted(self) -> Bools:
        """Which are in the means ``[T, F]``: those sampled, and if restricted only while they keep their identity."""
        assert self._features is not None
        counted = np.broadcast_to(self._sampled, (len(self._seen), len(self._sampled)))
        return counted if self.kept is None else counted & self.kept.to_last[:, self._features]


def _frequency(split: SplitObservation) -> Floats:
    """Share of the positions at which each feature fires, ``[d_sae]``."""
    counts: Integers = np.bincount(split.latents.indices, minlength=split.latents.shape[1])
    frequency: Floats = counts / len(split.positions)
    return frequency


def _by_step(population: pd.DataFrame, measure: str, quantity: str) -> dict[int, float]:
    rows = population[(population["measure"] == measure) & (population["quantity"] == quantity)]
    rows = rows[rows["mean"].notna()]
    return {int(step): float(mean) for step, mean in zip(rows["step"], rows["mean"], strict=True)}
