"""The figures of the report's overview, as data: what is drawn, from which columns, and what it means."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .data import COMMANDS, Results, plain

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]


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
    """

    name: str
    column: str
    low: str = ""
    high: str = ""
    band: str = ""
    null: bool = False


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

QUALITY = (
    Figure(
        "Unexplained variance",
        "FVU",
        "quality",
        (
            Line("after training", "fvu"),
            Line("before training", "fvu_before"),
            Line("previous SAE as it was", "fvu_shift", null=True),
        ),
        domain=(0, None),
        note="Fraction of the activations' variance that the SAE misses; 0 is perfect.",
    ),
    Figure("Latents per token", "L0", "quality", (Line("L0", "l0"),), domain=(0, None)),
    Figure(
        "Dead and dense features",
        "share of features",
        "quality",
        (Line("dead", "dead_share"), Line("dense", "dense_share")),
        domain=(0, None),
        percent=True,
    ),
    Figure(
        "Loss recovered",
        "CE loss recovered",
        "quality",
        (Line("against zero ablation", "ce_recovered_zero"), Line("against mean ablation", "ce_recovered_mean")),
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
        ),
        domain=(None, 1),
        note="Correlation of a latent with itself at the checkpoint before, on the same tokens.",
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
        domain=(0, 1),
        percent=True,
    ),
    Figure(
        "Progress",
        "likeness of a feature's positions",
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
        "Turning between neighbouring checkpoints",
        "cosine of the decoder row with the one before",
        "population",
        (
            Line("mean", "mean", "low", "high", "95 % interval of the mean"),
            Line("median feature", "median", "q25", "q75", "quartiles of the features"),
            Line("null", "null_mean", "null_low", "null_high", "null", null=True),
        ),
        measure=("decoder_to_previous_without_rotation", "decoder_to_previous"),
        domain=(None, 1),
        note="Without the rotation that all features share, where the track holds it.",
    ),
    Figure(
        "Way to the final direction",
        "cosine of the decoder row with the last",
        "population",
        (Line("mean", "mean", "low", "high", "95 % interval of the mean"),),
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

SECTIONS = (
    ("quality", "Quality", QUALITY),
    ("formation", "Formation", FORMATION),
    ("semantics", "Meaning", SEMANTICS),
    ("drift", "Drift", DRIFT + CALIBRATION),
    ("identity", "Identity", ()),
    ("phases", "Phases", ()),
)


def sections(results: Results) -> list[dict[str, Any]]:
    """Every section of the overview: its figures, or the command that makes them.

    Args:
        results: The track's analyses.

    Returns:
        Json-able, in the order of the page.
    """
    return [_section(results, name, title, figures) for name, title, figures in SECTIONS]


def _section(results: Results, name: str, title: str, figures: Iterable[Figure]) -> dict[str, Any]:
    facts = results.facts(name)
    section: dict[str, Any] = {"id": name, "title": title, "figures": []}
    if facts is None:
        return section | {"class": COMMANDS.get(name, name.capitalize())}
    drawn = [_figure(results, name, figure) for figure in figures]
    drawn += {"semantics": _classes, "phases": _phases, "identity": _identity}.get(name, _nothing)(results)
    return section | {
        "summary": facts.get("summary", ""),
        "settings": facts.get("settings", {}),
        "figures": [figure for figure in drawn if figure is not None],
    }


def _figure(results: Results, analysis: str, figure: Figure) -> dict[str, Any] | None:
    for measure in figure.measure or (None,):
        lines = [line for line in (_line(results, analysis, figure.table, x, measure) for x in figure.lines) if line]
        if any(not line["null"] for line in lines):
            return {
                "kind": "lines",
                "id": f"{analysis}-{figure.table}-{measure or figure.lines[0].column}",
                "title": figure.title,
                "y": figure.y,
                "domain": figure.domain,
                "percent": figure.percent,
                "note": figure.note,
                "source": f"analyses/{analysis}/{figure.table}.parquet" + (f", measure {measure}" if measure else ""),
                "lines": lines,
            }
    return None


def _line(results: Results, analysis: str, table: str, line: Line, measure: str | None) -> dict[str, Any] | None:
    low = results.curve(analysis, table, line.low, measure) if line.low else None
    high = results.curve(analysis, table, line.high, measure) if line.high else None
    values = results.curve(analysis, table, line.column, measure)
    if values is None and low is not None and high is not None:
        values = (low + high) / 2
    if values is None:
        return None
    banded = low is not None and high is not None
    return {
        "name": line.name,
        "null": line.null,
        "values": plain(values),
        "low": plain(low) if low is not None and banded else None,
        "high": plain(high) if high is not None and banded else None,
        "band": line.band if banded else "",
    }


def _nothing(_results: Results) -> list[dict[str, Any] | None]:
    return []


def _classes(results: Results) -> list[dict[str, Any] | None]:
    """Semantic classes by step, as shares of the features that have one."""
    grid = results.grid("semantics", "features", "class")
    if grid is None:
        return []
    names = sorted({str(value) for value in grid.ravel() if value is not None})
    known = np.maximum((grid != None).sum(axis=0), 1)  # noqa: E711  element by element
    return [
        {
            "kind": "stack",
            "id": "semantics-classes",
            "title": "What features mean, by step",
            "y": "share of features",
            "domain": (0, 1),
            "percent": True,
            "note": "Classes of the features that fire at the step.",
            "source": "analyses/semantics/features.parquet, column class",
            "lines": [
                {"name": name, "null": False, "values": plain((grid == name).sum(axis=0) / known)} for name in names
            ],
        }
    ]


def _identity(results: Results) -> list[dict[str, Any] | None]:
    """Curves of the identity analysis: whatever has a mean with an interval by step and measure."""
    table = results.table("identity", "population")
    if table is None or "measure" not in table:
        return []
    line = Line("mean", "mean", "low", "high", "95 % interval")
    null = Line("null", "null_mean", "null_low", "null_high", "null", null=True)
    return [
        _figure(
            results,
            "identity",
            Figure(str(name).replace("_", " "), str(name), "population", (line, null), (str(name),)),
        )
        for name in table["measure"].unique()[:4]
    ]


def _phases(results: Results) -> list[dict[str, Any] | None]:
    """Boundaries between phases with their intervals, one row for each perspective."""
    table, scores = (results.table("phases", name) for name in ("boundaries", "scores"))
    if table is None or not {"perspective", "step"} <= set(table.columns):
        return []
    step, low, high = (plain(table[c if c in table else "step"].to_numpy()) for c in ("step", "low", "high"))
    marks = [
        {"perspective": p, "step": s, "low": a, "high": b}
        for p, s, a, b in zip(_perspectives(table), step, low, high, strict=True)
    ]
    return [
        {
            "kind": "phases",
            "id": "phases-boundaries",
            "title": "Where a phase ends and the next begins",
            "y": "",
            "note": "A dot is a boundary, the line its interval; a perspective without a dot is one phase.",
            "source": "analyses/phases/boundaries.parquet",
            "perspectives": sorted(set(_perspectives(table if scores is None else scores))),
            "marks": marks,
        }
    ]


def _perspectives(table: pd.DataFrame) -> list[str]:
    """Name of each row's perspective, with the axis it was cut on where the table says so."""
    names = [column for column in ("perspective", "axis") if column in table]
    return [", ".join(map(str, row)).replace("_", " ") for row in table[names].itertuples(index=False)]
