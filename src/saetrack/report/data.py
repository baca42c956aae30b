"""The tables of a track's analyses, read by the columns they have: what is not there is None and nothing fails.

The report is the last to know of a new column and the first to be run on an old track. So this is the only module that
opens the tables, and all others ask it for what they would like to show.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from saetrack.analysis.base import RESULT_FILE
from saetrack.analysis.outdated import command_for, outdated

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from saetrack.track import Track

    Floats = NDArray[np.floating]

COMMANDS = {"profile": "Profile", "semantics": "Semantics", "formation": "Formation", "drift": "Drift"}
"""Analyses of the report by the folder's name, and the class that ``saetrack analyze --analyses+=`` takes."""

ROW_NAMES = ("measure", "baseline", "comparison", "control", "budget", "quantity")
"""Columns that tell apart the rows of one LLM step."""


class Results:
    """What the analyses of a track left behind.

    Args:
        track: The track, opened for reading.
    """

    def __init__(self, track: Track) -> None:
        self.track = track
        self.steps = np.array(track.steps, dtype=np.int64)
        self.d_sae = int(track.facts["d_sae"])
        self.table = cache(self._table)

    def names(self) -> list[str]:
        """Analyses that left a result, by their folders."""
        folder = self.track.analyses_dir
        return sorted(path.parent.name for path in folder.glob(f"*/{RESULT_FILE}") if path.parent.name[0] != ".")

    def facts(self, analysis: str) -> dict[str, Any] | None:
        """What ``result.json`` of an analysis says, or None when it has not been run."""
        path = self.track.analyses_dir / analysis / RESULT_FILE
        if not path.is_file():
            return None
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return facts

    def outdated(self) -> dict[str, dict[str, str]]:
        """Analyses whose result is not of the track as it is now: what it is of, and the command that makes it anew."""
        found = {name: outdated(self.track, (self.facts(name) or {}).get("settings") or {}) for name in self.names()}
        return {n: {"text": why, "command": command_for(self.track, n)} for n, why in found.items() if why is not None}

    def _table(self, analysis: str, name: str) -> pd.DataFrame | None:
        path = self.track.analyses_dir / analysis / f"{name}.parquet"
        return pd.read_parquet(path) if path.is_file() else None

    def curve(self, analysis: str, name: str, column: str, measure: str | None = None) -> Floats | None:
        """A column of a table with one row for each LLM step.

        Args:
            analysis: Folder under ``analyses/``.
            name: The table.
            column: Its column.
            measure: Rows whose ``measure`` (or other of `ROW_NAMES`) this is, in a table that has several; where it has
                two such columns, both with a stroke between.

        Returns:
            ``[T]`` float64, NaN where the table has no row; None when there is no such table, column or measure.
        """
        table = self.table(analysis, name)
        if table is None or column not in table or "step" not in table:
            return None
        for key, wanted in zip([n for n in ROW_NAMES if n in table], (measure or "").split("/"), strict=False):
            table = table[table[key] == wanted] if wanted else table
        if table["step"].duplicated().any():
            return None
        values = table.set_index("step")[column].reindex(self.steps).to_numpy(dtype=np.float64, na_value=np.nan)
        return values if np.isfinite(values).any() else None

    def by_feature(self, analysis: str, name: str, column: str) -> NDArray[Any] | None:
        """A column of a table with one row for each feature, ``[d_sae]``; None when there is none."""
        table = self.table(analysis, name)
        if table is None or column not in table or "feature" not in table:
            return None
        return table.drop_duplicates("feature").set_index("feature")[column].reindex(range(self.d_sae)).to_numpy()

    def grid(self, analysis: str, name: str, column: str) -> NDArray[Any] | None:
        """A column of a table with one row for each feature and LLM step.

        Returns:
            ``[d_sae, T]``: float32 with NaN where there is no row, or objects with None; None when there is no such
            table or column.
        """
        table = self.table(analysis, name)
        if table is None or not {column, "feature", "step"} <= set(table.columns):
            return None
        number = pd.api.types.is_numeric_dtype(table[column])
        grid = np.full(
            (self.d_sae, len(self.steps)), np.nan if number else None, dtype=np.float32 if number else object
        )
        place, known = self.places(table["step"].to_numpy())
        grid[table["feature"].to_numpy()[known], place[known]] = table[column].to_numpy()[known]
        return grid

    def snapshot_grid(self, column: str) -> Floats | None:
        """A column of the snapshots' own feature tables, ``[d_sae, T]`` float32; None unless all have it."""
        tables = [snapshot.features for snapshot in self.track]
        if not all(column in table for table in tables):
            return None
        return np.stack([table[column].to_numpy(dtype=np.float32, na_value=np.nan) for table in tables], axis=1)

    def arrays(self, analysis: str, name: str, column: str) -> NDArray[Any] | None:
        """A column of lists of one length, by feature and LLM step.

        Returns:
            ``[d_sae, T, n]``; zeros (or None) where there is no row. None when there is no such table or column.
        """
        table = self.table(analysis, name)
        if table is None or column not in table or table.empty:
            return None
        values = np.stack(table[column].to_list())
        spread = np.zeros((self.d_sae, len(self.steps), values.shape[1]), dtype=values.dtype)
        place, known = self.places(table["step"].to_numpy())
        spread[table["feature"].to_numpy()[known], place[known]] = values[known]
        return spread

    def places(self, steps: Sequence[int] | NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Position in the track of each LLM step, and whether the track has it."""
        index = pd.Index(self.steps).get_indexer(pd.Index(steps))
        return index, index >= 0


def plain(values: Floats) -> list[float | None]:
    """Numbers as JSON has them: six digits, None for NaN and infinity."""
    return [float(f"{v:.6g}") if np.isfinite(v) else None for v in np.asarray(values, dtype=np.float64)]
