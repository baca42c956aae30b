"""Similarities and bootstraps against one-pair-at-a-time references and simulation."""

import numpy as np
import pytest
import scipy.sparse as sp

from saetrack.analysis.resampling import bootstrap_means, dirichlet_pair_weights
from saetrack.analysis.similarity import (
    cosine_matrices,
    mean_similarity,
    own_values,
    pair_weights,
    sparse_pair_sums,
)


def cosine_of(a: np.ndarray, b: np.ndarray) -> float:
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms else 0.0


def jaccard_of(a: np.ndarray, b: np.ndarray) -> float:
    union = sum(x > 0 or y > 0 for x, y in zip(a, b, strict=True))
    return sum(x > 0 and y > 0 for x, y in zip(a, b, strict=True)) / union if union else 0.0


def weighted_jaccard_of(a: np.ndarray, b: np.ndarray) -> float:
    """The L1 identity, not sums of minima: another form than the code's."""
    total, apart = a.sum() + b.sum(), np.abs(a - b).sum()
    return float((total - apart) / (total + apart)) if total else 0.0


NAIVE = {"cosine": cosine_of, "jaccard": jaccard_of, "weighted_jaccard": weighted_jaccard_of}


def naive_mean(vectors: np.ndarray, measure: str) -> float:
    n = len(vectors)
    pairs = [NAIVE[measure](vectors[a], vectors[b]) for a in range(n) for b in range(n) if a != b]
    return sum(pairs) / len(pairs)


def sparse_codes(rng: np.random.Generator, rows: int, width: int, share: float) -> np.ndarray:
    return rng.exponential(size=(rows, width)) * (rng.random((rows, width)) < share)


@pytest.mark.parametrize("measure", sorted(NAIVE))
@pytest.mark.parametrize("share", [0.02, 0.2, 0.9], ids=["with empty rows", "sparse", "dense"])
def test_sparse_measures_match_one_pair_at_a_time(measure: str, share: float) -> None:
    rng = np.random.default_rng(0)
    codes = sparse_codes(rng, rows=60, width=30, share=share)
    members = rng.integers(60, size=(5, 7))
    members[1, 4:] = -1
    members[3, 2:] = -1
    sizes = (members >= 0).sum(axis=1)
    matrices = sparse_pair_sums(sp.csr_array(codes), members).similarities()[measure]
    expected = [naive_mean(codes[m[m >= 0]], measure) for m in members]
    np.testing.assert_allclose(mean_similarity(matrices, sizes), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("measure", sorted(NAIVE))
def test_leaving_a_coordinate_out_equals_deleting_its_column(measure: str) -> None:
    rng = np.random.default_rng(1)
    codes = sparse_codes(rng, rows=50, width=12, share=0.25)
    codes[0] = 0
    codes[0, 4] = 2.0  # a row that fires on nothing but the coordinate to leave out
    members, features = rng.integers(50, size=(4, 6)), np.array([4, 0, 11, 4])
    members[0, 0] = 0
    latents = sp.csr_array(codes)
    own = own_values(latents, members, features)
    matrices = sparse_pair_sums(latents, members).without_coordinate(own).similarities()[measure]
    expected = [
        naive_mean(np.delete(codes[m], feature, axis=1), measure) for m, feature in zip(members, features, strict=True)
    ]
    np.testing.assert_allclose(mean_similarity(matrices, np.full(4, 6)), expected, rtol=1e-9, atol=1e-12)


def test_mean_cosine_equals_the_sum_of_unit_vectors_form() -> None:
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(3, 25, 16)) + 0.5
    units = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    expected = ((units.sum(axis=1) ** 2).sum(axis=-1) - 25) / (25 * 24)
    np.testing.assert_allclose(mean_similarity(cosine_matrices(vectors), np.full(3, 25)), expected, rtol=1e-12)


def test_a_zero_vector_is_similar_to_nothing() -> None:
    vectors = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert mean_similarity(cosine_matrices(vectors)[None], np.array([3])).item() == pytest.approx(1 / 3)


def test_pair_weights_ignore_unused_places() -> None:
    weights = pair_weights(np.array([2, 4]), 4)
    np.testing.assert_allclose(weights.sum(axis=(1, 2)), 1.0)
    assert weights[0, 0, 1] == 0.5
    assert weights[0, 2:].sum() == weights[1, [0, 1, 2, 3], [0, 1, 2, 3]].sum() == 0


def test_dirichlet_replicates_equal_their_definition() -> None:
    vectors = np.random.default_rng(3).normal(size=(8, 5))
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    weights = np.random.default_rng(4).dirichlet(np.ones(8), 20)
    expected = [(np.sum((w @ units) ** 2) - np.sum(w**2)) / (1 - np.sum(w**2)) for w in weights]
    replicates = dirichlet_pair_weights(8, 8, 20, np.random.default_rng(4)) @ cosine_matrices(vectors).ravel()
    np.testing.assert_allclose(replicates, expected, rtol=1e-10)


def test_dirichlet_standard_error_matches_simulation() -> None:
    """True spread over fresh samples of 25 vectors, against the mean estimate from one sample each."""
    rng = np.random.default_rng(5)
    samples = rng.normal(size=(400, 25, 32)) + 0.4
    matrices = cosine_matrices(samples)
    true = mean_similarity(matrices, np.full(400, 25)).std(ddof=1)
    weights = dirichlet_pair_weights(25, 25, 200, rng)
    replicates = matrices.reshape(400, -1) @ weights.T
    assert replicates.std(axis=1, ddof=1).mean() == pytest.approx(true, rel=0.15)
    # and, unlike drawing with replacement, no upward bias of (1 - Sbar) / n
    assert (replicates.mean(axis=1) - mean_similarity(matrices, np.full(400, 25))).mean() == pytest.approx(0, abs=0.003)


def test_bootstrap_interval_is_that_of_the_mean_and_leaves_nan_out() -> None:
    values = np.random.default_rng(6).normal(3.0, 1.0, size=(2, 400))
    values[1, 100:] = np.nan
    mean, low, high = bootstrap_means(values, np.random.default_rng(7), replicates=2000)
    np.testing.assert_allclose(mean, np.nanmean(values, axis=1))
    np.testing.assert_allclose((high - low) / (2 * 1.96), [0.05, 0.1], rtol=0.15)


def test_bootstrap_of_a_row_without_values_is_nan() -> None:
    mean, low, high = bootstrap_means(np.full((1, 5), np.nan), np.random.default_rng(0))
    assert np.isnan([mean, low, high]).all()
