"""Figures of the semantics analysis."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from . import figures

if TYPE_CHECKING:
    import pandas as pd


CAPTIONS = {
    "semantics": (
        "Fewer tokens than with tokens shuffled (left), a share that holds on other rows (middle) and a turnover below "
        "both dashed lines (right) say that features mean something that lasts; all three count tokens, so they "
        "cannot see a feature of many tokens with one meaning."
    ),
    "classes": (
        "The share of each class among the features that fire enough; a class is the outcome of thresholds, and the "
        "share of false concepts in the title is what the same rule finds in permuted text."
    ),
    "examples": (
        "The top token of features drawn at random, dark where most of the activation falls on it; a token is not a "
        "meaning, and these few are no sample to judge the dictionary by."
    ),
}


def curves(table: pd.DataFrame) -> Figure:
    """N_eff, the top token's share and turnover by LLM step, each with its band and its null."""
    steps = table["step"].tolist()
    figure, axes = figures.small_multiples(3, columns=3, title="What features respond to, through training")
    n_eff, share, change = axes
    figures.line(
        n_eff, steps, table["n_eff_shuffled_median"], color=figures.GREY, label="tokens shuffled", linestyle="--"
    )
    figures.band(n_eff, steps, table["n_eff_low"], table["n_eff_high"], color=figures.BLUE, label="quartiles")
    figures.line(n_eff, steps, table["n_eff_chao_shen_median"], color=figures.SKY, label="median, Chao-Shen")
    figures.line(n_eff, steps, table["n_eff_median"], color=figures.BLUE, label="median")
    figures.log_y(n_eff, base=2.0)
    figures.describe(n_eff, title="Spread over tokens", ylabel="$N_\\mathrm{eff}$ (tokens, log scale)")

    low, high = table["top_token_share_evaluation_low"], table["top_token_share_evaluation_high"]
    figures.line(
        share, steps, table["top_token_share_median"], color=figures.GREY, label="rows it was chosen on", linestyle="--"
    )
    figures.band(share, steps, low, high, color=figures.GREEN, label="quartiles")
    figures.line(
        share, steps, table["top_token_share_evaluation_median"], color=figures.GREEN, label="median, held out"
    )
    share.set_ylim(0, 1.02)
    share.yaxis.set_major_formatter(PercentFormatter(1.0))
    figures.describe(share, title="Activation on the top token", ylabel="share of activation")

    for name, color, label in (
        ("turnover_other_feature", figures.BLACK, "another feature"),
        ("turnover_same_tokens", figures.GREY, "same tokens"),
    ):
        figures.line(change, steps, table[name], color=color, label=label, linestyle="--", marker=".")
    figures.band(change, steps, table["turnover_low"], table["turnover_high"], color=figures.VERMILION, alpha=0.3)
    figures.line(change, steps, table["turnover"], color=figures.VERMILION, label="mean, 95 % interval")
    change.set_ylim(0, 1.05)
    figures.describe(change, title="Turnover since the checkpoint before", ylabel="1 - Jaccard")
    for ax in axes:
        figures.step_axis(ax, steps)
        figures.legend(ax)
    return figure


def class_shares(table: pd.DataFrame, steps: list[int], false_concepts: float) -> Figure:
    """Share of each class by LLM step as stacked areas, with the share of false concepts on permuted text.

    Args:
        table: The analysis' table ``classes``.
        steps: The track's LLM steps.
        false_concepts: Of the instrument, at the last step.
    """
    figure, (ax,) = figures.small_multiples(1, panel_width=5.6, panel_height=3.5)
    names = list(dict.fromkeys(table["class"]))
    shares = table["share"].to_numpy().reshape(len(steps), len(names)).T
    ax.stackplot(figures.step_position(steps), np.nan_to_num(shares), labels=names, colors=figures.PALETTE, alpha=0.85)
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    title = f"What features are features of (false concepts: {false_concepts:.1%})"
    figures.describe(ax, title=title, ylabel="share of features that fire enough")
    figures.step_axis(ax, steps)
    figures.legend(ax, columns=3)
    return figure


def examples(table: pd.DataFrame, steps: list[int], features: list[int], seed: int) -> Figure:
    """Top token of some features at every checkpoint, shaded by its share of the feature's activation."""
    figure = Figure(
        figsize=(max(1.5 + 0.72 * len(steps), 5.6), 1.1 + 0.27 * max(len(features), 1)), layout="constrained", dpi=120
    )
    ax = figure.subplots()
    column = {step: i for i, step in enumerate(steps)}
    shares = np.full((max(len(features), 1), len(steps)), np.nan)
    chosen = table[table["feature"].isin(features)]
    for step, feature, token, share in zip(
        chosen["step"], chosen["feature"], chosen["top_token"], chosen["top_token_share"], strict=True
    ):
        x, y = column[step], features.index(feature)
        shares[y, x] = share
        color = "white" if share > 0.6 else "black"
        ax.text(
            x, y, figures.printable(token, limit=9), ha="center", va="center", fontsize=7, color=color, parse_math=False
        )
    image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    ax.set_facecolor("0.93")  # where a feature does not fire
    ax.set_xticks(range(len(steps)), [figures.step_label(step) for step in steps])
    ax.set_yticks(range(len(features)), [str(feature) for feature in features])
    ax.tick_params(labelsize=8, length=0)
    ax.spines[:].set_visible(False)
    ax.set_xticks(np.arange(len(steps) + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(max(len(features), 1) + 1) - 0.5, minor=True)
    ax.grid(visible=True, which="minor", color="white", linewidth=1.5)
    ax.tick_params(which="minor", length=0)
    figures.describe(
        ax,
        title=f"Top token of {len(features)} features drawn at random (seed {seed})",
        ylabel="feature",
        xlabel="LLM training step (not to scale)",
    )
    bar = figure.colorbar(image, ax=ax, pad=0.01, fraction=0.03)
    bar.set_label("share of activation mass (grey: silent)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure
