"""Phases on planted series: regimes are found where they are, and noise, walks and trends have none."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from saetrack.analysis.phases import Phases
from saetrack.analysis.phases_agreement import adjusted_rand, boundary_distance, covering, order_of_times
from saetrack.analysis.phases_cut import Resampling, cut
from saetrack.analysis.phases_segment import advantage, random_walk_advantage, segment
from saetrack.analysis.phases_series import Amounts, NotAvailable, Tables, drift_above_null, semantic_amounts
from saetrack.track import Track

N = 29
EQUAL = np.ones(N)


def accepted(series: np.ndarray) -> np.ndarray:
    """Number of phases of each series by the score and the random walks; the permutation null is left out."""
    found = segment(series, EQUAL)
    over_curve = advantage(series, EQUAL, found)[np.arange(len(series)), found.best - 1]
    return np.where(over_curve > random_walk_advantage(EQUAL, np.random.default_rng(9)), found.best, 1)


def test_the_best_cuts_are_those_of_trying_every_cut() -> None:
    rng = np.random.default_rng(0)
    series, weights = rng.normal(size=(4, 11)), rng.uniform(0.2, 3, size=11)
    found = segment(series, weights)

    def cost(y: np.ndarray, w: np.ndarray) -> float:
        return float((w * (y - (w * y).sum() / w.sum()) ** 2).sum())

    for s, y in enumerate(series):
        every = {
            (a, b): cost(y[:a], weights[:a]) + cost(y[a:b], weights[a:b]) + cost(y[b:], weights[b:])
            for a in range(3, 6)
            for b in range(a + 3, 9)
        }
        best = min(every, key=lambda places: every[places])
        assert tuple(found.boundaries[2][s]) == best
        assert found.residual[s, 2] == pytest.approx(every[best])


def test_three_planted_regimes_are_three_phases_with_boundaries_within_one_checkpoint() -> None:
    rng = np.random.default_rng(1)
    series = np.repeat([0.0, 1.0, 0.3], [9, 10, 10]) + 0.05 * rng.normal(size=(200, N))
    three = accepted(series) == 3
    near = (np.abs(segment(series, EQUAL).boundaries[2] - [9, 19]) <= 1).all(axis=1)
    assert (three & near).mean() >= 0.9


@pytest.mark.parametrize("kind", ["noise", "walk", "line", "curve"])
def test_noise_random_walks_and_smooth_trends_are_one_phase(kind: str) -> None:
    rng = np.random.default_rng(2)
    noise, time = rng.normal(size=(400, N)), np.linspace(0, 1, N)
    series = {
        "noise": noise,
        "walk": noise.cumsum(axis=1),
        "line": time + 0.05 * noise,
        "curve": np.exp(-3 * time) + 0.05 * noise,
    }[kind]
    # for walks the rate is 5 % by construction; two standard errors of 400 repeats
    assert (accepted(series) == 1).mean() >= (0.93 if kind == "walk" else 0.95)


def test_planted_regimes_in_features_are_found_and_features_that_do_not_change_have_none() -> None:
    rng = np.random.default_rng(3)
    draws = Resampling(replicates=50, permutations=40)
    noise = 0.5 * rng.normal(size=(N, 300)) + 0.03 * rng.normal(size=(N, 1))
    planted = cut(np.repeat([1.0, 2.0, 1.4], [9, 10, 10])[:, None] + noise, np.ones(N), [], draws)
    assert planted.phases == 3
    assert (np.abs(planted.boundaries - [9, 19]) <= 1).all()
    low, high = planted.interval()
    assert (low <= planted.boundaries).all()
    assert (planted.boundaries <= high).all()
    assert cut(1 + noise, np.ones(N), [], draws).phases == 1


def test_a_null_chain_with_the_same_regimes_takes_them_away() -> None:
    rng = np.random.default_rng(4)
    draws = Resampling(replicates=20, permutations=40)
    amounts = np.repeat([1.0, 2.0, 1.4], [9, 10, 10])[:, None] + 0.1 * rng.normal(size=(N, 300))
    assert cut(amounts, np.ones(N), [], draws).phases == 3
    chain = np.repeat([1.0, 2.0, 1.4], [9, 10, 10])[:, None] + 0.05 * rng.normal(size=(N, 300))
    calibrated = cut(amounts, np.ones(N), [chain], draws)
    assert (calibrated.phases, calibrated.null) == (1, "null chain")


def test_agreement_is_one_for_equal_segmentations_and_by_hand_otherwise() -> None:
    assert covering(np.array([4.0]), np.array([4.0]), 0.0, 10.0) == 1
    assert covering(np.array([5.0]), np.array([]), 0.0, 10.0) == pytest.approx(0.5)
    assert boundary_distance(np.array([2.0, 5.0]), np.array([3.0])) == pytest.approx((1.5 + 1) / 2)
    assert adjusted_rand(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1])) == 1
    assert adjusted_rand(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])) == pytest.approx(-0.5)


def test_times_in_the_same_order_have_tau_one_and_their_planted_lag() -> None:
    first = np.repeat(np.arange(5.0), 20)
    found = order_of_times(first, first + 0.7, 30, np.random.default_rng(0))
    assert found["tau"] == pytest.approx((1, 1, 1))
    assert found["lag"] == pytest.approx((0.7, 0.7, 0.7))


def test_a_track_of_fewer_than_six_snapshots_is_refused(tiny_track: Track) -> None:
    with pytest.raises(ValueError, match="holds 4 of the at least 6 snapshots that phases needs"):
        Phases().run(tiny_track)


def test_a_perspective_without_its_table_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(NotAvailable, match=r"saetrack analyze .* --analyses\+=Semantics"):
        semantic_amounts(Tables(tmp_path / "analyses", [0, 1, 2, 3, 4, 5], 4))


def test_null_steps_are_taken_off_the_drift_and_without_them_the_null_chain(tmp_path: Path) -> None:
    tables = Tables(tmp_path / "analyses", [0, 1, 2, 4, 8, 16], 3)
    drift = Amounts(np.full((5, 3), 0.5) + np.array([0.0, 0.1, -0.1]), "drift")
    assert drift_above_null(drift, tables, [])[1] is None
    chains = [np.arange(5.0)[:, None] * np.ones(3) / 10, np.zeros((5, 3))]
    found, by = drift_above_null(drift, tables, chains)
    assert by == "null chain"
    np.testing.assert_allclose(found.values, drift.values - np.arange(5.0)[:, None] / 20)
    (tmp_path / "analyses" / "drift").mkdir(parents=True)
    table = pd.DataFrame({"step": [1, 16], "drift_null": [0.1, 0.3]})  # the first stage and the last
    table.to_parquet(tmp_path / "analyses" / "drift" / "calibration.parquet")
    found, by = drift_above_null(drift, tables, chains)
    assert by == "null steps"
    np.testing.assert_allclose(found.values[:, 0], 0.5 - np.array([0.1, 0.15, 0.2, 0.25, 0.3]))
