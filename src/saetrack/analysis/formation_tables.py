"""What the formation analysis found, put together over LLM checkpoints, and its tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .columns import values_at
from .figures import step_position
from .formation_sets import BASELINES
from .formation_times import (
    AT_INIT,
    FORMED,
    INSUFFICIENT,
    MIN_CHECKPOINTS,
    NOT_AVAILABLE,
    NOT_KEPT,
    Times,
    measure_times,
    statuses,
)  # fmt: skip
from .resampling import bootstrap_means, population_table
from .significance import MaxT, discoveries

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .base import SplitObservation
    from .formation_measure import Measured
    from .formation_sets import FormationSets

    Floats = NDArray[np.floating]
    Integers = NDArray[np.integer]
    Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Findings:
    """Significance, times and status of all features and false features.

    Args:
        steps: LLM steps, increasing.
        progress: ``[T, F]`` against the baseline that counts.
        errors: ``[T, F]``, standard errors of ``progress``.
        p: Baseline to ``[T, F]``, adjusted over checkpoints.
        q: Baseline to ``[F]``.
        significant: ``[T, F]`` against the baseline that counts.
        times: None where there are too few checkpoints.
        status: ``[F]``.
    """

    steps: list[int]
    progress: Floats
    errors: Floats
    p: dict[str, Floats]
    q: dict[str, Floats]
    significant: Bools
    times: Times | None
    status: NDArray[np.str_]

    @classmethod
    def of(
        cls, steps: list[int], measured: list[Measured], max_t: dict[str, MaxT], baseline: str, rate: float
    ) -> Findings:
        """Test and time what was measured.

        Args:
            steps: LLM steps, increasing.
            measured: Of each step.
            max_t: Of each baseline, having seen all steps.
            baseline: The one that counts for times and status.
            rate: Of false discoveries over features.
        """
        p = {name: max_t[name].p_values(np.stack([m.z[name] for m in measured])) for name in BASELINES}
        found = {name: discoveries(p[name], rate) for name in BASELINES}
        progress = np.stack([m.progress(baseline) for m in measured])
        replicates = np.stack([m.replicates for m in measured])
        significant = found[baseline][1]
        times = None
        status = np.full(progress.shape[1], NOT_AVAILABLE)
        if len(steps) >= MIN_CHECKPOINTS:
            times = measure_times(progress, replicates, step_position(steps))
            status = statuses(times, significant)
        errors = replicates.std(axis=2, ddof=1)
        q = {name: values for name, (values, _) in found.items()}
        return cls(steps, progress, errors, p, q, significant, times, status)

    @property
    def available(self) -> bool:
        """Whether there are checkpoints enough for times."""
        return self.times is not None

    def count(self, which: Bools) -> dict[str, int]:
        """How many of some features have each status."""
        names, counts = np.unique(self.status[which], return_counts=True)
        return {str(name): int(n) for name, n in zip(names, counts, strict=True)}

    def formed_index(self) -> Integers:
        """Index of the checkpoint by which each has formed ``[F]``, -1 for those not known to have by the last one.

        Of a curve that still moves at the end the final level is not known, and so neither is the time of half of it.
        """
        if self.times is None:
            return np.full(len(self.status), -1)
        reached = np.searchsorted(step_position(self.steps), self.times.half)
        return np.where(self.status == AT_INIT, 0, np.where(self.status == FORMED, reached, -1))


def feature_table(sets: FormationSets, findings: Findings) -> pd.DataFrame:
    """One row for every feature of the SAE; times in LLM steps, NaN where there is none.

    ``formed_low`` and ``formed_high`` are the 95 % interval of ``formed_step``; ``formed_after`` and ``formed_by`` the
    LLM checkpoints around it. ``formed_step_isotonic`` is a second estimate, from the best increasing curve; it agrees
    when it lies in the same or a neighbouring interval of checkpoints. A feature formed at the first checkpoint has
    that step, for it may have formed earlier.
    """
    real = ~sets.false
    n_positions = (sets.chosen >= 0).sum(axis=1)
    table = pd.DataFrame({"feature": np.arange(len(n_positions)), "n_positions": n_positions})
    table["status"] = np.where(sets.counts, INSUFFICIENT, NOT_KEPT)
    rows = sets.features[real]
    table.loc[rows, "status"] = findings.status[real]
    steps = np.asarray(findings.steps, dtype=np.float64)
    index = findings.formed_index()
    columns: dict[str, Floats] = {}
    for name, time in _time_columns(findings).items():
        columns[name] = np.where(index > 0, time, np.where(index == 0, steps[0], np.nan))
    columns["formed_after"] = np.where(index > 0, steps[np.maximum(index - 1, 0)], np.nan)
    columns["formed_by"] = np.where(index >= 0, steps[np.minimum(index, len(steps) - 1)], np.nan)
    if findings.times is not None:
        second = np.searchsorted(step_position(findings.steps), findings.times.isotonic)
        columns["isotonic_agrees"] = np.where(index > 0, np.abs(second - index) <= 1, np.nan)
        columns["amplitude"], columns["amplitude_se"] = findings.times.amplitude, findings.times.amplitude_error
    columns |= {f"q_{name}": findings.q[name] for name in BASELINES}
    for name, values in columns.items():
        table[name] = np.nan
        table.loc[rows, name] = values[real]
    return table


def _time_columns(findings: Findings) -> dict[str, Floats]:
    """Times as LLM steps, and the second estimator's; all NaN where there are none."""
    names = ["formed_step", "formed_low", "formed_high", "formed90_step", "formed90_low", "formed90_high"]
    found = findings.times
    if found is None:
        return dict.fromkeys([*names, "formed_step_isotonic"], np.full(len(findings.status), np.nan))
    times = [found.half, found.half_low, found.half_high, found.most, found.most_low, found.most_high]
    return {
        name: np.where(np.isfinite(u), 10.0**u - 1, np.nan)
        for name, u in zip([*names, "formed_step_isotonic"], [*times, found.isotonic], strict=True)
    }


