"""Analyses that the report has no figures of its own for, as those of plugins: their numbers, pictures and tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .data import Results, plain

if TYPE_CHECKING:
    from pathlib import Path

TABLE_ROWS = 2000
"""Longer tables stay on disk: they are about features, which the table of features is for."""

PICTURE_BYTES = 2_000_000
"""Larger pictures stay on disk."""


def other_section(results: Results, name: str) -> dict[str, Any]:
    """The section of an analysis, from what every result has.

    Args:
        results: The track's analyses.
        name: The folder of the analysis.

    Returns:
        Json-able, like the sections of `overview`, with the pictures it drew among the figures, and ``tables``.
    """
    facts = results.facts(name) or {}
    folder = results.track.analyses_dir / name
    figures = [_scalar(results, name, scalar, by_step) for scalar, by_step in facts.get("scalars", {}).items()]
    figures += [
        _picture(folder / f"{figure}.svg", facts.get("captions", {}).get(figure, ""))
        for figure in facts.get("figures", [])
    ]
    return {
        "id": name,
        "title": _words(name),
        "summary": facts.get("summary", ""),
        "settings": facts.get("settings", {}),
        "figures": [figure for figure in figures if figure is not None],
        "tables": [found for table in facts.get("tables", []) if (found := _table(results, name, table)) is not None],
    }


def _words(name: str) -> str:
    return name.replace("_", " ").replace("-", " ").capitalize()


def _scalar(results: Results, analysis: str, name: str, by_step: dict[str, float | None]) -> dict[str, Any] | None:
    values = np.array([by_step.get(str(step)) for step in results.steps], dtype=np.float64)
    if np.isfinite(values).sum() < 2:
        return None
    return {
        "kind": "lines",
        "id": f"{analysis}-scalar-{name}",
        "title": _words(name),
        "y": "",
        "domain": (None, None),
        "percent": False,
        "note": "",
        "source": f"analyses/{analysis}/result.json, scalar {name}",
        "lines": [{"name": name, "null": False, "values": plain(values), "low": None, "high": None, "band": ""}],
    }


def _picture(path: Path, caption: str) -> dict[str, Any] | None:
    if not path.is_file() or path.stat().st_size > PICTURE_BYTES:
        return None
    return {
        "kind": "picture",
        "id": f"{path.parent.name}-picture-{path.stem}",
        "title": _words(path.stem),
        "y": "",
        "note": caption,
        "svg": path.read_text(encoding="utf-8"),
    }


def _table(results: Results, analysis: str, name: str) -> dict[str, Any] | None:
    table = results.table(analysis, name)
    if table is None or len(table) > TABLE_ROWS:
        return None
    return {"name": name, "rows": [list(map(str, table.columns)), *map(_cells, table.itertuples(index=False))]}


def _cells(row: tuple[Any, ...]) -> list[str | float | None]:
    """Numbers as numbers, the rest as text."""
    cells: list[str | float | None] = []
    for value in row:
        if isinstance(value, int | float | np.number) and not isinstance(value, bool):
            cells.append(plain(np.array([value]))[0])
        else:
            cells.append(None if value is None or value is pd.NA else str(value))
    return cells
