"""The shared look of saetrack's figures: size, colours, the axis of LLM steps, bands.

Figures are made as `matplotlib.figure.Figure`, never through pyplot, so nothing stays open and no display is needed.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

# Okabe & Ito (2008), "Color Universal Design": told apart with every common form of colour blindness.
BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
VERMILION = "#D55E00"
PURPLE = "#CC79A7"
SKY = "#56B4E9"
BLACK = "#000000"
GREY = "#7F7F7F"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)

PANEL_WIDTH, PANEL_HEIGHT = 3.5, 2.9  # inches, margins included
STEP_LABEL = "LLM training step"
_MARGINS = (0.68, 0.12, 0.3, 0.5)  # inches: left, right, above, below a panel; below without the rows of its legend
LEGEND_ROW = 0.16  # inches
_HEADING = 0.32  # inches
_TITLE_SIZE, _LABEL_SIZE, _TICK_SIZE = 9.5, 9.0, 8.0


class ShownFigure(Figure):
    """A figure that a notebook shows; by itself it shows only those of pyplot."""

    def _repr_png_(self) -> bytes:
        """The figure as PNG, for IPython."""
        picture = io.BytesIO()
        self.savefig(picture, format="png", bbox_inches="tight", dpi=96)
        return picture.getvalue()


def small_multiples(
    panels: int,
    *,
    columns: int = 2,
    title: str | None = None,
    panel_width: float = PANEL_WIDTH,
    panel_height: float = PANEL_HEIGHT,
    sharex: bool = False,
    sharey: bool = False,
    legend_rows: int = 2,
) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels, filled row by row.

    Args:
        panels: Number of panels; unused places of the last row stay empty.
        columns: Panels in a row.
        title: Title of the whole figure.
        panel_width: Inches.
        panel_height: Inches.
        sharex: Whether all panels have one x axis.
        sharey: Whether all panels have one y axis.
        legend_rows: Room below each panel for so many rows of legend.

    Returns:
        The figure and its panels.
    """
    columns = min(columns, panels)
    rows = -(-panels // columns)
    width, height = columns * panel_width, rows * panel_height + (_HEADING if title else 0.0)
    left, right, above, below = _MARGINS
    below += LEGEND_ROW * legend_rows
    inner_width, inner_height = panel_width - left - right, panel_height - above - below
    figure = ShownFigure(figsize=(width, height), dpi=120)
    # Margins in inches: an automatic layout lets long labels and legends squeeze the panels, down to nothing.
    grid = figure.add_gridspec(
        rows,
        columns,
        left=left / width,
        right=1 - right / width,
        bottom=below / height,
        top=1 - (above + (_HEADING if title else 0.0)) / height,
        wspace=(left + right) / inner_width,
        hspace=(above + below) / inner_height,
    )
    axes: list[Axes] = list(grid.subplots(squeeze=False, sharex=sharex, sharey=sharey).ravel())
    for spare in axes[panels:]:
        spare.remove()
    axes = axes[:panels]
    for ax in axes:
        style(ax)
    if title:
        place = (left / width, 1 - 0.06 / height)
        figure.text(*place, title, fontsize=_TITLE_SIZE + 1.5, fontweight="bold", va="top", parse_math=False)
    return figure, axes


def style(ax: Axes) -> None:
    """Light grid, no frame above and to the right."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(visible=True, color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=_TICK_SIZE, length=3)


def describe(ax: Axes, *, title: str, ylabel: str, xlabel: str | None = None) -> None:
    """Title and axis labels in the shared sizes. Units belong in the labels."""
    ax.set_title(title, fontsize=_TITLE_SIZE, loc="left")
    ax.set_ylabel(ylabel, fontsize=_LABEL_SIZE)
    if xlabel is not None:
        ax.set_xlabel(xlabel, fontsize=_LABEL_SIZE)


def legend(ax: Axes, *, columns: int = 2) -> None:
    """A legend below the panel and its x label, where it hides no curve; call it after everything was drawn.

    Args:
        ax: The panel.
        columns: Entries in a row; a row has room for about 40 letters.
    """
    below_label = ax.transAxes + ScaledTranslation(0.0, -0.42, ax.get_figure(root=True).dpi_scale_trans)  # type: ignore[union-attr]
    ax.legend(
        loc="upper center",
        bbox_to_anchor=(0.45, 0.0),
        bbox_transform=below_label,
        ncols=columns,
        fontsize=_TICK_SIZE,
        frameon=False,
        columnspacing=1.2,
        handlelength=1.8,
        borderaxespad=0.0,
        borderpad=0.0,
        labelspacing=0.3,
    )


def step_position(steps: ArrayLike) -> np.ndarray:
    """Place of LLM steps on the axis, ``log10(step + 1)``: step 0 has one, and early training has room.

    Example:
        >>> step_position([0, 9, 99]).tolist()
        [0.0, 1.0, 2.0]
    """
    return np.log10(np.asarray(steps, dtype=np.float64) + 1.0)


def step_label(step: int) -> str:
    """A step as a short label.

    Example:
        >>> [step_label(s) for s in (0, 512, 1000, 23_000, 1_500, 143_000, 2_000_000)]
        ['0', '512', '1k', '23k', '1.5k', '143k', '2M']
    """
    for size, letter in ((1_000_000, "M"), (1_000, "k")):
        if step >= size:
            return f"{step / size:.4g}{letter}" if step % (size // 10) == 0 else f"{step:,}"
    return str(step)


def step_axis(ax: Axes, steps: Sequence[int], *, label: str = STEP_LABEL, min_gap: float = 0.085) -> None:
    """Make x the axis of LLM steps: position ``log10(step + 1)``, ticks at steps that are in the track.

    Every step gets a small tick; those that have room get a label (the last one always does).

    Args:
        ax: The panel. Plot against `step_position(steps)`.
        steps: The track's LLM steps, in any order.
        label: Label of the axis.
        min_gap: Least distance between two labels, as a share of the axis.
    """
    steps = sorted(steps)
    places = step_position(steps)
    span = max(float(places[-1] - places[0]), 1e-9)
    labelled: list[int] = []
    for i in reversed(range(len(steps))):
        width = 0.5 + 0.15 * (len(step_label(steps[i])) + (len(step_label(steps[labelled[-1]])) if labelled else 0))
        if not labelled or (places[labelled[-1]] - places[i]) / span >= min_gap * width:
            labelled.append(i)
    labelled.reverse()
    ax.set_xticks(places[labelled], [step_label(steps[i]) for i in labelled])
    ax.set_xticks(places, minor=True)
    ax.tick_params(axis="x", which="minor", length=2)
    margin = 0.03 * span if len(steps) > 1 else 0.5
    ax.set_xlim(float(places[0]) - margin, float(places[-1]) + margin)
    ax.set_xlabel(label, fontsize=_LABEL_SIZE)


def say_order(figure: Figure, trained: Sequence[int]) -> None:
    """Say at the foot of a figure over LLM steps that its SAEs were not trained in their order.

    Args:
        figure: The figure.
        trained: The LLM steps in the order of training.
    """
    order = sorted(trained, reverse=True)
    said = f"backward, from LLM step {order[0]} to {order[-1]}"
    if list(trained) != order:
        said = f"in the order of the LLM steps {', '.join(map(str, trained))}"
    foot(figure, f"SAEs trained {said}.")


def foot(figure: Figure, text: str, *, size: float = _TICK_SIZE) -> None:
    """Write below all that a figure shows so far, from its left edge."""
    drawn = figure.get_tightbbox()  # in inches
    x, y = drawn.x0 / figure.get_figwidth(), (drawn.y0 - 0.08) / figure.get_figheight()
    figure.text(x, y, text, fontsize=size, va="top", parse_math=False)


def label_places(figure: Figure) -> None:
    """Say of a figure that was drawn over places in a track, and not over LLM steps, what its axes are."""
    for ax in figure.axes:
        for label in (ax.xaxis.label, ax.yaxis.label):
            if label.get_text() == STEP_LABEL:
                label.set_text("place in the chain")


def line(
    ax: Axes,
    steps: ArrayLike,
    values: ArrayLike,
    *,
    color: str,
    label: str | None = None,
    **kwargs: Any,
) -> None:
    """A curve over LLM steps with a dot at every checkpoint. NaN leaves a gap."""
    style_of_line = {"marker": "o", "markersize": 3.2, "linewidth": 1.4, **kwargs}
    ax.plot(step_position(steps), np.asarray(values, dtype=np.float64), color=color, label=label, **style_of_line)


def band(
    ax: Axes,
    steps: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    *,
    color: str,
    label: str | None = None,
    alpha: float = 0.2,
) -> None:
    """A shaded band over LLM steps: quartiles, an interval, or the spread of a null. NaN leaves a gap.

    A checkpoint with a gap on both sides is drawn as a bar, which a plain band would not show at all.
    """
    x = step_position(steps)
    low, high = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
    ax.fill_between(x, low, high, color=color, alpha=alpha, linewidth=0, label=label)
    known = np.isfinite(low) & np.isfinite(high)
    before, after = np.r_[False, known[:-1]], np.r_[known[1:], False]
    alone = known & ~before & ~after
    ax.vlines(x[alone], low[alone], high[alone], color=color, alpha=min(1.0, 2 * alpha), linewidth=3)


def band_key(ax: Axes, *, quartiles: bool = True) -> None:
    """Say in the legend what the light and the dark band of every curve are; call it before `legend`.

    Args:
        ax: The panel.
        quartiles: Whether there are light bands; without, there is one kind, the interval.
    """
    keys = ((0.14, "light: quartiles"), (0.4, "dark: 95 % interval")) if quartiles else ((0.3, "95 % interval"),)
    for alpha, label in keys:
        ax.fill_between([], [], [], color=GREY, alpha=alpha, linewidth=0, label=label)


def log_y(ax: Axes, *, base: float = 10.0) -> None:
    """Make the y axis logarithmic with plain numbers at its ticks, unless nothing positive is drawn; call it last."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in ax.lines])
    if not (drawn > 0).any():
        return
    ax.set_yscale("log", base=base)
    ax.yaxis.set_major_locator(LogLocator(base=base, subs=(1.0, 2.0, 5.0) if base == 10 else (1.0,)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def printable(token: str, limit: int = 16) -> str:
    r"""A token as a label: spaces and line ends visible, characters that the font lacks escaped, cut to ``limit``.

    Give the text ``parse_math=False`` as well: a token may hold dollar signs.

    Example:
        >>> printable(" the"), printable("a\n"), printable("\u4e2d")
        ('␣the', 'a\\n', '\\u4e2d')
    """
    shown = "".join(
        "␣" if c == " " else c if c.isprintable() and ord(c) < 0x250 else c.encode("unicode_escape").decode()
        for c in token
    )
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def colours(name: str, count: int) -> list[tuple[float, float, float, float]]:
    """``count`` evenly spaced colours of a matplotlib colour map, e.g. ``viridis`` for checkpoints in order."""
    return [tuple(c) for c in mpl.colormaps[name](np.linspace(0.0, 1.0, count)).tolist()]
