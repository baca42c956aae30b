"""Results restricted to features that kept their identity: no number of any table may be of all features."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from saetrack.analysis import AnalysisResult
from saetrack.analysis.causal import Causal
from saetrack.analysis.density import Density
from saetrack.analysis.dictionaries import Dictionaries
from saetrack.analysis.drift import Drift
from saetrack.analysis.formation import Formation
from saetrack.analysis.plugins import discover, load
from saetrack.analysis.semantics import Semantics
from saetrack.analysis.sweep import run_analyses
from saetrack.track import Track

from .conftest import add_control
from .test_density import STEPS, series, thinned

MADE = {
    "drift": lambda: Drift(replicates=20),
    "semantics": lambda: Semantics(contexts=3),
    "dictionaries": Dictionaries,
    "density": lambda: Density(replicates=20),
    "causal": lambda: Causal(sample=6, rows=3, min_documents=2, replicates=99),
    "formation": lambda: Formation(n_positions=5, n_min=3, draws=20, replicates=20),
}
WITH_OWN_TESTS = {"phases"}  # reads the tables of the others and needs more checkpoints
NAMES = {
    *("step", "next_step", "from_step", "to_step", "remaining", "place", "position", "rank", "thin", "snapshots"),
    *("feature", "document", "row", "column", "center", "factor"),  # what a row is of
}
NOT_OF_THE_TRACKS_FEATURES = {
    ("drift", "population", "gap_decades"),  # of the LLM's steps
    *(("drift", "calibration", name) for name in ("arms_real", "arms_null")),
    *(("dictionaries", "scratch", name) for name in ("seeds", "seeds_null", "seeds_shared_share", "seeds_encoder")),
    ("formation", "formed", "null_share"),  # of random positions
    *(("formation", "formed", f"null_{end}") for end in ("low", "high")),
}
BY_FEATURE = {("causal", "causal"), ("causal", "features")}  # of the features named or drawn, each in its own row


def keep(track: Track, features: list[int]) -> Track:
    """The track with these features kept throughout, the next two from the second snapshot on, and all others never."""
    steps, later = track.steps, [max(features) + 1, max(features) + 2]
    rows = [(f, steps[0], steps[-1]) for f in features] + [(f, steps[1], steps[-1]) for f in later]
    table = pd.DataFrame(rows, columns=["feature", "first_step", "last_step"])
    AnalysisResult({"stretches": table}, settings={"steps": steps}).save(track.analyses_dir / "identity")
    return track


def add_nulls(track: Track) -> None:
    """Two null controls of stage 2; what they end with are later snapshots, so their rows have moved."""
    for replica, end in enumerate((2, 3)):
        start = track[1].metadata["fvu"]
        add_control(track, f"null-0002-{replica}", [1, end], [start, 0.3], kind="null", position=2, first_budget=False)


def planted(name: str, track: Track, folder: Path) -> Track:
    """The track that an analysis is restricted on: few of its features are kept, and not those that do as most do."""
    if name != "density":
        add_nulls(track)
        for replica, positions in enumerate(([0, 3], [1, 2])):
            name, facts = f"scratch-first-{replica}", {"kind": "scratch", "position": None, "first_budget": True}
            add_control(track, name, positions, [0.5, 0.6], **facts)
        return keep(track, [0, 1, 2, 3])
    rows = np.random.default_rng(0).normal(size=(128, 16))
    found = series(folder / "density", STEPS, rows)
    thinned(found, 1, np.where(np.arange(128)[:, None] < 30, rows, -rows))
    thinned(found, 2, np.where(np.arange(128)[:, None] < 20, rows, -rows))
    return keep(Track.open(found.path), list(range(15, 40)))


def numbers(table: pd.DataFrame) -> Iterator[tuple[str, np.ndarray]]:
    for column in table:
        if pd.api.types.is_numeric_dtype(table[column]) and column not in NAMES:
            yield str(column), table[column].to_numpy(dtype=float)


def constant(values: np.ndarray) -> bool:
    known = values[np.isfinite(values)]
    return not len(known) or bool(np.ptp(known) < 1e-6)  # which says nothing


@pytest.mark.parametrize("name", MADE)
def test_no_number_of_a_restricted_result_is_that_of_all_features(tiny_track: Track, tmp_path: Path, name: str) -> None:
    track = planted(name, tiny_track, tmp_path)
    whole = run_analyses(track, {name: MADE[name]()})[name]
    restricted = run_analyses(track, {name: MADE[name]()}, only_kept=True)[name]
    assert restricted.tables
    for title, table in restricted.tables.items():
        if (name, title) in BY_FEATURE or len(table) != len(
            whole.tables[title]
        ):  # the second has rows of fewer features
            continue
        every = dict(numbers(whole.tables[title]))
        for column, values in numbers(table):
            if (name, title, column) in NOT_OF_THE_TRACKS_FEATURES or constant(every.get(column, np.zeros(1))):
                continue
            assert not np.allclose(values, every[column], equal_nan=True), (
                f"{name}/{title}: {column} is of all features"
            )


def test_an_analysis_is_restricted_in_the_run_that_asks_for_it_alone(tiny_track: Track) -> None:
    track, drift = keep(tiny_track, [0, 1, 2, 3]), Drift(replicates=20)
    run_analyses(track, {"drift": drift}, only_kept=True)
    again = run_analyses(track, {"drift": drift})["drift"]
    assert "not kept" not in set(again.tables["drift"]["status"])
    assert "kept" not in again.settings


def test_every_analysis_that_can_be_restricted_is_walked_through() -> None:
    restrictable = {name for name in discover() if load(name).restrictable}
    assert restrictable == {*MADE, *WITH_OWN_TESTS}


def test_a_restricted_semantics_has_rows_of_kept_features_alone_and_its_medians_are_theirs(tiny_track: Track) -> None:
    track = keep(tiny_track, [0, 1, 2, 3])
    tables = run_analyses(track, {"semantics": Semantics(contexts=3)}, only_kept=True)["semantics"].tables
    for title in ("features", "contexts"):
        by_step = tables[title].groupby("step")["feature"].unique()
        for step, allowed in zip(track.steps, (4, 4, 6, 6), strict=True):
            assert set(by_step[step]) <= set(range(allowed))
    of = tables["features"].groupby("step")
    assert tables["steps"]["n_eff_median"].to_numpy() == pytest.approx(of["n_eff"].median().to_numpy())
    assert tables["steps"]["firing_features"].tolist() == of.size().tolist()
    assert (tables["classes"].groupby("step")["features"].sum().to_numpy() <= [4, 4, 6, 6]).all()


def test_the_correlations_of_a_restricted_calibration_are_of_the_features_compared(tiny_track: Track) -> None:
    add_nulls(tiny_track)
    track = keep(tiny_track, [0, 1, 2, 3])
    result = run_analyses(track, {"drift": Drift(replicates=20)}, only_kept=True)["drift"]
    stage, compared = result.tables["calibration"].iloc[0], result.tables["excess"]["feature"]
    assert stage["features"] == len(compared)
    for name, arms in (("real", [track[2]]), ("null", [control[1] for control in track.controls("null")])):
        medians = [arm.features["functional_correlation"][compared].median() for arm in arms]
        assert stage[f"correlation_{name}"] == pytest.approx(np.mean(medians))
    assert not {"fvu_before_null", "fvu_null"} & set(result.tables["calibration"])
    drift = result.tables["drift"]
    assert drift.loc[~drift["feature"].isin(range(6)), "status"].eq("not kept").all()


def test_where_no_feature_kept_its_identity_no_trajectory_is_drawn(tiny_track: Track) -> None:
    steps = tiny_track.steps
    table = pd.DataFrame([(0, steps[0], steps[1])], columns=["feature", "first_step", "last_step"])
    AnalysisResult({"stretches": table}, settings={"steps": steps}).save(tiny_track.analyses_dir / "identity")
    result = run_analyses(tiny_track, {"drift": Drift(replicates=20)}, only_kept=True)["drift"]
    assert "trajectories" not in result.tables
    assert result.figures.keys() == result.captions.keys()
