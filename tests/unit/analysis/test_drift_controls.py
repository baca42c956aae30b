"""Drift against controls whose displacements are planted: what is common to the arms, and what is each one's own."""

import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from saetrack.analysis.controls import controls_of, one_step_controls
from saetrack.analysis.drift import Drift
from saetrack.analysis.drift_controls import calibrate
from saetrack.analysis.drift_geometry import unit_rows
from saetrack.analysis.phases import Phases
from saetrack.track import Track

from .planted_track import RECIPE, Displacements, begin, planted_stage, random_rows, snapshot, tangent

D_IN, D_SAE = 32, 256
PLANTED = Displacements()
LLM, NOISE = PLANTED.llm, PLANTED.noise
NOTHING = Displacements(llm=0.0)


def planted(path: Path, seed: int, replicas: int, nulls: int, moves: Displacements = PLANTED, **more: Any) -> Track:
    return planted_stage(path, np.random.default_rng(seed), (replicas, nulls), moves, (D_SAE, D_IN), **more)


def row_drift(common: float) -> tuple[float, float]:
    """1 - cosine of ``start + t`` for tangents of planted squared length, with noise and of the common part alone."""
    length = 2 * (common + NOISE)
    return 1 - 1 / np.sqrt(1 + length), 2 * common


def test_a_planted_displacement_is_found_apart_from_the_noise(tmp_path: Path) -> None:
    found = calibrate(planted(tmp_path / "t", 0, replicas=3, nulls=4)).stages.iloc[0]
    real, null = row_drift(LLM)[0], row_drift(0.0)[0]
    assert (found["arms_real"], found["arms_null"], found["features"]) == (4, 4, D_SAE)
    assert found["drift_real"] == pytest.approx(real, rel=0.02)
    assert found["drift_null"] == pytest.approx(null, rel=0.02)
    assert found["null_share"] == pytest.approx(null / real, rel=0.03)
    # the rotation is fitted, and of one draw takes more or less than on average: 0.97 to 1.00 over six seeds
    assert found["excess"] == pytest.approx(real - null, rel=0.05)
    # the rows are scaled back to length 1, which shortens what is common by the same factor and adds (1 - c)^2
    cosine = 1 / np.sqrt(1 + 2 * (LLM + NOISE))
    null_cosine = 1 / np.sqrt(1 + 2 * NOISE)
    energy = 0.5 * (cosine**2 * 2 * LLM + (1 - cosine) ** 2 - (1 - null_cosine) ** 2)
    assert found["energy_low"] < energy < found["energy_high"]
    assert found["energy"] == pytest.approx(energy, rel=0.05)
    assert found["systematic_null"] < 0.05 * found["drift_null"]
    assert (found["correlation_real"], found["correlation_null"]) == pytest.approx((0.3, 0.9))


def test_the_rotation_of_a_transported_stage_is_taken_out(tmp_path: Path) -> None:
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(D_IN, D_IN)))[0]
    plain = calibrate(planted(tmp_path / "plain", 0, 2, 3)).stages
    turned = calibrate(planted(tmp_path / "turned", 0, 2, 3, rotation=rotation)).stages
    pd.testing.assert_frame_equal(plain, turned, rtol=1e-4, atol=1e-6)


def test_arms_that_differ_are_separated_and_arms_that_do_not_are_not(tmp_path: Path) -> None:
    apart = calibrate(planted(tmp_path / "apart", 0, 3, 4)).stages.iloc[0]
    assert apart["separation"] > 0.1
    assert apart["separation_p"] == pytest.approx(
        2 / len(list(combinations(range(8), 4)))
    )  # the other dealing is it too
    p = [calibrate(planted(tmp_path / f"{i}", i, 3, 4, NOTHING)).stages["separation_p"].iloc[0] for i in range(20)]
    assert np.mean(np.array(p) <= 0.1) <= 0.3


def test_where_the_llm_did_nothing_the_intervals_contain_zero(tmp_path: Path) -> None:
    held = []
    for seed in range(40):
        found = calibrate(planted(tmp_path / f"{seed}", seed, replicas=2, nulls=3, moves=NOTHING)).stages.iloc[0]
        held.append([found[f"{n}_low"] <= 0 <= found[f"{n}_high"] for n in ("excess", "energy")])
        held[-1].append(found["null_share_low"] <= 1 <= found["null_share_high"])
    assert np.mean(held, axis=0).min() >= 0.85  # 0.95 less three standard errors of 40 repeats


