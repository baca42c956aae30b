"""Phases: whether rates of change have regimes, how many, where, and whether the perspectives agree."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from .base import Analysis, AnalysisResult
from .controls import null_chains
from .figures import step_position
from .phases_agreement import adjusted_rand, boundary_distance, covering, order_of_times
from .phases_cut import Cut, Resampling, cut
from .phases_figures import CAPTIONS, phases_figure
from .phases_segment import MIN_LENGTH
from .phases_series import AMOUNTS, TIMES, Amounts, NotAvailable, Tables, drift_above_null

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from saetrack.track import Track

    Floats = NDArray[np.floating]
    Cuts = dict[str, dict[str, Cut]]

LOG_STEP = "log-step"
_IN_CHAINS = ("semantic", "drift")  # nothing forms in a null chain, and its LLM does not change
_SAME = 0.3  # decades; boundaries closer than that, or than one interval, count as the same


class Phases(Analysis):
    """Whether the rates of semantic, formation, drift and model change have phases, how many, and whether they agree.

    It reads the results of semantics, formation, drift and quality. Amounts of change between neighbouring snapshots
    are divided by the length of the interval, in decades of ``step + 1``, in steps and in checkpoints, and cut into
    phases of constant rate by exact dynamic programming; every phase has at least 3 rates. Levels such as the cosine
    to the last snapshot are not used: those of a random walk have phases too. See `saetrack.analysis.phases_cut.cut`
    for when more than one phase is accepted, and for the intervals. One phase is an answer too; the table ``scores``
    holds every number of phases.

    Of the drift it cuts what is left above null steps, which at least two stages must have; otherwise the drift as it
    is, which ``settings["drift_above"]`` and the summary say.

    Turnover and drift must also gain more than the null chains do, where Semantics and Drift were run on these. Nothing
    can form in a chain, and its LLM does not change, so the other perspectives have only their permutation in time.
    ``settings["null"]`` says which it was.

    A boundary is ``robust`` if on both other axes one lies within one interval of it. The intervals do not cover
    another seed of the SAE or of the LLM.

    Args:
        replicates: Bootstrap replicates.
        permutations: Draws of the null.
        seed: Of both.

    Raises:
        ValueError: If a number is too small.
    """

    reads_results: ClassVar[bool] = True
    restrictable: ClassVar[bool] = True
    min_snapshots: ClassVar[int] = 2 * MIN_LENGTH + 1  # with fewer, one phase is the only answer there can be

    def __init__(self, replicates: int = 500, permutations: int = 200, seed: int = 0) -> None:
        if replicates < 2 or permutations < 20:
            raise ValueError(
                f"phases needs at least 2 replicates and 20 permutations, but replicates is {replicates} and "
                f"permutations is {permutations}."
            )
        self.draws = Resampling(replicates, permutations, seed)

    def run(self, track: Track) -> AnalysisResult:
        """Cut the rates of a track.

        Raises:
            ValueError: If the track has fewer than seven snapshots, or no perspective is available.
        """
        if len(track) < self.min_snapshots:
            raise ValueError(
                f"{track.path} holds {len(track)} of the at least {self.min_snapshots} snapshots that phases needs: "
                f"with fewer there can be no two phases of {MIN_LENGTH} rates. Follow more LLM checkpoints with "
                "`saetrack fit`."
            )
        tables, steps = Tables.of(track, self.kept), track.steps
        amounts, missing = _available(tables)
        if not amounts:
            raise ValueError(f"phases has nothing to cut: {'; '.join(missing.values())}.")
        axes = {LOG_STEP: step_position(steps), "step": np.asarray(steps, dtype=float), "index": np.arange(len(steps))}
        chains: dict[str, list[Floats]] = {}
        if self.kept is None:  # which of a chain's features to put beside those that were kept is not known
            chains = {name: _amounts_of_chains(track, name, missing) for name in _IN_CHAINS if name in amounts}
        above = None
        if "drift" in amounts:
            amounts["drift"], at = drift_above_null(amounts["drift"], tables)
            above = _above(track, at)
        cuts: Cuts = {
            name: {
                axis: cut(found.values, np.diff(place), chains.get(name, []), self.draws)
                for axis, place in axes.items()
            }
            for name, found in amounts.items()
        }
        on_log = {name: by_axis[LOG_STEP] for name, by_axis in cuts.items()}
        scores = _score_table(cuts)
        boundaries = _boundary_table(cuts, steps)
        return AnalysisResult(
            tables={
                "scores": scores,
                "boundaries": boundaries,
                "rates": _rate_table(cuts, steps),
                "agreement": _agreement_table(on_log, axes[LOG_STEP]),
                "order": self._order_table(tables, axes[LOG_STEP]),
            },
            figures={"phases": phases_figure(on_log, {name: found.what for name, found in amounts.items()}, steps)},
            scalars={
                f"rate_{name}": {steps[end]: float(rate) for end, rate in zip(c.ends, c.rates, strict=True)}
                for name, c in on_log.items()
            },
            settings={
                "replicates": self.draws.replicates,
                "permutations": self.draws.permutations,
                "seed": self.draws.seed,
                "min_length": MIN_LENGTH,
                "not_available": missing,
                "null": {name: c.null for name, c in on_log.items()},
                "drift_above": above,
            },
            summary=_summary(on_log, boundaries, missing, above),
            captions=CAPTIONS,
        )

    def _order_table(self, tables: Tables, place: Floats) -> pd.DataFrame:
        """Order and lag of the features' times, in decades, for every pair that is available."""
        times = {}
        for name, read in TIMES.items():
            try:
                found = read(tables)
            except NotAvailable:
                continue
            times[name] = found
        rows = []
        for first, second in combinations(times, 2):
            rng = np.random.default_rng([self.draws.seed, 3])
            ordered = order_of_times(times[first], times[second], place, self.draws.replicates, rng)
            both = int((np.isfinite(times[first]) & np.isfinite(times[second])).sum())
            row: dict[str, Any] = {"first": first, "second": second, "n_features": both}
            for name, values in ordered.items():
                row |= dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))
            rows.append(row)
        return pd.DataFrame(rows)


