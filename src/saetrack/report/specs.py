"""The overview's figures as data: what is drawn, from which columns of which tables, and how it is to be read.

They are drawn twice, by the page's JavaScript and by matplotlib in `saetrack.report.plots`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """One line of a figure: where its values stand.

    Args:
        name: In the legend.
        column: The column of the figure's table.
        low: Column of the band's lower edge.
        high: Column of the band's upper edge.
        band: What the band is, for the legend.
        null: Whether it is a null or a baseline: drawn grey and dashed.
        table: Another table than the figure's, of the same analysis or as ``analysis/table``.
        measure: Rows of the table to take; those of the figure when empty, and ``{}`` is the figure's name of them.
        from_one: Whether 1 - value is drawn.
    """

    name: str
    column: str
    low: str = ""
    high: str = ""
    band: str = ""
    null: bool = False
    table: str = ""
    measure: str = ""
    from_one: bool = False


@dataclass(frozen=True)
class Figure:
    """A figure over LLM steps.

    Args:
        title: What it shows.
        y: Label of the y axis.
        table: The table under ``analyses/``.
        lines: Its lines; those whose column is missing are left out.
        measure: Rows of the table to take, where it has several measures; of several, the first that is there.
        domain: Fixed ends of the y axis; None where the data set them.
        percent: Whether the values are shares.
        note: How to read it, in one sentence.
    """

    title: str
    y: str
    table: str
    lines: tuple[Line, ...]
    measure: tuple[str, ...] = ()
    domain: tuple[float | None, float | None] = (None, None)
    percent: bool = False
    note: str = ""


PROGRESS = ("token", "activation_cosine_centred")
"""Measures of progress, the preferred first: against token-matched positions, or the paper's, centred."""


def _controls(column: str, prefix: str = "") -> tuple[Line, ...]:
    """What the controls reach in a column of the quality table, where the track has some."""
    kinds = {
        "null": "same LLM checkpoint once more",
        "scratch-next": "fresh SAE, as many tokens",
        "scratch-first": "fresh SAE, tokens of the first stage",
    }
    return tuple(
        Line(prefix + name, column, f"{column}_low", f"{column}_high", "range of runs", True, "controls", kind)
        for kind, name in kinds.items()
    )


QUALITY = (
    Figure(
        "Unexplained variance",
        "FVU",
        "quality",
        (
            Line("after training", "fvu"),
            Line("before training", "fvu_before"),
            Line("previous SAE as it was", "fvu_shift", null=True),
            *_controls("fvu"),
        ),
        domain=(0, None),
        note="Fraction of the activations' variance that the SAE misses; 0 is perfect.",
    ),
    Figure("Latents per token", "L0", "quality", (Line("L0", "l0"),), domain=(0, None)),
    Figure(
        "Dead and dense features",
        "share of features",
        "quality",
        (Line("dead", "dead_share"), Line("dense", "dense_share"), *_controls("dead_share", "dead, ")),
        domain=(0, None),
        percent=True,
    ),
    Figure(
        "Loss recovered",
        "CE loss recovered",
        "quality",
        (
            Line("against zero ablation", "ce_recovered_zero"),
            Line("against mean ablation", "ce_recovered_mean"),
            *_controls("ce_recovered_mean", "mean ablation, "),
        ),
        percent=True,
        note="1 when the LLM predicts as well with the SAE's reconstruction as without it.",
    ),
    Figure(
        "Is index i still the same feature?",
        "functional correlation",
        "quality",
        (
            Line(
                "median feature",
                "functional_correlation_median",
                "functional_correlation_low",
                "functional_correlation_high",
                "quartiles of the features",
            ),
            Line("median where the LLM did not change", "correlation_null", null=True, table="drift/calibration"),
        ),
        domain=(None, 1),
        note="Correlation of a latent with itself at the checkpoint before, on the same tokens: the median over the "
        "features that fire at both.",
    ),
)

