"""Density on tracks whose survival and whose identity by gap are planted."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from saetrack.analysis.density import Density
from saetrack.analysis.drift_geometry import unit_rows
from saetrack.track import Track

from .planted_track import begin, snapshot

D_IN, D_SAE = 16, 128
STEPS = (0, 1, 2, 4, 8)


def identity_after(delta: float) -> float:
    """Functional correlation that is left after the FVU has risen by so much."""
    return 0.95 * float(np.exp(-3 * delta))


def series(path: Path, steps: tuple[int, ...], last: np.ndarray, **facts: Any) -> Track:
    """A track whose FVU rises by 0.02 for every LLM step of a gap, and whose features keep their identity by it."""
    track = begin(path, D_IN, D_SAE, **facts)
    dead = {"dead": np.arange(D_SAE) < 8}
    for position, step in enumerate(steps):
        rise = 0.02 * (step - steps[position - 1]) if position else 0.0
        metadata = {
            "warm_start": "prior" if position else "scratch",
            "fvu_shift": 0.3 - rise if position else None,
            "fvu_before": 0.1 + rise,
            "functional_correlation_median": identity_after(rise) if position else None,
            "dead_share": 0.0,
        }
        snapshot(track, step, last, features=dead, **metadata)
    return Track.open(path)


def thinned(track: Track, thin: int, last: np.ndarray, factor: int = 1) -> None:
    control = {"kind": "thinned", "position": None, "stages": len(STEPS[::thin]), "thin": thin, "factor": factor}
    series(track.path / "controls" / f"thinned-{thin}-{factor}", STEPS[::thin], last, control=control)


@pytest.fixture
def track(tmp_path: Path) -> Track:
    """Of the features that are alive, all survive in the whole series and every second one in the thinned one."""
    rows = unit_rows(np.random.default_rng(0).normal(size=(D_SAE, D_IN)))
    track = series(tmp_path / "t", STEPS, rows)
    thinned(track, 1, rows)
    thinned(track, 2, np.where(np.arange(D_SAE)[:, None] % 2, -rows, rows))
    return Track.open(track.path)


def test_planted_survival_is_found_among_the_alive_and_beside_the_ceiling(track: Track) -> None:
    table = Density(replicates=200).run(track).tables["thinned"].set_index("thin")
    assert table["features"].tolist() == [D_SAE - 8] * 2
    assert table["survival"].tolist() == [1.0, 0.5]
    assert table["survival_relative"].tolist() == [1.0, 0.5]
    half = table.loc[2]
    error = 1.96 * np.sqrt(0.25 / (D_SAE - 8))
    assert (half["survival_low"], half["survival_high"]) == pytest.approx((0.5 - error, 0.5 + error), abs=0.03)


def test_the_largest_admissible_gap_is_where_identity_falls_below_its_share_of_the_ceiling(track: Track) -> None:
    limits = Density(replicates=20).run(track).tables["admissible"].iloc[0]
    # gaps of 1, 1, 2 and 4 steps, and 2, 2 and 4 in the thinned series: rises of 0.02, 0.04 and 0.08
    assert (limits["ceiling"], limits["ceiling_from"]) == (pytest.approx(identity_after(0.02)), "smallest gap")
    assert identity_after(0.04) > 0.9 * identity_after(0.02) > identity_after(0.08)
    assert limits["rise"] == pytest.approx(0.04 / 0.1)
    assert limits["rank_correlation_rise"] == pytest.approx(-1)
    assert limits["rank_correlation_delta_fvu"] == pytest.approx(1)  # planted to mislead


def test_null_steps_give_the_ceiling(track: Track) -> None:
    control = {"kind": "null", "position": 1, "stages": 2}
    made = series(track.path / "controls" / "null-0001-0", (0, 0), np.eye(D_SAE, D_IN), control=control)
    assert made[1].metadata["functional_correlation_median"] == pytest.approx(0.95)
    limits = Density(replicates=20).run(Track.open(track.path)).tables["admissible"].iloc[0]
    assert (limits["ceiling"], limits["ceiling_from"]) == (pytest.approx(0.95), "null controls")


def test_the_identity_retained_has_the_interval_of_a_median(track: Track) -> None:
    file = track[2].path / "features.parquet"
    features = pd.read_parquet(file)
    features["functional_correlation"] = np.random.default_rng(0).permutation(np.linspace(0, 1, D_SAE))
    features.to_parquet(file)
    gap = Density(replicates=20).run(Track.open(track.path)).tables["gaps"].query("to_step == 2 and series == 't'")
    error = 1.96 * 0.5 / np.sqrt(D_SAE)  # of the rank, as a share; the values are uniform
    assert gap["retained_low"].item() == pytest.approx(0.5 - error, abs=0.02)
    assert gap["retained_high"].item() == pytest.approx(0.5 + error, abs=0.02)


def test_without_thinned_controls_it_says_what_to_run(tmp_path: Path) -> None:
    result = Density().run(series(tmp_path / "t", STEPS, np.eye(D_SAE, D_IN)))
    assert not result.tables
    assert "--kind thinned" in result.summary


def test_one_replicate_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        Density(replicates=1)
