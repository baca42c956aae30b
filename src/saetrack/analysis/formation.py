"""Formation: when the positions of a feature become alike, in the LLM and in the SAE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .base import AnalysisResult, Observation, Probe, SweepAnalysis
from .formation_figures import formed_figure, map_figure, progress_figure
from .formation_progress import MEASURES, Progress, Sets, measure_progress
from .formation_sets import random_sets, top_positions
from .resampling import bootstrap_means
from .similarity import own_values

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from saetrack.track import Snapshot, Track

    from .base import SplitObservation

    Floats = NDArray[np.floating]

RULE = (
    "A feature is formed at the first checkpoint where its progress is above the 97.5 % quantile of the random sets "
    "and at least half of its final value, there and at the next checkpoint, provided that its final value is above "
    "that quantile too. At the last checkpoint there is no next one and the first two conditions are enough."
)
POSITIONS = (
    "Strongest positions of the last snapshot on the selection rows, without BOS. They are chosen on the outcome: "
    "the last point of a feature-space curve is in-sample, and its own latent alone makes its positions alike."
)


class Formation(SweepAnalysis):
    """When each feature forms: how alike its positions are at every LLM checkpoint, against random positions.

    The positions ``P_i`` of feature i are those where it is most active in the last snapshot. At checkpoint t its
    progress is ``M_i(t) = Sbar(P_i) - mean_b Sbar(R_b)``, where ``Sbar`` is the mean similarity over pairs and the
    ``R_b`` are random sets of as many positions, the same at every checkpoint (SAE-Track, arXiv 2412.17626, Sec. 4).
    Vectors are the LLM's activations, raw (the paper's measure, which a large common mean dominates) and centred by
    their mean over the selection rows (cosine), and the SAE's latents (cosine, Jaccard, weighted Jaccard), each
    with and without the feature's own latent. All features with enough positions are computed.

    With completely independent sparse codes (2,048 latents, 30 active) the feature's own latent alone gives
    M = 0.165 by cosine; without it M is 0. Read the curves ``without_own`` in feature space.

    Per feature and checkpoint the standard error comes from a Dirichlet bootstrap over the positions, with the same
    weights at every checkpoint. It treats positions as independent and leaves out the error of the random mean,
    which all features share. The mean over features carries a bootstrap over features.

    Args:
        selection_rows: Token rows of the selection split to look for positions in. Corpora of long documents need
            many, or ``per_document`` above 1: packed rows hold few documents each.
        n_positions: Most positions of a feature.
        n_min: Features with fewer positions are listed as ``insufficient`` and not computed.
        per_document: Most positions of a feature in one document. Above 1 the standard errors are too small.
        random_sets: Number of random sets.
        replicates: Bootstrap replicates.
        criterion: The measure that ``formed_step`` and the scalar ``share_formed`` are taken from.
        seed: Seed of the random sets and of the bootstraps.

    Raises:
        ValueError: If a number is out of range or ``criterion`` is no measure.
    """

    def __init__(
        self,
        selection_rows: int = 1024,
        n_positions: int = 25,
        n_min: int = 10,
        per_document: int = 1,
        random_sets: int = 50,
        replicates: int = 200,
        criterion: str = "activation_cosine_centred",
        seed: int = 0,
    ) -> None:
        if not 2 <= n_min <= n_positions:
            raise ValueError(
                f"formation needs 2 <= n_min <= n_positions, but n_min is {n_min} and n_positions is {n_positions}."
            )
        least = {"selection_rows": 1, "per_document": 1, "random_sets": 2, "replicates": 2}
        given = {
            "selection_rows": selection_rows,
            "per_document": per_document,
            "random_sets": random_sets,
            "replicates": replicates,
        }
        for name, value in given.items():
            if value < least[name]:
                raise ValueError(f"formation's {name} is {value}; it must be at least {least[name]}.")
        if criterion not in MEASURES:
            raise ValueError(f"formation's criterion {criterion!r} is no measure; choose one of {', '.join(MEASURES)}.")
        self.settings: dict[str, Any] = {
            **given,
            "n_positions": n_positions,
            "n_min": n_min,
            "criterion": criterion,
            "seed": seed,
        }
        self._last_step: int | None = None
        self._progress: dict[int, dict[str, Progress]] = {}

    def begin(self, track: Track) -> Probe:
        """Forget any earlier sweep and ask for the selection rows."""
        self._last_step = track.steps[-1]
        self._progress = {}
        return Probe(selection_rows=self.settings["selection_rows"])

    def observe(self, snapshot: Snapshot, observation: Observation) -> None:
        """Choose the positions on the last snapshot, which comes first; measure at every one.

        Raises:
            RuntimeError: If another snapshot comes first.
        """
        split = observation.selection
        if split is None or (not self._progress and snapshot.step != self._last_step):
            raise RuntimeError(
                f"Formation chooses its positions on the selection rows of the last snapshot (LLM step "
                f"{self._last_step}), which the sweep must show first; it showed LLM step {snapshot.step}."
            )
        if not self._progress:
            self._choose(split)
        self._progress[snapshot.step] = measure_progress(split, self._sets)

    def _choose(self, split: SplitObservation) -> None:
        settings = self.settings
        rng = np.random.default_rng(settings["seed"])
        documents, per_document = split.documents, settings["per_document"]
        members = top_positions(split.latents, documents, settings["n_positions"], per_document)
        random = random_sets(documents, settings["n_positions"], settings["random_sets"], rng, per_document)
        sizes = (members >= 0).sum(axis=1)
        computed = np.flatnonzero(sizes >= settings["n_min"])
        self._sizes = sizes
        self._sets = Sets.build(computed, members[computed], random, settings["replicates"], rng)
        self._positions = _position_tables(split, self._sets)
        self._selection = {
            "rows": len(split.rows.tokens),
            "positions": len(split.positions),
            "documents": len(np.unique(documents)),
        }

    def finish(self) -> AnalysisResult:
        """Put the checkpoints in order, and say which features have formed when.

        Raises:
            RuntimeError: If nothing was observed.
        """
        if not self._progress:
            raise RuntimeError("Formation has seen no snapshot; call observe for each one before finish.")
        steps = sorted(self._progress)
        by_measure = {name: [self._progress[step][name] for step in steps] for name in MEASURES}
        values = {name: np.stack([p.value for p in found]) for name, found in by_measure.items()}  # [T, F]
        formed = {
            name: _formed_at(values[name], np.stack([p.null_high for p in by_measure[name]])) for name in MEASURES
        }
        rng = np.random.default_rng([self.settings["seed"], 1])
        population = _population(steps, by_measure, values, rng, self.settings["replicates"])
        shares = _shares(steps, by_measure, formed, rng, self.settings["replicates"])
        features = self._feature_table(steps, formed)
        tables = {
            "formation": _long_table(self._sets.features, steps, by_measure),
            "features": features,
            "population": population,
            "formed": shares,
            **self._positions,
        }
        criterion = self.settings["criterion"]
        scalars = {f"progress_{name}": _by_step(population, name, "mean") for name in MEASURES}
        scalars["share_formed"] = _by_step(shares, criterion, "share")
        figures = {}
        if len(self._sets.features):
            figures = {
                "progress": progress_figure(population, steps),
                "formed": formed_figure(shares, steps),
                "map": map_figure(values[criterion], formed[criterion], steps, criterion),
            }
        settings = {**self.settings, "rule": RULE, "positions": POSITIONS, "selection": self._selection}
        return AnalysisResult(tables, figures, scalars, settings, self._summary(features, scalars["share_formed"]))

    def _feature_table(self, steps: list[int], formed: dict[str, NDArray[np.integer]]) -> pd.DataFrame:
        status = np.select(
            [self._sizes == 0, self._sizes < self.settings["n_min"]], ["silent", "insufficient"], "computed"
        )
        table = pd.DataFrame({"feature": np.arange(len(self._sizes)), "n_positions": self._sizes, "status": status})
        at_step = np.append(np.asarray(steps, dtype=np.float64), np.nan)  # -1, never formed, takes the NaN
        columns = {"formed_step": self.settings["criterion"], **{f"formed_step_{name}": name for name in MEASURES}}
        for column, name in columns.items():
            table[column] = np.nan
            table.loc[self._sets.features, column] = at_step[formed[name]]
        return table

    def _summary(self, features: pd.DataFrame, share: dict[int, float]) -> str:
        count = features["status"].value_counts()
        computed, insufficient = int(count.get("computed", 0)), int(count.get("insufficient", 0))
        if not computed:
            return (
                f"No feature fires in {self.settings['n_min']} documents of the selection rows "
                f"({self._selection['documents']} documents), so formation was not computed. "
                "Raise `selection_rows` or `per_document`."
            )
        median = features["formed_step"].median()
        last = max(share)
        return (
            f"{share[last]:.0%} of {computed} features have formed by LLM step {last} "
            f"({self.settings['criterion']}; median step {median:,.0f}); {insufficient} features had too few positions."
        )


def _formed_at(values: Floats, null_high: Floats) -> NDArray[np.integer]:
    """Index of the checkpoint where each series forms by `RULE`, -1 for never. Both ``[T, F]``; gives ``[F]``."""
    above = values > null_high
    reached = above & (values >= 0.5 * values[-1]) & above[-1]
    lasting = reached.copy()
    lasting[:-1] &= reached[1:]
    return np.where(lasting.any(axis=0), lasting.argmax(axis=0), -1)


def _formed_by_chance(random: Floats) -> NDArray[np.integer]:
    """`RULE` applied to random sets ``[T, B]``, each against the mean and the quantile of the others."""
    sets = random.shape[1]
    formed = np.empty(sets, dtype=np.int64)
    for b in range(sets):
        others = np.delete(random, b, axis=1)
        centre = others.mean(axis=1)
        high = np.quantile(others, 0.975, axis=1) - centre
        formed[b] = _formed_at((random[:, b] - centre)[:, None], high[:, None])[0]
    return formed


def _population(
    steps: list[int],
    by_measure: dict[str, list[Progress]],
    values: dict[str, Floats],
    rng: np.random.Generator,
    replicates: int,
) -> pd.DataFrame:
    """Mean over features with its interval, quartiles, and the band of a random set, by step and measure."""
    mean, low, high = bootstrap_means(np.concatenate([values[name] for name in MEASURES]), rng, replicates)
    rows = []
    for m, name in enumerate(MEASURES):
        for t, step in enumerate(steps):
            found, row = by_measure[name][t], m * len(steps) + t
            some = len(found.value) > 0
            quartiles = np.quantile(found.value, [0.25, 0.5, 0.75]) if some else [np.nan] * 3
            rows.append(
                {
                    "step": step,
                    "measure": name,
                    "mean": mean[row],
                    "low": low[row],
                    "high": high[row],
                    "q25": quartiles[0],
                    "median": quartiles[1],
                    "q75": quartiles[2],
                    "null_low": found.null_low.mean() if some else np.nan,
                    "null_high": found.null_high.mean() if some else np.nan,
                    "n_features": len(found.value),
                }
            )
    return pd.DataFrame(rows)


def _shares(
    steps: list[int],
    by_measure: dict[str, list[Progress]],
    formed: dict[str, NDArray[np.integer]],
    rng: np.random.Generator,
    replicates: int,
) -> pd.DataFrame:
    """Share of the features that have formed by each step, and the share of random sets that would count as formed."""
    index = np.arange(len(steps))[:, None]
    tables = []
    for name in MEASURES:
        done = (formed[name] >= 0) & (formed[name] <= index)
        share, low, high = bootstrap_means(done.astype(np.float64), rng, replicates)
        chance = _formed_by_chance(np.stack([p.random for p in by_measure[name]]))
        null = ((chance >= 0) & (chance <= index)).mean(axis=1)
        columns = {"step": steps, "measure": name, "share": share, "low": low, "high": high, "null_share": null}
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def _long_table(features: NDArray[np.integer], steps: list[int], by_measure: dict[str, list[Progress]]) -> pd.DataFrame:
    columns: dict[str, Any] = {"feature": np.tile(features, len(steps)), "step": np.repeat(steps, len(features))}
    for name in MEASURES:
        columns[name] = np.concatenate([p.value for p in by_measure[name]]).astype(np.float32)
        columns[f"{name}_se"] = np.concatenate([p.error for p in by_measure[name]]).astype(np.float32)
    return pd.DataFrame(columns)


def _position_tables(split: SplitObservation, sets: Sets) -> dict[str, pd.DataFrame]:
    """The selection, so that it can be looked up: row and column among the track's selection rows."""
    used = sets.members >= 0
    which, rank = np.nonzero(used)
    chosen = sets.members[used]
    activation = own_values(split.latents, sets.members, sets.features)[used]
    n_sets, n = sets.random.shape
    top = {"feature": sets.features[which], "rank": rank, "activation": activation}
    random = {"set": np.repeat(np.arange(n_sets), n), "rank": np.tile(np.arange(n), n_sets)}
    return {
        "positions": pd.DataFrame({**top, **_places(split, chosen)}),
        "random_positions": pd.DataFrame({**random, **_places(split, sets.random.ravel())}),
    }


def _places(split: SplitObservation, positions: NDArray[np.integer]) -> dict[str, Any]:
    row, column = split.positions[positions].T
    return {"row": row, "column": column, "document": split.documents[positions]}


def _by_step(table: pd.DataFrame, measure: str, column: str) -> dict[int, float]:
    rows = table[table["measure"] == measure]
    return {int(step): float(value) for step, value in zip(rows["step"], rows[column], strict=True)}
