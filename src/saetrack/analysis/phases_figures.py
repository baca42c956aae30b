"""The figure of the phases analysis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from . import figures as look

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .phases_cut import Cut


CAPTIONS = {
    "phases": (
        "Points are rates of change, black the level of a phase, red where one ends with its 95 % interval; one phase "
        "is an answer too, a boundary between two LLM checkpoints cannot be placed more finely than they stand, and "
        "another seed would move it further than the interval says."
    )
}


def phases_figure(cuts: Mapping[str, Cut], what: Mapping[str, str], steps: list[int]) -> Figure:
    """Rates per decade of LLM steps, the perspectives under one another, with boundaries and their intervals.

    Points stand in the middle of their interval; bars are two standard errors over features.

    Args:
        cuts: By perspective, on the log-step axis.
        what: By perspective, what the rate counts.
        steps: The track's LLM steps, increasing.
    """
    figure, axes = look.small_multiples(len(cuts), columns=1, panel_width=6.2, panel_height=2.4)
    place = look.step_position(steps)
    for ax, (name, cut) in zip(axes, cuts.items(), strict=True):
        middle = (place[cut.ends - 1] + place[cut.ends]) / 2
        ax.errorbar(
            middle,
            cut.rates,
            yerr=2 * np.nan_to_num(cut.errors),
            fmt="o",
            color=look.BLUE,
            ms=4,
            label="rate, ± 2 standard errors",
        )
        for phase in range(cut.phases):
            inside = cut.ends[cut.label == phase]
            level = cut.levels[cut.label == phase][0]
            span = [place[inside[0] - 1], place[inside[-1]]]
            ax.plot(span, [level, level], color=look.BLACK, label="level of a phase" if phase == 0 else None)
        for boundary, low, high in zip(cut.boundaries, *cut.interval(), strict=True):
            ax.axvspan(place[low], place[high], color=look.VERMILION, alpha=0.15, linewidth=0)
            ax.axvline(place[boundary], color=look.VERMILION, label="boundary and its 95 % interval")
        number = f"{cut.phases} phases" if cut.phases > 1 else "one phase"
        look.describe(ax, title=f"{name}: {number}", ylabel=f"{what[name]}\nper decade")
        look.step_axis(ax, steps)
        look.legend(ax, columns=3)
    return figure
