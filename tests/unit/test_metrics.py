import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import scipy.stats
import torch
from torch import Tensor

from saetrack.metrics import (
    FVU,
    CELossRecovered,
    ExplainedVariance,
    FiringStatistics,
    FunctionalCorrelation,
    Latents,
    ce_loss_recovered,
    dead_share,
    dense_share,
    explained_variance,
    firing_frequency,
    fraction_variance_unexplained,
    functional_correlation,
    l0,
)


def fvu_by_hand(x: np.ndarray, x_hat: np.ndarray) -> float:
    """One activation at a time; no vectorised algebra to share a bug with."""
    mean = sum(x) / len(x)
    missed = sum(float(np.dot(a - b, a - b)) for a, b in zip(x, x_hat, strict=True))
    return missed / sum(float(np.dot(a - mean, a - mean)) for a in x)


def reconstructions(offset: float, n: int = 64) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(offset, 1.0, size=(n, 8)).astype(np.float32)
    return x, x + rng.normal(0.2, 0.5, size=x.shape).astype(np.float32)


def sparse_latents(seed: int, n: int = 60, d_sae: int = 12, density: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(n, d_sae, generator=generator) + 0.1
    return values * (torch.rand(n, d_sae, generator=generator) < density)


Form = Callable[[Tensor], Latents]
either_form = pytest.mark.parametrize(
    "form", [lambda t: t, lambda t: scipy.sparse.csr_array(t.numpy())], ids=["dense", "csr"]
)
offsets = pytest.mark.parametrize("offset", [0.0, 1e4], ids=["centred", "far from zero"])


@offsets
def test_fvu_matches_the_definition(offset: float) -> None:
    x, x_hat = reconstructions(offset)
    expected = fvu_by_hand(x.astype(np.float64), x_hat.astype(np.float64))
    got = fraction_variance_unexplained(torch.from_numpy(x), torch.from_numpy(x_hat))
    assert got.item() == pytest.approx(expected, rel=1e-9)
    metric = FVU(8)
    for part in np.array_split(np.arange(64), 5):
        metric.update(torch.from_numpy(x[part]), torch.from_numpy(x_hat[part]))
    assert metric.compute().dtype == torch.float64
    assert metric.compute().item() == pytest.approx(expected, rel=1e-6)


@offsets
def test_explained_variance_matches_numpy_and_ignores_an_offset(offset: float) -> None:
    x, x_hat = reconstructions(offset)
    X, E = x.astype(np.float64), x.astype(np.float64) - x_hat
    expected = 1 - sum(np.var(E, axis=0)) / sum(np.var(X, axis=0))
    got = explained_variance(torch.from_numpy(x), torch.from_numpy(x_hat))
    assert got.item() == pytest.approx(expected, rel=1e-9)
    assert got > 1 - fraction_variance_unexplained(torch.from_numpy(x), torch.from_numpy(x_hat))
    metric = ExplainedVariance(8)
    for part in np.array_split(np.arange(64), 5):
        metric.update(torch.from_numpy(x[part]), torch.from_numpy(x_hat[part]) + 2)
    assert metric.compute().item() == pytest.approx(expected, rel=1e-3 if offset else 1e-6)  # + 2 rounds far from zero


def test_closed_forms_of_reconstruction() -> None:
    x, _ = (torch.from_numpy(v) for v in reconstructions(3.0))
    assert fraction_variance_unexplained(x, x).item() == 0
    assert fraction_variance_unexplained(x.double(), 2 * x.double().mean(0) - x).item() == pytest.approx(4)
    assert explained_variance(x, x * 0).item() == pytest.approx(0)
    # Shrinking towards the mean by s leaves s^2 of the variance.
    shrunk = x.double() + 0.3 * (x.double().mean(0) - x)
    assert fraction_variance_unexplained(x.double(), shrunk).item() == pytest.approx(0.09)


@either_form
def test_firing_statistics_match_a_count_by_hand(form: Form) -> None:
    latents = sparse_latents(0)
    latents[:, 3] = 0.0
    latents[:, 4] = 0.5
    metric = FiringStatistics(12)
    for part in latents.split([1, 40, 0, 19]):
        metric.update(form(part))
    got = metric.compute()
    columns = [[float(v) for v in column if v > 0] for column in latents.T.tolist()]
    np.testing.assert_allclose(got["firing_frequency"], [len(c) / 60 for c in columns], rtol=1e-12)
    np.testing.assert_allclose(got["mean_activation"], [sum(c) / len(c) if c else 0 for c in columns], rtol=1e-12)
    np.testing.assert_allclose(got["max_activation"], [max(c, default=0) for c in columns], rtol=1e-12)
    assert got["l0"].item() == pytest.approx(sum(len(c) for c in columns) / 60)
    assert got["tokens"].item() == 60
    assert got["tokens"].dtype == torch.int64
    np.testing.assert_allclose(firing_frequency(latents), got["firing_frequency"])
    assert l0(latents).item() == pytest.approx(got["l0"].item())
    metric.reset()
    metric.update(form(latents[:10]))
    assert metric.compute()["tokens"].item() == 10
    assert got["tokens"].item() == 60


def test_dead_and_dense_shares_count_their_borders() -> None:
    frequency = torch.tensor([0.0, 0.1, 0.1001, 1.0, 1e-9], dtype=torch.float64)
    assert dead_share(frequency).item() == pytest.approx(1 / 5)
    assert dense_share(frequency).item() == pytest.approx(2 / 5)
    assert dense_share(frequency, threshold=0.5).item() == pytest.approx(1 / 5)


@either_form
def test_functional_correlation_matches_scipy(form: Form) -> None:
    a = sparse_latents(1)
    b = torch.where(torch.rand(a.shape, generator=torch.Generator().manual_seed(9)) < 0.7, a, sparse_latents(2))
    metric = FunctionalCorrelation(12)
    for part_a, part_b in zip(a.split([1, 40, 0, 19]), b.split([1, 40, 0, 19]), strict=True):
        metric.update(form(part_a), form(part_b))
    expected = [scipy.stats.pearsonr(a[:, i].double(), b[:, i].double())[0] for i in range(12)]
    np.testing.assert_allclose(metric.compute(), expected, rtol=1e-9)
    np.testing.assert_allclose(functional_correlation(form(a), form(b)), expected, rtol=1e-9)


@either_form
def test_functional_correlation_of_constants_is_nan_and_of_copies_one(form: Form) -> None:
    a = sparse_latents(1, n=1000)
    b = 3 * a
    a[:, 0] = 0.0
    b[:, 1] = 0.1  # its float64 sums do not cancel exactly
    a[:, 2] = b[:, 2] = 0.0
    a[7, 2] = b[7, 2] = 1e-4  # fires once
    got = functional_correlation(form(a), form(b))
    assert got.isnan().tolist() == [True, True] + [False] * 10
    np.testing.assert_allclose(got[2:], 1.0, rtol=1e-12)


def test_ce_loss_recovered_closed_forms() -> None:
    clean, ablated = torch.tensor(2.0), torch.tensor(6.0)
    assert ce_loss_recovered(clean, clean, ablated).item() == 1
    assert ce_loss_recovered(clean, ablated, ablated).item() == 0
    assert ce_loss_recovered(clean, torch.tensor(7.0), ablated).item() == pytest.approx(-0.25)
    assert ce_loss_recovered(clean, clean, clean).isnan()
    assert ce_loss_recovered(ablated, clean, clean).isnan()  # the ablation helps: an untrained LLM


def test_ce_loss_recovered_weights_batches_by_their_tokens() -> None:
    metric = CELossRecovered()
    metric.update(torch.tensor(20.0), torch.tensor(25.0), torch.tensor(40.0), torch.tensor(30.0), tokens=10)
    metric.update(torch.tensor(70.0), torch.tensor(95.0), torch.tensor(140.0), torch.tensor(110.0), tokens=30)
    got = {name: value.item() for name, value in metric.compute().items()}
    assert got == pytest.approx(
        {
            "ce_clean": 90 / 40,
            "ce_sae": 120 / 40,
            "ce_zero": 180 / 40,
            "ce_mean": 140 / 40,
            "ce_recovered_zero": 60 / 90,
            "ce_recovered_mean": 20 / 50,
        }
    )


def test_bad_input_says_what_was_wrong() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\) but x_hat has \(3, 3\)"):
        fraction_variance_unexplained(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="All 4 activations in x are identical"):
        explained_variance(torch.ones(4, 3), torch.zeros(4, 3))
    constant = FVU(3)
    constant.update(torch.full((7, 3), 0.1), torch.zeros(7, 3))
    with pytest.raises(ValueError, match="All 7 activations are identical"):
        constant.compute()
    with pytest.raises(ValueError, match=r"latents have shape \(2, 3\); expected \[n, 4\]"):
        FiringStatistics(4).update(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"a has shape \(2, 4\) but b has \(3, 4\)"):
        FunctionalCorrelation(4).update(torch.zeros(2, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="in one form"):
        FunctionalCorrelation(4).update(torch.zeros(2, 4), scipy.sparse.csr_array((2, 4)))


@pytest.mark.parametrize(
    "metric", [FVU(2), ExplainedVariance(2), FiringStatistics(2), FunctionalCorrelation(2), CELossRecovered()]
)
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")  # torchmetrics says it as well
def test_a_metric_of_nothing_says_so(metric: FVU) -> None:
    with pytest.raises(ValueError, match="Nothing was added"):
        metric.compute()


TWO_RANKS = """
import sys, torch
import torch.distributed as dist
from saetrack.metrics import FVU, CELossRecovered, ExplainedVariance, FiringStatistics, FunctionalCorrelation

def build(rows, x, latents):
    metrics = [FVU(4), ExplainedVariance(4), FiringStatistics(6), FunctionalCorrelation(6), CELossRecovered()]
    metrics[0].update(x[rows], 0.5 * x[rows])
    metrics[1].update(x[rows], 0.5 * x[rows])
    metrics[2].update(latents[rows])
    metrics[3].update(latents[rows], latents.flip(1)[rows])
    sums = x[rows].double().square().sum(0)
    metrics[4].update(*sums.cumsum(0), tokens=len(x[rows]))
    return metrics

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
generator = torch.Generator().manual_seed(0)
x, latents = torch.randn(30, 4, generator=generator), torch.rand(30, 6, generator=generator).sub(0.5).relu()
shared = build(slice(0, 11) if rank == 0 else slice(11, 30), x, latents)
alone = build(slice(0, 30), x, latents)
for metric in alone:
    metric._to_sync = False
for ours, reference in zip(shared, alone):
    torch.testing.assert_close(ours.compute(), reference.compute(), rtol=1e-12, atol=1e-12)
dist.destroy_process_group()
"""


def test_two_ranks_together_give_the_numbers_of_one(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