FORMATION = (
    Figure(
        "Features formed by step",
        "share of features",
        "formed",
        (
            Line("formed", "share", "low", "high", "95 % interval"),
            Line("random positions", "null_share", "null_low", "null_high", "95 % interval", null=True),
        ),
        measure=PROGRESS,
        domain=(0, None),
        percent=True,
    ),
    Figure(
        "Progress",
        "likeness of its positions",
        "population",
        (
            Line("mean", "mean", "low", "high", "95 % interval of the mean"),
            Line("median feature", "median", "q25", "q75", "quartiles of the features"),
            Line("random positions", "null_mean", "null_low", "null_high", "95 % of random sets", null=True),
        ),
        measure=PROGRESS,
        note="How alike the LLM's activations are at the positions where the finished feature fires.",
    ),
)

DRIFT = (
    Figure(
        "Drift from checkpoint to checkpoint",
        "1 - cosine with the row before",
        "population",
        (
            Line("mean", "mean", "low", "high", "95 % interval of the mean", from_one=True),
            Line("median feature", "median", "q25", "q75", "quartiles of the features", from_one=True),
            Line("mean where the LLM did not change", "drift_null", null=True, table="calibration"),
        ),
        measure=("decoder_to_previous_without_rotation", "decoder_to_previous"),
        domain=(0, None),
        note="Of decoder rows, without the rotation that all features share, where the track holds it.",
    ),
    Figure(
        "Way to the final direction",
        "cosine with the last row",
        "population",
        (
            Line("mean", "mean", "low", "high", "95 % interval of the mean"),
            Line("if its turns were independent", "mean", null=True, measure="{}_if_random_walk"),
            Line("null chain", "null", "null_low", "null", "to its lower 5 %", True, "null_chain"),
        ),
        measure=("decoder_to_last_without_rotation", "decoder_to_last"),
        domain=(None, 1),
        note="Rises to 1 by construction; only the excess over a random walk says that features head for their end.",
    ),
)

CALIBRATION = (
    Figure(
        "Drift against null steps",
        "mean 1 - cosine with the row before",
        "calibration",
        (
            Line("as the LLM changed", "drift_real"),
            Line("excess", "excess", "excess_low", "excess_high", "95 % interval over runs"),
            Line("same LLM checkpoint again", "drift_null", null=True),
        ),
        domain=(None, None),
        note="What training the SAE once more on an unchanged LLM does, and what is beyond it.",
    ),
)

SEMANTICS = (
    Figure(
        "Tokens that a feature answers to",
        "effective number of tokens",
        "steps",
        (
            Line("median feature", "n_eff_median", "n_eff_low", "n_eff_high", "quartiles of the features"),
            Line("tokens shuffled", "n_eff_shuffled_median", null=True),
        ),
        domain=(0, None),
    ),
    Figure(
        "Turnover of top contexts",
        "share replaced since the checkpoint before",
        "steps",
        (
            Line("mean", "turnover", "turnover_low", "turnover_high", "95 % interval"),
            Line("another feature's", "turnover_other_feature", null=True),
            Line("same tokens, random contexts", "turnover_same_tokens", null=True),
        ),
        domain=(0, 1),
        percent=True,
    ),
)

