"""The figures of the causal analysis."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.ticker import PercentFormatter

from . import figures as look

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTIONS = {
    "effects": (
        "What ablating a feature does, mean over the sampled features that fire in enough documents at that "
        "checkpoint, beside the same ablation in the direction of another living feature. Above: the loss on the "
        "text; below: how far the LLM's predictions move. Middle: the difference of the two. Right: for how many "
        "features a test over documents finds one (maxT over checkpoints, Benjamini-Hochberg over features). "
        "Bands: 95 % intervals, over features in the first two columns. The features were drawn among those that "
        "live at the last checkpoint, so those that died before are not in it; and a small effect on the loss may "
        "be a large one elsewhere."
    ),
    "features": (
        "How far the predictions move, for every estimated feature against the null, nats for each firing; lines "
        "are 95 % intervals over documents. Off the diagonal, the feature's direction does more or less than "
        "another feature's in its place. Filled: more, significantly."
    ),
}
_MEASURES = {"loss": ("Loss", "rise of loss (nats)"), "divergence": ("Predictions", "divergence (nats)")}


def effects_figure(population: pd.DataFrame, steps: list[int]) -> Figure:
    """For each measure: mean effect beside its null, the excess, and the share of features with one, by step.

    Args:
        population: The analysis' table ``population``.
        steps: LLM steps, increasing.
    """
    figure, axes = look.small_multiples(6, columns=3, title="What the LLM does without a feature, per firing")
    for (measure, (name, unit)), panels in zip(_MEASURES.items(), (axes[:3], axes[3:]), strict=True):
        part = population[population["measure"] == measure]
        by = {quantity: rows.sort_values("step") for quantity, rows in part.groupby("quantity")}
        _curve(panels[0], by["null"], look.GREY, "another direction")
        _curve(panels[0], by["effect"], look.BLUE, "the feature")
        look.describe(panels[0], title=f"{name}: mean-ablated", ylabel=unit)
        excess = by["excess"]
        look.band(panels[1], excess["step"], excess["q25"], excess["q75"], color=look.GREEN, alpha=0.14)
        _curve(panels[1], excess, look.GREEN, "mean")
        panels[1].axhline(0.0, color=look.GREY, linewidth=0.8)
        look.describe(panels[1], title=f"{name}: feature minus other direction", ylabel=unit)
        look.band_key(panels[1])
        _curve(panels[2], by["significant"], look.PURPLE, "share, 95 % interval")
        panels[2].set_ylim(0, 1)
        panels[2].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        look.describe(panels[2], title=f"{name}: significantly more", ylabel="share of features")
    for ax in axes:
        look.step_axis(ax, steps)
        look.legend(ax)
    return figure


def _curve(ax: Axes, rows: pd.DataFrame, color: str, label: str) -> None:
    look.band(ax, rows["step"], rows["low"], rows["high"], color=color, alpha=0.4)
    look.line(ax, rows["step"], rows["mean"], color=color, label=label)


def features_figure(effects: pd.DataFrame, steps: list[int]) -> Figure:
    """Divergence against its null for every feature, at the first, the middle and the last checkpoint.

    Args:
        effects: The analysis' table ``causal``.
        steps: LLM steps, increasing.
    """
    shown = [steps[i] for i in sorted({0, len(steps) // 2, len(steps) - 1})]
    title = "How far predictions move, feature by feature"
    figure, axes = look.small_multiples(len(shown), columns=3, sharex=True, sharey=True, title=title)
    known = effects[(effects["measure"] == "divergence") & (effects["effect"] > 0) & (effects["null"] > 0)]
    known = known[known["step"].isin(shown)]
    ends = known[["effect_low", "effect_high", "null_low", "null_high"]].to_numpy()
    low, high = (ends[ends > 0].min() / 1.5, ends.max() * 1.5) if (ends > 0).any() else (1e-6, 1.0)
    for ax, step in zip(axes, shown, strict=True):
        rows = known[known["step"] == step]
        ax.plot([low, high], [low, high], color=look.GREY, linewidth=0.8)
        ax.hlines(rows["effect"], rows["null_low"], rows["null_high"], color=look.GREY, alpha=0.5, linewidth=0.8)
        ax.vlines(rows["null"], rows["effect_low"], rows["effect_high"], color=look.BLUE, alpha=0.5, linewidth=0.8)
        for significant, face in ((True, look.BLUE), (False, "white")):
            part = rows[rows["significant"] == significant]
            label = "significantly more" if significant else "not so"
            ax.scatter(part["null"], part["effect"], s=16, color=face, edgecolors=look.BLUE, label=label, zorder=3)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlim(low, high)
        ax.set_ylim(low, high)
        units = {"ylabel": "the feature (nats)", "xlabel": "another direction (nats)"}
        look.describe(ax, title=f"Step {look.step_label(step)}", **units)
        look.legend(ax)
    return figure
