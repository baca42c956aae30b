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

from .planted_rates import D_SAE, Rates, plant_rates, track_with_chain

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


def test_features_of_one_value_each_cannot_be_permuted_and_are_one_phase() -> None:
    """Each is known at one time: a permutation moves nothing, so nothing can beat it."""
    gaps = np.array([0.7, 0.3, 0.4, 0.2, 1.0, 0.5])
    for each in (1, 2):
        amounts = np.full((6, 6 * each), np.nan)
        amounts[np.repeat(np.arange(6), each), np.arange(6 * each)] = np.repeat([1.0, 9.0], 3 * each)
        amounts += 0.1 * np.random.default_rng(each).normal(size=amounts.shape)
        found = cut(amounts * gaps[:, None], gaps, [], Resampling(replicates=20, permutations=20))
        assert found.found.score[0].max() > 0
        assert (found.phases, found.null_score) == (1, found.found.score[0].max())


def test_a_feature_keeps_its_own_times_under_the_null() -> None:
    """Half of the features end half-way, at twice the rate: the mean has two levels, and no feature has."""
    rng = np.random.default_rng(8)
    amounts = (
        np.where(np.arange(300) < 150, 2.0, 1.0) + 0.3 * rng.normal(size=(N, 300)) + 0.03 * rng.normal(size=(N, 1))
    )
    amounts[15:, :150] = np.nan
    found = cut(amounts, np.ones(N), [], Resampling(replicates=20, permutations=40))
    assert found.found.best[0] == 2
    assert found.phases == 1


def test_a_null_chain_with_the_same_regimes_takes_them_away() -> None:
    rng = np.random.default_rng(4)
    draws = Resampling(replicates=20, permutations=40)
    amounts = np.repeat([1.0, 2.0, 1.4], [9, 10, 10])[:, None] + 0.1 * rng.normal(size=(N, 300))
    assert cut(amounts, np.ones(N), [], draws).phases == 3
    chain = np.repeat([1.0, 2.0, 1.4], [9, 10, 10])[:, None] + 0.05 * rng.normal(size=(N, 300))
    calibrated = cut(amounts, np.ones(N), [chain], draws)
    still = cut(amounts, np.ones(N), [np.ones((N, 300)) + 0.05 * rng.normal(size=(N, 300))], draws)
    assert still.phases == 3
    assert still.null_score >= cut(amounts, np.ones(N), [], draws).null_score  # a control makes no phases
    assert (calibrated.phases, calibrated.null) == (1, "permutation in time and null chain")


def test_agreement_is_one_for_equal_segmentations_and_by_hand_otherwise() -> None:
    assert covering(np.array([4.0]), np.array([4.0]), 0.0, 10.0) == 1
    assert covering(np.array([5.0]), np.array([]), 0.0, 10.0) == pytest.approx(0.5)
    assert boundary_distance(np.array([2.0, 5.0]), np.array([3.0])) == pytest.approx((1.5 + 1) / 2)
    assert adjusted_rand(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1])) == 1
    assert adjusted_rand(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])) == pytest.approx(-0.5)


def test_times_in_the_same_order_have_tau_one_and_their_planted_lag() -> None:
    first = np.repeat(np.arange(5.0), 20)
    found = order_of_times(first, first + 2, 0.7 * np.arange(7), 30, np.random.default_rng(0))
    assert found["tau"] == pytest.approx((1, 1, 1))
    assert found["lag"] == pytest.approx((1.4, 0.7, 2.1))


@pytest.mark.parametrize("planted", [0.0, 0.3, 1.1])
def test_the_interval_of_the_lag_covers_the_truth_that_checkpoints_hide(planted: float) -> None:
    """Were the times those of the middles, the interval would often be a point beside the truth."""
    place = np.arange(8.0)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        first = rng.uniform(0.2, 5, size=200)
        second = first + planted + 0.2 * rng.normal(size=200)
        found = order_of_times(*(np.searchsorted(place, t).astype(float) for t in (first, second)), place, 50, rng)
        _, low, high = found["lag"]
        assert low < planted < high


def test_a_perspective_without_its_table_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(NotAvailable, match=r"saetrack analyze .* --analyses\+=Semantics"):
        semantic_amounts(Tables(tmp_path / "analyses", [0, 1, 2, 3, 4, 5], 4))


