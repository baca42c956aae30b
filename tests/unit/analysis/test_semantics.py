"""Semantics: planted answers, and what it writes on a real small track."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

from saetrack.analysis import AnalysisResult, Observation, SplitObservation
from saetrack.analysis.semantics import Semantics
from saetrack.analysis.semantics_scores import Scorer, Vocabulary
from saetrack.analysis.semantics_turnover import same_tokens, turnover
from saetrack.analysis.sweep import run_analyses
from saetrack.lm.checkpoints import load_llm
from saetrack.lm.tokens import TokenRows
from saetrack.track import Track


class Words:
    """A tokenizer for planted tracks: token 7 is ' w7'."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"w{i}" for i in ids]

    def decode(self, ids: list[int], **_: object) -> str:
        return f" w{ids[0]}"


class PlantedTrack(list):
    path = Path("planted")

    def tokenizer(self) -> Words:
        return Words()

    def controls(self, kind: str | None = None) -> list[Track]:
        return []


ROWS, CONTEXT, VOCABULARY = 64, 16, 10
STEPS = (0, 1, 2, 8)
EMBEDDINGS = torch.from_numpy(np.random.default_rng(9).normal(size=(VOCABULARY, 8)))


def planted_rows(seed: int) -> TokenRows:
    tokens = np.random.default_rng(seed).integers(1, VOCABULARY, size=(ROWS, CONTEXT)).astype(np.uint16)
    tokens[:, 0] = 0
    documents = np.repeat(np.arange(ROWS * 2), CONTEXT // 2).reshape(ROWS, CONTEXT).astype(np.int32)
    return TokenRows(tokens, documents, 0)


def planted(rows: TokenRows, step: int) -> SplitObservation:
    """Feature 0: token 3, the same contexts always. 1: from 4 to 5. 2: token 6, always other contexts. 3: dead."""
    positions = np.argwhere(rows.usable())
    tokens = rows.tokens[positions[:, 0], positions[:, 1]]
    fixed = np.random.default_rng(0).random(len(tokens)) + 0.1
    fresh = np.random.default_rng(step).random(len(tokens)) + 0.1
    columns = [fixed * (tokens == 3), fixed * (tokens == (4 if step < 2 else 5)), fresh * (tokens == 6), 0 * fixed]
    latents = scipy.sparse.csr_array(np.stack(columns, axis=1).astype(np.float32))
    return SplitObservation(rows, positions, np.zeros((len(positions), 2), dtype=np.float32), latents)


def run_planted(chain: bool = False, **arguments: int) -> AnalysisResult:
    """Of a track, or with the same answers of a null chain, whose snapshots share LLM step 0."""
    track = PlantedTrack(SimpleNamespace(step=step * (not chain), position=i) for i, step in enumerate(STEPS))
    analysis = Semantics(**{"contexts": 4, "left": 2, "right": 1, **arguments})
    analysis.begin(track)
    for step in (8, 0, 1, 2):
        observation = Observation(planted(planted_rows(1), step), planted(planted_rows(2), step), EMBEDDINGS)
        analysis.observe(track[STEPS.index(step)], observation)
    return analysis.finish()


def test_planted_features_have_their_tokens() -> None:
    table = run_planted().tables["features"].set_index(["step", "feature"])
    assert set(table.index.get_level_values("feature")) == {0, 1, 2}
    assert [table.loc[(step, 1), "top_token"] for step in (0, 1, 2, 8)] == [" w4", " w4", " w5", " w5"]
    assert (table["top_token_share"] == 1).all()
    assert (table["top_token_share_evaluation"] == 1).all()
    assert np.allclose(table["n_eff"], 1)
    assert (table["n_eff_shuffled"] > 5).all()


def test_planted_turnover_is_found_where_it_was_planted() -> None:
    table = run_planted().tables["features"].pivot_table(index="step", columns="feature", values="turnover")
    assert table[0].tolist() == [0, 0, 0]  # the same contexts at every step
    assert table[1].tolist() == [0, 1, 0]  # into step 2
    assert (table[2] > 0.7).all()


def test_nulls_tell_a_feature_with_contexts_from_one_with_tokens_only() -> None:
    steps = run_planted().tables["steps"].set_index("step")
    assert np.isnan(steps.loc[0, ["turnover", "turnover_other_feature", "turnover_same_tokens"]].astype(float)).all()
    assert steps.loc[8, "turnover_other_feature"] == pytest.approx(1.0)  # the planted features share no token
    assert 0.9 < steps.loc[8, "turnover_same_tokens"] < 1
    assert steps.loc[1, "turnover_low"] <= steps.loc[1, "turnover"] <= steps.loc[1, "turnover_high"]
    assert steps.loc[1, "features_compared"] == 3


def test_snapshots_of_a_null_chain_are_told_apart_by_their_place() -> None:
    track, chain = run_planted().tables["features"], run_planted(chain=True).tables["features"]
    assert "position" not in track
    assert set(chain["step"]) == {0}
    assert [STEPS[place] for place in chain["position"]] == track["step"].tolist()
    pd.testing.assert_series_equal(chain["turnover"], track["turnover"])


def test_coherence_is_not_defined_where_random_sets_with_the_same_tokens_do_not_differ() -> None:
    """Tokens 10 to 12 occur twice, so the random sets are one set, whose deviation is rounding or 0."""
    rows = planted_rows(1)
    rows.tokens[1:7, 5] = [10, 10, 11, 11, 12, 12]
    split = planted(rows, 0)
    tokens = rows.tokens[split.positions[:, 0], split.positions[:, 1]]
    rare = np.isin(split.positions[:, 0], [1, 3, 5]) & (split.positions[:, 1] == 5)
    latents = scipy.sparse.csr_array(np.stack([rare, tokens == 3], axis=1).astype(np.float32))
    split = replace(split, latents=latents)
    embeddings = np.random.default_rng(9).normal(size=(13, 8))
    scorer = Scorer(Vocabulary.of([f"w{i}" for i in range(13)]), embeddings, split, seed=0)
    z = scorer.scores(split, split).coherence_z
    assert np.isnan(z[0])
    assert abs(z[1]) < 10


def test_contexts_are_the_tokens_around_the_position(tiny_track: Track) -> None:
    analysis = Semantics(selection_rows=20, contexts=3, left=4, right=2, examples=4)
    result = run_analyses(tiny_track, {"semantics": analysis})["semantics"]
    table = AnalysisResult.load(tiny_track.analyses_dir / "semantics").tables["contexts"]
    rows, tokenizer = tiny_track.tokens("selection"), tiny_track.tokenizer()
    assert (table.groupby(["step", "feature"])["document"].nunique() == table.groupby(["step", "feature"]).size()).all()
    assert table["row"].max() < 20
    assert set(table["column"]) >= {1, 15}  # windows are cut off at both ends of a row
    for context in table.sample(60, random_state=0).itertuples():
        first, end = max(context.column - 4, 0), min(context.column + 3, 16)
        ids = rows.tokens[context.row, first:end]
        assert [t.replace(" ", "") for t in context.tokens] == [tokenizer.decode([i]).replace(" ", "") for i in ids]
        assert context.center == context.column - first
        assert context.token == context.tokens[context.center]
        assert context.activation == pytest.approx(context.activations[context.center])
        assert np.isnan(context.activations[ids == 0]).all()
        assert np.isfinite(context.activations[ids != 0]).all()
    assert result.settings["rows_read"] == {"selection": 20, "evaluation": 12}


def test_activations_in_contexts_are_those_of_the_snapshot(tiny_track: Track) -> None:
    result = run_analyses(tiny_track, {"semantics": Semantics(contexts=2, left=3, right=3)})["semantics"]
    snapshot, rows = tiny_track.at(4), tiny_track.tokens("selection")
    hidden = load_llm(snapshot.llm)(torch.from_numpy(rows.tokens.astype(np.int64)), output_hidden_states=True)
    latents = snapshot.sae().encode(hidden.hidden_states[1].detach()).numpy()  # [R, T, d_sae]
    table = result.tables["contexts"]
    for context in table[table["step"] == 4].itertuples():
        first, end = max(context.column - 3, 0), min(context.column + 4, 16)
        known = rows.tokens[context.row, first:end] != 0
        wanted = latents[context.row, first:end, context.feature]
        np.testing.assert_allclose(context.activations[known], wanted[known], rtol=1e-3, atol=1e-4)


def test_every_firing_feature_is_in_the_tables_and_a_second_run_is_equal(tiny_track: Track) -> None:
    for name in ("a", "b"):
        run_analyses(tiny_track, {name: Semantics(contexts=3)})
    folders = [tiny_track.analyses_dir / name for name in ("a", "b")]
    assert sorted(p.name for p in folders[0].iterdir()) == [
        "classes.parquet",
        "classes.svg",
        "contexts.parquet",
        "examples.svg",
        "features.parquet",
        "patterns.parquet",
        "result.json",
        "semantics.svg",
        "sensitivity.parquet",
        "steps.parquet",
        "transitions.parquet",
    ]
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes(), path.name
    result = AnalysisResult.load(folders[0])
    features, contexts = result.tables["features"], result.tables["contexts"]
    assert set(map(tuple, features[["step", "feature"]].to_numpy())) == set(
        map(tuple, contexts[["step", "feature"]].to_numpy())
    )
    assert features.groupby("step").size().to_dict() == result.scalars["firing_features"]
    assert features[features["step"] == 0]["feature"].nunique() > 20


def test_a_track_of_one_snapshot_has_no_turnover(tiny_track: Track, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_track, "_snapshots", list(tiny_track)[-1:])
    result = run_analyses(tiny_track, {"semantics": Semantics(contexts=2)})["semantics"]
    assert result.scalars["turnover"] == {}
    assert "turnover" not in result.summary


def test_an_sae_that_never_fires_gives_empty_tables_and_figures(tmp_path: Path) -> None:
    analysis = Semantics()
    analysis.begin(PlantedTrack(SimpleNamespace(step=step, position=step) for step in (0, 1)))
    for step in (1, 0):
        split = planted(planted_rows(1), step)
        silent = replace(split, latents=scipy.sparse.csr_array(split.latents.shape, dtype=np.float32))
        analysis.observe(SimpleNamespace(step=step, position=step), Observation(silent, silent, EMBEDDINGS))
    result = analysis.finish()
    result.save(tmp_path / "semantics")
    assert len(result.tables["features"]) == len(result.tables["contexts"]) == 0
    assert result.scalars["firing_features"] == {0: 0, 1: 0}
    assert result.scalars["n_eff_median"] == {}


def test_turnover_counts_shared_positions() -> None:
    rng = np.random.default_rng(0)
    before, after = (np.stack([rng.choice(20, size=8, replace=False) for _ in range(50)]) for _ in range(2))
    before[0, 3:], after[1, :] = -1, -1
    for f, value in enumerate(turnover(before, after)):
        a, b = set(before[f].tolist()) - {-1}, set(after[f].tolist()) - {-1}
        assert (np.isnan(value) and not b) or value == pytest.approx(1 - len(a & b) / len(a | b))


def test_sets_of_the_same_tokens_keep_the_tokens_and_are_spread_evenly() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(12, size=400)
    tokens[5] = 99  # occurs once
    positions = np.stack([rng.choice(400, size=6, replace=False) for _ in range(30)])
    positions[0] = [5, 7, 8, -1, -1, -1]
    counts = np.zeros(400)
    for _ in range(200):
        drawn = same_tokens(positions, tokens, rng)
        for before, after in zip(positions, drawn, strict=True):
            kept, now = before[before >= 0], after[after >= 0]
            assert sorted(tokens[kept]) == sorted(tokens[now])
            assert len(set(now.tolist())) == len(kept)
        counts += np.bincount(drawn[drawn >= 0], minlength=400)
    assert 5 in same_tokens(positions, tokens, rng)[0]
    for token in range(12):
        expected = (tokens[positions[positions >= 0]] == token).sum() * 200 / (tokens == token).sum()
        assert np.abs(counts[tokens == token] / expected - 1).max() < 0.5


def test_finish_before_observe_is_told(tiny_track: Track) -> None:
    analysis = Semantics()
    analysis.begin(tiny_track)
    with pytest.raises(RuntimeError, match="before observe"):
        analysis.finish()


@pytest.mark.parametrize(("name", "value"), [("contexts", 0), ("left", -1), ("selection_rows", 0)])
def test_arguments_out_of_range_are_told(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        Semantics(**{name: value})
