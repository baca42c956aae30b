"""Ablations: closed forms on an LLM that is a look-up and a matrix, and what the tests find where there is nothing."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from scipy.stats import false_discovery_control
from torch import nn

from saetrack.analysis.base import SplitObservation
from saetrack.analysis.causal import Causal
from saetrack.analysis.causal_measure import Ablations, Targets, ablate, documents_with_firing, sample_by_frequency
from saetrack.analysis.causal_tables import estimate
from saetrack.analysis.sweep import run_analyses
from saetrack.lm.forward import EditableLLM
from saetrack.lm.tokens import TokenRows
from saetrack.track import Track

D_IN, VOCABULARY, ROWS, CONTEXT = 8, 6, 40, 12
PLANTED, SILENT_DIRECTION, DENSE = 0, 1, 2


class LookUp(nn.Module):
    """Predicts the next token from this one alone; the last coordinate of the activation is read by nothing."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding.from_pretrained(torch.randn(VOCABULARY, D_IN, generator=generator))
        self.hook = nn.Identity()
        self.read = torch.randn(D_IN, VOCABULARY, generator=generator)
        self.read[-1] = 0

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.hook(self.embed(input_ids)) @ self.read)


def planted_split(seed: int = 0) -> SplitObservation:
    """A document a row; feature 0 fires now and then, 1 too, 2 at most positions."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, VOCABULARY, size=(ROWS, CONTEXT)).astype(np.int32)
    tokens[:, 0] = 0
    documents = np.repeat(np.arange(ROWS, dtype=np.int32)[:, None], CONTEXT, axis=1)
    positions = np.argwhere(tokens != 0)
    fires = rng.random((len(positions), 3)) < (0.1, 0.1, 0.9)
    latents = sp.csr_array((fires * (0.5 + rng.random(fires.shape))).astype(np.float32))
    activations = np.zeros((len(positions), D_IN), dtype=np.float32)
    return SplitObservation(TokenRows(tokens, documents, 0), positions, activations, latents)


def planted_targets(split: SplitObservation) -> Targets:
    decoder = torch.randn(3, D_IN, generator=torch.Generator().manual_seed(1))
    decoder[SILENT_DIRECTION] = 0
    decoder[SILENT_DIRECTION, -1] = 2.0
    means = split.latents.mean(axis=0)
    return Targets(np.arange(3), np.asarray(means).ravel(), decoder, np.arange(3))


def by_hand(split: SplitObservation, targets: Targets, feature: int) -> dict[str, dict[int, float]]:
    """Loss and divergence of every row with the feature ablated, one prediction at a time."""
    llm = LookUp()
    embed, read, direction = (x.double().numpy() for x in (llm.embed.weight, llm.read, targets.decoder[feature]))
    latents = {tuple(place): float(z) for place, z in zip(split.positions, split.latents.toarray()[:, feature])}  # noqa: B905
    found: dict[str, dict[int, float]] = {"loss": {}, "divergence": {}}
    for row, tokens in enumerate(split.rows.tokens):
        loss = divergence = 0.0
        for t in range(1, CONTEXT - 1):
            before = np.log(softmax(embed[tokens[t]] @ read))
            taken = (latents[row, t] - targets.means[feature]) * direction
            after = np.log(softmax((embed[tokens[t]] - taken) @ read))
            loss += before[tokens[t + 1]] - after[tokens[t + 1]]
            divergence += float(np.exp(before) @ (before - after))
        found["loss"][row], found["divergence"][row] = loss, divergence
    return found


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum()


def ablations_of(rows: int = ROWS, rows_per_forward: int = 7) -> tuple[SplitObservation, Targets, Ablations]:
    split = planted_split()
    targets = planted_targets(split)
    llm: Any = LookUp()
    done = ablate(EditableLLM(llm, "hook"), split, targets, rows, seed=0, rows_per_forward=rows_per_forward)
    return split, targets, done


def test_effects_are_those_of_the_closed_form_in_rows_where_the_feature_fires_and_nothing_elsewhere() -> None:
    split, targets, done = ablations_of()
    for feature in (PLANTED, DENSE):
        expected = by_hand(split, targets, feature)
        fires = np.zeros((ROWS, CONTEXT), dtype=bool)
        fires[tuple(split.positions.T)] = split.latents.toarray()[:, feature] > 0
        run = fires[:, :-1].any(axis=1)
        assert 0 < run.sum() <= ROWS
        np.testing.assert_array_equal(done.firings[:, feature], fires[:, :-1].sum(axis=1))
        for measure, by_row in expected.items():
            rows = np.array([by_row[row] for row in range(ROWS)])
            np.testing.assert_allclose(done.sums[measure][0, :, feature], np.where(run, rows, 0), atol=2e-5)
    assert done.sums["divergence"][0, :, PLANTED].sum() > 0.1


def test_a_direction_that_nothing_reads_has_no_effect_and_its_interval_covers_0() -> None:
    _, _, done = ablations_of()
    for measure in ("loss", "divergence"):
        mean, low, high = estimate([done], measure, 2, 199, 0).values["effect"][:, 0, SILENT_DIRECTION]
        assert abs(mean) < 1e-5
        assert low - 1e-6 <= 0 <= high + 1e-6
    found = estimate([done], "divergence", 2, 199, 0)
    assert found.values["excess"][0, 0, SILENT_DIRECTION] < 0  # what it is compared with is read
    assert not found.significant[0, SILENT_DIRECTION]


def test_the_null_is_the_same_taken_in_another_direction_at_the_length_of_the_feature() -> None:
    split = planted_split()
    targets = planted_targets(split)
    others = Targets(np.array([PLANTED]), targets.means[:1], targets.decoder, np.array([PLANTED, SILENT_DIRECTION]))
    llm: Any = LookUp()
    done = ablate(EditableLLM(llm, "hook"), split, others, ROWS, seed=0, rows_per_forward=7)
    assert np.abs(done.sums["loss"][1]).max() < 1e-5  # the only other direction is read by nothing
    towards = Targets(others.features, others.means, 5 * targets.decoder, np.array([PLANTED, DENSE]))
    lengths = targets.decoder.norm(dim=1, keepdim=True)
    same = Targets(others.features, others.means, targets.decoder * 5, np.array([PLANTED, DENSE]))
    same.decoder[DENSE] = targets.decoder[DENSE] / lengths[DENSE] * 1e-3
    a, b = (ablate(EditableLLM(llm, "hook"), split, t, ROWS, seed=0, rows_per_forward=7) for t in (towards, same))
    np.testing.assert_allclose(a.sums["loss"][1], b.sums["loss"][1], atol=1e-4)


def test_batches_change_nothing_and_a_limit_takes_as_many_documents() -> None:
    _, _, whole = ablations_of(rows=5, rows_per_forward=100)
    _, _, parts = ablations_of(rows=5, rows_per_forward=3)
    for measure, sums in whole.sums.items():
        np.testing.assert_allclose(sums, parts.sums[measure], atol=1e-5)
    assert ((whole.firings > 0).sum(axis=0) == 5).all()


def test_one_row_of_every_document_comes_before_second_ones() -> None:
    split = planted_split()
    split.rows.documents[:30] = 0  # one long document and ten short ones
    targets = planted_targets(split)
    dense = Targets(np.array([DENSE]), targets.means[[DENSE]], targets.decoder, targets.others)
    llm: Any = LookUp()
    done = ablate(EditableLLM(llm, "hook"), split, dense, 11, seed=0, rows_per_forward=11)
    assert (done.firings[:, 0] > 0).sum() == 11


def nothing(features: int, documents: int, seed: int, planted: float = 0.0) -> list[Ablations]:
    """Three checkpoints at which feature and null do the same but for noise, and `planted` more for the first half."""
    rng = np.random.default_rng(seed)
    firings = rng.integers(0, 4, size=(documents, features))
    more = np.where(np.arange(features) < features // 2, planted, 0.0) * firings
    common = rng.normal(size=(documents, features))
    seen = []
    for _ in range(3):
        pair = common + firings * rng.standard_t(4, size=(2, documents, features))
        pair[0] += more
        seen.append(Ablations({"loss": pair}, firings))
    return seen


@pytest.mark.parametrize("documents", [12, 40])
def test_where_there_is_no_excess_few_are_found_and_intervals_cover_0(documents: int) -> None:
    found, covered = 0, []
    for seed in range(20):
        estimates = estimate(nothing(20, documents, seed), "loss", 5, 199, seed)
        found += bool(estimates.significant.any())
        _, low, high = estimates.values["excess"]
        covered.append(((low <= 0) & (high >= 0)).mean())
    assert found <= 4  # any false discovery in 5 % of the repeats
    assert 0.90 <= np.mean(covered) <= 0.97


def test_a_planted_excess_is_found_and_recovered() -> None:
    estimates = estimate(nothing(20, 60, 0, planted=1.5), "loss", 5, 499, 0)
    assert estimates.significant[:, :10].mean() > 0.9
    assert not estimates.significant[:, 10:].any()
    mean, low, high = estimates.values["excess"][:, :, :10]
    assert mean.mean() == pytest.approx(1.5, abs=0.1)
    assert ((low <= 1.5) & (high >= 1.5)).mean() > 0.85


def test_naming_features_changes_nothing_for_those_drawn_and_they_are_adjusted_among_themselves() -> None:
    seen = nothing(20, 60, 0, planted=1.5)
    drawn = [Ablations({"loss": a.sums["loss"][:, :, 10:]}, a.firings[:, 10:]) for a in seen]
    alone = estimate(drawn, "loss", 5, 199, 0)
    named = np.arange(20) < 10  # all have an excess: in one family they would make the level of the others easier
    both = estimate(seen, "loss", 5, 199, 0, ~named)
    np.testing.assert_array_equal(both.p[:, ~named], alone.p)
    np.testing.assert_array_equal(both.q[~named], alone.q)
    np.testing.assert_array_equal(both.significant[:, ~named], alone.significant)
    np.testing.assert_allclose(both.q[named], false_discovery_control(both.p[:, named].min(axis=0)))
    assert not np.allclose(estimate(seen, "loss", 5, 199, 0).q[~named], alone.q)


def test_too_few_documents_give_no_estimate() -> None:
    seen = nothing(4, 30, 0)
    for ablations in seen:
        ablations.firings[4:, 1] = 0
        ablations.firings[:4, 1] = 1
    estimates = estimate(seen, "loss", 5, 199, 0)
    assert np.isnan(estimates.values["effect"][:, :, 1]).all()
    assert np.isnan(estimates.p[:, 1]).all()
    assert np.isnan(estimates.q[1])
    assert np.isfinite(estimates.q[[0, 2, 3]]).all()


def test_the_sample_has_one_feature_of_every_stratum_of_frequency() -> None:
    frequency = np.random.default_rng(0).random(100)
    eligible = np.flatnonzero(frequency > 0.2)
    drawn = sample_by_frequency(frequency, eligible, 10, np.random.default_rng(1))
    strata = np.array_split(np.sort(frequency[eligible]), 10)
    assert all(s.min() <= frequency[i] <= s.max() for s, i in zip(strata, drawn, strict=True))
    assert set(sample_by_frequency(frequency, eligible[:3], 10, np.random.default_rng(1))) == set(eligible[:3])
    assert not len(sample_by_frequency(frequency, eligible, 0, np.random.default_rng(1)))


def test_documents_with_firing_counts_each_document_once() -> None:
    split = planted_split()
    dense = split.latents.toarray() > 0
    expected = [len(set(split.documents[dense[:, f]])) for f in range(3)]
    assert documents_with_firing(split).tolist() == expected


def test_on_a_track_the_sample_and_named_features_are_ablated_at_every_checkpoint(tiny_track: Track) -> None:
    analysis = Causal(sample=6, features=[5, 9], rows=4, min_documents=3, replicates=99)
    result = run_analyses(tiny_track, {"causal": analysis})["causal"]
    table = result.tables["causal"]
    drawn = result.settings["drawn"].tolist()
    assert len(table) == 2 * 4 * len({*drawn, 5, 9})  # measures, steps, features
    assert set(table.loc[~table["sampled"], "feature"]) == {5, 9} - set(drawn)
    dead = table[table["feature"] == 5]
    assert (dead["documents"] == 0).all()
    assert dead["effect"].isna().all()
    known = table[(table["measure"] == "divergence") & table["effect"].notna()]
    assert len(known) > 10
    assert (known["effect"] > 0).all()
    np.testing.assert_allclose(known["excess"], known["effect"] - known["null"], atol=1e-9)
    tests = result.tables["features"]
    assert "q" not in table
    assert len(tests) == len(table) / 4  # one for each feature and measure
    smallest = table.groupby(["measure", "feature"])["p"].min()
    pd.testing.assert_series_equal(tests.set_index(["measure", "feature"])["p"].sort_index(), smallest.sort_index())
    assert set(result.scalars["divergence_effect"]) <= {0, 1, 4, 10}
    assert (tiny_track.analyses_dir / "causal" / "effects.svg").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample": 0}, "give one of them"),
        ({"rows": 2}, "no feature could be estimated"),
        ({"text_rows": 0}, "text_rows is 0; expected 1"),
        ({"replicates": 9}, "expected 99"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Causal(**arguments)


def test_a_feature_out_of_range_is_refused_before_any_llm_is_loaded(tiny_track: Track) -> None:
    with pytest.raises(ValueError, match=r"no feature 64: .* has 64; give whole numbers from 0 to 63"):
        Causal(features=[3, 64]).begin(tiny_track)