def test_one_null_arm_has_a_share_and_no_interval(tmp_path: Path) -> None:
    found = calibrate(planted(tmp_path / "t", 0, replicas=0, nulls=1)).stages.iloc[0]
    assert found["null_share"] > 0
    assert found[["null_share_low", "excess_high", "energy", "separation"]].isna().all()


def test_a_feature_that_dies_in_one_arm_does_not_count(tmp_path: Path) -> None:
    track = planted(tmp_path / "t", 0, replicas=1, nulls=2)
    path = track.controls("null")[0][1].path / "features.parquet"
    features = pd.read_parquet(path)
    features.loc[7, "dead"] = True
    features.loc[9, "revived"] = True
    features.to_parquet(path)
    calibration = calibrate(Track.open(track.path))
    assert calibration.stages["features"].item() == D_SAE - 2
    assert not {7, 9} & set(calibration.features["feature"])


def test_a_null_chain_gives_the_cosine_to_the_last_that_training_alone_makes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    track = begin(tmp_path / "t", D_IN, D_SAE)
    control = {"kind": "null", "position": None, "stages": 4}
    chain = begin(tmp_path / "t" / "controls" / "null-chain-0", D_IN, D_SAE, control=control)
    rows = start = random_rows(rng, D_SAE, D_IN)
    for t in range(4):
        snapshot(track, t, start)
        snapshot(chain, 0, rows)
        rows = unit_rows(rows + tangent(rng, rows, 0.05))
    table = calibrate(Track.open(tmp_path / "t")).chain
    assert table["remaining"].tolist() == [3, 2, 1, 0]
    np.testing.assert_allclose(table["real"], 1.0, atol=1e-6)
    step = 1 / np.sqrt(1.1)  # the cosine of one step; independent steps multiply
    np.testing.assert_allclose(table["null"], [step**3, step**2, step, 1.0], atol=0.02)
    np.testing.assert_allclose(table["drift"], [np.nan, *[1 - step] * 3], atol=0.01)
    assert (table["null_low"] <= table["null"] + 1e-9).all()
    shown = Drift(replicates=20).run(Track.open(tmp_path / "t")).tables["null_chain"]
    assert shown["below_null"].notna().tolist() == [True, True, True, False]  # the last is 1 by definition


def test_drift_on_a_null_chain_is_by_place_and_phases_calibrates_with_it(tmp_path: Path) -> None:
    steps, pace = [0, 1, 3, 9, 31, 99, 315], [0.3, 0.3, 0.3, 0.003, 0.003, 0.003]
    track = begin(tmp_path / "t", D_IN, D_SAE)
    control = {"kind": "null", "position": None, "stages": 7}
    chain = begin(tmp_path / "t" / "controls" / "null-chain-0", D_IN, D_SAE, control=control)
    for series in (track, chain):
        rng = np.random.default_rng(0)  # the chain does what the track does, so none of it is the LLM's
        rows = unit_rows(rng.normal(size=(D_SAE, D_IN)))
        for t, step in enumerate(steps):
            snapshot(series, step if series is track else 0, rows)
            rows = unit_rows(rows + tangent(rng, rows, pace[min(t, 5)]))
    track, chain = Track.open(track.path), Track.open(chain.path)
    drift, phases = Drift(replicates=20), Phases(replicates=20, permutations=20)
    drift.run(track).save(track.analyses_dir / "drift")
    alone = phases.run(track)
    result = drift.run(chain)
    result.save(chain.analyses_dir / "drift")
    table = result.tables["drift"]
    assert set(table["step"]) == {0}
    turned = 1 - table.groupby("position")["decoder_to_previous"].mean().to_numpy()[1:]
    np.testing.assert_allclose(turned, [1 - 1 / np.sqrt(1 + 2 * p) for p in pace], rtol=0.05)
    assert not result.scalars
    assert "place 1 of the chain" in result.summary
    assert "step" not in result.summary
    assert {ax.get_xlabel() for ax in result.figures["adjacent"].axes} == {"place in the chain"}
    calibrated = phases.run(track)
    assert alone.settings["null"]["drift"] == "permutation in time"
    assert calibrated.settings["null"]["drift"] == "permutation in time and null chain"
    cut = "perspective == 'drift' and axis == 'index'"
    assert set(alone.tables["rates"].query(cut)["phase"]) == {1, 2}
    assert set(calibrated.tables["rates"].query(cut)["phase"]) == {1}


