"""The nulls of identity are nulls of the stages that they were measured at."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from saetrack.analysis.controls import stage_place
from saetrack.analysis.identity import Identity
from saetrack.analysis.identity_nulls import limit_table, null_survival, stage_controls
from saetrack.analysis.sweep import run_analyses
from saetrack.track import Track

from .conftest import add_control
from .planted_track import begin, random_rows, snapshot

STEPS, FEATURES = [0, 1, 3, 9, 31], 200
OTHERS = np.full((5, FEATURES), 0.3)  # so that this is the limit where the null steps reach less


def arms(kept: float, seed: int = 0) -> np.ndarray:
    """Two null arms ``[2, F]`` of whose features a share reaches 0.5, and the others 0.1."""
    reach = np.random.default_rng(seed).random((2, FEATURES)) < kept
    return np.where(reach, 0.9, 0.1)


def test_a_null_is_of_its_stage_and_of_those_between_two_stages_that_have_one() -> None:
    nulls = {1: arms(0.9), 3: arms(0.7, 1)}
    table = limit_table(STEPS, nulls, OTHERS, threshold=0.5)
    assert table["null_from"].tolist() == ["", "null steps", "interpolated", "null steps", ""]
    shares = [(nulls[t] > 0.5).mean() for t in (1, 3)]
    expected = [np.nan, shares[0], np.mean(shares), shares[1], np.nan]
    assert table["null_kept"].to_numpy() == pytest.approx(np.array(expected), nan_ok=True)
    assert table["threshold"].tolist()[1:] == [0.3, 0.3, 0.3, 0.5]
    alone = limit_table(STEPS, {2: arms(0.9)}, OTHERS, threshold=0.5)
    assert np.flatnonzero(alone["null_quantile"].notna()).tolist() == [2]


def test_what_null_steps_would_leave_ends_with_the_last_stage_that_has_some_and_has_an_interval() -> None:
    nulls = {1: arms(0.9), 3: arms(0.7, 1)}
    limits = limit_table(STEPS, nulls, OTHERS, threshold=0.5)
    found = null_survival(nulls, limits, np.random.default_rng(0), 200)
    expected = np.cumprod([1.0, *limits["null_kept"][1:4]])
    assert found["null"][:4] == pytest.approx(expected)
    assert np.isnan(found["null"][4])
    assert (found["null_low"][1:4] < expected[1:]).all()
    assert (found["null_high"][1:4] > expected[1:]).all()
    error = 1.96 * np.sqrt(0.9 * 0.1 / (2 * FEATURES))
    assert found["null_high"][1] - found["null_low"][1] == pytest.approx(2 * error, rel=0.35)
    later = {2: arms(0.9)}
    nowhere = null_survival(later, limit_table(STEPS, later, OTHERS, 0.5), np.random.default_rng(0), 50)
    assert all(np.isnan(values).all() for values in nowhere.values())


def test_a_feature_that_a_null_step_loses_is_not_left_and_one_that_was_dead_before_does_not_count() -> None:
    lost = np.tile(np.repeat([0.9, -np.inf, np.nan], [50, 30, 120]), (2, 1))
    limits = limit_table(STEPS, {1: lost}, OTHERS, threshold=0.5)
    assert limits["null_quantile"][1] == pytest.approx(0.9)
    assert limits["null_kept"][1] == pytest.approx(50 / 80)
    assert null_survival({1: lost}, limits, np.random.default_rng(0), 50)["null"][1] == pytest.approx(50 / 80)


def test_a_stage_with_few_null_features_is_measured_all_the_same() -> None:
    few = np.full((1, FEATURES), np.nan)
    few[0, :2] = 0.9
    nulls = {1: few, 3: arms(0.7, 1)}
    found = null_survival(nulls, limit_table(STEPS, nulls, OTHERS, 0.5), np.random.default_rng(0), 200)
    assert found["null"][1] == 1.0
    assert np.isfinite(found["null_low"][:4]).all()


def test_a_stage_is_where_its_later_end_is_and_nowhere_if_its_ends_are_no_neighbours(tmp_path: Path) -> None:
    track = begin(tmp_path / "t", 8, 64)
    rows = random_rows(np.random.default_rng(0), 64, 8)
    for step, compared_with in ((16, None), (8, "0000-step16"), (64, "0000-step16"), (32, "0002-step64")):
        snapshot(track, step, rows, compared_with=compared_with)
    track = Track.open(track.path)  # 8 and 32 were trained backward, 64 over 32
    assert {s.step: stage_place(track, s.position) for s in track} == {8: 1, 16: None, 32: 3, 64: None}


def test_stages_between_equal_weights_are_null_steps_of_the_stage_that_follows(tmp_path: Path) -> None:
    track = begin(tmp_path / "t", 8, 64)
    rows = random_rows(np.random.default_rng(0), 64, 8)
    for step, weights in zip((0, 1, 4, 8, 16), "aabbc", strict=True):
        values = {"firing_frequency": 0.1, "functional_correlation": step / 100}
        snapshot(track, step, rows, features=values)
        file = track[-1].path / "metadata.json"
        facts = json.loads(file.read_text())
        facts["llm"]["weight_hash"] = weights
        file.write_text(json.dumps(facts))
    found = stage_controls(Track.open(track.path).distinct(), "null", 1e-4)
    assert {position: arms[:, 0].tolist() for position, arms in found.items()} == {1: [0.01], 2: [0.08]}


def test_a_null_chain_gives_the_ceiling_of_the_ends_and_without_one_it_says_what_to_run(tiny_track: Track) -> None:
    alone = run_analyses(tiny_track, {"identity": Identity(replicates=20)})["identity"]
    assert alone.tables["curves"]["chain"].isna().all()
    assert "--kind null --chain true" in alone.summary
    add_control(tiny_track, "null-chain-0", [0, 1], [tiny_track[0].metadata["fvu"], 0.3], kind="null", position=None)
    observed = []

    class Looking(Identity):
        def observe(self, snapshot: object, observation: object) -> None:
            observed.append(observation)
            super().observe(snapshot, observation)

    result = run_analyses(tiny_track, {"identity": Looking(replicates=20)})["identity"]
    x = observed[1].evaluation.activations  # the last snapshot is observed first
    before, after = (s.sae().encode(torch.from_numpy(x)).detach().numpy() for s in list(tiny_track)[:2])
    both = np.minimum((before > 0).mean(axis=0), (after > 0).mean(axis=0)) > 1e-4
    expected = np.mean([np.corrcoef(before[:, i], after[:, i])[0, 1] for i in np.flatnonzero(both)])
    curves = result.tables["curves"].set_index("comparison")
    assert curves.loc["to_first", "chain"].to_numpy() == pytest.approx(
        np.array([1, expected, *[np.nan] * 2]), nan_ok=True
    )
    assert curves.loc["to_last", "chain"].to_numpy() == pytest.approx(
        np.array([*[np.nan] * 2, expected, 1]), nan_ok=True
    )
    assert "--chain" not in result.summary
