"""Density: how far apart may the LLM checkpoints be before features lose themselves?"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import scipy.stats
from scipy.optimize import isotonic_regression

from . import figures as look
from .base import Analysis, AnalysisResult
from .controls import controls_of, one_step_controls
from .drift_rows import alive, decoder_rows
from .resampling import bootstrap_means

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from saetrack.track import Track

    Floats = NDArray[np.floating]

SURVIVES = 0.7
"""Cosine of a decoder row with the same index of the track, from which on it is the same feature."""
CAPTION = (
    "Left, the share of features that a series with fewer LLM checkpoints leaves at the end as the track has them; "
    "right, identity over each gap by how much the FVU rose, with the largest admissible gap. The rule of 0.7 for a "
    "surviving feature is a choice, and a feature that fails it may live on under another index."
)
KEPT = 0.9
"""Share of the ceiling that identity must keep over a gap that is still admissible."""


class Density(Analysis):
    """What a series with fewer LLM checkpoints does to the features, and how large a gap they survive.

    It needs ``thinned`` controls: the series again from its first snapshot, over every second, fourth, ... LLM
    checkpoint, with the same tokens in a stage or the same tokens in all, by any warm start. That with ``--thin 1`` is
    the whole series in another order of the data and gives the ceiling: what no density can do better.

    * ``thinned``: for each such series, of its last snapshot beside the track's: FVU, dead share, and ``survival``, the
      share of the features alive in both whose decoder rows have a cosine of at least 0.7, with its interval (bootstrap
      over features) and relative to the ceiling.
    * ``gaps``: for every stage of the track and of those series: the gap in steps; ``delta_fvu``, how much the FVU of
      the SAE rises when the LLM changes under it, as it is; ``rise``, by which share it has risen after the warm start,
      before any training; and ``retained``, the median functional correlation over the stage, with its interval.
    * The largest admissible gap is the largest ``rise`` at which a decreasing (isotonic) fit of ``retained`` stays
      above 0.9 of its ceiling, the median functional correlation of the null controls, or of the smallest gap.
      ``delta_fvu`` is there to compare: a warm start that turns the dictionary with the LLM undoes most of it, and it
      then says little about identity (rank correlations with ``retained`` are in ``admissible``).

    Restricted (``--only_kept``), there is survival alone, of the features that the track kept from its first snapshot
    to its last: it is not known which ones kept their identity over a gap of a thinned series.

    Args:
        replicates: Bootstrap replicates.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If there are fewer than 2 replicates.
    """

    restrictable: ClassVar[bool] = True

    def __init__(self, replicates: int = 500, seed: int = 0) -> None:
        if replicates < 2:
            raise ValueError(f"density's replicates is {replicates}; it must be at least 2.")
        self.replicates = replicates
        self.seed = seed

    def run(self, track: Track) -> AnalysisResult:
        """Compare the thinned series of a track with it; without any, the result says how to make them."""
        controls = controls_of(track, "thinned")
        if not controls:
            missing = (
                f"Not available: {track.path} has no thinned controls. Make some with `saetrack control {track.path} "
                "--kind thinned --thin 2`, the same with 4 and 8, and with 1 for the ceiling."
            )
            return AnalysisResult({}, {}, {}, {}, missing)
        thinned = pd.DataFrame([self._survival(track, control) for control in controls])
        ceiling = thinned.loc[thinned["thin"] == 1, "survival"].mean()  # NaN without one
        thinned["survival_relative"] = thinned["survival"] / ceiling
        settings = {
            "seed": self.seed,
            "replicates": self.replicates,
            "survives_from": SURVIVES,
            "kept": KEPT,
            "ceiling": "thinned controls with --thin 1" if np.isfinite(ceiling) else "not available: run --thin 1",
        }
        if self.kept is not None:  # of the rest it is not known which features it is of
            thinned = thinned.drop(columns=["fvu", "fvu_track", "dead_share"])
            return AnalysisResult({"thinned": thinned}, {}, {}, settings, _survival_summary(thinned))
        gaps = _gaps(track, controls)
        admissible = {name: _admissible(part, track) for name, part in gaps.groupby("warm_start")}
        limits = pd.DataFrame([{"warm_start": name, **limit} for name, limit in admissible.items()])
        tables = {"thinned": thinned, "gaps": gaps, "admissible": limits}
        figures = {"density": _figure(thinned, gaps, limits)}
        return AnalysisResult(tables, figures, {}, settings, _summary(thinned, limits), {"density": CAPTION})

    def _survival(self, track: Track, control: Track) -> dict[str, Any]:
        last, reference = control[-1], track.at(control[-1].step)
        both = alive(last) & alive(reference)
        if self.kept is not None:
            both &= self.kept.throughout
        cosines = np.einsum("fd,fd->f", decoder_rows(last), decoder_rows(reference), dtype=np.float64)[both]
        survives = (cosines >= SURVIVES).astype(float)[None]
        mean, low, high = bootstrap_means(survives, np.random.default_rng(self.seed), self.replicates)
        facts = control.facts["control"]
        return {
            "control": control.path.name,
            "thin": facts["thin"],
            "budget": "total" if facts["factor"] > 1 or facts["thin"] == 1 else "next",
            "warm_start": last.metadata["warm_start"],
            "snapshots": len(control),
            "features": int(both.sum()),
            "survival": float(mean[0]),
            "survival_low": float(low[0]),
            "survival_high": float(high[0]),
            "fvu": last.metadata["fvu"],
            "fvu_track": reference.metadata["fvu"],
            "dead_share": last.metadata["dead_share"],
        }


def _gaps(track: Track, controls: list[Track]) -> pd.DataFrame:
    """One row for every stage of the track and of its thinned controls."""
    rows = []
    for series in (track, *controls):
        for after in series:
            before, facts = series.before(after), after.metadata
            if before is None:
                continue
            rows.append(
                {
                    "series": series.path.name,
                    "from_step": before.step,
                    "to_step": after.step,
                    "warm_start": facts["warm_start"],
                    "delta_fvu": facts["fvu_shift"] - before.metadata["fvu"],
                    "rise": facts["fvu_before"] / before.metadata["fvu"] - 1,
                    "retained": facts["functional_correlation_median"],
                    **_median_interval(after.features["functional_correlation"]),
                    "dead_share": facts["dead_share"],
                }
            )
    return pd.DataFrame(rows)


def _median_interval(values: pd.Series) -> dict[str, float]:
    """The 95 % interval of the median over features by order statistics: the ranks that a fair coin leaves between."""
    known = np.sort(values.dropna().to_numpy(dtype=np.float64))
    low, high = np.full(2, np.nan)
    if len(known):
        rank = int(scipy.stats.binom.ppf(0.025, len(known), 0.5))
        low, high = known[max(rank - 1, 0)], known[min(len(known) - rank, len(known) - 1)]
    return {"retained_low": float(low), "retained_high": float(high)}


def _admissible(gaps: pd.DataFrame, track: Track) -> dict[str, Any]:
    """The largest gap over which identity keeps its share of the ceiling, of the series of one warm start."""
    known = gaps.dropna(subset=["rise", "retained"]).sort_values("rise")
    made = chain.from_iterable(one_step_controls(track, "null").values())
    nulls = [control[-1].metadata["functional_correlation_median"] for control in made]
    fitted = isotonic_regression(known["retained"].to_numpy(), increasing=False).x if len(known) else np.array([np.nan])
    ceiling = float(np.median(nulls)) if nulls else float(fitted[0])
    within = known["rise"].to_numpy()[fitted >= KEPT * ceiling] if len(known) else []
    return {
        "ceiling": ceiling,
        "ceiling_from": "null controls" if nulls else "smallest gap",
        "rise": float(max(within)) if len(within) else 0.0,
        "stages": len(known),
        "rank_correlation_rise": _rank_correlation(known, "rise"),
        "rank_correlation_delta_fvu": _rank_correlation(known, "delta_fvu"),
    }


def _rank_correlation(gaps: pd.DataFrame, meter: str) -> float:
    """Spearman's, of a meter of the gap with the identity retained; NaN where either is constant."""
    if gaps[meter].nunique() < 2 or gaps["retained"].nunique() < 2:
        return float("nan")
    return float(scipy.stats.spearmanr(gaps[meter], gaps["retained"]).statistic)


