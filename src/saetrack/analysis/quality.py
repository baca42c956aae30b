"""Quality of every snapshot: how much of the activations and of the LLM's loss its SAE keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.ticker import PercentFormatter

from . import figures
from .base import Analysis, AnalysisResult
from .controls import controls_of, one_step_controls, scratch_controls
from .places import place_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from saetrack.track import Snapshot, Track

_COLUMNS = (
    "position",
    "step",
    "tokens",
    "tokens_trained",
    "warm_start",
    "from_step",
    "fvu",
    "fvu_before",
    "fvu_shift",
    "explained_variance",
    "l0",
    "dead_share",
    "dense_share",
    "ce_clean",
    "ce_sae",
    "ce_zero",
    "ce_mean",
    "ce_recovered_zero",
    "ce_recovered_mean",
)
_SCALARS = (
    "fvu",
    "fvu_before",
    "fvu_shift",
    "explained_variance",
    "l0",
    "dead_share",
    "dense_share",
    "ce_recovered_zero",
    "ce_recovered_mean",
    "functional_correlation_median",
)
_CONTROLLED = ("fvu", "l0", "dead_share", "dense_share", "ce_recovered_zero", "ce_recovered_mean")
_CONTROLS = {
    "null": ("null", figures.GREY, "x"),
    "scratch-next": ("fresh", figures.PURPLE, "D"),
    "scratch-first": ("fresh, long", figures.ORANGE, "D"),
}
_OFF_SCALE = (-0.25, 1.25)
CAPTION = (
    "Lower FVU and a recovered share nearer to 1 say that the SAE keeps more of the LLM (functional correlation: "
    "median and quartiles over the features that fire at both snapshots; points, where there are controls: null, the "
    "same LLM checkpoint once more; fresh, a new SAE with as many tokens, or with those of the first stage). They "
    "cannot say that features mean something, and an LLM checkpoint that is easier to reconstruct has a lower FVU "
    "with the same features."
)


class Quality(Analysis):
    """Quality of every snapshot: FVU, L0, dead and dense features, CE loss recovered, functional correlation.

    All numbers were measured on the evaluation split when the snapshot was written; this puts them side by side.
    ``fvu_shift`` is the FVU of the SAE that the stage began from, as it was, on the new LLM checkpoint; ``fvu_before``
    that of the warm start before any training; ``fvu`` that of the snapshot. The functional correlation of a feature is
    the Pearson correlation of its latent with the snapshot that the stage began from (``from_step``: a later LLM step
    where the series was trained backward) on the same rows, each SAE on its own LLM checkpoint; its
    quartiles are over features whose firing frequency is above a threshold in both snapshots. Where there are random
    controls, the FVU on LLMs that were never trained is beside the curve, after as many tokens as the first snapshot.

    Where the track has null or scratch controls, the table ``controls`` has what they reach at the LLM checkpoint that
    they were trained on: the mean over the runs of a kind, and ``_low`` and ``_high``, their range. With scratch
    controls ``tokens_to_reach`` has the tokens after which a fresh SAE has the held-out FVU of the track's.

    Args:
        min_firing_frequency: Features that fire on no larger a share of the evaluation positions, in this snapshot or
            in the one before, are left out of the quartiles of the functional correlation.
    """

    def __init__(self, min_firing_frequency: float = 1e-4) -> None:
        if not 0 <= min_firing_frequency < 1:
            raise ValueError(
                f"min_firing_frequency is {min_firing_frequency}; it is a share of positions, expected 0 <= it < 1."
            )
        self.min_firing_frequency = min_firing_frequency

    def run(self, track: Track) -> AnalysisResult:
        """Collect the table, draw it, and give its columns as scalars."""
        table = track.metrics()
        if "fvu" not in table:
            raise ValueError(
                f"{track.path} was imported, so nothing was measured when its snapshots were written; quality needs a "
                "track that `saetrack fit` wrote. `saetrack fit --model.start` begins one from an imported SAE."
            )
        table = table.reindex(columns=list(_COLUMNS))
        numbers = [column for column in _COLUMNS if column != "warm_start"]
        table[numbers] = table[numbers].apply(pd.to_numeric)
        identity = [self._identity(track.before(snapshot), snapshot) for snapshot in track]
        table = pd.concat([table, pd.DataFrame(identity)], axis=1)
        controls, reached = _control_table(track), _tokens_to_reach(track)
        title = f"{str(track.facts['model']).rstrip('/').split('/')[-1]}, {track.facts['hookpoint']}"
        untrained = [control[-1].metadata["fvu"] for control in controls_of(track, "random")]
        return AnalysisResult(
            tables={"quality": table}
            | ({} if controls.empty else {"controls": controls})
            | ({} if reached.empty else {"tokens_to_reach": reached}),
            figures={"quality": _figure(table, controls, untrained, title)},
            scalars={name: _by_step(table, name) for name in _SCALARS},
            settings={
                "min_firing_frequency": self.min_firing_frequency,
                "split": "evaluation",
                "fvu_random_llm": untrained,
            },
            summary=_summary(table, self.min_firing_frequency),
            captions={"quality": CAPTION},
        )

    def _identity(self, before: Snapshot | None, now: Snapshot) -> dict[str, float]:
        """Quartiles of the functional correlation with the previous snapshot, and the number of features in them."""
        names = ("functional_correlation_low", "functional_correlation_median", "functional_correlation_high")
        if before is None:
            return {**dict.fromkeys(names, np.nan), "features_compared": 0}
        alive = [s.features["firing_frequency"].to_numpy() > self.min_firing_frequency for s in (before, now)]
        r = now.features["functional_correlation"].to_numpy(dtype=np.float64)[alive[0] & alive[1]]
        r = r[np.isfinite(r)]
        quartiles = np.quantile(r, [0.25, 0.5, 0.75]).tolist() if len(r) else [np.nan] * 3
        return {**dict(zip(names, quartiles, strict=True)), "features_compared": len(r)}


def _control_table(track: Track) -> pd.DataFrame:
    """What null and scratch controls reach, by kind and LLM step; empty without any."""
    nulls = [control[-1] for runs in one_step_controls(track, "null").values() for control in runs]
    found = {"null": nulls}
    for budget, controls in scratch_controls(track).items():
        found[f"scratch-{budget}"] = [snapshot for control in controls for snapshot in control]
    rows = [
        {"control": kind, "step": snapshot.step} | {name: snapshot.metadata[name] for name in _CONTROLLED}
        for kind, snapshots in found.items()
        for snapshot in snapshots
    ]
    if not rows:
        return pd.DataFrame()
    runs = pd.DataFrame(rows).astype(dict.fromkeys(_CONTROLLED, np.float64)).groupby(["control", "step"])
    table = runs.size().to_frame("runs")
    for name in _CONTROLLED:
        table[name], table[f"{name}_low"], table[f"{name}_high"] = runs[name].mean(), runs[name].min(), runs[name].max()
    return table.reset_index()


def _tokens_to_reach(track: Track) -> pd.DataFrame:
    """How many tokens an SAE from scratch needs to reach the held-out FVU of the track's at the same LLM checkpoint.

    From the held-out curves of both, the logarithm of the FVU interpolated over that of the tokens; NaN where it does
    not get there with its budget. ``spent`` is what the track's series had been given by then.
    """
    rows = []
    for snapshot in track:
        spent = sum(int(s.metadata["tokens_trained"]) for s in track if s.number <= snapshot.number)
        curve: list[list[float]] = snapshot.metadata.get("held_out_curve") or []
        for budget, controls in scratch_controls(track).items() if curve else ():
            for control in controls:
                fresh = (
                    control.at(snapshot.step).metadata.get("held_out_curve") if snapshot.step in control.steps else None
                )
                if fresh:
                    row = {"step": snapshot.step, "budget": budget, "control": control.path.name, "fvu": curve[-1][1]}
                    row |= {"tokens_warm": curve[-1][0], "tokens": _crossing(np.array(fresh), curve[-1][1])}
                    rows.append({**row, "tokens_given": fresh[-1][0], "fvu_scratch": fresh[-1][1], "spent": spent})
    return pd.DataFrame(rows)


def _crossing(curve: np.ndarray, fvu: float) -> float:
    """Tokens at which a curve ``[n, 2]`` of tokens and FVU first falls to a value; NaN where it does not."""
    below = curve[:, 1] <= fvu
    if not below.any():
        return float("nan")
    at = int(below.argmax())
    if not at:
        return float(curve[0, 0])
    (tokens, before), (later, after) = np.log(curve[at - 1 : at + 1])
    return float(np.exp(tokens + (later - tokens) * (before - np.log(fvu)) / (before - after)))


def _by_step(table: pd.DataFrame, name: str) -> dict[int, float]:
    known = table[table[name].notna()]
    return {int(step): float(value) for step, value in zip(known["step"], known[name], strict=True)}


def _summary(table: pd.DataFrame, least: float) -> str:
    names, first, last = place_names(table["step"].tolist()), table.iloc[0], table.iloc[-1]
    count = "1 snapshot" if len(table) == 1 else f"{len(table)} snapshots"
    span = f"{names[0].replace('step', 'steps')} to {names[-1].removeprefix('LLM step ')}"
    text = (
        f"{count}, {span if len(table) > 1 else names[0]}: FVU {first['fvu']:.3f} at the first and "
        f"{last['fvu']:.3f} at the last, where L0 is {last['l0']:.1f}, {last['dead_share']:.1%} of the features are "
        "dead."
    )
    if np.isfinite(last["ce_recovered_zero"]):
        text += f" {last['ce_recovered_zero']:.1%} of the CE loss is recovered there (against zero ablation)."
    if table["functional_correlation_median"].notna().any():
        at = int(np.nanargmin(table["functional_correlation_median"]))
        text += (
            f" The functional correlation with the snapshot before has its lowest median at {names[at]}: "
            f"{table['functional_correlation_median'].iloc[at]:.2f}, over the {table['features_compared'].iloc[at]} "
            f"features that fire on more than {least:g} of the positions at both ends."
        )
    return text


def _figure(table: pd.DataFrame, controls: pd.DataFrame, untrained: list[float], name: str) -> Figure:
    steps = table["step"].tolist()
    figure, axes = figures.small_multiples(6, columns=3, title=f"SAE quality through the training of {name}")
    _draw_fvu(axes[0], table, controls, untrained, steps)
    _draw_recovered(axes[1], table, steps)
    for name, label, color in (
        ("ce_clean", "as it is", figures.BLACK),
        ("ce_sae", "with the SAE", figures.BLUE),
        ("ce_mean", "mean ablation", figures.ORANGE),
        ("ce_zero", "zero ablation", figures.VERMILION),
    ):
        figures.line(axes[2], steps, table[name], color=color, label=label)
    figures.describe(axes[2], title="Loss of the LLM", ylabel="cross entropy (nats)")
    figures.legend(axes[2])
    figures.line(axes[3], steps, table["l0"], color=figures.BLUE)
    axes[3].set_ylim(0, 1.15 * max(float(table["l0"].max()), 1.0))
    figures.describe(axes[3], title="Active latents per token", ylabel="L0")
    figures.line(axes[4], steps, table["dead_share"], color=figures.VERMILION, label="dead")
    figures.line(axes[4], steps, table["dense_share"], color=figures.SKY, label="dense")
    axes[4].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes[4].set_ylim(bottom=0, top=max(0.02, 1.15 * float(table[["dead_share", "dense_share"]].max().max())))
    figures.describe(axes[4], title="Dead and dense features", ylabel="share of all features")
    figures.legend(axes[4])
    _draw_identity(axes[5], table, steps)
    for ax in axes:
        figures.step_axis(ax, steps)
    return figure


def _draw_fvu(ax: Axes, table: pd.DataFrame, controls: pd.DataFrame, untrained: list[float], steps: list[int]) -> None:
    shift, before = table["fvu_shift"], table["fvu_before"]
    if not np.allclose(shift.dropna(), before[shift.notna()], rtol=1e-6):
        figures.line(ax, steps, shift, color=figures.GREY, label="SAE before", linestyle=":", marker="s")
    if untrained:
        ax.axhline(float(np.mean(untrained)), color=figures.BLACK, linewidth=1.0, linestyle="-.", label="random LLM")
    figures.line(ax, steps, before, color=figures.VERMILION, label="warm start", linestyle="--")
    figures.line(ax, steps, table["fvu"], color=figures.BLUE, label="trained")
    for kind, rows in controls.groupby("control") if len(controls) else ():
        label, color, marker = _CONTROLS[str(kind)]
        figures.line(ax, rows["step"], rows["fvu"], color=color, label=label, linestyle="", marker=marker, markersize=5)
        ax.vlines(figures.step_position(rows["step"]), rows["fvu_low"], rows["fvu_high"], color=color, linewidth=1.2)
    figures.log_y(ax)
    figures.describe(ax, title="Variance left out", ylabel="FVU (log scale)")
    figures.legend(ax, columns=3)


def _draw_recovered(ax: Axes, table: pd.DataFrame, steps: list[int]) -> None:
    """Recovered shares, cut off where an untrained LLM makes them meaningless: ablation then changes no loss."""
    low, high = _OFF_SCALE
    off_scale = False
    for name, label, color in (
        ("ce_recovered_zero", "vs. zero ablation", figures.VERMILION),
        ("ce_recovered_mean", "vs. mean ablation", figures.ORANGE),
    ):
        values = table[name].to_numpy(dtype=np.float64)
        off_scale |= bool(((values < low) | (values > high)).any())
        inside = np.where((values >= low) & (values <= high), values, np.nan)
        figures.line(ax, steps, inside, color=color, label=label)
        for edge, beyond, marker in ((low, values < low, "v"), (high, values > high, "^")):
            ax.plot(
                figures.step_position(steps)[beyond], np.full(beyond.sum(), edge), marker, color=color, clip_on=False
            )
    ax.set_ylim(low if (table[["ce_recovered_zero", "ce_recovered_mean"]] < 0).any(axis=None) else 0.0, high)
    ax.axhline(1.0, color=figures.GREY, linewidth=0.8)
    figures.describe(ax, title="CE loss recovered", ylabel="share" + (" (triangles: off scale)" if off_scale else ""))
    figures.legend(ax)


def _draw_identity(ax: Axes, table: pd.DataFrame, steps: list[int]) -> None:
    low, high = table["functional_correlation_low"], table["functional_correlation_high"]
    figures.band(ax, steps, low, high, color=figures.GREEN, label="quartiles")
    figures.line(ax, steps, table["functional_correlation_median"], color=figures.GREEN, label="median")
    ax.set_ylim(min(0.0, float(np.nan_to_num(low).min()) - 0.05), 1.02)
    figures.describe(ax, title="Identity since the snapshot before", ylabel="functional correlation")
    figures.legend(ax)