def test_null_steps_at_two_stages_are_taken_off_the_drift_and_at_fewer_nothing(tmp_path: Path) -> None:
    tables = Tables(tmp_path / "analyses", [0, 1, 2, 4, 8, 16], 3)
    drift = Amounts(np.full((5, 3), 0.5) + np.array([0.0, 0.1, -0.1]), "drift")
    assert drift_above_null(drift, tables) == (drift, [])
    folder = tmp_path / "analyses" / "drift"
    folder.mkdir(parents=True)
    pd.DataFrame({"step": [4], "drift_null": [0.1]}).to_parquet(folder / "calibration.parquet")
    assert drift_above_null(drift, tables) == (drift, [4])
    table = pd.DataFrame({"step": [1, 16], "drift_null": [0.1, 0.3]})  # the first stage and the last
    table.to_parquet(folder / "calibration.parquet")
    found, at = drift_above_null(drift, tables)
    assert at == [1, 16]
    np.testing.assert_allclose(found.values[:, 0], 0.5 - np.array([0.1, 0.15, 0.2, 0.25, 0.3]))


STEPS = (0, 1, 3, 9, 31, 99, 315)


def plant_turnover(track: Track, amounts: np.ndarray) -> None:
    """Write the table of semantics as it would be, ``amounts`` ``[T - 1, F]``."""
    values = np.concatenate([np.full((1, amounts.shape[1]), np.nan), amounts])
    place, feature = np.indices(values.shape)
    table = pd.DataFrame({"step": np.array(track.steps)[place.ravel()], "feature": feature.ravel()})
    table = table.assign(turnover=values.ravel(), top_token_id=0)
    if len(set(track.steps)) < len(track):
        table["position"] = place.ravel()
    (track.analyses_dir / "semantics").mkdir(parents=True, exist_ok=True)
    table.to_parquet(track.analyses_dir / "semantics" / "features.parquet")


def test_turnover_that_a_null_chain_has_too_makes_no_phases(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    track = track_with_chain(tmp_path / "t", STEPS, chain=True)
    amounts = np.repeat([0.6, 0.1], 3)[:, None] * (1 + 0.1 * rng.normal(size=(6, D_SAE)))
    plant_turnover(track, amounts)
    phases = Phases(replicates=20, permutations=40)
    alone = phases.run(track)
    assert alone.settings["null"]["semantic"] == "permutation in time"
    assert "run `saetrack analyze" in alone.settings["not_available"]["semantic of null-chain-0"]
    assert "Semantic of null-chain-0 not available: no semantics yet: run `saetrack analyze" in alone.summary
    (chain,) = track.controls("null")
    plant_turnover(chain, amounts[:, ::-1] / 2)
    calibrated = phases.run(track)
    assert calibrated.settings["null"]["semantic"] == "permutation in time and null chain"
    assert "semantic of null-chain-0" not in calibrated.settings["not_available"]
    cut = "perspective == 'semantic' and axis == 'index'"
    assert set(alone.tables["rates"].query(cut)["phase"]) == {1, 2}
    assert set(calibrated.tables["rates"].query(cut)["phase"]) == {1}
    still = 0.1 * (1 + 0.1 * rng.normal(size=(6, D_SAE)))
    plant_turnover(chain, still)  # a chain without regimes leaves those of the track
    assert set(phases.run(track).tables["rates"].query(cut)["phase"]) == {1, 2}


def test_the_summary_is_a_sentence_for_each_perspective_and_says_what_was_taken_off(tmp_path: Path) -> None:
    track = track_with_chain(tmp_path / "t", STEPS, chain=False)
    rates = np.random.default_rng(6).uniform(0.05, 0.06, size=6)
    plant_rates(track, Rates(rates, np.zeros(6), STEPS), np.random.default_rng(7))
    pd.DataFrame({"step": [9], "drift_null": [0.01]}).to_parquet(track.analyses_dir / "drift" / "calibration.parquet")
    result = Phases(replicates=20, permutations=20).run(track)
    wanted = f"nothing: only LLM step 9 has null steps, and two must have; run `saetrack control {track.path} --kind"
    assert result.settings["drift_above"].startswith(wanted)
    assert result.summary.startswith("Drift: one phase (")
    assert f"Taken off the drift: {wanted}" in result.summary
    assert "\n" not in result.summary


def test_six_snapshots_are_refused_as_one_phase_is_the_only_answer_there_could_be(tmp_path: Path) -> None:
    track = track_with_chain(tmp_path / "t", STEPS[:6], chain=False)
    with pytest.raises(
        ValueError, match="holds 6 of the at least 7 snapshots that phases needs: with fewer there can be no two phases"
    ):
        Phases().run(track)
    track = track_with_chain(tmp_path / "seven", STEPS, chain=False)
    amounts = np.full((6, D_SAE), 0.5)
    amounts[0] = np.nan
    plant_turnover(track, amounts)
    with pytest.raises(ValueError, match="5 intervals hold a feature that counts, and two phases need 6"):
        Phases().run(track)
