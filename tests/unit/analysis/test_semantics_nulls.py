"""The shares of classes and patterns that null chains reach, with the interval of as many features as they have."""

import numpy as np
import pandas as pd
import pytest

from saetrack.analysis.resampling import share_interval
from saetrack.analysis.semantics_patterns import pattern_table, transition_table

CLASSES = np.array([["token"] * 10, ["token"] * 4 + ["concept"] * 6])


def test_transitions_of_null_chains_are_taken_together_and_have_an_interval() -> None:
    null = pd.DataFrame({"place": 0, "from": "token", "to": "concept", "features": [3, 5], "of": [20, 60]})
    table = transition_table([0, 8], CLASSES, null).set_index(["from", "to"]).loc[("token", "concept")]
    share, low, high = (values.item() for values in share_interval(np.array([8]), np.array([80])))
    assert (table["null_share"], table["null_low"], table["null_high"]) == pytest.approx((share, low, high))
    assert low < share == 0.1 < high
    alone = transition_table([0, 8], CLASSES)
    assert alone[["null_share", "null_low", "null_high"]].isna().all(axis=None)


def test_patterns_of_null_chains_have_an_interval_too() -> None:
    null = pd.DataFrame({"remaining": 1, "pattern": "death", "features": [2, 4], "of": [30, 30]})
    found = [np.array(["death", "other", ""])]
    table = pattern_table([0, 8], found, null).set_index("pattern")
    assert table.loc["death", "null_low"] < table.loc["death", "null_share"] == 0.1 < table.loc["death", "null_high"]
    assert np.isnan(table.loc["other", "null_share"])
