"""The report's figures in matplotlib, for a notebook or a paper: ``track.plot``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import PercentFormatter

from saetrack.analysis import figures as look

from .data import Results
from .features import ADJACENT_DRIFT, WAY_TO_LAST, columns, curves
from .overview import section

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from saetrack.track import Track

    Drawn = dict[str, Any]

_WIDTH, _HEIGHT = 4.2, 2.8  # inches of a panel, without the rows of its legend
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (2, 2)), (0, (7, 2, 2, 2)))
_NULL_DASHES: tuple[Any, ...] = ((0, (3, 3)), (0, (1, 2)), (0, (7, 2, 2, 2)), (0, (10, 3)))
_NULL_MARKERS = ("o", "D", "s", "^")


class Plots:
    """The report's figures as matplotlib figures; ``track.plot`` is one.

    They are drawn from the results under ``analyses/`` and from the snapshots, with the intervals and the nulls that
    are there. Bands are named in the legend; what is grey is a null or a baseline. A notebook shows what is returned,
    and its ``savefig`` saves it.

    Args:
        track: The track, opened for reading.
    """

    def __init__(self, track: Track) -> None:
        self.track = track
        self._results = Results(track)

    def quality(self) -> Figure:
        """FVU, L0, dead features, loss recovered and identity by LLM step, with the controls that the track has.

        Raises:
            FileNotFoundError: If the analysis was not run; the message says how to run it.
        """
        return self._draw(self._section("quality"), "Quality of the SAEs", "quality")

    def formation(self) -> Figure:
        """Share of the features formed by each LLM step and their progress, beside random positions.

        Raises:
            FileNotFoundError: If the analysis was not run; the message says how to run it.
        """
        return self._draw(self._section("formation"), "Formation of features", "formation")

    def drift(self, features: Sequence[int] | None = None) -> Figure:
        """How far decoder rows turn and how they come to their last direction, of all features or of some.

        Args:
            features: Indices of features to draw beside the quartiles of all, each with its own nulls, dotted: its
                drift where the LLM did not change (needs null controls), and its way to the last direction if its
                turns were independent. None for the population.

        Raises:
            FileNotFoundError: If the analysis was not run; the message says how to run it.
            ValueError: If there are none or more than five features, or the SAE has not got one.
        """
        panels = self._section("drift")
        if features is None:
            return self._draw(panels, "Drift of decoder rows", "drift")
        chosen = self.track.indices(features)
        if not 1 <= len(chosen) <= 5:
            raise ValueError(f"drift draws 1 to 5 features beside each other, but features names {len(chosen)}.")
        of_all = curves(self._results)
        own = [{figure["title"]: figure for figure in of_all.of(feature)} for feature in chosen]
        beside = []
        for title, whole in zip((ADJACENT_DRIFT, WAY_TO_LAST), panels[:2], strict=True):
            lines = [line | {"null": True} for line in whole["lines"] if line["name"] == "median feature"]
            for feature, colour, figures in zip(chosen, look.PALETTE, own, strict=False):
                for line in figures[title]["lines"]:
                    if line["name"] != "as it is":
                        name = f"{feature}, {line['name']}" if line["null"] else f"feature {feature}"
                        lines.append(line | {"name": name, "colour": colour})
            beside.append(whole | {"lines": lines})
        return self._draw(beside, f"Drift of features {', '.join(map(str, chosen))}", "drift")

    def feature(self, index: int) -> Figure:
        """One feature through training: the curves of its page, those whose analysis was run.

        Args:
            index: Of the feature.

        Raises:
            ValueError: If the SAE has not got it.
        """
        (index,) = self.track.indices([index])
        title, token = f"Feature {index}", self._results.grid("semantics", "features", "top_token")
        if token is not None and token[index, -1] is not None:
            title += f", top token {look.printable(token[index, -1])}"
        status = self._results.by_feature("formation", "features", "status")
        title += f"; formation: {status[index]}" if status is not None else ""
        panels = curves(self._results).of(index)
        values = columns(self._results).values
        formed = [float(values[n][index]) for n in ("formed", "formed_low", "formed_high") if n in values]
        if np.isfinite(formed[:1]).any():
            formed = formed if np.isfinite(formed).all() else formed[:1]
            title += f", step {formed[0]:,.0f}"
            title += f" (95 % interval {formed[1]:,.0f} to {formed[2]:,.0f})" if len(formed) == 3 else ""
            panels = [panel | {"formed": formed} if panel.get("marks") == "formed" else panel for panel in panels]
        return self._draw(panels, title, "formation", "drift", "semantics")

    def _section(self, analysis: str) -> list[Drawn]:
        found = section(self._results, analysis)
        if "class" in found:
            path = self.track.path
            raise FileNotFoundError(
                f"{path} holds no results of {analysis}. Run `saetrack analyze {path} --analyses+={found['class']}`."
            )
        panels: list[Drawn] = [figure for figure in found["figures"] if figure["kind"] == "lines"]
        if not panels:
            raise ValueError(f"{self.track.path} holds nothing to draw of {analysis}: {found['summary']}")
        return panels

    def _draw(self, panels: list[Drawn], title: str, *analyses: str) -> Figure:
        old = self._results.outdated()
        title += "".join(f"\nold result of {name}: {old[name]['text']}" for name in analyses if name in old)
        rows = max(len(panel["lines"]) for panel in panels)
        height = _HEIGHT + look.LEGEND_ROW * rows
        columns = 2 if len(panels) in (2, 4) else 3
        figure, axes = look.small_multiples(
            len(panels), columns=columns, title=title, panel_width=_WIDTH, panel_height=height, legend_rows=rows
        )
        for ax, panel in zip(axes, panels, strict=True):
            _draw_panel(ax, panel, self.track.steps)
        return figure


def _draw_panel(ax: Axes, panel: Drawn, steps: list[int]) -> None:
    for place, line in enumerate(panel["lines"]):
        colour = line.get("colour") or (look.GREY if line["null"] else look.PALETTE[place % len(look.PALETTE)])
        kind = int(line["null"]) if "colour" in line else place % 4
        shape: dict[str, Any] = {"linestyle": _DASHES[kind]}
        if line["null"]:
            shape = {"linestyle": _NULL_DASHES[kind], "marker": _NULL_MARKERS[kind], "linewidth": 1.1}
        label = line["name"]
        if line.get("low") is not None:
            look.band(ax, steps, _numbers(line["low"]), _numbers(line["high"]), color=colour)
            label += f" (band: {line['band']})"
        look.line(ax, steps, _numbers(line["values"]), color=colour, label=label, **shape)
    if "formed" in panel:
        at, *interval = look.step_position(panel["formed"])
        ax.axvline(at, color=look.VERMILION, linewidth=1.2, linestyle="--", label="formed, with its 95 % interval")
        if interval:
            ax.axvspan(*interval, color=look.VERMILION, alpha=0.1, linewidth=0, zorder=0)
    _limit(ax, *panel.get("domain", (None, None)))
    if panel.get("percent"):
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    look.describe(ax, title=panel["title"], ylabel=panel["y"])
    look.step_axis(ax, steps)
    look.legend(ax, columns=1)


def _numbers(values: Any) -> NDArray[np.float64]:
    return np.array(values, dtype=np.float64)  # None becomes NaN


def _limit(ax: Axes, low: float | None, high: float | None) -> None:
    """Fixed ends of the y axis, with room for the dots on them; what is drawn beyond an end moves it."""
    bottom, top = ax.get_ylim()
    low, high = bottom if low is None else low, top if high is None else max(high, ax.dataLim.y1)
    room = 0.03 * (high - low)
    ax.set_ylim(low - room if low != bottom else low, high + room if high != top else high)
