"""A result of a track that has grown since, or has lost a snapshot, is told from a current one."""

import shutil
from typing import Any

import pytest

from saetrack.analysis.drift import Drift
from saetrack.analysis.outdated import command_for, missing, outdated
from saetrack.analysis.quality import Quality
from saetrack.analysis.sweep import run_analyses
from saetrack.track import Track


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": [0, 1, 4, 10], "equal_weights": []}, None),
        ({}, None),  # of 0.1.0
        ({"steps": [0, 1]}, "made on 2 of the track's 4 snapshots (LLM steps 0 to 1)"),
        ({"steps": [0, 2]}, "made on 2 snapshots (LLM steps 0 to 2), of which the track has 1 and 3 others"),
        ({"steps": [0]}, "made on 1 of the track's 4 snapshots (LLM step 0)"),
        (
            {"steps": [0, 1, 2, 4, 10]},
            "made on 5 snapshots (LLM steps 0 to 10), of which the track has 4",
        ),
        (
            {"steps": [0, 1, 4, 10], "equal_weights": [[0, 1]]},
            "made when other LLM checkpoints than now counted as one",
        ),
    ],
)
def test_a_result_of_other_snapshots_is_told(settings: dict[str, Any], said: str | None, tiny_track: Track) -> None:
    assert outdated(tiny_track, settings) == said


def test_what_has_just_been_run_is_current(tiny_track: Track) -> None:
    result = run_analyses(tiny_track, {"drift": Drift(replicates=20)})["drift"]
    assert outdated(tiny_track, result.settings) is None
    assert outdated(tiny_track.distinct(), result.settings) is None


def test_the_command_names_the_class_and_that_it_was_restricted(tiny_track: Track) -> None:
    begin = f"saetrack analyze {tiny_track.path} --analyses+="
    assert command_for(tiny_track, "drift") == f"{begin}Drift"
    assert command_for(tiny_track, "drift-kept") == f"{begin}Drift --only_kept true"
    assert command_for(tiny_track, "mine.Alive") == f"{begin}mine.Alive"


def test_a_lost_snapshot_is_told_in_every_result(tiny_track: Track) -> None:
    assert missing(tiny_track) == []
    shutil.rmtree(tiny_track[2].path)
    track = Track.open(tiny_track.path)
    assert missing(track) == [2]
    results = run_analyses(track, {"drift": Drift(replicates=20), "quality": Quality()})
    for result in results.values():
        assert "Missing snapshots: 0002." in result.summary
        assert result.settings["missing"] == [2]
