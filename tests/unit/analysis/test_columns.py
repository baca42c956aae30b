"""Column statistics of sparse latents against loops over features."""

from collections import defaultdict
from math import log2

import numpy as np
import pytest
import scipy.sparse

from saetrack.analysis.columns import token_share, token_statistics, top_positions, values_at


def random_latents(positions: int = 300, features: int = 12, density: float = 0.15, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    dense = rng.exponential(size=(positions, features)) * (rng.random((positions, features)) < density)
    dense[:, 3] = 0  # silent
    dense[:, 7] = 0
    dense[41, 7] = 2.5  # fires once
    dense[:, 8] = np.where(dense[:, 8] > 0, 1.5, 0)  # ties only
    return dense.astype(np.float32)


def sparse(dense: np.ndarray) -> scipy.sparse.csr_array:
    return scipy.sparse.csr_array(dense)


def entropies_by_hand(values: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    mass, count = defaultdict(float), defaultdict(int)
    for value, token in zip(values, tokens, strict=True):
        if value > 0:
            mass[int(token)] += float(value)
            count[int(token)] += 1
    n, total = sum(count.values()), sum(mass.values())
    seen_once = sum(1 for c in count.values() if c == 1)
    if seen_once == n:
        seen_once = n - 1
    coverage = 1 - seen_once / n
    plain = -sum(m / total * log2(m / total) for m in mass.values())
    corrected = 0.0
    for m in mass.values():
        cp = coverage * m / total
        corrected -= cp * log2(cp) / (1 - (1 - cp) ** n)
    return plain, corrected


@pytest.mark.parametrize("vocabulary", [5, 1000], ids=["frequent tokens", "mostly seen once"])
def test_token_statistics_match_the_definition(vocabulary: int) -> None:
    dense = random_latents()
    tokens = np.random.default_rng(1).integers(vocabulary, size=len(dense))
    got = token_statistics(sparse(dense), tokens)
    for f in range(dense.shape[1]):
        fires = dense[:, f] > 0
        assert got.firing_positions[f] == fires.sum()
        if not fires.any():
            assert got.top_token[f] == -1
            assert np.isnan([got.entropy[f], got.entropy_chao_shen[f], got.top_token_share[f]]).all()
            continue
        plain, corrected = entropies_by_hand(dense[:, f], tokens)
        assert got.entropy[f] == pytest.approx(plain, abs=1e-6)
        assert got.entropy_chao_shen[f] == pytest.approx(corrected, abs=1e-6)
        shares = {v: dense[tokens == v, f].sum() / dense[:, f].sum() for v in set(tokens.tolist())}
        assert got.top_token_share[f] == pytest.approx(max(shares.values()), rel=1e-5)
        assert shares[got.top_token[f]] == pytest.approx(max(shares.values()), rel=1e-5)


def test_a_feature_of_one_token_has_n_eff_one_and_a_uniform_one_the_number_of_tokens() -> None:
    tokens = np.repeat(np.arange(16), 50)
    dense = np.stack([(tokens == 11) * 0.3, np.ones(800)], axis=1).astype(np.float32)
    got = token_statistics(sparse(dense), tokens)
    assert (2**got.entropy).tolist() == pytest.approx([1.0, 16.0])
    assert (2**got.entropy_chao_shen).tolist() == pytest.approx([1.0, 16.0], rel=1e-6)
    assert got.top_token.tolist() == [11, 0]  # the smallest id among equals


def test_the_correction_removes_most_of_the_bias_of_few_firings() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(64, size=40 * 200)  # 200 features that each fire at 40 positions, uniform over 64 tokens
    feature = np.repeat(np.arange(200), 40)
    latents = scipy.sparse.coo_array((np.ones(8000, np.float32), (np.arange(8000), feature))).tocsr()
    got = token_statistics(latents, tokens)
    plain, corrected = 6 - got.entropy.mean(), 6 - got.entropy_chao_shen.mean()
    assert plain > 0.8
    assert abs(corrected) < 0.2


def test_no_latent_at_all_is_no_error() -> None:
    empty = scipy.sparse.csr_array((20, 4), dtype=np.float32)
    got = token_statistics(empty, np.arange(20))
    assert got.firing_positions.tolist() == [0] * 4
    assert got.top_token.tolist() == [-1] * 4
    positions, values = top_positions(empty, np.zeros(20, dtype=int), 3)
    assert (positions == -1).all()
    assert not values.any()
    assert not values_at(empty, np.array([1, 2]), np.array([0, 1])).any()


def test_token_share_is_of_the_chosen_token() -> None:
    dense = random_latents(seed=3)
    tokens = np.random.default_rng(4).integers(6, size=len(dense))
    chosen = np.arange(dense.shape[1]) % 6
    chosen[2] = -1
    got = token_share(sparse(dense), tokens, chosen)
    for f in range(dense.shape[1]):
        if f in (2, 3):
            assert np.isnan(got[f])
        else:
            assert got[f] == pytest.approx(dense[tokens == chosen[f], f].sum() / dense[:, f].sum(), rel=1e-5)


@pytest.mark.parametrize("documents", [7, 300], ids=["fewer documents than contexts", "a document a position"])
def test_top_positions_are_the_largest_one_per_document(documents: int) -> None:
    dense = random_latents()
    document = np.sort(np.random.default_rng(2).integers(documents, size=len(dense)))
    positions, values = top_positions(sparse(dense), document, 8)
    for f in range(dense.shape[1]):
        order = sorted((p for p in range(len(dense)) if dense[p, f] > 0), key=lambda p: (-dense[p, f], p))
        wanted, used = [], set()
        for p in order:
            if document[p] not in used:
                used.add(document[p])
                wanted.append(p)
        wanted = (wanted[:8] + [-1] * 8)[:8]
        assert positions[f].tolist() == wanted
        assert values[f].tolist() == [dense[p, f] if p >= 0 else 0 for p in wanted]


def test_values_at_are_the_entries() -> None:
    dense = random_latents()
    rng = np.random.default_rng(5)
    positions, features = rng.integers(len(dense), size=(50, 6)), rng.integers(dense.shape[1], size=(50, 1))
    np.testing.assert_array_equal(values_at(sparse(dense), positions, features), dense[positions, features])
