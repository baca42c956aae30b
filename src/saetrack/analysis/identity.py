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
from .controls import null_chains
from .drift_rows import flags
from .identity_figures import CAPTIONS, correlation_figure, survival_figure
from .identity_matching import Matched, match_latents, match_with_scratch, matching_row
from .identity_nulls import (
    CHANCE_QUANTILE,
    NULL_QUANTILE,
    chain_ceiling,
    chain_correlations,
    controls_said,
    limit_table,
    null_survival,
    stage_controls,
)
from .identity_stretches import kept_stages, stretch_table
from .lineage import revived_between
from .places import place_names
from .resampling import bootstrap_means

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from saetrack.track import Snapshot, Track

    Floats = NDArray[np.floating]

COMPARISONS = ("to_previous", "to_first", "to_last", "other_feature")


class Identity(SweepAnalysis):
    """Does an index keep its meaning? Functional correlation to neighbours and ends, stretches, ceilings.

    Functional correlation is Pearson's over the evaluation positions between latent i of two snapshots, each on its
    own LLM checkpoint. It is given with the previous, the first and the last snapshot, for every feature and as means
    with an interval (bootstrap over features; another text or another seed would add to it). Features count that are
    alive (fire on a larger share than ``min_firing_frequency``) at both ends and were not revived in between. Beside
    it: what a null step and a replica of the stage reach, and null chains over as many stages (``chain``), where the
    track has such controls, and the correlation of a latent with that of another feature.

    A feature kept its identity over a stage when it is alive on both sides, was not revived, and its correlation
    reached the threshold: the lower 5 % of the null steps of the stage (interpolated between two stages that have some)
    or, if that is more, the 99 % quantile of the correlation with another feature, but never above ``threshold``, which
    holds where no null step reaches. Stages between LLM checkpoints of equal weights are null steps too. A stretch is
    an unbroken run of such stages. It compares neighbours only: a feature may change its meaning little by little
    within a stretch, which ``like_first`` in the table ``survival`` shows.

    The table ``matching`` has the latents of neighbouring snapshots matched one to one by their correlation, and those
    of the track with ``scratch`` controls on the same LLM checkpoint, beside those with each other and beside latents
    whose positions were permuted. Intervals are over latents, for one matching. `Dictionaries` does it by directions.

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
        least = self.min_firing_frequency
        self._ceilings = {kind: stage_controls(track, kind, least) for kind in ("null", "replica")}
        self._chains = null_chains(track)
        self._chained: list[tuple[Floats, Floats]] = []
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
        least, seed = self.min_firing_frequency, self.seed
        share = np.bincount(latents.indices, minlength=latents.shape[1]) / latents.shape[0]
        self._alive[t] = share > least
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
                self._match(now, "previous", [match_latents(before, after, least, np.random.default_rng([seed, 1]))])
        rng = np.random.default_rng([seed, 1])
        for name, pairs in match_with_scratch(self._track, snapshot, observation.evaluation, least, rng).items():
            self._match(t, name, pairs)
        if t == 0:  # what null chains were trained on
            chained = (chain_correlations(c, observation.evaluation, least, _correlate) for c in self._chains)
            self._chained = list(chained)
        self._latents = {i: kept for i, kept in self._latents.items() if i in (0, t, last)}

    def _match(self, t: int, comparison: str, pairs: list[Matched]) -> None:
        row = matching_row(comparison, pairs, self.seed, self.replicates)
        self._matched.append({"step": self._track.steps[t], **row})

    def finish(self) -> AnalysisResult:
        """Tables of features, curves, stretches and survival, and two figures."""
        steps = self._track.steps
        limits = limit_table(steps, self._ceilings["null"], self._found["other_feature"], self.threshold)
        kept = kept_stages(
            self._found["to_previous"], limits["threshold"].to_numpy(), self._alive, self._revived["to_previous"]
        )
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
            summary=_summary(curves, survival, self._track, self.min_firing_frequency) + self._no_chain(),
            captions=CAPTIONS,
        )

    def _counted(self, name: str) -> Floats:
        """A comparison's correlations, NaN where the feature does not count."""
        values, alive, revived = self._found[name].copy(), self._alive, self._revived
        if name in ("to_previous", "other_feature"):
            values[1:][~(alive[1:] & alive[:-1]) | revived["to_previous"][1:]] = np.nan
        else:
            values[~(alive & alive[0 if name == "to_first" else -1]) | revived[name]] = np.nan
        return values

    def _curves(self) -> pd.DataFrame:
        tables, chains = [], chain_ceiling(self._chained, *self._alive.shape)
        for name in COMPARISONS:
            table = self._curve(name, self._counted(name))
            reached = self._bootstrap(chains[name]) if name in chains and self._chained else (np.nan,) * 3
            table["chain"], table["chain_low"], table["chain_high"] = reached
            tables.append(table)
        for kind, by_position in self._ceilings.items():
            values = np.full(self._alive.shape, np.nan)
            for position, found in by_position.items():
                count = np.isfinite(found).sum(axis=0)
                total = np.where(np.isfinite(found), found, 0.0).sum(axis=0)
                values[position] = np.where(count, total / np.maximum(count, 1), np.nan)
            tables.append(self._curve(kind, values))
        return pd.concat(tables, ignore_index=True)

    def _curve(self, name: str, values: Floats) -> pd.DataFrame:
        mean, low, high = self._bootstrap(values)
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
        nulls = null_survival(self._ceilings["null"], limits, np.random.default_rng(self.seed), self.replicates)
        return pd.concat([table, pd.DataFrame(nulls)], axis=1)

    def _features(self, kept: NDArray[np.bool_]) -> pd.DataFrame:
        t, count = self._alive.shape
        columns: dict[str, Any] = {"feature": np.tile(np.arange(count), t), "step": np.repeat(self._track.steps, count)}
        known = pd.array(kept.ravel(), dtype="boolean")
        known[:count] = pd.NA  # no stage leads into the first snapshot
        columns |= {"alive": self._alive.ravel(), "revived": self._revived["to_previous"].ravel(), "kept": known}
        columns |= {name: self._found[name].ravel() for name in COMPARISONS[:3]}
        return pd.DataFrame(columns)

    def _no_chain(self) -> str:
        if self._chains or "control" in self._track.facts or not self._track.is_forward_chain:
            return ""
        return (
            " Not available: the ceiling of the correlation with the first and the last snapshot; run "
            f"`saetrack control {self._track.path} --kind null --chain true`."
        )

    def _settings(self) -> dict[str, Any]:
        return {
            "evaluation_rows": self.evaluation_rows,
            "threshold": self.threshold,
            "null_quantile": NULL_QUANTILE,
            "chance_quantile": CHANCE_QUANTILE,
            "min_firing_frequency": self.min_firing_frequency,
            "replicates": self.replicates,
            "seed": self.seed,
            "controls_by_step": controls_said(self._track, self._ceilings, len(self._chains)),
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


def _summary(curves: pd.DataFrame, survival: pd.DataFrame, track: Track, least: float) -> str:
    names, rows = place_names(track.steps), curves[curves["comparison"] == "to_previous"].reset_index(drop=True)
    if rows["mean"].isna().all():
        return "No feature is alive in two neighbouring snapshots."
    lowest, last = int(rows["mean"].argmin()), survival.iloc[-1]
    there = rows.iloc[lowest]
    text = (
        f"Over features that fire on more than {least:g} of the positions at both ends, the mean functional "
        f"correlation with the previous snapshot is lowest at {names[lowest]} ({there['mean']:.2f}, "
        f"{there['low']:.2f} to {there['high']:.2f}; median {there['median']:.2f}). {last['unbroken']:.1%} "
        f"({last['unbroken_low']:.1%} to {last['unbroken_high']:.1%}) of the first snapshot's "
        f"{int(last['n_features'])} features kept their identity in every stage to {names[-1]}."
    )
    if "control" in track.facts:  # which has no controls of its own
        return text
    command, reached = f"run `saetrack control {track.path} --kind null", survival[survival["null"].notna()]
    if reached.empty:
        return f"{text} Not available: what null steps alone would leave, for the first stage has none; {command}`."
    end = survival.iloc[len(reached) - 1]
    text += (
        f" Null steps alone would leave {end['null']:.1%} ({end['null_low']:.1%} to {end['null_high']:.1%}) to "
        f"{names[len(reached) - 1]}, and the track left {end['unbroken']:.1%}"
    )
    if len(reached) < len(survival):
        return f"{text}. Not available: what they would leave after it; {command} --positions '[{track[-1].number}]'`."
    return f"{text}."
