"""The figures of the identity analysis."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import figures as look

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

CAPTIONS = {
    "correlation": (
        "A curve near its ceiling, the null steps or the replicas, says that an index keeps its meaning over a stage "
        "as well as training allows; it cannot say so over many stages, which the ends (right) show, and it is "
        "measured on one text."
    ),
    "survival": (
        "The share of the first features that kept their identity in every stage, beside what unchanged LLMs would "
        "leave; a feature that is kept in every stage may still have drifted to another meaning, which the second "
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
        look.describe(ax, title=title, ylabel="mean functional correlation")
        look.step_axis(ax, steps)
        look.band_key(ax, quartiles=False)
        look.legend(ax)
    axes[0].set_ylim(-0.05, 1.02)
    return figure


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
