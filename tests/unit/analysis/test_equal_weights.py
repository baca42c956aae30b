"""LLM checkpoints of equal weights count as one, and what lies between them is a null step for nothing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from saetrack.analysis.controls import one_step_controls
from saetrack.analysis.dictionaries import Dictionaries
from saetrack.analysis.drift import Drift
from saetrack.analysis.quality import Quality
from saetrack.analysis.sweep import run_analyses
from saetrack.track import Track
from saetrack.training.control_plan import ControlSettings, plan_controls

from .planted_track import begin, random_rows, snapshot, tangent, unit_rows

STEPS, HASHES = (0, 1, 2, 4, 8, 16), "aaabbc"  # as Pythia's first three; steps 4 and 8 are equal too
MOVED = (0.01, 0.02, 0.03, 0.04, 0.05)


def series(path: Path) -> Track:
    rng = np.random.default_rng(0)
    rows = random_rows(rng, 64, 8)
    track = begin(path, 8, 64)
    for step, weights, moved in zip(STEPS, HASHES, (0.0, *MOVED), strict=True):
        rows = unit_rows(rows + tangent(rng, rows, moved))
        snapshot(track, step, rows)
        file = track[-1].path / "metadata.json"
        facts = json.loads(file.read_text())
        facts["llm"]["weight_hash"] = weights
        file.write_text(json.dumps(facts))
    return Track.open(path)


def test_of_equal_ones_the_last_of_the_beginning_and_the_first_of_later_ones_stand_for_all(tmp_path: Path) -> None:
    track = series(tmp_path)
    assert track.equal_weights == [[0, 1, 2], [4, 8]]
    one = track.distinct()
    assert one.steps == [2, 4, 16]
    assert [s.position for s in one] == [0, 1, 2]
    assert [s.position for s in track] == [0, 1, 2, 3, 4, 5]
    assert [one.before(s) for s in one] == [None, one[0], one[1]]
    assert one.is_forward_chain
    assert track.is_forward_chain
    assert one.whole is track


def test_the_stage_after_later_ones_is_compared_with_what_it_began_from(tmp_path: Path) -> None:
    """The SAE of step 16 was trained from that of step 8, which step 4 stands for."""
    track = series(tmp_path)
    one = track.distinct()
    assert [b and b.step for b in map(one.began_from, one)] == [None, 2, 8]
    results = run_analyses(track, {"drift": Drift(replicates=20), "dictionaries": Dictionaries(random_pairs=2)})
    drift = results["drift"].tables["drift"].query("step == 16")
    left = 1 - 8 / 128  # of what rows move on their own, after the rotation that they have in common
    assert (1 - drift["decoder_to_previous_without_rotation"]).mean() == pytest.approx(0.05 * left, rel=0.1)
    neighbours = results["dictionaries"].tables["neighbours"].set_index("step")
    assert neighbours.loc[16, "same_index"] == pytest.approx(0.95, abs=0.005)


def test_a_control_of_the_stage_after_later_ones_begins_where_that_did(tmp_path: Path) -> None:
    track = series(tmp_path)
    (planned,) = plan_controls(track, ControlSettings("null", positions=[5]))
    assert planned.start is not None
    assert planned.start.step == 8
    control = {"kind": "null", "position": 5, "stages": 2, "replica": 0}
    made = begin(tmp_path / "controls" / "null-0005-0", 8, 64, control=control)
    shutil.copytree(track.path / "snapshots" / "0004-step8", made.path / "snapshots" / "0000-step8")
    trained = shutil.copytree(track.path / "snapshots" / "0005-step16", made.path / "snapshots" / "0001-step8")
    (trained / "metadata.json").write_text(json.dumps({**track[5].metadata, "llm": track[4].metadata["llm"]}))
    assert list(one_step_controls(track.distinct(), "null")) == [2]
    assert run_analyses(track, {"drift": Drift(replicates=20)})["drift"].tables["calibration"]["step"].tolist() == [16]


def test_drift_says_that_they_are_one_and_gives_what_lies_between_them_as_null_steps(tmp_path: Path) -> None:
    track = series(tmp_path)
    result = run_analyses(track, {"drift": Drift(replicates=20)})["drift"]
    assert sorted(set(result.tables["drift"]["step"])) == [2, 4, 16]
    assert "LLM steps 0 = 1 = 2, 4 = 8 have equal weights and count as one." in result.summary
    assert result.settings["equal_weights"] == [[0, 1, 2], [4, 8]]
    free = result.tables["free_null"]
    assert free[["from_step", "step"]].to_numpy().tolist() == [[0, 1], [1, 2], [4, 8]]
    cosines = [0.01, 0.02, 0.04]  # less what the rotation of the rows takes, 8 / 128, and the rows' new lengths
    assert free["drift"].to_numpy() == pytest.approx(np.array(cosines) * (1 - 8 / 128), rel=0.1)


def test_no_control_repeats_a_stage_between_them_and_one_that_is_there_is_not_read(tmp_path: Path) -> None:
    track = series(tmp_path)
    planned = plan_controls(track, ControlSettings("null"))
    assert [control.position for control in planned] == [3, 5]
    control = {"kind": "null", "position": 1, "stages": 2, "replica": 0}
    made = begin(tmp_path / "controls" / "null-0001-0", 8, 64, control=control)
    for name in ("0000-step0", "0001-step1"):
        shutil.copytree(track.path / "snapshots" / name, made.path / "snapshots" / name)
    assert one_step_controls(track.distinct(), "null") == {}


def test_a_track_without_equal_ones_is_as_it_is(tiny_track: Track) -> None:
    assert tiny_track.distinct() is tiny_track
    result = run_analyses(tiny_track, {"quality": Quality()})["quality"]
    assert "equal weights" not in result.summary
