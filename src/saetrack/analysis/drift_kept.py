"""Drift restricted to stretches: what is left of its rows when only kept features count."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .drift_tables import LAST, NOT_KEPT, PREVIOUS, WALKS

if TYPE_CHECKING:
    from .identity_stretches import Kept


def restrict_rows(table: pd.DataFrame, kept: Kept) -> pd.DataFrame:
    """The table of features with status `NOT_KEPT` and no number where a feature did not keep its identity.

    Args:
        table: One row by snapshot and feature, as `Drift` makes it.
        kept: Numbers of a stage are left to those that kept it in the stage, those to the last snapshot to those that
            kept it until then.
    """
    at, to_last = kept.at.ravel(), kept.to_last.ravel()
    table = table.assign(
        status=np.where(at, table["status"], NOT_KEPT),
        alive_before=table["alive_before"].to_numpy() & at,
        revived_later=table["revived_later"].to_numpy() & to_last,
        followed_to_last=table["followed_to_last"].to_numpy() & to_last,
    )
    of_stage, of_rest = [*PREVIOUS, "functional_correlation"], [*LAST, *WALKS]
    table[of_stage] = np.where(at[:, None], table[of_stage], np.nan)
    table[of_rest] = np.where(to_last[:, None], table[of_rest], np.nan)
    return table
