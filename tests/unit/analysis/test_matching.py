"""Matching: planted permutations, independent references, and random dictionaries that have nothing in common."""

from itertools import permutations

import numpy as np
import pytest
import scipy.sparse

from saetrack.analysis.drift_geometry import unit_rows
from saetrack.analysis.matching import (
    CosineSimilarity,
    LatentCorrelation,
    directional_covariance,
    match,
    random_rows,
    relate,
)


def directions(count: int, d: int, seed: int) -> np.ndarray:
    return unit_rows(np.random.default_rng(seed).standard_normal((count, d)).astype(np.float32))


def sparse_latents(tokens: int, features: int, seed: int, share: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.random((tokens, features)) * (rng.random((tokens, features)) < share)).astype(np.float32)


@pytest.mark.parametrize("dense_features", [1000, 10], ids=["every pair", "candidates"])
def test_a_permuted_copy_is_matched_wholly(dense_features: int) -> None:
    a, order = directions(100, 16, seed=0), np.random.default_rng(1).permutation(100)
    matching = match(CosineSimilarity(a, a[order]), dense_features)
    assert matching.similarity.mean() == pytest.approx(1, abs=1e-6)
    assert (order[matching.right] == matching.left).all()


@pytest.mark.parametrize("shape", [(5, 5), (4, 6), (6, 4)], ids=["square", "wide", "tall"])
def test_the_matching_has_the_largest_sum_of_all(shape: tuple[int, int]) -> None:
    a, b = directions(shape[0], 3, seed=0), directions(shape[1], 3, seed=1)
    cosines = a @ b.T if shape[0] <= shape[1] else b @ a.T
    best = max(sum(cosines[i, j] for i, j in enumerate(p)) for p in permutations(range(max(shape)), min(shape)))
    for dense_features in (100, 1):
        matching = match(CosineSimilarity(a, b), dense_features)
        assert matching.similarity.sum() == pytest.approx(best, abs=1e-5)
        assert len(set(matching.right)) == len(matching.right) == min(shape)


def test_candidates_of_many_features_lose_next_to_nothing() -> None:
    a = directions(400, 32, seed=0)
    b = unit_rows(a + 0.2 * np.random.default_rng(1).standard_normal(a.shape).astype(np.float32))
    whole, chosen = match(CosineSimilarity(a, b)), match(CosineSimilarity(a, b), dense_features=399)
    assert chosen.similarity.mean() == pytest.approx(whole.similarity.mean(), abs=1e-4)
    assert chosen.similarity.mean() >= np.einsum("fd,fd->f", a, b).mean()


def test_correlations_are_those_of_numpy() -> None:
    a, b = sparse_latents(300, 6, seed=0), sparse_latents(300, 4, seed=1)
    b[:, 0] += a[:, 2]
    a[:, 5] = 0.0
    similarity = LatentCorrelation(scipy.sparse.csr_array(a), scipy.sparse.csr_array(b))
    got = np.concatenate([similarity.rows(0, 2), similarity.rows(2, 6)])
    expected = np.corrcoef(a[:, :5].T, b.T)[:5, 5:]
    assert np.allclose(got[:5], expected, atol=1e-5)
    assert (got[5] == 0).all()


def random_units(covariance: np.ndarray, count: int, seed: int) -> np.ndarray:
    return unit_rows(random_rows(covariance, count, np.random.default_rng(seed)))


def pw_mcc(a: np.ndarray, b: np.ndarray) -> float:
    return float(match(CosineSimilarity(a, b)).similarity.mean())


@pytest.mark.parametrize("known", [True, False], ids=["the data's covariance", "fitted to the rows"])
def test_independent_random_dictionaries_match_as_their_null_says(known: bool) -> None:
    spectrum = np.diag(1.0 / np.arange(1, 17))
    a, b = random_units(spectrum, 256, seed=0), random_units(spectrum, 256, seed=1)
    from_a, from_b = (spectrum, spectrum) if known else (directional_covariance(a), directional_covariance(b))
    null = [pw_mcc(random_units(from_a, 256, 10 + i), random_units(from_b, 256, 50 + i)) for i in range(20)]
    assert abs(pw_mcc(a, b) - np.mean(null)) < 2 * np.std(null, ddof=1)
    isotropic = pw_mcc(directions(256, 16, seed=1), directions(256, 16, seed=2))
    assert pw_mcc(a, b) > isotropic + 0.05  # an isotropic null would call these dictionaries similar


def test_the_directional_covariance_is_that_of_the_gaussian_behind_the_directions() -> None:
    spectrum = np.diag([8.0, 4.0, 2.0, 1.0])
    found = directional_covariance(random_units(spectrum, 50_000, seed=0), iterations=20, shrinkage=0.0)
    assert np.allclose(found, spectrum * 4 / np.trace(spectrum), atol=0.03)


def test_random_rows_have_the_covariance_asked_for() -> None:
    wanted = np.array([[2.0, 0.9], [0.9, 0.5]])
    rows = random_rows(wanted, 200_000, np.random.default_rng(0))
    assert np.allclose(rows.T @ rows / len(rows), wanted, atol=0.02)


def test_a_duplicate_is_a_split_and_two_into_one_a_merge() -> None:
    before, fresh = sparse_latents(2000, 6, seed=0), sparse_latents(2000, 1, seed=9)[:, 0]
    after = before.copy()
    after[:, 3] = 0.5 * before[:, 1]  # 3 becomes a copy of 1, and what 3 was is gone
    after[:, 4] = before[:, 4] + before[:, 5]
    after[:, 5] = fresh
    relations = relate(LatentCorrelation(scipy.sparse.csr_array(before), scipy.sparse.csr_array(after)))
    assert relations.splits(0.5).tolist() == [1]
    assert relations.merges(0.5).tolist() == [4]
    assert relations.parent[[0, 1, 2, 3]].tolist() == [0, 1, 2, 1]
    assert relations.child[[4, 5]].tolist() == [4, 4]
    unchanged = relate(LatentCorrelation(scipy.sparse.csr_array(before), scipy.sparse.csr_array(before)))
    assert not len(unchanged.splits(0.5))
    assert not len(unchanged.merges(0.5))
