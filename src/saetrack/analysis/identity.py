"""Identity: does index i still mean the same thing from snapshot to snapshot?

Memory between checkpoints: the latents of three snapshots (first, last, previous), ``3 * P * L0 * 8`` bytes with P
positions, and ``4 * T * d_sae * 8`` bytes of correlations.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import scipy.sparse

from saetrack.metrics import FunctionalCorrelation

from .base import AnalysisResult, Observation, Probe, SweepAnalysis
from .controls import one_step_controls
from .drift_rows import flags
from .identity_figures import CAPTIONS, correlation_figure, survival_figure
from .identity_matching import match_latents, match_with_scratch
from .identity_stretches import stretch_table
from .lineage import revived_between
from .resampling import bootstrap_means

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from saetrack.track import Snapshot, Track

    Floats = NDArray[np.floating]

CHANCE_QUANTILE = 0.99
NULL_QUANTILE = 0.05
COMPARISONS = ("to_previous", "to_first", "to_last", "other_feature")


class Identity(SweepAnalysis):
    """Does an index keep its meaning? Functional correlation to neighbours and ends, stretches, ceilings.

    Functional correlation is Pearson's over the evaluation positions between latent i of two snapshots, each on its
    own LLM checkpoint. It is given with the previous, the first and the last snapshot, for every feature and as means
    with an interval (bootstrap over features; another text or another seed would add to it). Features count that are
    alive (fire on a larger share than ``min_firing_frequency``) at both ends and were not revived in between. Beside
    it: what a null step and a replica of the stage reach, where the track has such controls, and the correlation of a
    latent with that of another feature.

    A feature kept its identity over a stage when its correlation reached the threshold: the lower 5 % of the null
    steps (of the nearest position that has some) or, if that is more, the 99 % quantile of the correlation with another
    feature, but never above ``threshold``, which is also used without nulls. A stretch is an unbroken run of such
    stages. It compares neighbours only: a feature may change its meaning little by little within a stretch, which
    ``like_first`` in the table ``survival`` shows.

    The table ``matching`` has the latents of neighbouring snapshots matched one to one by their correlation, and those
    of the track with ``scratch`` controls on the same LLM checkpoint, beside those with each other and beside latents
    whose positions were permuted. `Dictionaries` does it by directions.

    Args:
        evaluation_rows: Token rows of the evaluation split; all there are, if fewer.
        threshold: Correlation that is always enough.
        min_firing_frequency: Share of positions that a live feature fires on more often.
        replicates: Bootstrap replicates.
        seed: Of the bootstrap.

    Raises:
        ValueError: If a number is out of range.
    """

    min_snapshots: ClassVar[int] = 2

    def __init__(
        self,
        evaluation_rows: int = 2048,
        threshold: float = 0.5,
        min_firing_frequency: float = 1e-4,
        replicates: int = 500,
        seed: int = 0,
    ) -> None:
        if evaluation_rows < 1 or replicates < 2:
            raise ValueError(
                f"identity needs at least 1 evaluation row and 2 replicates, but evaluation_rows is {evaluation_rows} "
                f"and replicates is {replicates}."
            )
        if not (0 < threshold <= 1 and 0 <= min_firing_frequency < 1):
            raise ValueError(
                f"identity's threshold is {threshold}, expected 0 < it <= 1; its min_firing_frequency is "
                f"{min_firing_frequency}, expected 0 <= it < 1."
            )
        self.evaluation_rows, self.threshold = evaluation_rows, threshold
        self.min_firing_frequency, self.replicates, self.seed = min_firing_frequency, replicates, seed

    def begin(self, track: Track) -> Probe:
        """Read what the controls reached; ask for the evaluation rows."""
        if len(track) < 2:
            raise ValueError(f"{track.path} holds {len(track)} of the at least 2 snapshots that identity compares.")
        self._track = track
        self._ceilings = {kind: self._ceiling(track, kind) for kind in ("null", "replica")}
        shape = (len(track), int(track.facts["d_sae"]))
        self._found = {name: np.full(shape, np.nan) for name in COMPARISONS}
        self._alive, self._revived = np.zeros(shape, dtype=bool), _revivals(track)
        self._latents: dict[int, scipy.sparse.csr_array] = {}
        self._matched: list[dict[str, Any]] = []
        return Probe(evaluation_rows=self.evaluation_rows)

    def observe(self, snapshot: Snapshot, observation: Observation) -> None:
        """Correlate the latents with those of the snapshots that are kept."""
        assert observation.evaluation is not None  # begin asked for it; the type checker cannot know
        latents, t, last = observation.evaluation.latents, snapshot.position, len(self._track) - 1
        share = np.bincount(latents.indices, minlength=latents.shape[1]) / latents.shape[0]
        self._alive[t] = share > self.min_firing_frequency
        self._latents[t] = latents
        for name, other in (("to_first", 0), ("to_last", last)):
            if other in self._latents:
                self._found[name][t] = _correlate(self._latents[other], latents)
        self._found["to_first"][last] = self._found["to_last"][0]
        for now in (t, t + 1):
            if now - 1 in self._latents and now in self._latents:
                before, after = self._latents[now - 1], self._latents[now]
                self._found["to_previous"][now] = _correlate(before, after)
                others = np.random.default_rng(self.seed).permutation(after.shape[1])
                self._found["other_feature"][now] = _correlate(before, after[:, others])
                self._match(now, [{"comparison": "previous", **self._match_latents(before, after)}])
        rng = np.random.default_rng([self.seed, 1])
        split = observation.evaluation
        self._match(t, match_with_scratch(self._track, snapshot, split, self.min_firing_frequency, rng))
        self._latents = {i: kept for i, kept in self._latents.items() if i in (0, t, last)}

    def _match_latents(self, before: scipy.sparse.csr_array, after: scipy.sparse.csr_array) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, 1])
        return {"pairs": 1, **match_latents(before, after, self.min_firing_frequency, rng)}

    def _match(self, t: int, rows: list[dict[str, Any]]) -> None:
        self._matched += [{"step": self._track.steps[t], **row} for row in rows]

    def finish(self) -> AnalysisResult:
        """Tables of features, curves, stretches and survival, and two figures."""
        steps = self._track.steps
        limits = self._limits()
        kept = self._found["to_previous"] >= limits["threshold"].to_numpy()[:, None]  # NaN is not
        kept &= ~self._revived["to_previous"]
        stretches = stretch_table(self._alive, kept, steps)
        curves = self._curves()
        survival = self._survival(kept, limits)
        scalars = {
            name: _by_step(curves[curves["comparison"] == name], "mean")
            for name in ("to_previous", "to_first", "to_last")
        }
        scalars["unbroken_from_first"] = _by_step(survival, "unbroken")
        return AnalysisResult(
            tables={
                "features": self._features(kept),
                "curves": curves,
                "stretches": stretches,
                "survival": survival,
                "limits": limits,
                "matching": pd.DataFrame(self._matched).sort_values(["comparison", "step"], ignore_index=True),
            },
            figures={"correlation": correlation_figure(curves, steps), "survival": survival_figure(survival)},
            scalars=scalars,
            settings=self._settings(),
            summary=_summary(curves, survival, self._track),
            captions=CAPTIONS,
        )

    def _ceiling(self, track: Track, kind: str) -> dict[int, Floats]:
        """Correlations over the stage in all controls of a kind that repeat it, by position."""
        values = {}
        for position, controls in one_step_controls(track, kind).items():
            found = []
            for control in controls:
                frequency = [s.features["firing_frequency"].to_numpy() for s in control]
                use = (np.minimum(*frequency) > self.min_firing_frequency) & ~flags(control[1], "revived")
                r = control[1].features["functional_correlation"].to_numpy(dtype=np.float64)
                found.append(np.where(use, r, np.nan))
            values[position] = np.stack(found)  # [controls, d_sae]
        return values

    def _limits(self) -> pd.DataFrame:
        """The threshold of every stage, and where it came from."""
        nulls, rows = self._ceilings["null"], []
        for t, step in enumerate(self._track.steps):
            row: dict[str, Any] = dict.fromkeys(
                ("threshold", "null_quantile", "null_step", "null_kept", "chance"), np.nan
            )
            row["step"] = step
            if t:
                other = self._found["other_feature"][t]
                use = np.isfinite(other)
                row["chance"] = np.quantile(other[use], CHANCE_QUANTILE) if use.any() else 0.0
                limit = self.threshold
                if nulls:
                    nearest = min(nulls, key=lambda position, t=t: (abs(position - t), position))  # type: ignore[misc]
                    known = nulls[nearest][np.isfinite(nulls[nearest])]
                    row["null_step"] = self._track.steps[nearest]
                    row["null_quantile"] = np.quantile(known, NULL_QUANTILE) if len(known) else np.nan
                    limit = max(row["null_quantile"], row["chance"]) if len(known) else limit
                row["threshold"] = min(limit, self.threshold)
                if nulls and len(known):
                    row["null_kept"] = float((known >= row["threshold"]).mean())
            rows.append(row)
        return pd.DataFrame(rows)

    def _counted(self, name: str) -> Floats:
        """A comparison's correlations, NaN where the feature does not count."""
        values, alive, revived = self._found[name].copy(), self._alive, self._revived
        if name in ("to_previous", "other_feature"):
            values[1:][~(alive[1:] & alive[:-1]) | revived["to_previous"][1:]] = np.nan
        else:
            values[~(alive & alive[0 if name == "to_first" else -1]) | revived[name]] = np.nan
        return values

    def _curves(self) -> pd.DataFrame:
        tables = []
        for name in COMPARISONS:
            mean, low, high = self._bootstrap(self._counted(name))
            tables.append(self._curve(name, self._counted(name), mean, low, high))
        for kind, by_position in self._ceilings.items():
            values = np.full(self._alive.shape, np.nan)
            for position, found in by_position.items():
                count = np.isfinite(found).sum(axis=0)
                values[position] = np.where(count, np.nansum(found, axis=0) / np.maximum(count, 1), np.nan)
            tables.append(self._curve(kind, values, *self._bootstrap(values)))
        return pd.concat(tables, ignore_index=True)

    def _curve(self, name: str, values: Floats, mean: Floats, low: Floats, high: Floats) -> pd.DataFrame:
        known = [row[np.isfinite(row)] for row in values]
        table = pd.DataFrame({"step": self._track.steps, "comparison": name, "mean": mean, "low": low, "high": high})
        table["median"] = [np.median(row) if len(row) else np.nan for row in known]
        table["n_features"] = [len(row) for row in known]
        return table

    def _bootstrap(self, values: Floats) -> tuple[Floats, Floats, Floats]:
        return bootstrap_means(values, np.random.default_rng(self.seed), self.replicates)

    def _survival(self, kept: NDArray[np.bool_], limits: pd.DataFrame) -> pd.DataFrame:
        """Of the features alive at first: kept in every stage since, and still correlated with the first."""
        at_first = self._alive[0]
        unbroken = self._alive.copy()
        for t in range(1, len(unbroken)):
            unbroken[t] &= kept[t] & unbroken[t - 1]
        like_first = self._found["to_first"] >= limits["threshold"].fillna(0).to_numpy()[:, None]
        like_first &= self._alive & ~self._revived["to_first"]
        like_first[0] = at_first
        table = pd.DataFrame({"step": self._track.steps, "n_features": int(at_first.sum())})
        for name, which in (("unbroken", unbroken), ("like_first", like_first)):
            values = np.where(at_first, which, np.nan)
            table[name], table[f"{name}_low"], table[f"{name}_high"] = self._bootstrap(values)
        table["null"] = limits["null_kept"].where(limits.index > 0, 1.0).cumprod() if self._ceilings["null"] else np.nan
        return table

    def _features(self, kept: NDArray[np.bool_]) -> pd.DataFrame:
        t, count = self._alive.shape
        columns = {"feature": np.tile(np.arange(count), t), "step": np.repeat(self._track.steps, count)}
        columns |= {"alive": self._alive.ravel(), "revived": self._revived["to_previous"].ravel(), "kept": kept.ravel()}
        columns |= {name: self._found[name].ravel() for name in COMPARISONS[:3]}
        return pd.DataFrame(columns)

    def _settings(self) -> dict[str, Any]:
        command = f"not available: run `saetrack control {self._track.path} --kind"
        controls = {
            kind: {self._track.steps[p]: len(found) for p, found in by.items()} or f"{command} {kind}`"
            for kind, by in self._ceilings.items()
        }
        return {
            "evaluation_rows": self.evaluation_rows,
            "threshold": self.threshold,
            "null_quantile": NULL_QUANTILE,
            "chance_quantile": CHANCE_QUANTILE,
            "min_firing_frequency": self.min_firing_frequency,
            "replicates": self.replicates,
            "seed": self.seed,
            "controls_by_step": controls,
        }


