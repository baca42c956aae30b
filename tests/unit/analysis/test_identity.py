"""Identity: planted features that keep or lose their meaning, and what it writes on a real small track."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from saetrack.analysis import AnalysisResult, Observation
from saetrack.analysis.causal import Causal
from saetrack.analysis.dictionaries import Dictionaries
from saetrack.analysis.drift import Drift
from saetrack.analysis.formation import Formation
from saetrack.analysis.identity import Identity
from saetrack.analysis.identity_stretches import Kept, kept_between, kept_stages, read_stretches, stretch_table
from saetrack.analysis.quality import Quality
from saetrack.analysis.semantics import Semantics
from saetrack.analysis.sweep import run_analyses
from saetrack.track import Track

FEATURES, TOKENS, STEPS = 40, 4000, (0, 8, 32, 64, 256, 512)
SWAPPED = np.arange(20)  # in pairs, 0 with 1 and so on, between steps 32 and 64


def latents(step: int, seed: int = 0) -> scipy.sparse.csr_array:
    """The same activations at every step but for noise; half of the features change places half-way."""
    rng = np.random.default_rng(seed)
    values = rng.random((TOKENS, FEATURES)) * (rng.random((TOKENS, FEATURES)) < 0.05)
    values = values * np.random.default_rng(step).uniform(0.7, 1.3, values.shape)
    if step >= 64:
        values[:, SWAPPED] = values[:, SWAPPED ^ 1]
    return scipy.sparse.csr_array(values.astype(np.float32))


def firing(latents: scipy.sparse.csr_array, feature: int, positions: int) -> scipy.sparse.csr_array:
    """The same with the feature at so many positions, always the same ones."""
    dense = latents.toarray()
    dense[:, feature] = np.arange(TOKENS) < positions
    return scipy.sparse.csr_array(dense)


class PlantedTrack(list):
    path, facts, equal_weights, is_forward_chain = "planted", {"d_sae": FEATURES}, (), True

    @property
    def whole(self) -> "PlantedTrack":
        return self

    @property
    def steps(self) -> list[int]:
        return [s.step for s in self]

    def controls(self, kind: str | None = None) -> list[Track]:
        return []

    def before(self, snapshot: SimpleNamespace) -> SimpleNamespace | None:
        return self[snapshot.position - 1] if snapshot.position else None


def run_planted(revived: tuple[int, int] | None = None, rare: tuple[int, int] | None = None) -> AnalysisResult:
    track = PlantedTrack()
    for position, step in enumerate(STEPS):
        table = pd.DataFrame({"revived": [(step, i) == revived for i in range(FEATURES)]})
        track.append(SimpleNamespace(position=position, number=position, step=step, features=table))
    analysis = Identity(replicates=50, min_firing_frequency=2.5 / TOKENS)
    analysis.begin(track)
    for snapshot in (track[-1], *track[:-1]):
        seen = latents(snapshot.step)
        if rare is not None:  # alive is 3 positions or more
            seen = firing(seen, rare[1], 2 if snapshot.step == rare[0] else 3)
        analysis.observe(snapshot, Observation(evaluation=SimpleNamespace(latents=seen)))
    return analysis.finish()


def test_planted_features_that_change_places_are_lost_and_the_others_kept() -> None:
    result = run_planted()
    kept = kept_between(result.tables["stretches"], 0, 512, FEATURES)
    assert (~kept[SWAPPED]).mean() >= 0.95
    assert kept[20:].mean() >= 0.95
    lost = result.tables["stretches"].query("feature == 3")[["first_step", "last_step"]]
    assert lost.to_numpy().tolist() == [[0, 32], [64, 512]]
    assert result.figures.keys() == result.captions.keys()
    survival = result.tables["survival"].set_index("step")
    assert survival.loc[32, "unbroken"] == 1
    assert survival.loc[[64, 512], "unbroken"].tolist() == survival.loc[[64, 512], "like_first"].tolist() == [0.5, 0.5]


def test_every_correlation_is_that_of_numpy() -> None:
    table = run_planted().tables["features"].set_index(["step", "feature"])
    dense = {step: latents(step).toarray() for step in STEPS}
    for t, step in enumerate(STEPS):
        for name, other in (("to_previous", STEPS[max(t - 1, 0)]), ("to_first", 0), ("to_last", 512)):
            if name == "to_previous" and t == 0:
                continue
            for i in (0, 30):
                expected = np.corrcoef(dense[step][:, i], dense[other][:, i])[0, 1]
                assert table.loc[(step, i), name] == pytest.approx(expected, abs=1e-6)


def test_a_revived_feature_is_a_new_one() -> None:
    result = run_planted(revived=(32, 30))
    assert result.tables["stretches"].query("feature == 30")[["first_step", "last_step"]].to_numpy().tolist() == [
        [0, 8],
        [32, 512],
    ]


def test_stretches_end_where_a_feature_is_dead() -> None:
    alive = np.array([[True, False], [False, True], [True, True]])
    kept = kept_stages(np.ones((3, 2)), np.full(3, 0.5), alive, np.zeros((3, 2), dtype=bool))
    table = stretch_table(alive, kept, [1, 2, 3])
    assert table.to_numpy().tolist() == [[0, 1, 1, 1], [0, 3, 3, 1], [1, 2, 3, 2]]
    assert kept_between(table, 3, 2, 2).tolist() == [False, True]


def test_the_column_kept_is_what_the_stretches_say_and_not_known_where_no_stage_leads() -> None:
    result = run_planted(rare=(32, 30))  # its correlation is high, but it is not alive
    table = result.tables["features"].set_index(["step", "feature"])
    assert table.loc[0, "kept"].isna().all()
    assert not table.loc[(32, 30), "alive"]
    assert table.loc[(32, 30), "to_previous"] > 0.5
    for before, step in pairwise(STEPS):
        assert (
            table.loc[step, "kept"].tolist()
            == kept_between(result.tables["stretches"], before, step, FEATURES).tolist()
        )


def test_the_sweep_agrees_with_what_training_measured_and_says_what_controls_are_missing(tiny_track: Track) -> None:
    with pytest.raises(FileNotFoundError, match="analyze"):
        read_stretches(tiny_track)
    run_analyses(tiny_track, {"identity": Identity(replicates=20)})
    result = AnalysisResult.load(tiny_track.analyses_dir / "identity")
    measured = np.concatenate([s.features["functional_correlation"].to_numpy(dtype=float) for s in tiny_track])
    assert np.allclose(result.tables["features"]["to_previous"], measured, atol=1e-4, equal_nan=True)
    assert "--kind null" in result.settings["controls_by_step"]["null"]
    assert result.tables["survival"]["null"].isna().all()
    assert len(read_stretches(tiny_track)) == len(result.tables["stretches"])


@pytest.mark.parametrize("wrong", [{"threshold": 0.0}, {"replicates": 1}, {"min_firing_frequency": 1.0}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Identity(**wrong)


def with_stretches(track: Track) -> Track:
    """The track with features 0 to 3 kept throughout, 4 and 5 from the second snapshot on, and all others never."""
    steps = track.steps
    rows = [(f, steps[0], steps[-1]) for f in range(4)] + [(f, steps[1], steps[-1]) for f in (4, 5)]
    table = pd.DataFrame(rows, columns=["feature", "first_step", "last_step"])
    AnalysisResult({"stretches": table}, settings={"steps": steps}).save(track.analyses_dir / "identity")
    return track


def test_what_is_restricted_counts_the_features_that_kept_their_identity(tiny_track: Track) -> None:
    kept = Kept.of(with_stretches(tiny_track))
    assert kept.into.sum(axis=1).tolist() == [64, 4, 6, 6]
    assert kept.to_last.sum(axis=1).tolist() == [4, 6, 6, 6]
    drift = run_analyses(tiny_track, {"drift": Drift(replicates=20)}, only_kept=True)["drift"]
    population = drift.tables["population"].query("measure == 'decoder_to_previous'")
    assert (population["n_features"].to_numpy()[1:] <= [4, 6, 6]).all()
    assert drift.settings["kept"]["into"] == dict(zip(tiny_track.steps[1:], [4, 6, 6], strict=True))
    assert "4 to 6 of 64 features in a stage, 4 from the first snapshot" in drift.summary
    assert (tiny_track.analyses_dir / "drift-kept" / "result.json").is_file()
    assert not (tiny_track.analyses_dir / "drift").exists()


@pytest.mark.parametrize("name", ["semantics", "formation", "causal", "dictionaries"])
def test_every_analysis_of_features_can_be_restricted(tiny_track: Track, name: str) -> None:
    analysis = {
        "semantics": Semantics(contexts=3),
        "formation": Formation(n_positions=5, n_min=3, draws=20, replicates=20),
        "causal": Causal(sample=6, rows=3, min_documents=2, replicates=99),
        "dictionaries": Dictionaries(),
    }[name]
    result = run_analyses(with_stretches(tiny_track), {name: analysis}, only_kept=True)[name]
    if name == "semantics":
        last = result.tables["transitions"].drop_duplicates(["step", "from"]).groupby("step")["of"].sum()
        assert last.tolist() == [4, 6, 6]
        assert set(result.tables["features"].query("turnover.notna()")["feature"]) <= set(range(6))
    elif name == "formation":
        status = result.tables["features"]["status"]
        assert (status[4:] == "not kept").all()
        assert not (status[:4] == "not kept").any()
    elif name == "causal":
        population = result.tables["population"]
        assert (population["n_features"] <= 6).all()
    else:
        assert (result.tables["neighbours"]["features"] <= [4, 6, 6]).all()


def test_restricting_without_stretches_or_what_leaves_none_out_is_refused(tiny_track: Track) -> None:
    with pytest.raises(FileNotFoundError, match=r"saetrack analyze .* --analyses\+=Identity"):
        run_analyses(tiny_track, {"drift": Drift()}, only_kept=True)
    with pytest.raises(ValueError, match="'quality' is not made to leave out features"):
        run_analyses(tiny_track, {"quality": Quality()}, only_kept=True)
    AnalysisResult(settings={"steps": [0, 1]}).save(tiny_track.analyses_dir / "identity")
    with pytest.raises(
        ValueError, match=r"is old, made on 2 of the track's 4 snapshots .*Run `saetrack analyze .*=Identity` again"
    ):
        read_stretches(tiny_track)
