"""The figures of the drift analysis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import LogNorm

from . import figures as look

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from .drift_geometry import Plane

CAPTIONS = {
    "adjacent": (
        "How far rows turn from one LLM checkpoint to the next, with and without the rotation that all have in common; "
        "it cannot say how much of that training once more would do on the same LLM, for which there are controls."
    ),
    "to_last": (
        "A curve above its dashed line says that features head for their last direction; the rise to 1 itself says "
        "nothing, for a random walk rises too."
    ),
    "identity": (
        "Left, medians and quartiles over the features alive at both snapshots, not revived and not frozen in between. "
        "Points low on the right are features whose direction stays while their latent changes its meaning; the "
        "correlation is over one text, and low for features that fire on few of its tokens."
    ),
    "cosine_to_previous": (
        "Each ridge is the distribution over features of the cosine to the checkpoint before; heights are scaled "
        "ridge by ridge and cannot be compared, and nothing is corrected for the common rotation."
    ),
    "trajectories": (
        "Paths of some features in the plane of their most variance; a random walk looks like a smooth arc there too, "
        "so a smooth path is no evidence of a direction."
    ),
    "controls": (
        "What the track's stages do (blue) beside training once more on the same LLM checkpoint (grey): mean drift "
        "over the features that live in every run, without the rotation they have in common, and the median functional "
        "correlation over all that fire before and after (in a restricted result, over those compared). Only the "
        "excess is due to the LLM, and the intervals are over few runs and over no other LLM."
    ),
}
_WIDTH, _HEIGHT = 4.0, 3.2  # inches
_PARTS = {"Decoder": ("decoder", look.BLUE), "Encoder": ("encoder", look.GREEN)}


def _curve(population: pd.DataFrame, measure: str, steps: list[int]) -> pd.DataFrame:
    return population[population["measure"] == measure].set_index("step").loc[steps]


def adjacent_figure(population: pd.DataFrame, steps: list[int]) -> Figure:
    """Drift between neighbouring snapshots, decoder and encoder, with and without the common rotation.

    Lines are means with their interval, light bands the quartiles.

    Args:
        population: The analysis' table ``population``.
        steps: The track's LLM steps, increasing.
    """
    figure, axes = look.small_multiples(2, panel_width=_WIDTH, panel_height=_HEIGHT, sharey=True)
    for ax, (title, (part, color)) in zip(axes, _PARTS.items(), strict=True):
        lines = [(f"{part}_to_previous", "raw", color)]
        lines += [(f"{part}_to_previous_without_rotation", "common rotation removed", look.VERMILION)]
        for measure, label, shade in lines:
            rows = _curve(population, measure, steps)
            look.band(ax, steps, 1 - rows["q75"], 1 - rows["q25"], color=shade, alpha=0.14)
            look.band(ax, steps, 1 - rows["high"], 1 - rows["low"], color=shade, alpha=0.4)
            look.line(ax, steps, 1 - rows["mean"], color=shade, label=label)
        look.describe(ax, title=f"{title}: drift from snapshot to snapshot", ylabel="1 - cosine to the previous")
        look.step_axis(ax, steps)
        look.band_key(ax)
        look.legend(ax)
    axes[0].set_ylim(bottom=0)
    return figure


def to_last_figure(population: pd.DataFrame, steps: list[int], random_sd: float) -> Figure:
    """Cosine to the last snapshot, with what a random walk of the same adjacent drift gives, and random directions.

    Args:
        population: The analysis' table ``population``.
        steps: The track's LLM steps, increasing.
        random_sd: Standard deviation of the cosine of a random direction.
    """
    figure, axes = look.small_multiples(2, panel_width=_WIDTH, panel_height=_HEIGHT, sharey=True, legend_rows=3)
    dashed: dict[str, Any] = {"linestyle": "--", "marker": "", "linewidth": 1.1}
    for ax, (title, (part, color)) in zip(axes, _PARTS.items(), strict=True):
        lines = [(f"{part}_to_last", "raw", color)]
        lines += [(f"{part}_to_last_without_rotation", "common rotation removed", look.VERMILION)]
        for measure, label, shade in lines:
            rows = _curve(population, measure, steps)
            look.band(ax, steps, rows["q25"], rows["q75"], color=shade, alpha=0.14)
            look.band(ax, steps, rows["low"], rows["high"], color=shade, alpha=0.4)
            look.line(ax, steps, rows["mean"], color=shade, label=label)
            walk = _curve(population, f"{measure}_if_random_walk", steps)
            look.line(ax, steps, walk["mean"], color=shade, **dashed)
        ax.plot([], [], color=look.BLACK, label="random walk, same steps", **dashed)
        edge = np.full(len(steps), 1.96 * random_sd)
        look.band(ax, steps, -edge, edge, color=look.GREY, alpha=0.3, label="random direction, 95 %")
        look.describe(ax, title=f"{title}: cosine to the last snapshot", ylabel="cosine")
        look.step_axis(ax, steps)
        look.band_key(ax)
        look.legend(ax)
    return figure


def controls_figure(stages: pd.DataFrame, chain: pd.DataFrame, steps: list[int]) -> Figure:
    """The track beside its controls: drift, its part that the LLM made, functional correlation, cosine to the last.

    Args:
        stages: The analysis' table ``calibration``.
        chain: Its table ``null_chain``; empty where there is none, and the last panel is then left out.
        steps: The track's LLM steps, increasing.
    """
    figure, axes = look.small_multiples(3 + bool(len(chain)), panel_width=_WIDTH, panel_height=_HEIGHT)
    at = stages["step"].tolist()
    for kind, label, colour in (("real", "next LLM checkpoint", look.BLUE), ("null", "same once more", look.GREY)):
        look.line(axes[0], at, stages[f"drift_{kind}"], color=colour, label=label)
        look.line(axes[2], at, stages[f"correlation_{kind}"], color=colour, label=label)
    look.describe(axes[0], title="Decoder drift while training a stage", ylabel="1 - cosine, rotation removed")
    look.describe(axes[2], title="Same feature as before? (median)", ylabel="functional correlation")
    for name, label, colour in (
        ("excess", "excess over null", look.VERMILION),
        ("energy", "common to arms", look.GREEN),
    ):
        look.band(axes[1], at, stages[f"{name}_low"], stages[f"{name}_high"], color=colour)
        look.line(axes[1], at, stages[name], color=colour, label=label)
    axes[1].axhline(0, color=look.BLACK, linewidth=0.8)
    look.band_key(axes[1], quartiles=False)
    look.describe(axes[1], title="Drift that the LLM's change made", ylabel="1 - cosine")
    if len(chain):
        look.line(axes[3], chain["step"].tolist(), chain["real"], color=look.BLUE, label="track")
        look.line(axes[3], chain["step"].tolist(), chain["null"], color=look.GREY, label="null chain")
        look.band(
            axes[3], chain["step"].tolist(), chain["null_low"], chain["null"], color=look.GREY, label="its lower 5 %"
        )
        look.describe(axes[3], title="Cosine to the last snapshot", ylabel="cosine, rotation removed")
    for ax in axes:
        look.step_axis(ax, steps)
        look.legend(ax)
    for ax in (axes[0], axes[2]):
        ax.set_ylim(bottom=0)
    return figure


def identity_figure(population: pd.DataFrame, table: pd.DataFrame, steps: list[int]) -> Figure:
    """Does the index keep its meaning? Decoder cosine to the previous snapshot beside functional correlation.

    Args:
        population: The analysis' table ``population``.
        table: The analysis' table ``drift``.
        steps: The track's LLM steps, increasing.
    """
    figure, (left, right) = look.small_multiples(2, panel_width=_WIDTH, panel_height=_HEIGHT)
    lines = {
        "decoder_to_previous": ("decoder cosine", look.BLUE),
        "functional_correlation": ("functional correlation", look.VERMILION),
    }
    for measure, (label, color) in lines.items():
        rows = _curve(population, measure, steps)
        look.band(left, steps, rows["q25"], rows["q75"], color=color)
        look.line(left, steps, rows["median"], color=color, label=label)
    look.describe(left, title="With the previous snapshot: median, quartiles", ylabel="cosine or correlation")
    look.step_axis(left, steps)
    look.legend(left)
    pairs = table.loc[(table["status"] == "alive") & table["alive_before"], list(lines)].dropna().to_numpy()
    title = "Every feature and stage"
    if len(pairs):
        low = np.floor(pairs.min(axis=0) * 20) / 20
        edges = [np.linspace(min(start, 0.95), 1.0, 61) for start in low]
        density, *_ = np.histogram2d(pairs[:, 0], pairs[:, 1], bins=edges)
        shown = np.ma.masked_equal(density.T, 0)
        most = max(2, int(density.max()))
        right.locator_params(axis="x", nbins=5)
        right.pcolormesh(*edges, shown, cmap="viridis", norm=LogNorm(1, most), rasterized=True)
        title = f"Every feature and stage (log colour, 1 to {most:,})"
    look.describe(right, title=title, ylabel="functional correlation", xlabel="decoder cosine to the previous")
    return figure


def ridge_figure(table: pd.DataFrame, steps: list[int]) -> Figure:
    """Distribution of the decoder's cosine to the previous snapshot, one ridge per snapshot, negative ones included.

    Args:
        table: The analysis' table ``drift``.
        steps: The track's LLM steps, increasing.
    """
    used = table[(table["status"] == "alive") & table["alive_before"] & table["decoder_to_previous"].notna()]
    shown = steps[1:]
    figure, (ax,) = look.small_multiples(1, panel_width=4.6, panel_height=1.6 + 0.26 * len(shown))
    low = float(used["decoder_to_previous"].min()) if len(used) else 0.0
    edges = np.linspace(max(-1.0, np.floor(low * 20) / 20 - 0.05), 1.0, 101)
    middles = (edges[1:] + edges[:-1]) / 2
    # the first ridge is the highest one on the page, so later ones are drawn over earlier ones' feet
    for place, (step, color) in enumerate(zip(shown, look.colours("viridis", len(shown) + 1), strict=False)):
        values = used.loc[used["step"] == step, "decoder_to_previous"].to_numpy()
        counts, _ = np.histogram(values, bins=edges)
        base = len(shown) - 1 - place
        height = base + 1.5 * counts / max(1, counts.max())
        ax.fill_between(middles, base, height, color=color, alpha=0.75, linewidth=0, zorder=2 + place, step="mid")
        ax.step(middles, height, color="white", linewidth=0.6, zorder=2 + place, where="mid")
        if len(values):
            ax.plot([np.median(values)] * 2, [base, base + 0.5], color=look.BLACK, linewidth=1.0, zorder=2.5 + place)
    ax.set_yticks(range(len(shown)), [look.step_label(step) for step in reversed(shown)])
    ax.set_ylim(-0.1, len(shown) + 0.7)
    title = "Cosine to the previous snapshot (bar: median)"
    look.describe(ax, title=title, ylabel=look.STEP_LABEL, xlabel="decoder cosine; each ridge scaled to its mode")
    return figure


def trajectory_figure(plane: Plane, chosen: list[int], steps: list[int]) -> Figure:
    """The chosen features' decoder rows through training, in the plane of their most variance.

    Args:
        plane: Coordinates ``[T, n, 2]`` and explained variance.
        chosen: The features' indices.
        steps: The track's LLM steps, increasing.
    """
    figure, (ax,) = look.small_multiples(1, panel_width=4.8, panel_height=4.6)
    shade = look.colours("viridis", len(steps))
    for k, feature in enumerate(chosen):
        path = plane.coordinates[:, k]
        ax.plot(path[:, 0], path[:, 1], color=look.GREY, linewidth=0.8, zorder=1)
        ax.scatter(path[:, 0], path[:, 1], c=shade, s=14, zorder=2)
        ax.annotate(str(feature), path[-1], xytext=(4, 3), textcoords="offset points", fontsize=8)
    for t in sorted({0, len(steps) // 2, len(steps) - 1}):
        ax.scatter([], [], color=shade[t], s=14, label=f"step {look.step_label(steps[t])}")
    share = [f"{100 * value:.0f} %" for value in plane.explained]
    title = "Decoder rows through training"
    look.describe(ax, title=title, ylabel=f"axis 2 ({share[1]} of variance)", xlabel=f"axis 1 ({share[0]} of variance)")
    ax.set_aspect("equal", adjustable="datalim")
    ax.margins(0.12)
    look.legend(ax, columns=3)
    return figure
