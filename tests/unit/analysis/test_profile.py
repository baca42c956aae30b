import numpy as np
import pytest
import scipy.sparse
import torch

from saetrack.analysis.profile import BIN_EDGES, Profile, histogram, logit_effects, nearest_rows
from saetrack.analysis.sweep import run_analyses
from saetrack.lm import load_llm, read_unembedding
from saetrack.track import Track


def test_histogram_counts_every_firing_once_in_its_bin() -> None:
    rng = np.random.default_rng(0)
    dense = np.where(rng.random((200, 6)) < 0.3, rng.lognormal(0, 3, size=(200, 6)), 0).astype(np.float32)
    counts = histogram(scipy.sparse.csr_array(dense), scale=0.5)
    for feature in range(6):
        expected = np.zeros(len(BIN_EDGES) - 1, dtype=int)
        for value in dense[:, feature][dense[:, feature] > 0] * 0.5:
            expected[int(np.clip(np.floor(4 * np.log2(value)) + 24, 0, 47))] += 1
        np.testing.assert_array_equal(counts[feature], expected)


def test_logit_effects_are_the_extremes_of_the_centred_product() -> None:
    generator = torch.Generator().manual_seed(0)
    decoder, unembedding = torch.randn(300, 8, generator=generator), torch.randn(50, 8, generator=generator)
    tokens, effects = logit_effects(decoder, unembedding, 3)
    for feature in (0, 255, 256, 299):
        logits = np.array([float(row @ decoder[feature]) for row in unembedding])
        order = np.argsort(logits)
        assert tokens[feature].tolist() == [*order[::-1][:3], *order[:3]]
        np.testing.assert_allclose(effects[feature], (logits - logits.mean())[tokens[feature]], atol=1e-5)


def test_nearest_rows_are_other_rows_by_cosine() -> None:
    matrix = torch.randn(1100, 5, generator=torch.Generator().manual_seed(0))
    nearest, cosines = nearest_rows(matrix, 4)
    rows = matrix.numpy() / np.linalg.norm(matrix.numpy(), axis=1, keepdims=True)
    for row in (0, 1023, 1024, 1099):
        expected = sorted(((float(rows[row] @ rows[i]), i) for i in range(1100) if i != row), reverse=True)[:4]
        assert nearest[row].tolist() == [i for _, i in expected]
        np.testing.assert_allclose(cosines[row], [c for c, _ in expected], atol=1e-5)


def test_a_track_gets_a_row_for_every_feature_and_checkpoint(tiny_track: Track) -> None:
    result = run_analyses(tiny_track, {"profile": Profile(tokens=4, neighbours=3)})["profile"]
    assert set(result.tables) == {"activations", "nearest", "logits"}
    for table in result.tables.values():
        assert len(table) == 4 * 64
    dead = result.tables["activations"].query("feature == 5")["counts"]
    assert sum(int(np.sum(c)) for c in dead) == 0
    snapshot = tiny_track.at(4)
    effect = snapshot.tensor("W_dec")[9] @ read_unembedding(load_llm(snapshot.llm)).T
    row = result.tables["logits"].query("step == 4 and feature == 9").iloc[0]
    text = tiny_track.tokenizer().decode([int(effect.argmax())])
    assert row["raised"][0] == text
    assert row["raised_by"][0] == pytest.approx(float(effect.max() - effect.mean()), abs=1e-5)


def test_profile_refuses_a_count_of_zero() -> None:
    with pytest.raises(ValueError, match="neighbours is 0; expected 1 or more"):
        Profile(neighbours=0)
