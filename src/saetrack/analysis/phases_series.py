"""From the tables of the other analyses to what the phases analysis cuts: amounts of change, and times of features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from .places import share_a_step

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from saetrack.track import Track

    from .identity_stretches import Kept

    Floats = NDArray[np.floating]


class NotAvailable(Exception):  # noqa: N818 - an answer, not an error
    """Why a perspective cannot be read, in words for the user."""


@dataclass(frozen=True)
class Amounts:
    """How much changed from each checkpoint to the next. Divided by the gap it is a rate.

    Args:
        values: ``[T - 1, d_sae]``, or ``[T - 1, 1]`` for the LLM's own; NaN where a feature does not count.
        what: What is counted, with its unit, for the axis of a figure.
    """

    values: Floats
    what: str


@dataclass(frozen=True)
class Tables:
    """The tables of the other analyses of one track.

    Args:
        folder: The track's ``analyses``.
        steps: LLM steps of its snapshots.
        d_sae: Features of its SAEs.
        kept: If given, amounts are of features that kept their identity in the stage, and what is of whole curves is
            of those that kept it throughout.
    """

    folder: Path
    steps: list[int]
    d_sae: int
    kept: Kept | None = None

    @classmethod
    def of(cls, track: Track, kept: Kept | None = None) -> Tables:
        """Those of a track."""
        return cls(track.analyses_dir, track.steps, int(track.facts["d_sae"]), kept)

    def read(self, analysis: str, name: str, columns: Sequence[str], optional: Sequence[str] = ()) -> pd.DataFrame:
        """Some columns of a table, and those of the optional ones that are there.

        Raises:
            NotAvailable: If there is no such table, or it lacks a column.
        """
        path = self.folder / analysis / f"{name}.parquet"
        if not path.is_file():
            raise NotAvailable(f"no {analysis} yet: run `{self._command(analysis)}`")
        present = pq.read_schema(path).names
        if not set(columns) <= set(present):
            raise self.stale(analysis)
        return pd.read_parquet(path, columns=[*columns, *(c for c in optional if c in present)])

    def read_by_step(
        self, analysis: str, name: str, columns: Sequence[str], optional: Sequence[str] = ()
    ) -> pd.DataFrame:
        """As `read`, a table with a column ``step``, which must hold just the steps of the track.

        With ``position``, by which the snapshots of a null chain are told apart, for they share one step.
        """
        by = ["step", "position"] if share_a_step(self.steps) else ["step"]
        table = self.read(analysis, name, [*by, *columns], optional)
        if set(table["step"]) != set(self.steps):
            raise self.stale(analysis)
        return table

    def pivot(self, table: pd.DataFrame, column: str) -> Floats:
        """``[T, d_sae]`` from a table with a row for some of the features at each step; NaN for the others."""
        values = np.full((len(self.steps), self.d_sae), np.nan)
        at = table["position"] if "position" in table else np.searchsorted(self.steps, table["step"])
        values[at, table["feature"]] = table[column]
        return values

    def restrict(self, values: Floats) -> Floats:
        """Amounts ``[T - 1, d_sae]`` with NaN where a feature did not keep its identity."""
        return values if self.kept is None else np.where(self.kept.into[1:], values, np.nan)

    def restrict_whole(self, values: Floats) -> Floats:
        """Times ``[d_sae]``, or amounts of whole curves ``[T - 1, d_sae]``, likewise."""
        return values if self.kept is None else np.where(self.kept.throughout, values, np.nan)

    def stale(self, analysis: str) -> NotAvailable:
        """The answer when a table is not what the track needs."""
        return NotAvailable(
            f"{self.folder / analysis} was made on other snapshots or by another version: run "
            f"`{self._command(analysis)}` again"
        )

    def _command(self, analysis: str) -> str:
        return f"saetrack analyze {self.folder.parent} --analyses+={analysis.capitalize()}"


def semantic_amounts(tables: Tables) -> Amounts:
    """Turnover of a feature's top contexts, 1 - Jaccard."""
    table = tables.read_by_step("semantics", "features", ["feature", "turnover"])
    return Amounts(tables.restrict(tables.pivot(table, "turnover")[1:]), "turnover of top contexts")


def formation_amounts(tables: Tables) -> Amounts:
    """Whether a feature formed between two checkpoints, 0 or 1; those formed at the first one never do."""
    formed, status = _formation(tables)
    values = (formed[None, :] == np.arange(1, len(tables.steps))[:, None]).astype(np.float64)
    values[:, np.isin(status, _NO_FORMATION)] = np.nan
    return Amounts(tables.restrict_whole(values), "share of features formed")


def drift_amounts(tables: Tables) -> Amounts:
    """1 - cosine of the decoder row to the snapshot before, the common rotation taken out where it is known.

    Features dead at either end, revived or frozen in the stage do not count. Rows are taken in the order of the
    snapshots and not by step: those of a null chain all have one step.
    """
    measures = ["decoder_to_previous_without_rotation", "decoder_to_previous"]
    table = tables.read("drift", "drift", ["step", "status", "alive_before", *measures])
    shape = (len(tables.steps), tables.d_sae)
    if len(table) != shape[0] * shape[1] or table["step"].tolist()[:: shape[1]] != tables.steps:
        raise tables.stale("drift")
    counts = ((table["status"] == "alive") & table["alive_before"]).to_numpy(dtype=bool).reshape(shape)
    for measure in measures:
        turned = np.where(counts, 1 - table[measure].to_numpy(dtype=np.float64).reshape(shape), np.nan)[1:]
        if np.isfinite(turned).any(axis=1).all():
            break
    return Amounts(tables.restrict(turned), "1 - cosine to the previous")