@pytest.mark.parametrize("changed", ["metadata", "weights"])
def test_a_control_that_begins_with_another_snapshot_is_refused(tmp_path: Path, changed: str) -> None:
    track = planted(tmp_path / "t", 0, replicas=0, nulls=1)
    if changed == "metadata":
        facts = {**track[0].metadata, "fvu": 0.2}
        (track[0].path / "metadata.json").write_text(json.dumps(facts), encoding="utf-8")
    else:
        file = track[0].path / "sae_weights.safetensors"
        weights = load_file(file)
        save_file({**weights, "b_dec": weights["b_dec"] + 0.1}, file)
    with pytest.raises(ValueError, match="begins with another snapshot"):
        calibrate(Track.open(track.path))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.continuity", 0.3),
        ("model.dead_after_tokens", 7),
        ("scheduler.tokens_next", 2000),
        ("scheduler.warm_start", "prior"),
        ("corpus_hash", "another"),
        ("d_sae", 512),
    ],
)
def test_a_control_of_another_recipe_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    track = planted(tmp_path / "t", 0, replicas=0, nulls=1)
    if "." in name:
        track.facts["recipe"] = {**RECIPE, name: value}
    else:
        track.facts[name] = value
    with pytest.raises(ValueError, match=f"another recipe .*{name} is .*, not {value}"):
        calibrate(track)


def test_a_control_on_an_llm_with_other_weights_is_refused(tmp_path: Path) -> None:
    track = planted(tmp_path / "t", 0, replicas=1, nulls=1)
    for at, weights in ((track[1], "a"), (track.controls("replica")[0][1], "b")):
        llm = {**at.metadata["llm"], "weight_hash": weights}
        file = at.path / "metadata.json"
        file.write_text(json.dumps({**at.metadata, "llm": llm}), encoding="utf-8")
    with pytest.raises(
        ValueError, match="replica-0001-0 was trained on an LLM checkpoint of step 8 with other weights"
    ):
        calibrate(Track.open(track.path))


@pytest.mark.parametrize("lost", [0, 1])
def test_a_control_of_a_stage_whose_snapshots_are_not_all_here_is_not_read(tmp_path: Path, lost: int) -> None:
    track = planted(tmp_path / "t", 0, replicas=0, nulls=1)
    assert list(one_step_controls(track, "null")) == [1]
    shutil.rmtree(track[lost].path)
    assert one_step_controls(Track.open(track.path), "null") == {}


def test_a_thinned_control_of_more_tokens_is_of_the_same_recipe(tmp_path: Path) -> None:
    track = planted(tmp_path / "t", 0, replicas=0, nulls=0)
    control = {"kind": "thinned", "position": None, "stages": 1, "replica": 0, "factor": 2}
    recipe = {**RECIPE, "scheduler.warm_start": "prior", "scheduler.tokens_next": 2000}
    facts = {"d_in": track.facts["d_in"], "d_sae": track.facts["d_sae"]}
    made = begin(tmp_path / "t/controls/thinned-2-total-0", **facts, recipe=recipe, control=control)
    shutil.copytree(track[0].path, made.path / "snapshots" / track[0].path.name)
    assert len(controls_of(track, "thinned")) == 1


def test_drift_shows_its_controls_and_without_them_says_what_to_run(tmp_path: Path) -> None:
    with_controls = Drift(replicates=20).run(planted(tmp_path / "t", 0, 1, 2))
    assert {"calibration", "excess"} <= set(with_controls.tables)
    assert "controls" in with_controls.figures
    assert set(with_controls.scalars["null_share"]) == {8}
    tables, said = with_controls.tables, with_controls.summary
    stage = tables["calibration"].iloc[0]
    assert f"{stage['null_share']:.0%} at LLM step 8 ({stage['drift_null']:.3g} of {stage['drift_real']:.3g}" in said
    rows = tables["population"].query("step == 8").set_index("measure")
    for measure in ("decoder_to_previous", "decoder_to_previous_without_rotation"):
        assert f"{1 - rows.loc[measure, 'mean']:.3g}" in said
    assert f"{rows.loc['functional_correlation', 'median']:.2f} over {D_SAE} features" in said
    without = Drift(replicates=20).run(planted(tmp_path / "bare", 0, 0, 0))
    assert "calibration" not in without.tables
    assert "null_share" not in without.scalars
    assert f"saetrack control {tmp_path / 'bare'} --kind null" in without.settings["controls"]