def _available(tables: Tables) -> tuple[dict[str, Amounts], dict[str, str]]:
    """What can be read, and for the other perspectives why not."""
    amounts, missing = {}, {}
    for name, read in AMOUNTS.items():
        try:
            found = read(tables)
        except NotAvailable as reason:
            missing[name] = str(reason)
            continue
        known = int(np.isfinite(found.values).any(axis=1).sum())
        if known < 2 * MIN_LENGTH:
            missing[name] = f"{known} intervals hold a feature that counts, and two phases need {2 * MIN_LENGTH}"
        else:
            amounts[name] = found
    return amounts, missing


def _amounts_of_chains(track: Track, name: str, missing: dict[str, str]) -> list[Floats]:
    """Amounts of a perspective in the null chains; why one cannot be read is added to ``missing``."""
    chains = []
    for control in null_chains(track):
        if len(control) != len(track):
            missing[control.path.name] = f"it has {len(control)} snapshots, and the track {len(track)}"
            continue
        try:
            values = AMOUNTS[name](Tables.of(control)).values
        except NotAvailable as reason:
            missing[f"{name} of {control.path.name}"] = str(reason)
            continue
        if np.isfinite(values).any(axis=1).all():
            chains.append(values)
        else:
            missing[f"{name} of {control.path.name}"] = "in some stage no feature counts"
    return chains


def _above(track: Track, at: list[int]) -> str:
    """What was taken off the drift, given the LLM steps with null steps; if nothing, what to run."""
    if len(at) > 1:
        return f"null steps at LLM steps {', '.join(map(str, at))}"
    have = f"only LLM step {at[0]} has null steps, and two must have" if at else "no stage has null steps"
    return f"nothing: {have}; run `saetrack control {track.path} --kind null`, then drift again"


