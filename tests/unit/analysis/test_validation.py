"""The rows of docs/validation.md that need no SAE, with fewer repeats than benchmarks/validation_simulated.py.

A bound is what the row asks for, less what so few repeats leave to chance. Those of formation are in test_formation.
"""

from pathlib import Path

import numpy as np
import pytest
from validation_rows import Row, interval, line
from validation_simulated import (
    dictionary_rows,
    drift_recovered,
    map_leaves,
    null_excess,
    one_phase,
    semantic_rows,
    three_phases,
)

from .planted_rates import Rates


def share(row: Row) -> float:
    return row.right / row.cases


def test_a_track_on_which_the_llm_did_nothing_has_no_excess_drift(tmp_path: Path) -> None:
    for row in null_excess(tmp_path, (2, 3), repeats=16):
        assert share(row) >= 0.8


def test_planted_drift_is_recovered(tmp_path: Path) -> None:
    assert 0.9 <= drift_recovered(tmp_path, repeats=3).ratio <= 1.1


@pytest.mark.parametrize(("features", "left"), [(24, 24 / 64), (32, 1 / 2), (128, 1 - 32 / 256)])
def test_a_map_between_activations_leaves_what_the_drift_analysis_says(features: int, left: float) -> None:
    assert map_leaves("", features, 32, repeats=2).ratio == pytest.approx(left, abs=0.03)


def test_permuted_dictionaries_match_and_independent_ones_do_as_their_null(tmp_path: Path) -> None:
    permuted, *independent = dictionary_rows(tmp_path, repeats=8, shape=(64, 8))
    assert share(permuted) == 1
    assert all(share(row) >= 0.6 for row in independent)


def test_a_null_chain_has_one_phase(tmp_path: Path) -> None:
    assert share(one_phase(tmp_path, "", Rates.still(), Rates.still(), repeats=4)) >= 0.75


def test_three_planted_regimes_are_three_phases(tmp_path: Path) -> None:
    assert share(three_phases(tmp_path, "", Rates.three(0.05), Rates.still(0.0005), repeats=4)) >= 0.75


def test_three_planted_regimes_are_found_under_null_steps_that_hide_them(tmp_path: Path) -> None:
    row = three_phases(tmp_path, "", Rates.three(0.05, null=0.01), None, repeats=4, null_steps=True)
    assert share(row) >= 0.75


def test_planted_tokens_and_concepts_have_their_class_and_permuted_text_no_concepts(tmp_path: Path) -> None:
    accuracy, *_, false = semantic_rows(tmp_path, seeds=1)
    assert share(accuracy) >= 0.9
    assert share(false) <= 0.05


def test_a_line_adds_up_repeats_and_says_what_is_not_there() -> None:
    low, high = interval(6, 8)
    assert (low, high) == pytest.approx((0.4093, 0.9285), abs=1e-4)  # Wilson's, by hand
    assert line([Row("a", ">= 1", 3, 4)] * 2) == f"| a | >= 1 | 0.750 [{low:.3f}, {high:.3f}] | 8 |"
    assert line([Row("b", "1", np.nan, 5, 0.91)] * 2) == "| b | 1 | 0.91, 0.91 | 10 |"
    assert line([Row("c", "1", np.nan, 0)]) == "| c | 1 | not available | 0 |"
