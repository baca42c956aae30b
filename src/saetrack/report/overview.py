"""The report's overview: the figures of `specs`, filled from the analyses of a track."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .data import COMMANDS, Results, plain
from .others import other_section
from .specs import SECTIONS, Figure, Line

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]

UNRESOLVED = "unresolved"
"""The class for which no rule holds: grey."""


def sections(results: Results) -> list[dict[str, Any]]:
    """Every section of the overview: its figures, or the command that makes them.

    Args:
        results: The track's analyses.

    Returns:
        Json-able, in the order of the page: the report's own sections, then those of other analyses.
    """
    others = [name for name in results.names() if name not in {*SECTIONS, *COMMANDS}]
    return [section(results, name) for name in SECTIONS] + [other_section(results, name) for name in others]


def section(results: Results, name: str) -> dict[str, Any]:
    """One section, named as its analysis' folder."""
    title, figures = SECTIONS[name]
    facts = results.facts(name)
    head: dict[str, Any] = {"id": name, "title": title, "figures": []}
    if facts is None:
        return head | {"class": COMMANDS.get(name, name.capitalize())}
    drawn = [_figure(results, name, figure) for figure in figures]
    drawn += {"semantics": _classes, "phases": _phases}.get(name, _nothing)(results)
    return head | {
        "summary": facts.get("summary", ""),
        "settings": facts.get("settings", {}),
        "figures": [figure for figure in drawn if figure is not None],
    }


def _figure(results: Results, analysis: str, figure: Figure) -> dict[str, Any] | None:
    first = figure.lines[0]
    for measure in figure.measure or (None,):
        lines = [line for line in (_line(results, analysis, figure.table, x, measure) for x in figure.lines) if line]
        if any(not line["null"] for line in lines):
            return {
                "kind": "lines",
                "id": f"{analysis}-{figure.table}-{measure or first.measure or first.column}".replace("/", "-"),
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
    where = (line.table or table).rpartition("/")
    measure = line.measure.format(measure) or measure

    def curve(column: str) -> Floats | None:
        values = results.curve(where[0] or analysis, where[2], column, measure) if column else None
        return 1 - values if line.from_one and values is not None else values

    low, high = (curve(line.high), curve(line.low)) if line.from_one else (curve(line.low), curve(line.high))
    values = curve(line.column)
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
    """Semantic classes by step, as shares of the features that fire often enough to have one."""
    table = results.table("semantics", "classes")
    if table is None or not {"class", "share", "step"} <= set(table.columns):
        return []
    names = list(dict.fromkeys(table["class"]))

    def shares(name: str, column: str) -> list[float | None]:
        rows = table[table["class"] == name].set_index("step")
        return plain(rows[column if column in rows else "share"].reindex(results.steps).to_numpy(dtype=np.float64))

    return [
        {
            "kind": "stack",
            "id": "semantics-classes",
            "title": "What features answer to, by step",
            "y": "share of features that fire enough",
            "domain": (0, 1),
            "percent": True,
            "note": "Classes come from thresholds on scores and are experimental; unresolved means that no rule holds.",
            "source": "analyses/semantics/classes.parquet",
            "lines": [
                {
                    "name": name,
                    "null": False,
                    "grey": name == UNRESOLVED,
                    "values": shares(name, "share"),
                    "low": shares(name, "low"),
                    "high": shares(name, "high"),
                }
                for name in names
            ],
        }
    ]


def _phases(results: Results) -> list[dict[str, Any] | None]:
    """Rates of change and the boundaries between phases with their intervals, one row for each perspective."""
    boundaries, scores, rates = (_on_log(results.table("phases", name)) for name in ("boundaries", "scores", "rates"))
    if boundaries is None or not {"perspective", "step"} <= set(boundaries.columns):
        return []
    ends = (plain(boundaries[c if c in boundaries else "step"].to_numpy()) for c in ("step", "low", "high"))
    robust = boundaries.get("robust", [True] * len(boundaries))
    marks = [
        {"perspective": p, "step": s, "low": a, "high": b, "robust": bool(r)}
        for p, s, a, b, r in zip(_perspectives(boundaries), *ends, robust, strict=True)
    ]
    cells: list[dict[str, Any]] = []
    if rates is not None and {"from_step", "step", "rate"} <= set(rates.columns):
        share = rates["rate"] / rates.groupby("perspective")["rate"].transform("max")
        values = (plain(rates[c].to_numpy()) for c in ("from_step", "step", "rate"))
        columns = zip(_perspectives(rates), *values, plain(share.to_numpy()), strict=True)
        cells = [{"perspective": p, "from": a, "to": b, "rate": r, "share": s} for p, a, b, r, s in columns]
    return [
        {
            "kind": "phases",
            "id": "phases-boundaries",
            "title": "Where a phase ends and the next begins",
            "y": "rate of change per decade of LLM steps, darkest where it is fastest",
            "note": "A dot ends a phase, the line is its 95 % interval; it is hollow where other spacings of the steps "
            "do not agree. A row without a dot is one phase: no cut is better than chance.",
            "source": "analyses/phases/rates.parquet and boundaries.parquet",
            "perspectives": list(dict.fromkeys(_perspectives(boundaries if scores is None else scores))),
            "marks": marks,
            "rates": cells,
        }
    ]


def _on_log(table: pd.DataFrame | None) -> pd.DataFrame | None:
    """The rows that were cut on the log of the step, where the table has some: the other axes are a check of them."""
    if table is None or "axis" not in table or not (table["axis"] == "log-step").any():
        return table
    return table[table["axis"] == "log-step"].drop(columns="axis")


def _perspectives(table: pd.DataFrame) -> list[str]:
    """Name of each row's perspective, with the axis it was cut on where the table says so."""
    names = [column for column in ("perspective", "axis") if column in table]
    return [", ".join(map(str, row)).replace("_", " ") for row in table[names].itertuples(index=False)]