def formation_table(sets: FormationSets, measured: list[Measured], findings: Findings) -> pd.DataFrame:
    """One row by feature and step: ``Sbar``, progress against each baseline, its standard error and adjusted p."""
    real = ~sets.false
    columns: dict[str, Any] = {
        "feature": np.tile(sets.features[real], len(measured)),
        "step": np.repeat(findings.steps, int(real.sum())),
        "similarity": np.concatenate([m.similarity[real] for m in measured]).astype(np.float32),
        "progress_se": findings.errors[:, real].ravel().astype(np.float32),
        "significant": findings.significant[:, real].ravel(),
    }
    for name in BASELINES:
        progress = np.concatenate([m.progress(name)[real] for m in measured])
        columns[f"progress_{name}"] = progress.astype(np.float32)
        columns[f"p_{name}"] = findings.p[name][:, real].ravel().astype(np.float32)
    return pd.DataFrame(columns)


def population(
    measured: list[Measured], steps: list[int], real: Bools, rng: np.random.Generator, replicates: int
) -> pd.DataFrame:
    """Mean progress over features by step and baseline, with interval, quartiles, and the band of one random set."""
    tables = []
    for name in BASELINES:
        table = population_table(steps, np.stack([m.progress(name)[real] for m in measured]), rng, replicates)
        some = real.any()
        table["null_low"] = [m.null_low[name][real].mean() if some else np.nan for m in measured]
        table["null_high"] = [m.null_high[name][real].mean() if some else np.nan for m in measured]
        tables.append(table.assign(baseline=name))
    return pd.concat(tables, ignore_index=True)


def share_table(sets: FormationSets, findings: Findings, rng: np.random.Generator, replicates: int) -> pd.DataFrame:
    """Share of the features known to have formed by each step, with the same of the false features.

    ``at-init`` counts from the first checkpoint. All others are followed to the last one, so none leaves before it, and
    one less this share is both Turnbull's and Kaplan and Meier's estimate of the survival curve.
    """
    steps = findings.steps
    table: dict[str, Any] = {"step": steps}
    index = findings.formed_index()
    by = (index >= 0) & (index <= np.arange(len(steps))[:, None])  # [T, F]
    for kind, which in (("", ~sets.false), ("null_", sets.false)):
        n = int(which.sum())
        columns = np.full((3, len(steps)), np.nan)
        if findings.available and n:
            columns = np.stack(bootstrap_means(by[:, which].astype(np.float64), rng, replicates))
        table |= {f"{kind}{name}": values for name, values in zip(("share", "low", "high"), columns, strict=True)}
    return pd.DataFrame(table)


def positions_table(split: SplitObservation, sets: FormationSets) -> pd.DataFrame:
    """The choice, so that it can be looked up: row and column among the track's evaluation rows.

    Of every feature, also of those that were not computed.
    """
    feature, place = np.nonzero(sets.chosen >= 0)
    chosen = sets.chosen[feature, place]
    row, column = split.positions[chosen].T
    return pd.DataFrame(
        {
            "feature": feature,
            "row": row,
            "column": column,
            "document": split.documents[chosen],
            "activation": values_at(split.latents, chosen, feature),
        }
    )