def _revivals(track: Track) -> dict[str, NDArray[np.bool_]]:
    """Which features were revived between each snapshot and another one, ``[T, d_sae]`` for each comparison."""
    snapshots = list(track)
    previous = [flags(snapshots[0], "revived"), *(revived_between(track, *pair) for pair in pairwise(snapshots))]
    return {
        "to_previous": np.stack(previous),
        "to_first": np.stack([revived_between(track, snapshots[0], s) for s in snapshots]),
        "to_last": np.stack([revived_between(track, s, snapshots[-1]) for s in snapshots]),
    }


def _correlate(a: scipy.sparse.csr_array, b: scipy.sparse.csr_array) -> Floats:
    metric = FunctionalCorrelation(a.shape[1])
    metric.update(a, b)
    correlation: Floats = metric.compute().numpy()
    return correlation


def _by_step(table: pd.DataFrame, name: str) -> dict[int, float]:
    known = table[table[name].notna()]
    return {int(step): float(value) for step, value in zip(known["step"], known[name], strict=True)}


def _summary(curves: pd.DataFrame, survival: pd.DataFrame, track: Track) -> str:
    rows = curves[(curves["comparison"] == "to_previous") & curves["mean"].notna()]
    if rows.empty:
        return "No feature is alive in two neighbouring snapshots."
    lowest, last = rows.sort_values("mean").iloc[0], survival.iloc[-1]
    text = (
        f"The mean functional correlation with the previous snapshot is lowest at step {int(lowest['step'])} "
        f"({lowest['mean']:.2f}, {lowest['low']:.2f} to {lowest['high']:.2f}). {last['unbroken']:.1%} of the first "
        f"snapshot's {int(last['n_features'])} features kept their identity in every stage"
    )
    if np.isnan(last["null"]):
        command = f"`saetrack control {track.path} --kind null`"
        return f"{text}. Not available: what null steps alone would leave; run {command}."
    return f"{text}; null steps alone would leave {last['null']:.1%}."
