"""Dictionaries whose partners are planted: copies, permuted copies, splits, and independent ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from saetrack.analysis.dictionaries import Dictionaries
from saetrack.analysis.drift_geometry import unit_rows
from saetrack.track import Track

from .planted_track import random_rows, write_track

D_IN, D_SAE = 16, 128


def random(seed: int) -> np.ndarray:
    return random_rows(np.random.default_rng(seed), D_SAE, D_IN)


def write(path: Path, decoders: list[np.ndarray], steps: tuple[int, ...] = (0, 8), **facts: Any) -> Track:
    return write_track(path, decoders, steps, **facts)


def scratch(track: Track, replica: int, decoder: np.ndarray) -> None:
    control = {"kind": "scratch", "position": None, "stages": 1, "first_budget": True}
    write(track.path / "controls" / f"scratch-first-{replica}", [decoder], (8,), control=control)


def test_a_permuted_copy_matches_wholly_and_the_index_not_at_all(tmp_path: Path) -> None:
    moved = np.roll(np.arange(D_SAE), 1)
    found = Dictionaries().run(write(tmp_path / "t", [random(0), random(0)[moved]])).tables["neighbours"].iloc[0]
    assert found["pw_mcc"] == pytest.approx(1, abs=1e-6)
    assert found["shared_share"] == 1
    assert found["kept_index"] == 0
    assert found["renaming_gap"] == pytest.approx(1 - found["same_index"], abs=1e-6)
    assert abs(found["same_index"]) < 0.1
    assert (found["births"], found["deaths"]) == (0, 0)


def test_independent_dictionaries_are_as_alike_as_their_null(tmp_path: Path) -> None:
    found = Dictionaries(random_pairs=8).run(write(tmp_path / "t", [random(0), random(1)])).tables["neighbours"].iloc[0]
    assert abs(found["pw_mcc"] - found["null"]) < 3 * found["null_sd"]
    assert found["pw_mcc"] > 0.3  # which a reader without the null would take for something
    assert found["shared_share"] < 0.15


def test_the_null_of_independent_dictionaries_is_not_below_them(tmp_path: Path) -> None:
    """Each spread is fitted by itself; without the correction for that the mean is 1.1 deviations above its null."""
    above = []
    for seed in range(10):
        rows = [random_rows(np.random.default_rng([seed, i]), 128, D_IN) for i in range(2)]
        found = Dictionaries(random_pairs=6, seed=seed).run(write(tmp_path / f"{seed}", rows)).tables["neighbours"]
        above.append(((found["pw_mcc"] - found["null"]) / 0.007).item())  # 0.007: the deviation of one pair
    assert abs(np.mean(above)) < 0.7


def test_a_feature_that_splits_in_two_is_found_and_one_that_is_born(tmp_path: Path) -> None:
    before, after = random(0), random(0)
    after[5] = before[4]  # index 5 becomes a second 4; nothing is like the old 5 any more
    found = Dictionaries().run(write(tmp_path / "t", [before, after])).tables["neighbours"].iloc[0]
    near_5 = (np.delete(before, 5, axis=0) @ before[5]).max()
    assert found["splits"] == 1
    assert found["deaths"] == int(near_5 < 0.7)
    assert found["births"] == 0
    assert found["splits_low"] < 1 < found["splits_high"]
    assert found["births_high"] > 0  # of 128 features none is born, which is no proof that none ever is
    assert np.isnan(found["splits_null"])
    assert found["null_from"] == ""


def test_births_deaths_and_splits_have_the_null_of_null_steps_else_of_the_null_chain(tmp_path: Path) -> None:
    split = random(0)
    split[5] = split[4]
    track = write(tmp_path / "t", [random(0)] * 3, (0, 8, 32))
    for name, position, end in (("null-0002-0", 2, split), ("null-0002-1", 2, random(0))):
        control = {"kind": "null", "position": position, "stages": 2}
        write(track.path / "controls" / name, [random(0), end], (8, 8), control=control)
    control = {"kind": "null", "position": None, "stages": 3}
    write(track.path / "controls" / "null-chain-0", [random(0), random(1), random(0)], (0, 0, 0), control=control)
    table = Dictionaries().run(Track.open(track.path)).tables["neighbours"]
    assert table["null_from"].tolist() == ["null chain", "null steps"]
    assert table["splits"].tolist() == [0, 0]
    assert table["splits_null"].iloc[1] == 0.5  # in one of two
    assert table["births_null"].iloc[0] > 64  # independent rows: most have no partner


def test_the_renaming_gap_is_the_difference_of_two_columns_over_the_same_features_and_has_its_interval(
    tmp_path: Path,
) -> None:
    after = random(0)
    after[:64] = np.roll(after[:64], 1, axis=0)
    track = write(tmp_path / "t", [random(0), after])
    features = pd.read_parquet(track[1].path / "features.parquet")
    features.loc[[70, 71], "dead"] = True
    features.to_parquet(track[1].path / "features.parquet")
    result = Dictionaries().run(Track.open(track.path))
    found = result.tables["neighbours"].iloc[0]
    assert found["features_both"] == D_SAE - 2
    assert found["pw_mcc_both"] - found["same_index"] == pytest.approx(found["renaming_gap"])
    gaps = np.r_[1 - (random(0)[:64] * after[:64]).sum(axis=1), np.zeros(62)]
    error = 1.96 * gaps.std() / np.sqrt(len(gaps))
    assert found["renaming_gap"] == pytest.approx(gaps.mean(), abs=1e-6)
    assert found["renaming_gap_high"] - found["renaming_gap_low"] == pytest.approx(2 * error, rel=0.2)
    for name in ("features_both", "pw_mcc_both", "same_index", "renaming_gap", "pw_mcc", "null"):
        value = found[name]
        assert (f"{int(value)}" if name == "features_both" else f"{value:.3f}") in result.summary


def test_a_series_that_finds_what_the_seeds_find_agrees_and_one_that_does_not_does_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truth = random(3)
    noisy = [unit_rows(truth + 0.1 * rng.normal(size=truth.shape)) for _ in range(3)]
    for name, own, expected in (("one", noisy[2], 1.0), ("other", random(4), 0.0)):
        track = write(tmp_path / name, [own, own])
        scratch(track, 0, noisy[0])
        scratch(track, 1, noisy[1][rng.permutation(D_SAE)])
        found = Dictionaries().run(Track.open(track.path)).tables["scratch"].iloc[0]
        assert found["agreement"] == pytest.approx(expected, abs=0.1)
        assert found["agreement_low"] < found["agreement"] < found["agreement_high"]
        assert found["seeds_low"] < found["seeds"] < found["seeds_high"]


def test_without_scratch_controls_it_says_what_to_run(tmp_path: Path) -> None:
    result = Dictionaries().run(write(tmp_path / "t", [random(0), random(0)]))
    assert "scratch" not in result.tables
    assert "--kind scratch" in result.settings["scratch"]


@pytest.mark.parametrize("steps", [(0, 8), (0, 8, 16)], ids=["all", "one stage"])
def test_a_snapshot_without_live_features_is_compared_with_nothing(tmp_path: Path, steps: tuple[int, ...]) -> None:
    track = write(tmp_path / "t", [random(0)] * len(steps), steps)
    path = track[0].path / "features.parquet"
    pd.read_parquet(path).assign(dead=True).to_parquet(path)
    result = Dictionaries().run(Track.open(track.path))
    first, *rest = result.tables["neighbours"].to_dict("records")
    assert first["features"] == 0
    assert (first["births"], first["deaths"], first["splits"]) == (D_SAE, 0, 0)
    names = ("pw_mcc", "pw_mcc_encoder", "null", "null_sd", "shared_share", "same_index", "renaming_gap", "kept_index")
    assert all(np.isnan(first[name]) for name in names)
    assert [row["pw_mcc"] for row in rest] == pytest.approx([1.0] * len(rest), abs=1e-5)
    assert ("nothing could be matched" in result.summary) == (not rest)


def test_wrong_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        Dictionaries(random_pairs=1)
    with pytest.raises(ValueError, match="holds 1 of the at least 2 snapshots"):
        Dictionaries().run(write(tmp_path / "t", [random(0)], (0,)))
