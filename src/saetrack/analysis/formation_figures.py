"""The figures of the formation analysis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import figures as look

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]

CAPTIONS = {
    "progress": (
        "A curve above the grey band says that the positions of features are more alike than random ones, of the named "
        "kind; it cannot say what the features mean, and positions that were chosen on the last LLM checkpoint can "
        "show only the features that are there in the end."
    ),
    "paper": (
        "The paper's measures and their corrected forms, beside what random sets give (grey); a rise in the uncentred "
        "cosine alone cannot be told from activations that all become alike."
    ),
    "formed": (
        "The share of the features that are known to have formed by each step, beside the share of false features "
        "(random positions with features' tokens) that the same rule calls formed; a feature that has not plateaued "
        "counts as not formed, and features with too few positions are in no curve."
    ),
    "map": (
        "A row is a feature (or some, averaged), red where its positions are more alike than random ones with the "
        "same tokens; the sorting by the formed step draws an edge into any data, so believe the intervals and not "
        "the edge."
    ),
}
# rows of the map: more cannot be told apart on paper
_MAP_ROWS = 400
_PANELS = {
    "Activations, cosine": {"activation_cosine": "raw", "activation_cosine_centred": "centred"},
    "Latents, cosine": {"feature_cosine": "all latents", "feature_cosine_without_own": "without own latent"},
    "Latents, Jaccard": {"feature_jaccard": "all latents", "feature_jaccard_without_own": "without own latent"},
    "Latents, weighted Jaccard": {
        "feature_weighted_jaccard": "all latents",
        "feature_weighted_jaccard_without_own": "without own latent",
    },
}
_BASELINES = {
    "uniform": ("Against any random positions", look.SKY),
    "position": ("Same places in the row", look.GREEN),
    "token": ("Same tokens", look.BLUE),
}
_STATUS_COLOURS = {
    "at-init": look.SKY,
    "formed": look.BLUE,
    "not plateaued": look.ORANGE,
    "transient": look.PURPLE,
    "unresolved": look.GREY,
    "never": look.VERMILION,
    "insufficient": "0.85",
}


def progress_figure(population: pd.DataFrame, steps: list[int]) -> Figure:
    """Mean progress over features against each baseline, with interval, quartiles and the band of a random set.

    Args:
        population: The analysis' table ``population``.
        steps: The track's LLM steps, increasing.
    """
    figure, axes = look.small_multiples(3, columns=3, sharey=True, title="How alike a feature's positions are")
    for ax, (baseline, (title, color)) in zip(axes, _BASELINES.items(), strict=True):
        rows = population[population["baseline"] == baseline].set_index("step").loc[steps]
        look.band(ax, steps, rows["q25"], rows["q75"], color=color, alpha=0.15, label="quartiles")
        look.band(ax, steps, rows["low"], rows["high"], color=color, alpha=0.5)
        look.line(ax, steps, rows["mean"], color=color, label="mean, 95 % interval")
        null: dict[str, Any] = {"color": look.GREY, "alpha": 0.4, "label": "one random set, 95 %"}
        look.band(ax, steps, rows["null_low"], rows["null_high"], **null)
        _zero(ax)
        look.describe(ax, title=title, ylabel="progress M (cosine)")
        look.step_axis(ax, steps)
        look.legend(ax)
    return figure


def paper_figure(population: pd.DataFrame, steps: list[int]) -> Figure:
    """The paper's measures and their corrected forms, with interval, quartiles and the band of a random set.

    Args:
        population: The analysis' table ``paper_population``.
        steps: The track's LLM steps, increasing.
    """
    figure, axes = look.small_multiples(len(_PANELS), panel_width=3.9, panel_height=3.2, legend_rows=3)
    for ax, (title, lines) in zip(axes, _PANELS.items(), strict=True):
        for (measure, label), color in zip(lines.items(), (look.BLUE, look.VERMILION), strict=True):
            rows = population[population["measure"] == measure].set_index("step").loc[steps]
            look.band(ax, steps, rows["q25"], rows["q75"], color=color, alpha=0.12)
            look.band(ax, steps, rows["low"], rows["high"], color=color, alpha=0.4)
            look.line(ax, steps, rows["mean"], color=color, label=label)
        # two nulls on top of each other cannot be told apart: only that of the sounder measure, the last, is drawn
        null: dict[str, Any] = {"color": look.GREY, "alpha": 0.35, "label": "one random set, 95 %"}
        look.band(ax, steps, rows["null_low"], rows["null_high"], **null)
        _zero(ax)
        look.describe(ax, title=title, ylabel="progress M")
        ax.yaxis.labelpad = 1  # tick labels may be as long as "-0.025"
        look.step_axis(ax, steps)
        look.band_key(ax)
        look.legend(ax)
    return figure


def formed_figure(shares: pd.DataFrame, counts: pd.Series, steps: list[int]) -> Figure:
    """Share of the features formed by each step, with that of false features, and how many have each status.

    Args:
        shares: The analysis' table ``formed``.
        counts: Status to number of features.
        steps: The track's LLM steps, increasing.
    """
    figure, (curve, bars) = look.small_multiples(2, panel_width=4.3, panel_height=3.3)
    for kind, color, label in (("", look.BLUE, "features"), ("null_", look.GREY, "false features")):
        look.band(curve, steps, shares[f"{kind}low"], shares[f"{kind}high"], color=color, alpha=0.25)
        look.line(curve, steps, shares[f"{kind}share"], color=color, label=f"{label}, 95 % interval")
    curve.set_ylim(-0.02, 1.02)
    look.describe(curve, title="Formed by each checkpoint", ylabel="share of computed features")
    look.step_axis(curve, steps)
    look.legend(curve)
    present = [name for name in reversed(_STATUS_COLOURS) if name in counts.index]
    numbers = [int(counts[name]) for name in present]
    drawn = bars.barh(present, numbers, color=[_STATUS_COLOURS[name] for name in present])
    bars.bar_label(drawn, fontsize=8, padding=2)
    bars.margins(x=0.15)
    bars.grid(visible=False, axis="y")
    place = bars.get_position()
    bars.set_position((place.x0 + 0.05, place.y0, place.width - 0.05, place.height))
    look.describe(bars, title="Status", ylabel="", xlabel="features")
    return figure


def map_figure(values: Floats, formed: NDArray[np.integer], steps: list[int], baseline: str) -> Figure:
    """Every computed feature's progress, sorted by when it formed and then by its final value.

    Args:
        values: ``[T, F]`` progress.
        formed: ``[F]`` index of the checkpoint where it formed, -1 for never.
        steps: The track's LLM steps, increasing.
        baseline: Name of the baseline, for the title.
    """
    when = np.where(formed < 0, len(steps), formed)
    order = np.lexsort((-values[-1], when))
    groups = np.array_split(order, min(_MAP_ROWS, len(order)))
    image = np.stack([values[:, group].mean(axis=1) for group in groups])  # [rows, T]
    figure, (ax,) = look.small_multiples(1, panel_width=5.0, panel_height=4.0)
    limit = float(max(np.quantile(np.abs(values), 0.99), 1e-6))
    drawn = ax.imshow(
        image, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest",
        extent=(-0.5, len(steps) - 0.5, len(order), 0),
    )  # fmt: skip
    edges = np.searchsorted(when[order], np.arange(len(steps) + 1), side="right")
    ax.step(
        np.arange(-0.5, len(steps) + 0.5), np.append(edges[0], edges[: len(steps)]), color=look.BLACK, linewidth=1.2
    )
    ax.grid(visible=False)
    every = max(1, -(-len(steps) // 10))
    ticks = np.arange(len(steps) - 1, -1, -every)[::-1]
    ax.set_xticks(ticks, [look.step_label(steps[t]) for t in ticks])
    title = f"Every feature's progress, {baseline} baseline"
    look.describe(ax, title=title, ylabel="features, sorted by formed step (line)", xlabel="LLM training step")
    place = ax.get_position()
    ax.set_position((place.x0, place.y0, 0.84 * place.width, place.height))
    bar = figure.colorbar(drawn, cax=figure.add_axes((place.x0 + 0.87 * place.width, place.y0, 0.02, place.height)))
    bar.ax.tick_params(labelsize=8)
    bar.ax.set_title("progress", fontsize=8)
    return figure


def _zero(ax: Axes) -> None:
    ax.axhline(0, color=look.GREY, linewidth=0.8)