IDENTITY = (
    Figure(
        "Same index at neighbouring checkpoints",
        "mean functional correlation",
        "curves",
        (
            Line("with the checkpoint before", "mean", "low", "high", "95 % interval", measure="to_previous"),
            Line("the same stage repeated", "mean", "low", "high", "95 % interval", measure="replica"),
            Line("where the LLM did not change", "mean", "low", "high", "95 % interval", True, measure="null"),
            Line("another feature", "mean", "low", "high", "95 % interval", True, measure="other_feature"),
        ),
        domain=(None, 1),
        note="How far an index keeps its meaning over one stage: the mean over the features that fire at both "
        "checkpoints and were not revived. What it becomes over many is in the next two figures.",
    ),
    Figure(
        "Same index at both ends",
        "mean functional correlation",
        "curves",
        (
            Line("with the first checkpoint", "mean", "low", "high", "95 % interval", measure="to_first"),
            Line("with the last checkpoint", "mean", "low", "high", "95 % interval", measure="to_last"),
            Line(
                "null chain, its first", "chain", "chain_low", "chain_high", "95 % interval", True, measure="to_first"
            ),
            Line("null chain, its last", "chain", "chain_low", "chain_high", "95 % interval", True, measure="to_last"),
            Line("another feature, neighbours", "mean", "low", "high", "95 % interval", True, measure="other_feature"),
        ),
        domain=(None, 1),
        note="1 at the end itself by definition. A null chain is the first snapshot, trained as often on one LLM "
        "checkpoint.",
    ),
    Figure(
        "Survival of identity",
        "share of the first checkpoint's features",
        "survival",
        (
            Line("kept in every stage", "unbroken", "unbroken_low", "unbroken_high", "95 % interval"),
            Line("still like the first", "like_first", "like_first_low", "like_first_high", "95 % interval"),
            Line("what unchanged LLMs alone would leave", "null", "null_low", "null_high", "95 % interval", True),
        ),
        domain=(0, 1),
        percent=True,
        note="A feature that is kept in every stage may still drift to another meaning; the second line shows that. "
        "The dashed line ends with the last stage that null steps reach.",
    ),
)

DICTIONARIES = (
    Figure(
        "Dictionaries of neighbouring checkpoints",
        "mean cosine of decoder rows",
        "neighbours",
        (
            Line("matched one to one", "pw_mcc", "pw_mcc_low", "pw_mcc_high", "95 % interval"),
            Line("matched, alive at both", "pw_mcc_both", "pw_mcc_both_low", "pw_mcc_both_high", "95 % interval"),
            Line("alive at both, by index", "same_index", "same_index_low", "same_index_high", "95 % interval"),
            Line("random dictionaries, matched", "null", null=True),
        ),
        domain=(None, 1),
        note="Where the two lines of features alive at both lie on each other, no index was renamed.",
    ),
    Figure(
        "Beside SAEs of their own",
        "mean cosine of matched decoder rows",
        "scratch",
        (
            Line(
                "this track with fresh SAEs",
                "track_to_seeds",
                "track_to_seeds_low",
                "track_to_seeds_high",
                "95 % interval",
            ),
            Line("fresh SAEs with each other", "seeds", "seeds_low", "seeds_high", "95 % interval"),
            Line("random dictionaries", "track_null", null=True),
        ),
        measure=("first", "next"),
        domain=(None, 1),
    ),
)


def _causal(title: str, measure: str, note: str = "") -> Figure:
    band = "95 % interval of the mean"
    return Figure(
        title,
        "nats per firing",
        "population",
        (
            Line("without the feature", "mean", "low", "high", band, measure=f"{measure}/effect"),
            Line("excess", "mean", "low", "high", band, measure=f"{measure}/excess"),
            Line("without another feature's direction", "mean", "low", "high", band, True, measure=f"{measure}/null"),
        ),
        note=note,
    )


CAUSAL = (
    _causal(
        "What the loss loses without a feature",
        "loss",
        "The feature's activation is set to its mean and everything else stays; features are drawn at random.",
    ),
    _causal("How far the predictions move", "divergence"),
)

SECTIONS: dict[str, tuple[str, tuple[Figure, ...]]] = {
    "quality": ("Quality", QUALITY),
    "formation": ("Formation", FORMATION),
    "drift": ("Drift", DRIFT + CALIBRATION),
    "identity": ("Identity", IDENTITY),
    "phases": ("Phases", ()),
    "semantics": ("Meaning", SEMANTICS),
    "causal": ("Effects", CAUSAL),
    "dictionaries": ("Dictionaries", DICTIONARIES),
}
"""By the folder of the analysis, in the order of the page: title and figures; some sections have more to draw."""