def drift_above_null(found: Amounts, tables: Tables) -> tuple[Amounts, list[int]]:
    """The drift that is left above what training once more makes, and the LLM steps at which that was measured.

    By the null steps of the drift analysis, interpolated between the stages that have some; with fewer than two such
    stages nothing is taken off. The mean null is taken off every feature. A null chain is no substitute: it is trained
    on one LLM checkpoint again and again, converges, and drifts far less than a null step from the track's snapshot.

    Args:
        found: The drift.
        tables: Of the track.
    """
    try:
        null = _null_drift(tables)
    except NotAvailable:
        null = pd.DataFrame(columns=["step", "drift_null"])
    null = null[null["step"].isin(tables.steps[1:]) & null["drift_null"].notna()].sort_values("step")
    at = null["step"].tolist()
    if len(at) < 2:
        return found, at
    places = np.searchsorted(tables.steps, at)
    level = np.interp(np.arange(1, len(tables.steps)), places, null["drift_null"])
    return Amounts(found.values - level[:, None], "1 - cosine to the previous, above the null"), at


def _null_drift(tables: Tables) -> pd.DataFrame:
    """Mean drift of null steps, ``drift_null`` by ``step``; restricted, of the features that count."""
    if tables.kept is None:
        return tables.read("drift", "calibration", ["step", "drift_null"])
    table = tables.read("drift", "excess", ["step", "feature", "drift_null"])
    table = table[table["step"].isin(tables.steps)]
    use = tables.kept.into[np.searchsorted(tables.steps, table["step"]), table["feature"]]
    return table.loc[use, ["step", "drift_null"]].groupby("step").mean().reset_index()


def loss_amounts(tables: Tables) -> Amounts:
    """Fall of the LLM's own loss on the evaluation rows, in nats."""
    table = tables.read_by_step("quality", "quality", ["ce_clean"])
    return _of_llm(-np.diff(table["ce_clean"].to_numpy(dtype=np.float64)), "fall of the LLM's loss, nats")


def shift_amounts(tables: Tables) -> Amounts:
    """What the LLM's step costs the SAE of the snapshot before, unchanged: its FVU after the step less before it."""
    table = tables.read_by_step("quality", "quality", ["fvu", "fvu_shift"], ["from_step"])
    if "from_step" in table and table["from_step"].tolist()[1:] != tables.steps[:-1]:
        raise NotAvailable("the stages of this track did not each begin from the snapshot before in LLM steps")
    shift = table["fvu_shift"].to_numpy(dtype=np.float64)[1:] - table["fvu"].to_numpy(dtype=np.float64)[:-1]
    return _of_llm(shift, "rise of the old SAE's FVU")


AMOUNTS: dict[str, Callable[[Tables], Amounts]] = {
    "semantic": semantic_amounts,
    "formation": formation_amounts,
    "drift": drift_amounts,
    "model_loss": loss_amounts,
    "model_shift": shift_amounts,
}
"""By perspective; the LLM's has two."""


def semantic_times(tables: Tables) -> Floats:
    """Index of the checkpoint from which a feature keeps what it means at the last one ``[d_sae]``.

    What it means is its class where the table has one, its top token otherwise. NaN for those silent at the last.
    """
    table = tables.read_by_step("semantics", "features", ["feature", "top_token_id"], ["class"])
    meaning = table["class" if "class" in table else "top_token_id"]
    codes = tables.pivot(table.assign(code=pd.factorize(meaning)[0]), "code")
    kept = np.logical_and.accumulate((codes == codes[-1])[::-1])[::-1]
    return tables.restrict_whole(np.where(np.isfinite(codes[-1]), kept.argmax(axis=0), np.nan))


def formation_times(tables: Tables) -> Floats:
    """Index of the checkpoint by which a feature has formed ``[d_sae]``; NaN for those that have not."""
    return tables.restrict_whole(_formation(tables)[0])


def drift_times(tables: Tables) -> Floats:
    """Index of the checkpoint by which a feature has turned half of all it turns ``[d_sae]``.

    NaN for those that do not count in some stage.
    """
    path = np.cumsum(drift_amounts(tables).values, axis=0)
    return np.where(np.isfinite(path[-1]), (path >= path[-1] / 2).argmax(axis=0) + 1, np.nan)


TIMES: dict[str, Callable[[Tables], Floats]] = {
    "semantic": semantic_times,
    "formation": formation_times,
    "drift": drift_times,
}

_NO_FORMATION = ("silent", "insufficient", "not available")  # status of features that were not followed


def _of_llm(values: Floats, what: str) -> Amounts:
    if not np.isfinite(values).all():
        raise NotAvailable("the snapshots of this track do not all hold the LLM's loss and the SAE's FVU before it")
    return Amounts(values[:, None], what)


def _formation(tables: Tables) -> tuple[Floats, NDArray[np.object_]]:
    """Index of the checkpoint by which each feature has formed, NaN for never, and its status, both ``[d_sae]``."""
    tables.read_by_step("formation", "formed", [])
    table = tables.read("formation", "features", ["status", "formed_step"], ["formed_by"])
    if len(table) != tables.d_sae:
        raise tables.stale("formation")
    times = table["formed_by" if "formed_by" in table else "formed_step"].to_numpy(dtype=np.float64)
    index = np.where(np.isfinite(times), np.searchsorted(tables.steps, times), np.nan)
    return index, table["status"].to_numpy(dtype=object)
