"""Formation on synthetic activations whose answer is known."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from saetrack.analysis.base import AnalysisResult, Observation, SplitObservation
from saetrack.analysis.drift import Drift
from saetrack.analysis.formation import Formation, _formed_at
from saetrack.analysis.formation_progress import MEASURES
from saetrack.analysis.formation_sets import random_sets, top_positions
from saetrack.analysis.sweep import run_analyses
from saetrack.lm.tokens import TokenRows
from saetrack.track import Track

DOCUMENTS, PER_DOCUMENT = 200, 20


def split_of(activations: np.ndarray, latents: np.ndarray) -> SplitObservation:
    """Every row one document, BOS in column 0."""
    tokens = np.ones((DOCUMENTS, PER_DOCUMENT + 1), dtype=np.int32)
    tokens[:, 0] = 0
    documents = np.repeat(np.arange(DOCUMENTS, dtype=np.int32)[:, None], PER_DOCUMENT + 1, axis=1)
    row, column = np.divmod(np.arange(DOCUMENTS * PER_DOCUMENT), PER_DOCUMENT)
    positions = np.stack([row, column + 1], axis=1)
    return SplitObservation(
        TokenRows(tokens, documents, 0),
        positions,
        activations.astype(np.float32),
        sp.csr_array(latents.astype(np.float32)),
    )


def independent_codes(rng: np.random.Generator, width: int = 256, active: int = 12) -> np.ndarray:
    """Sparse codes with no meaning at all: every latent fires at random.

    The number of active latents must not be fixed: then one that fires leaves less room for the others.
    """
    shape = (DOCUMENTS * PER_DOCUMENT, width)
    return rng.exponential(size=shape) * (rng.random(shape) < active / width)


def sweep(analysis: Formation, splits: dict[int, SplitObservation]) -> AnalysisResult:
    """As `run_analyses` does it: the last snapshot first."""
    track: Any = SimpleNamespace(steps=sorted(splits))
    analysis.begin(track)
    *others, last = sorted(splits)
    for step in [last, *others]:
        snapshot: Any = SimpleNamespace(step=step)
        analysis.observe(snapshot, Observation(selection=splits[step]))
    return analysis.finish()


def mean_at(result: AnalysisResult, measure: str, step: int) -> pd.Series:
    rows = result.tables["population"]
    return rows[(rows["measure"] == measure) & (rows["step"] == step)].iloc[0]


@pytest.mark.parametrize("name", ["cosine", "jaccard", "weighted_jaccard"])
def test_the_own_latent_makes_independent_codes_look_formed_and_leaving_it_out_does_not(name: str) -> None:
    rng = np.random.default_rng(0)
    split = split_of(rng.normal(size=(DOCUMENTS * PER_DOCUMENT, 32)), independent_codes(rng))
    result = sweep(Formation(random_sets=30, replicates=50), {0: split})
    with_own, without = mean_at(result, f"feature_{name}", 0), mean_at(result, f"feature_{name}_without_own", 0)
    assert with_own["mean"] > 1.5 * with_own["null_high"]
    assert with_own["mean"] > 0.025
    # the random mean, common to all features, is what is left: a thirtieth of a set's variance
    assert abs(without["mean"]) < 0.2 * without["null_high"]


def test_a_dense_latent_left_out_is_left_out_of_the_random_sets_too() -> None:
    rng = np.random.default_rng(1)
    codes = independent_codes(rng)
    codes[:, 7] = 3.0
    split = split_of(rng.normal(size=(DOCUMENTS * PER_DOCUMENT, 8)), codes)
    table = sweep(Formation(random_sets=30, replicates=20), {0: split}).tables["formation"].set_index("feature")
    assert abs(table.loc[7, "feature_cosine_without_own"]) < 0.02


def planted(rng: np.random.Generator, strength: np.ndarray) -> np.ndarray:
    """Activations: a direction for each of four features where it fires, common noise, and a large common mean."""
    noise = rng.normal(size=(DOCUMENTS * PER_DOCUMENT, 64))
    directions = np.eye(64)[:4] * strength[:, None] * 8.0
    fires = np.arange(len(noise)) % PER_DOCUMENT
    activations = noise + 20.0
    for i in range(4):
        activations[fires == i] += directions[i]
    return activations


@pytest.fixture(scope="module")
def planted_result() -> AnalysisResult:
    """Feature i fires at column i of every document; features 0-3 form at steps 0, 10, 100, never."""
    rng = np.random.default_rng(2)
    column = np.arange(DOCUMENTS * PER_DOCUMENT) % PER_DOCUMENT
    codes = np.zeros((len(column), 8))
    for i in range(4):
        codes[column == i, i] = 1 + rng.random((column == i).sum())
    codes[:5, 4] = 1.0  # too few documents
    codes[:, 5] = rng.random(len(column))
    when = np.array([0, 10, 100, np.inf])
    splits = {step: split_of(planted(rng, (step >= when).astype(float)), codes) for step in (0, 1, 10, 30, 100, 200)}
    return sweep(Formation(random_sets=40, replicates=60), splits)


def test_planted_formation_steps_are_recovered(planted_result: AnalysisResult) -> None:
    formed = planted_result.tables["features"].set_index("feature")["formed_step"]
    np.testing.assert_array_equal(formed.loc[[0, 1, 2, 3]], [0, 10, 100, np.nan])
    assert planted_result.scalars["share_formed"][0] == pytest.approx(1 / 5)
    assert planted_result.scalars["share_formed"][200] == pytest.approx(3 / 5)


def test_centring_removes_what_a_common_mean_hides(planted_result: AnalysisResult) -> None:
    """Raw cosine of vectors around a large mean is near 1 for any set, so progress can hardly rise above 0."""
    table = planted_result.tables["formation"].set_index(["feature", "step"])
    assert table.loc[(0, 200), "activation_cosine"] < 0.05
    assert table.loc[(0, 200), "activation_cosine_centred"] > 0.3


def test_features_without_enough_documents_are_listed_and_not_computed(planted_result: AnalysisResult) -> None:
    features = planted_result.tables["features"].set_index("feature")
    assert features["status"].to_dict() == {
        **dict.fromkeys(range(4), "computed"), 4: "insufficient", 5: "computed", 6: "silent", 7: "silent"
    }  # fmt: skip
    assert features.loc[4, "n_positions"] == 1  # five positions, all in one document
    assert set(planted_result.tables["formation"]["feature"]) == {0, 1, 2, 3, 5}


def test_positions_are_recorded_at_most_one_per_document(planted_result: AnalysisResult) -> None:
    positions = planted_result.tables["positions"]
    assert not positions.duplicated(["feature", "document"]).any()
    assert (positions["column"] > 0).all()
    assert (positions[positions["feature"] < 4]["column"] == positions[positions["feature"] < 4]["feature"] + 1).all()
    assert not planted_result.tables["random_positions"].duplicated(["set", "document"]).any()


def test_every_measure_has_its_null_and_interval(planted_result: AnalysisResult) -> None:
    population = planted_result.tables["population"]
    assert set(population["measure"]) == set(MEASURES)
    assert population.notna().all().all()
    assert (population["low"] <= population["mean"]).all()
    assert (population["mean"] <= population["high"]).all()
    assert (population["null_low"] < population["null_high"]).all()
    assert set(planted_result.figures) == {"progress", "formed", "map"}
    assert planted_result.summary.startswith("60% of 5 features have formed by LLM step 200")


def test_the_same_seed_gives_the_same_numbers() -> None:
    rng = np.random.default_rng(3)
    split = split_of(rng.normal(size=(DOCUMENTS * PER_DOCUMENT, 8)), independent_codes(rng, width=64))
    first, second = (sweep(Formation(random_sets=10, replicates=10), {0: split, 5: split}) for _ in range(2))
    for name, table in first.tables.items():
        pd.testing.assert_frame_equal(table, second.tables[name])


def test_the_per_feature_standard_error_matches_simulation() -> None:
    """Many features with the same law of activations: the spread of M over them is what each estimates."""
    rng = np.random.default_rng(4)
    codes = independent_codes(rng, width=400, active=6)
    activations = rng.normal(size=(len(codes), 16)) + 0.5
    result = sweep(Formation(random_sets=20, replicates=100), {0: split_of(activations, codes)})
    table = result.tables["formation"]
    assert table["activation_cosine_se"].mean() == pytest.approx(table["activation_cosine"].std(), rel=0.2)


def test_formation_and_drift_run_on_a_real_track(tiny_track: Track) -> None:
    analyses: Any = {"formation": Formation(n_min=5, random_sets=10, replicates=10), "drift": Drift(replicates=10)}
    results = run_analyses(tiny_track, analyses)
    table = results["formation"].tables["formation"]
    alive = (results["formation"].tables["features"]["status"] == "computed").sum()
    assert len(table) == alive * len(tiny_track) > 0
    assert sorted(results["formation"].scalars["share_formed"]) == tiny_track.steps
    assert len(results["drift"].tables["drift"]) == 64 * len(tiny_track)
    for name in analyses:
        assert AnalysisResult.load(tiny_track.analyses_dir / name).summary == results[name].summary


def test_no_feature_with_enough_documents_gives_empty_tables_and_says_so() -> None:
    split = split_of(np.random.default_rng(5).normal(size=(DOCUMENTS * PER_DOCUMENT, 4)), np.zeros((4000, 6)))
    result = sweep(Formation(random_sets=5, replicates=5), {0: split, 1: split})
    assert len(result.tables["formation"]) == 0
    assert (result.tables["features"]["status"] == "silent").all()
    assert "not computed" in result.summary


def test_another_snapshot_first_is_refused() -> None:
    split = split_of(np.zeros((4000, 4)), np.zeros((4000, 6)))
    analysis, track, snapshot = Formation(), SimpleNamespace(steps=[0, 8]), SimpleNamespace(step=0)
    analysis.begin(track)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="last snapshot"):
        analysis.observe(snapshot, Observation(selection=split))  # type: ignore[arg-type]


def test_finishing_without_a_sweep_is_refused() -> None:
    with pytest.raises(RuntimeError, match="seen no snapshot"):
        Formation().finish()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"n_min": 1}, "n_min"), ({"random_sets": 1}, "random_sets is 1"), ({"criterion": "cosine"}, "no measure")],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Formation(**arguments)


def test_formed_needs_two_checkpoints_half_the_final_value_and_a_final_value_above_the_null() -> None:
    series = np.array([
        [0.0, 0.6, 0.6, 1.0],  # from the second on
        [0.6, 0.1, 0.6, 1.0],  # once is not enough
        [0.4, 0.4, 0.4, 1.0],  # only at the end
        [0.6, 0.6, 0.6, 0.1],  # gone in the end
    ]).T  # fmt: skip
    np.testing.assert_array_equal(_formed_at(series, np.full((4, 4), 0.2)), [1, 2, 3, -1])


def test_top_positions_match_a_plain_loop() -> None:
    rng = np.random.default_rng(6)
    codes = np.round(sp.random_array((300, 20), density=0.2, rng=rng).toarray(), 1)
    documents = rng.integers(40, size=300)
    got = top_positions(sp.csr_array(codes), documents, n_positions=5, per_document=2)
    for feature in range(20):
        taken: list[int] = []
        for p in sorted(np.flatnonzero(codes[:, feature]), key=lambda p: (-codes[p, feature], p)):
            if len(taken) < 5 and sum(documents[q] == documents[p] for q in taken) < 2:
                taken.append(p)
        assert got[feature].tolist() == taken + [-1] * (5 - len(taken))


def test_random_sets_repeat_a_document_only_where_documents_run_out() -> None:
    documents = np.repeat(np.arange(6), 10)
    sets = random_sets(documents, n_positions=9, sets=20, rng=np.random.default_rng(7))
    for members in sets:
        assert len(set(members)) == 9
        assert set(documents[members[:6]]) == set(range(6))
    with pytest.raises(ValueError, match="hold 60 positions"):
        random_sets(documents, n_positions=61, sets=1, rng=np.random.default_rng(7))
