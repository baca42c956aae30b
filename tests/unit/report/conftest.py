"""The small track of the analyses' tests, with every analysis of the report run on it once."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from saetrack.analysis.drift import Drift
from saetrack.analysis.profile import Profile
from saetrack.analysis.quality import Quality
from saetrack.analysis.semantics import Semantics
from saetrack.analysis.sweep import run_analyses
from saetrack.track import Track
from tests.unit.analysis.conftest import build_track


@pytest.fixture(scope="session")
def analysed(tmp_path_factory: pytest.TempPathFactory, tiny_series: Path, tiny_tokenizer: Any) -> Path:
    track = build_track(tmp_path_factory.mktemp("report") / "track", tiny_series, tiny_tokenizer)
    run_analyses(track, {"quality": Quality(), "semantics": Semantics(), "drift": Drift(), "profile": Profile()})
    return track.path


@pytest.fixture
def track(tmp_path: Path, analysed: Path) -> Track:
    """Four snapshots with the results of quality, semantics, drift and profile; one's own copy."""
    return Track.open(shutil.copytree(analysed, tmp_path / "track"))
