"""The paper's measures, and what selection alone does to them."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from saetrack.analysis import formation_paper
from saetrack.analysis.base import SplitObservation
from saetrack.analysis.formation_paper import MEASURES, PaperSets, measure_paper, paper_tables
from saetrack.lm.tokens import TokenRows

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


def measured(split: SplitObservation) -> dict[str, pd.DataFrame]:
    sets = PaperSets.choose(split, seed=0)
    return paper_tables(sets, {0: measure_paper(split, sets)}, np.random.default_rng(0))


def mean_of(tables: dict[str, pd.DataFrame], measure: str) -> pd.Series:
    return tables["paper_population"].set_index("measure").loc[measure]


@pytest.mark.parametrize("name", ["cosine", "jaccard", "weighted_jaccard"])
def test_the_own_latent_makes_independent_codes_look_formed_and_leaving_it_out_does_not(name: str) -> None:
    rng = np.random.default_rng(0)
    split = split_of(rng.normal(size=(DOCUMENTS * PER_DOCUMENT, 32)), independent_codes(rng))
    tables = measured(split)
    with_own, without = mean_of(tables, f"feature_{name}"), mean_of(tables, f"feature_{name}_without_own")
    assert with_own["mean"] > 1.5 * with_own["null_high"]
    assert with_own["mean"] > 0.025
    # the random mean, common to all features, is what is left: a thirtieth of a set's variance
    assert abs(without["mean"]) < 0.2 * without["null_high"]


def test_a_dense_latent_left_out_is_left_out_of_the_random_sets_too() -> None:
    rng = np.random.default_rng(1)
    codes = independent_codes(rng)
    codes[:, 7] = 3.0
    split = split_of(rng.normal(size=(DOCUMENTS * PER_DOCUMENT, 8)), codes)
    table = measured(split)["paper"].set_index("feature")
    assert abs(table.loc[7, "feature_cosine_without_own"]) < 0.02


def test_the_per_feature_standard_error_matches_simulation() -> None:
    """Many features with the same law of activations: the spread of M over them is what each estimates."""
    rng = np.random.default_rng(4)
    codes = independent_codes(rng, width=400, active=6)
    activations = rng.normal(size=(len(codes), 16)) + 0.5
    table = measured(split_of(activations, codes))["paper"]
    assert table["activation_cosine_se"].mean() == pytest.approx(table["activation_cosine"].std(), rel=0.2)


def test_centring_shows_what_a_common_mean_hides() -> None:
    """Raw cosine of vectors around a large mean is near 1 for any set, so the paper's progress hardly leaves 0."""
    rng = np.random.default_rng(2)
    fires = np.arange(DOCUMENTS * PER_DOCUMENT) % PER_DOCUMENT == 3
    activations = 20.0 + rng.normal(size=(len(fires), 64))
    activations[fires, 0] += 8.0
    table = measured(split_of(activations, fires[:, None] * (1 + rng.random((len(fires), 2)))))["paper"]
    assert table.loc[0, "activation_cosine"] < 0.05
    assert table.loc[0, "activation_cosine_centred"] > 0.3


def test_positions_are_the_strongest_of_25_documents_and_features_with_fewer_than_ten_are_left_out() -> None:
    rng = np.random.default_rng(3)
    codes = independent_codes(rng, width=16, active=4)
    codes[9 * PER_DOCUMENT :, 3] = 0  # nine documents
    split = split_of(rng.normal(size=(len(codes), 4)), codes)
    sets = PaperSets.choose(split, seed=0)
    assert 3 not in sets.features
    by_document = codes[:, 5].reshape(DOCUMENTS, PER_DOCUMENT).max(axis=1)
    chosen = sets.members[sets.features == 5][0]
    np.testing.assert_allclose(codes[chosen, 5], np.sort(by_document)[::-1][: formation_paper.N_POSITIONS])
    assert set(measured(split)["paper_population"]["measure"]) == set(MEASURES)