def _figure(thinned: pd.DataFrame, gaps: pd.DataFrame, limits: pd.DataFrame) -> Figure:
    figure, axes = look.small_multiples(2, panel_width=4.0, panel_height=3.2)
    for colour, (name, part) in zip(look.PALETTE, thinned.groupby(["warm_start", "budget"]), strict=False):
        means = part.groupby("thin")[["survival", "survival_low", "survival_high"]].mean()
        axes[0].plot(means.index, means["survival"], marker="o", color=colour, label=", ".join(map(str, name)))
        axes[0].fill_between(means.index, means["survival_low"], means["survival_high"], color=colour, alpha=0.25)
    look.describe(
        axes[0], title="Features that survive to the end", ylabel="share", xlabel="stages of the track in one"
    )
    for colour, (warm_start, part) in zip(look.PALETTE, gaps.groupby("warm_start"), strict=False):
        axes[1].vlines(part["rise"], part["retained_low"], part["retained_high"], color=colour, linewidth=1.0)
        axes[1].scatter(part["rise"], part["retained"], s=16, color=colour, label=str(warm_start))
    for colour, limit in zip(look.PALETTE, limits.sort_values("warm_start")["rise"].to_numpy(), strict=False):
        axes[1].axvline(limit, color=colour, linewidth=0.9, linestyle="--")
    look.describe(
        axes[1],
        title="Identity over a gap (line: admissible)",
        ylabel="functional correlation",
        xlabel="relative rise of FVU",
    )
    look.band_key(axes[0], quartiles=False)
    for ax in axes:
        ax.set_ylim(0, 1)
        look.legend(ax)
    return figure


def _survival_summary(thinned: pd.DataFrame) -> str:
    worst = thinned.sort_values("survival").iloc[0]
    return (
        f"Of the features alive in both, {worst['survival']:.0%} survive in {worst['control']}, the worst of "
        f"{len(thinned)} thinned series."
    )


def _summary(thinned: pd.DataFrame, limits: pd.DataFrame) -> str:
    text = _survival_summary(thinned)
    for limit in limits.itertuples():
        text += (
            f" By {limit.warm_start}, identity keeps {KEPT:.0%} of its ceiling ({limit.ceiling:.2f}, from "
            f"{limit.ceiling_from}) where the FVU after the warm start has risen by no more than {limit.rise:.0%}."
        )
    return text
