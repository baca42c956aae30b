"""Formation on planted series whose onsets are known."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from saetrack.analysis.base import AnalysisResult, Observation
from saetrack.analysis.drift import Drift
from saetrack.analysis.figures import step_position
from saetrack.analysis.formation import Formation
from saetrack.analysis.formation_times import crossing_times
from saetrack.analysis.phases_series import Tables, formation_amounts, formation_times
from saetrack.analysis.sweep import run_analyses
from saetrack.track import Track

from .planted import STEPS, PlantedFeature, PlantedSeries, rising, sudden, sweep

SMALL = {"n_positions": 40, "draws": 80, "replicates": 200}


def never(step: int) -> float:
    return 0.0


@pytest.fixture(scope="module")
def many() -> AnalysisResult:
    """120 features of one law (half formed at step 15) and 80 that never form, each on three of twelve tokens."""
    rng = np.random.default_rng(3)
    tokens = [tuple(int(t) for t in rng.choice(np.arange(1, 13), 3, replace=False)) for _ in range(200)]
    strengths = [rising(15, 0.15)] * 120 + [never] * 80
    features = tuple(PlantedFeature(t, 0.2, s) for t, s in zip(tokens, strengths, strict=True))
    series = PlantedSeries(features, amplitude=3.5, seed=3)
    return sweep(Formation(**SMALL), series.observation, STEPS)


def test_the_interval_of_the_formed_step_covers_the_truth_as_often_as_it_says(many: AnalysisResult) -> None:
    """The truth is the time of the mean curve: every feature has the same law, and Sbar is unbiased at any n."""
    table = many.tables["formation"].query("feature < 120")
    curve = table.groupby("step")["progress_token"].mean().to_numpy()[:, None]
    formed = many.tables["features"].query("feature < 120 and status == 'formed'")
    assert len(formed) > 60
    for share, name in ((0.5, "formed"), (0.9, "formed90")):
        truth = 10 ** crossing_times(curve, step_position(STEPS), share)[0] - 1
        high = formed[f"{name}_high"].fillna(np.inf)
        covered = (formed[f"{name}_low"] <= truth) & (truth <= high)
        assert 0.88 <= covered.mean() <= 0.995  # 0.95 within two binomial errors
    assert formed["formed_after"].isin([9, 31]).mean() > 0.9  # the cell that holds 15, or the next by noise


def test_features_that_never_form_are_hardly_ever_called_formed(many: AnalysisResult) -> None:
    status = many.tables["features"].query("feature >= 120")["status"]
    assert status.isin(["formed", "not plateaued", "at-init"]).mean() <= 0.05
    false = many.settings["status_of_false_features"]
    assert sum(false.values()) > 100
    assert false.get("formed", 0) <= 0.05 * sum(false.values())


KINDS = {
    "from the beginning": (sudden(0), "at-init"),
    "sudden": (sudden(31), "formed"),
    "late": (rising(400, 0.3), "not plateaued"),
    "passing": (lambda step: float(1 <= step <= 31), "transient"),
    "none": (never, "never"),
}


@pytest.fixture(scope="module")
def kinds() -> AnalysisResult:
    features = [PlantedFeature((1, 2, 3, 4), 0.25, strength) for strength, _ in KINDS.values()]
    # the token explains it all: fires wherever its token is
    features.append(PlantedFeature((6,), 1.0, never))
    features.append(PlantedFeature((7,), 0.004, never))  # rare
    series = PlantedSeries(tuple(features), amplitude=8.0)
    return sweep(Formation(**SMALL), series.observation, STEPS)


@pytest.mark.parametrize("kind", list(KINDS))
def test_planted_courses_get_their_status(kinds: AnalysisResult, kind: str) -> None:
    row = kinds.tables["features"].loc[list(KINDS).index(kind)]
    assert row["status"] == KINDS[kind][1]
    times = row.filter(regex="^formed").astype(float)
    known = row["status"] in ("at-init", "formed")
    assert np.isfinite(times[["formed_step", "formed90_step", "formed_by"]]).all() == known
    assert np.isnan(times).all() == (not known)


def test_a_sudden_onset_lies_between_its_two_checkpoints(kinds: AnalysisResult) -> None:
    row = kinds.tables["features"].loc[1]
    assert (row["formed_after"], row["formed_by"]) == (9, 31)
    assert 9 < row["formed_low"] <= row["formed_step"] <= row["formed_high"] <= 31
    assert row["formed_step"] < row["formed90_step"]
    assert row["isotonic_agrees"] == 1


def test_a_feature_of_one_token_is_alike_only_against_sets_of_other_tokens(kinds: AnalysisResult) -> None:
    row = kinds.tables["features"].loc[5]
    assert row["status"] == "never"
    assert row["q_token"] > 0.05
    assert max(row["q_uniform"], row["q_position"]) < 0.05


def test_a_rare_feature_is_listed_and_not_computed(kinds: AnalysisResult) -> None:
    assert kinds.tables["features"].loc[6, "status"] == "insufficient"
    assert kinds.tables["features"].loc[6, "n_positions"] < 20
    assert 6 not in set(kinds.tables["formation"]["feature"])


def test_the_curve_of_formed_features_rises_where_they_form_and_false_ones_stay_below(kinds: AnalysisResult) -> None:
    share = kinds.tables["formed"].set_index("step")
    assert share.loc[0, "share"] == pytest.approx(1 / 6)
    assert share.loc[9, "share"] == pytest.approx(1 / 6)
    assert share.loc[31, "share"] == pytest.approx(2 / 6)
    assert share["null_share"].max() <= 0.2
    assert kinds.scalars["share_formed"][999] == share.loc[999, "share"]
    assert "1 at-init, 1 formed, 1 not plateaued, 1 transient, 2 never" in kinds.summary


def test_a_feature_that_still_moves_is_not_formed_in_the_curve_nor_in_the_rate_of_phases(
    kinds: AnalysisResult, tmp_path: Path
) -> None:
    kinds.save(tmp_path / "formation")
    tables = Tables(tmp_path, STEPS, len(kinds.tables["features"]))
    with np.errstate(invalid="ignore"):
        formed_in = np.nanmean(formation_amounts(tables).values, axis=1)
    np.testing.assert_allclose(formed_in, np.diff(kinds.tables["formed"]["share"]), atol=1e-12)
    assert formed_in.sum() == pytest.approx(1 / 6)  # the sudden one; the late one moves to the end
    assert np.isfinite(formation_times(tables)).tolist() == [True, True, *[False] * 5]


def test_every_curve_has_its_interval_and_null(kinds: AnalysisResult) -> None:
    population = kinds.tables["population"]
    assert set(population["baseline"]) == {"token", "position", "uniform"}
    assert population.notna().all().all()
    assert (population["low"] <= population["mean"]).all()
    assert (population["mean"] <= population["high"]).all()
    assert (population["null_low"] < 0).all()
    assert (population["null_high"] > 0).all()
    assert set(kinds.figures) == set(kinds.captions) == {"progress", "formed", "map", "paper"}


def test_positions_are_recorded_one_of_a_document_without_repeats(kinds: AnalysisResult) -> None:
    positions = kinds.tables["positions"]
    assert not positions.duplicated(["feature", "document"]).any()
    assert (positions["column"] > 0).all()
    assert (positions["activation"] > 0).all()
    counts = positions["feature"].value_counts()
    features = kinds.tables["features"].set_index("feature")["n_positions"]
    assert 0 < features[6] < 20  # too few to be computed, and listed all the same
    pd.testing.assert_series_equal(features, counts.reindex(features.index, fill_value=0), check_names=False)


def test_the_same_seed_gives_the_same_numbers() -> None:
    series = PlantedSeries((PlantedFeature((1, 2), 0.3, sudden(9)),), documents=60)
    arguments = {**SMALL, "draws": 20, "replicates": 20}
    first, second = (sweep(Formation(**arguments), series.observation, STEPS) for _ in range(2))
    for name, table in first.tables.items():
        pd.testing.assert_frame_equal(table, second.tables[name])


def test_fewer_than_six_checkpoints_give_curves_and_no_times() -> None:
    series = PlantedSeries((PlantedFeature((1, 2), 0.3, sudden(9)),), documents=60)
    result = sweep(Formation(**{**SMALL, "draws": 20}), series.observation, STEPS[3:])
    features = result.tables["features"]
    assert features["status"].tolist() == ["not available"]
    assert features.filter(like="formed").isna().all().all()
    assert result.tables["formed"]["share"].isna().all()
    assert "share_formed" not in result.scalars
    assert "they need 6 LLM checkpoints and the track has 5; follow more with `saetrack fit`" in result.summary
    assert np.isfinite(result.tables["formation"]["p_token"]).all()


def test_formation_and_drift_run_on_a_real_track(tiny_track: Track) -> None:
    analyses: Any = {"formation": Formation(n_positions=10, n_min=5, draws=20, replicates=20), "drift": Drift()}
    results = run_analyses(tiny_track, analyses)
    table = results["formation"].tables["formation"]
    assert table["feature"].nunique() * len(tiny_track) == len(table) > 0
    assert len(results["formation"].tables["features"]) == 64
    for name in analyses:
        assert AnalysisResult.load(tiny_track.analyses_dir / name).summary == results[name].summary


def test_no_feature_with_enough_documents_gives_empty_tables_and_says_so() -> None:
    series = PlantedSeries((PlantedFeature((1,), 0.0, never),), documents=70)
    result = sweep(Formation(**SMALL), series.observation, STEPS)
    assert len(result.tables["formation"]) == 0
    assert result.tables["features"]["status"].tolist() == ["insufficient"]
    assert "formation was not computed" in result.summary


def test_another_snapshot_first_is_refused() -> None:
    series = PlantedSeries((PlantedFeature((1,), 1.0, never),), documents=5)
    analysis: Any = Formation()
    analysis.begin(SimpleNamespace(steps=[0, 8], path=""))
    with pytest.raises(RuntimeError, match="last snapshot"):
        analysis.observe(SimpleNamespace(step=0), series.observation(0))
    with pytest.raises(RuntimeError, match="both splits"):
        analysis.observe(SimpleNamespace(step=8), replace(series.observation(8), selection=None))


def test_a_control_of_one_llm_checkpoint_is_refused() -> None:
    analysis: Any = Formation()
    with pytest.raises(ValueError, match="follows one LLM checkpoint several times"):
        analysis.begin(SimpleNamespace(steps=[8, 8, 8], path="controls/null-0"))


def test_too_few_positions_for_a_random_set_are_refused() -> None:
    series = PlantedSeries((PlantedFeature((1,), 1.0, never),), documents=2)
    with pytest.raises(ValueError, match="hold 46 positions, fewer than the 64"):
        sweep(Formation(), series.observation, STEPS)


def test_finishing_without_a_sweep_is_refused() -> None:
    with pytest.raises(RuntimeError, match="seen no snapshot"):
        Formation().finish()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"n_min": 1}, "n_min"), ({"draws": 1}, "draws is 1"), ({"baseline": "cosine"}, "baseline 'cosine' is none")],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Formation(**arguments)


def test_an_observation_without_evaluation_rows_is_refused() -> None:
    analysis: Any = Formation()
    analysis.begin(SimpleNamespace(steps=[0], path=""))
    with pytest.raises(RuntimeError, match="both splits"):
        analysis.observe(SimpleNamespace(step=0), Observation())
