"""The figures of the identity analysis."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import figures as look

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTIONS = {
    "correlation": (
        "Means over the features alive at both snapshots, with 95 % intervals over features. A curve near its ceiling, "
        "the null steps or the replicas of a stage (left) or a null chain over as many stages (right), says that an "
        "index keeps its meaning as well as training allows; where no such control is drawn the ceiling is not known, "
        "and all is measured on one text."
    ),
    "survival": (
        "The share of the first snapshot's features that kept their identity in every stage, beside what null steps "
        "alone would leave, if stages were independent: drawn as far as every stage has null steps or lies between two "
        "that have. A feature that is kept in every stage may still have drifted to another meaning, which the second "
        "curve shows."
    ),
}
_CURVES = {
    "to_previous": ("to the previous", look.BLUE),
    "null": ("null step", look.VERMILION),
    "replica": ("replica of the stage", look.GREEN),
    "other_feature": ("other feature", look.GREY),
}
_ENDS = {"to_first": ("to the first", look.PURPLE), "to_last": ("to the last", look.ORANGE)}


def correlation_figure(curves: pd.DataFrame, steps: list[int]) -> Figure:
    """Functional correlation with the neighbour, beside its ceilings, and with both ends.

    Args:
        curves: The analysis' table ``curves``.
        steps: The track's LLM steps.
    """
    figure, axes = look.small_multiples(2, panel_width=4.2, panel_height=3.4, sharey=True, legend_rows=3)
    titles = ("Same index in neighbouring snapshots", "Same index at both ends of the track")
    for ax, shown, title in zip(axes, (_CURVES, _ENDS), titles, strict=True):
        for comparison, (label, colour) in shown.items():
            rows = curves[curves["comparison"] == comparison].set_index("step").reindex(steps)
            if rows["mean"].notna().any():
                look.band(ax, steps, rows["low"], rows["high"], color=colour, alpha=0.35)
                line = {"linestyle": "" if comparison in ("null", "replica") else "-"}
                look.line(ax, steps, rows["mean"], color=colour, label=label, **line)
        _draw_chains(ax, curves[curves["comparison"].isin(shown)], steps)
        look.describe(ax, title=title, ylabel="mean functional correlation")
        look.step_axis(ax, steps)
        look.band_key(ax, quartiles=False)
        look.legend(ax)
    axes[0].set_ylim(-0.05, 1.02)
    return figure


def _draw_chains(ax: Axes, curves: pd.DataFrame, steps: list[int]) -> None:
    """What null chains reach over as many stages, once for each end."""
    label: str | None = "null chain, as many stages"
    for comparison in _ENDS:
        rows = curves[curves["comparison"] == comparison].set_index("step").reindex(steps)
        if rows["chain"].notna().any():
            look.band(ax, steps, rows["chain_low"], rows["chain_high"], color=look.GREY, alpha=0.35)
            look.line(ax, steps, rows["chain"], color=look.GREY, label=label, linestyle="--")
            label = None


def survival_figure(survival: pd.DataFrame) -> Figure:
    """Share of the first snapshot's features that still are what they were.

    Args:
        survival: The analysis' table ``survival``.
    """
    figure, (ax,) = look.small_multiples(1, panel_width=5.0, panel_height=3.4)
    steps = survival["step"].tolist()
    lines = {
        "unbroken": ("kept in every stage", look.BLUE),
        "like_first": ("still correlated with the first", look.PURPLE),
        "null": ("what null steps alone would leave", look.VERMILION),
    }
    for name, (label, colour) in lines.items():
        if survival[name].notna().any():
            if f"{name}_low" in survival:
                look.band(ax, steps, survival[f"{name}_low"], survival[f"{name}_high"], color=colour, alpha=0.3)
            look.line(ax, steps, survival[name], color=colour, label=label)
    ax.set_ylim(0, 1.03)
    look.describe(ax, title="Survival of identity from the first snapshot", ylabel="share of its features")
    look.step_axis(ax, steps)
    look.band_key(ax, quartiles=False)
    look.legend(ax)
    return figure