def _score_table(cuts: Cuts) -> pd.DataFrame:
    rows = [
        {
            "perspective": name,
            "axis": axis,
            "phases": k + 1,
            "residual": c.found.residual[0, k],
            "score": c.found.score[0, k],
            "null_score": c.null_score,
            "null": c.null,
            "advantage": c.advantage[k],
            "walk_advantage": c.walk_advantage,
            "best_in_replicates": c.best_in_replicates[k],
            "accepted": k + 1 == c.phases,
        }
        for name, by_axis in cuts.items()
        for axis, c in by_axis.items()
        for k in range(len(c.advantage))
    ]
    return pd.DataFrame(rows)


def _boundary_table(cuts: Cuts, steps: list[int]) -> pd.DataFrame:
    columns = ["perspective", "axis", "step", "low", "high", "robust"]
    rows = []
    for name, by_axis in cuts.items():
        for axis, c in by_axis.items():
            others = [other.boundaries for label, other in by_axis.items() if label != axis]
            for at, low, high in zip(c.boundaries, *c.interval(), strict=True):
                robust = all(bool((np.abs(other - at) <= 1).any()) for other in others)
                rows.append([name, axis, steps[at], steps[low], steps[high], robust])
    return pd.DataFrame(rows, columns=columns)


def _rate_table(cuts: Cuts, steps: list[int]) -> pd.DataFrame:
    at = np.asarray(steps)
    parts = [
        pd.DataFrame(
            {
                "perspective": name,
                "axis": axis,
                "from_step": at[c.ends - 1],
                "step": at[c.ends],
                "rate": c.rates,
                "rate_se": c.errors,
                "n_features": c.features,
                "phase": c.label + 1,
                "level": c.levels,
            }
        )
        for name, by_axis in cuts.items()
        for axis, c in by_axis.items()
    ]
    return pd.concat(parts, ignore_index=True)


def _agreement_table(cuts: Mapping[str, Cut], place: Floats) -> pd.DataFrame:
    """How far each two perspectives agree on the log-step axis; distances in decades, NaN where one has no boundary."""
    same = max(_SAME, float(np.median(np.diff(place))))
    columns = ["first", "second", "distance", "low", "high", "same", "covering", "adjusted_rand"]
    rows = []
    for (first, a), (second, b) in combinations(cuts.items(), 2):
        distance = float(boundary_distance(place[a.boundaries], place[b.boundaries]))
        drawn = boundary_distance(place[a.replicates], place[b.replicates])
        low, high = np.quantile(drawn, [0.025, 0.975])
        at = [place[c.boundaries] for c in (a, b)]
        ends = (place[0], place[-1])
        overlap = (covering(at[0], at[1], *ends) + covering(at[1], at[0], *ends)) / 2
        shared = np.intersect1d(a.ends, b.ends)
        rand = adjusted_rand(a.label[np.isin(a.ends, shared)], b.label[np.isin(b.ends, shared)])
        is_same = bool(np.quantile(drawn, 0.95) <= same) if np.isfinite(distance) else None
        rows.append([first, second, distance, low, high, is_same, overlap, rand])
    return pd.DataFrame(rows, columns=columns)


def _summary(cuts: Mapping[str, Cut], boundaries: pd.DataFrame, missing: Mapping[str, str], above: str | None) -> str:
    """One sentence for each perspective: its answer on the log-step axis, and why if that is one phase."""
    sentences = []
    for name, c in cuts.items():
        at = boundaries[(boundaries["perspective"] == name) & (boundaries["axis"] == LOG_STEP)]
        where = " and ".join(
            f"at step {b.step} [{b.low}, {b.high}]{'' if b.robust else ', not robust'}" for b in at.itertuples()
        )
        answer = f"{c.phases} phases, boundaries {where}" if len(at) else f"one phase ({c.why_one})"
        sentences.append(f"{name.capitalize().replace('_', ' ')}: {answer}.")
    if above is not None:
        sentences.append(f"Taken off the drift: {above}.")
    sentences += [f"{name.capitalize().replace('_', ' ')} not available: {why}." for name, why in missing.items()]
    return " ".join(sentences)
