"""The starts and forms that only benchmarks/ has do what docs/warm-starts.md says of them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
import warm_start_forms
import warm_start_maps
from torch import Tensor

from saetrack.sae import TopKSAE
from saetrack.training.warm_start import Calibration

D = 12


def place(x: Tensor) -> Any:
    return SimpleNamespace(calibration_rows=x, calibration=Calibration.measure(x))


def an_sae(x: Tensor) -> TopKSAE:
    sae = TopKSAE(D, 4, k=5)
    sae.initialise(x * Calibration.measure(x).scale, torch.Generator().manual_seed(1))
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    return sae


@pytest.fixture
def series() -> tuple[Tensor, Tensor]:
    """Activations of two LLM checkpoints, the second an affine map of the first that stretches every direction."""
    g = torch.Generator().manual_seed(0)
    before = torch.randn(4000, D, generator=g) @ torch.randn(D, D, generator=g) + torch.randn(D, generator=g)
    stretch = torch.linspace(0.5, 2, D)
    turn, _ = torch.linalg.qr(torch.randn(D, D, generator=g))
    return before, (before * stretch) @ turn + 3


@pytest.mark.parametrize("start", ["affine", "regressed"])
def test_an_encoder_reads_what_new_activations_say_of_the_old_ones(series: tuple[Tensor, Tensor], start: str) -> None:
    before, now = (place(x) for x in series)
    sae = an_sae(series[0])
    old = sae.preactivations(series[0] * before.calibration.scale)
    warm_start_maps.MAPS[start](sae, {}, before, now)
    new = sae.preactivations(series[1] * now.calibration.scale)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(sae.d_sae), atol=1e-5)
    ratio = (old * new).sum(dim=0) / old.square().sum(dim=0)  # the length of the row, which went into the latent
    assert (new - old * ratio).square().sum() < 1e-3 * new.square().sum()


def test_the_affine_start_reconstructs_what_it_did_before_carried_over(series: tuple[Tensor, Tensor]) -> None:
    before, now = (place(x) for x in series)
    sae = an_sae(series[0])
    x = series[0][:100] * before.calibration.scale
    z = sae.preactivations(x)  # of all latents: which ones are largest may change with their scale
    old = z @ sae.W_dec + sae.b_dec
    linear = torch.linalg.lstsq(
        torch.cat([series[0] * before.calibration.scale, torch.ones(4000, 1)], dim=1),
        series[1] * now.calibration.scale,
    ).solution
    warm_start_maps.affine(sae, {}, before, now)
    y = series[1][:100] * now.calibration.scale
    new = sae.preactivations(y) @ sae.W_dec + sae.b_dec
    expected = old @ linear[:-1] + linear[-1]
    assert (new - expected).square().sum() < 1e-2 * (expected - expected.mean(dim=0)).square().sum()


def test_the_form_of_the_package_is_the_package_s(series: tuple[Tensor, Tensor]) -> None:
    x = series[0][:64] * Calibration.measure(series[0]).scale
    sae = an_sae(series[0])
    before = sae.sparse_latents(x + 0.3)
    new = torch.arange(sae.d_sae) % 2 == 0
    everywhere, held = sae.loss(x, before=before).moved, sae.loss(x, before=before, new=new).moved
    assert everywhere is not None
    assert held is not None
    assert held < 0.9 * everywhere
    sae.__dict__["_moved"] = warm_start_forms.dead_too(sae, None)
    assert sae.loss(x, before=before, new=new).moved.item() == pytest.approx(everywhere.item(), rel=1e-5)
    # all alike, so that `equal` is the same
    alike = scipy.sparse.csr_array(np.ones((20, sae.d_sae), dtype=np.float32))
    statistics = SimpleNamespace(frequency=torch.ones(sae.d_sae), latents=alike)
    sae.__dict__["_moved"] = warm_start_forms.equal(sae, statistics)
    assert sae.loss(x, before=before, new=new).moved.item() == pytest.approx(held.item(), rel=1e-5)
