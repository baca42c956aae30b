"""The quality table and its figure."""

import numpy as np
import pandas as pd
import pytest

from saetrack.analysis.quality import Quality, _crossing
from saetrack.analysis.sweep import run_analyses
from saetrack.track import Track

from .conftest import add_controls


def test_the_table_has_one_row_per_snapshot_with_its_metadata(tiny_track: Track) -> None:
    result = run_analyses(tiny_track, {"quality": Quality()})["quality"]
    table = result.tables["quality"]
    assert table["step"].tolist() == [0, 1, 4, 10]
    for row, snapshot in zip(table.itertuples(), tiny_track, strict=True):
        for name in ("fvu", "l0", "dead_share", "ce_recovered_zero", "tokens_trained"):
            assert getattr(row, name) == snapshot.metadata[name]
    assert np.isnan(table["fvu_before"][0])
    assert result.scalars["fvu"].keys() == {0, 1, 4, 10}
    assert result.scalars["fvu_before"].keys() == {1, 4, 10}
    assert (tiny_track.analyses_dir / "quality" / "quality.svg").stat().st_size > 10_000


def test_quartiles_are_over_features_that_fire_in_both_snapshots(tiny_track: Track) -> None:
    table = Quality(min_firing_frequency=0.02).run(tiny_track).tables["quality"]
    for position in (1, 2, 3):
        before, now = tiny_track[position - 1].features, tiny_track[position].features
        values = [
            r
            for a, b, r in zip(
                before["firing_frequency"], now["firing_frequency"], now["functional_correlation"], strict=True
            )
            if a > 0.02 and b > 0.02 and not np.isnan(r)
        ]
        row = table.iloc[position]
        assert row["features_compared"] == len(values) > 2
        low, median, high = np.percentile(values, [25, 50, 75])
        assert row["functional_correlation_low"] == pytest.approx(low)
        assert row["functional_correlation_median"] == pytest.approx(median)
        assert row["functional_correlation_high"] == pytest.approx(high)
    assert np.isnan(table["functional_correlation_median"][0])


def test_a_track_of_one_snapshot_is_enough(tiny_track: Track, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_track, "_snapshots", list(tiny_track)[:1])
    result = Quality().run(tiny_track)
    assert "1 snapshots" not in result.summary
    result.save(tiny_track.analyses_dir / "quality")
    assert pd.isna(result.tables["quality"]["fvu_shift"]).all()


def test_controls_stand_at_the_llm_checkpoint_they_were_trained_on(tiny_track: Track) -> None:
    assert "controls" not in Quality().run(tiny_track).tables
    add_controls(tiny_track)
    table = Quality().run(tiny_track).tables["controls"].set_index(["control", "step"])
    assert sorted(table.index) == [("null", 1), ("scratch-first", 0), ("scratch-first", 10)]
    null = table.loc["null", 1]
    assert null["runs"] == 2
    assert null[["fvu", "fvu_low", "fvu_high"]].tolist() == pytest.approx([0.3, 0.25, 0.35])
    assert null["l0"] == tiny_track[1].metadata["l0"]
    assert table.loc[("scratch-first", 10), "fvu"] == 0.6


def test_a_frequency_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="min_firing_frequency is 1"):
        Quality(min_firing_frequency=1)


def test_tokens_to_reach_are_where_the_fresh_curve_meets_the_fvu() -> None:
    curve = np.array([[100.0, 0.8], [200.0, 0.4], [400.0, 0.2]])
    assert _crossing(curve, 0.4) == pytest.approx(200)
    assert _crossing(curve, 0.4 / np.sqrt(2)) == pytest.approx(200 * np.sqrt(2))  # a power law between the points
    assert _crossing(curve, 0.9) == 100
    assert np.isnan(_crossing(curve, 0.1))
