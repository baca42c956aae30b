from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from saetrack.sae import (
    SAE,
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    SAETrackSAE,
    StandardSAE,
    TopKSAE,
)
from saetrack.training.warm_start import Calibration, orthogonal_map, recentre, transport

D = 12

MAKE: list[Callable[[], SAE]] = [
    lambda: TopKSAE(D, 4, k=5),
    lambda: StandardSAE(D, 4),
    lambda: SAETrackSAE(D, 4),
    lambda: BatchTopKSAE(D, 4, k=5),
    lambda: MatryoshkaSAE(D, 4, k=5),
    lambda: JumpReLUSAE(D, 4),
    lambda: GatedSAE(D, 4),
]
each_class = pytest.mark.parametrize("make", MAKE, ids=lambda make: type(make()).__name__)


def activations(seed: int, n: int = 500) -> Tensor:
    """Anisotropic and off centre, as an LLM's are."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=g)
    return (torch.randn(n, D, generator=g) @ mix + 5 * torch.randn(D, generator=g)).float()


def a_rotation(seed: int) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return q


def started(sae: SAE, x: Tensor) -> SAE:
    g = torch.Generator().manual_seed(7)
    sae.initialise(x, g)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name not in ("W_enc", "W_dec", "b_dec"):
                noise = 0.1 * torch.randn(parameter.shape, generator=g)
                parameter.add_(noise.abs() if name == "threshold" else noise)
    return sae


def test_calibration_leaves_outliers_out() -> None:
    x = activations(0)
    sinks = torch.cat([x, 1000 * x[:20]])
    got, expected = Calibration.measure(sinks, 10 * x.norm(dim=1).max().item()), Calibration.measure(x)
    assert torch.equal(got.mean, expected.mean)
    assert torch.equal(got.covariance, expected.covariance)
    assert got.scale == expected.scale
    assert Calibration.measure(sinks).scale < 0.1 * expected.scale


def test_calibration_matches_numpy() -> None:
    x = activations(0)
    got = Calibration.measure(x)
    by_hand = x.numpy().astype(np.float64)
    np.testing.assert_allclose(got.mean, by_hand.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(got.covariance, np.cov(by_hand.T, bias=True), rtol=1e-9, atol=1e-9)
    assert got.scale == pytest.approx(np.sqrt(D) / np.mean([np.linalg.norm(row) for row in by_hand]), rel=1e-9)
    assert (x * got.scale).norm(dim=1).mean().item() == pytest.approx(D**0.5, rel=1e-5)


def test_activations_that_are_all_zero_have_no_scale() -> None:
    with pytest.raises(ValueError, match="All 7 calibration activations are zero"):
        Calibration.measure(torch.zeros(7, D))


@pytest.mark.parametrize("noise", [0.0, 0.05], ids=["exact", "noisy"])
def test_a_planted_rotation_is_found_whatever_the_means(noise: float) -> None:
    x, planted = activations(0).double(), a_rotation(1)
    after = x @ planted + 30 * torch.randn(D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    after += noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    got = orthogonal_map(x.float(), after.float())
    assert got.dtype == torch.float64
    torch.testing.assert_close(got @ got.T, torch.eye(D, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(got, planted, rtol=0, atol=1e-4 if noise == 0 else 0.05)


def test_no_other_rotation_fits_better() -> None:
    before, after = activations(0).double(), activations(4).double()
    before, after = before - before.mean(0), after - after.mean(0)
    best = orthogonal_map(before, after)
    least = (before @ best - after).norm()
    for seed in range(20):
        assert (before @ a_rotation(seed) - after).norm() > least
        skew = torch.randn(D, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        near = best @ torch.linalg.matrix_exp(1e-3 * (skew - skew.T))
        assert (before @ near - after).norm() > least


def test_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"before have shape \(5, 4\) and after \(5, 6\)"):
        orthogonal_map(torch.zeros(5, 4), torch.zeros(5, 6))


@each_class
def test_a_transported_sae_does_to_turned_activations_what_it_did_before(make: Callable[[], SAE]) -> None:
    """After x -> (x - mean) R + another mean: equal latents, and a reconstruction turned like x."""
    x = activations(0) * 3
    before = Calibration.measure(x)
    sae = started(make(), x * before.scale)
    planted = a_rotation(1)
    moved = (x - x.mean(0)) @ planted.float() + 2 * torch.randn(D, generator=torch.Generator().manual_seed(5))
    after = Calibration.measure(moved)
    # the two scales differ, and what the SAE sees is scaled activations
    turned = (x * before.scale - before.scale * x.mean(0)) @ planted.float() + after.scale * moved.mean(0)
    with torch.no_grad():
        latents, x_hat = sae.encode(x * before.scale), sae(x * before.scale)
        transport(sae, planted, before, after)
        torch.testing.assert_close(sae.encode(turned), latents, rtol=1e-4, atol=1e-4)
        expected = (x_hat - before.scale * x.mean(0)) @ planted.float() + after.scale * moved.mean(0)
        torch.testing.assert_close(sae(turned), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.d_sae), rtol=1e-5, atol=1e-5)


def test_the_map_found_and_the_transport_agree_on_their_direction() -> None:
    """End to end: with the estimated map, the FVU on turned activations is what it was."""
    x = activations(0)
    moved = (x.double() @ a_rotation(1)).float() + 10
    before, after = Calibration.measure(x), Calibration.measure(moved)
    sae = started(TopKSAE(D, 4, k=5), x * before.scale)

    def fvu(units: Tensor) -> float:
        with torch.no_grad():
            return ((units - sae(units)).square().sum() / (units - units.mean(0)).square().sum()).item()

    was = fvu(x * before.scale)
    transport(sae, orthogonal_map(x, moved), before, after)
    # compared at the old scale, for a change of scale is not a rotation
    same_scale = (moved - moved.mean(0)) * before.scale + after.scale * moved.mean(0)
    assert fvu(same_scale) == pytest.approx(was, rel=1e-3)


def test_recentre_moves_only_b_dec_by_the_scaled_means() -> None:
    x, y = activations(0), activations(1)
    before, after = Calibration.measure(x), Calibration.measure(y)
    sae = started(TopKSAE(D, 4, k=5), x * before.scale)
    was = {name: value.clone() for name, value in sae.state_dict().items()}
    recentre(sae, before, after)
    shift = (y * after.scale).double().mean(0) - (x * before.scale).double().mean(0)
    torch.testing.assert_close(sae.b_dec.detach(), was["b_dec"] + shift.float(), rtol=1e-4, atol=1e-5)
    for name in ("W_enc", "W_dec", "b_enc"):
        assert torch.equal(sae.state_dict()[name], was[name])


@each_class
def test_recentre_keeps_the_latents_when_only_the_mean_moved(make: Callable[[], SAE]) -> None:
    x = activations(0)
    before = Calibration.measure(x)
    sae = started(make(), x * before.scale)
    after = Calibration(before.mean + 3.0, before.covariance, before.scale)
    with torch.no_grad():
        latents = sae.encode(x * before.scale)
        recentre(sae, before, after)
        torch.testing.assert_close(sae.encode((x + 3.0) * before.scale), latents, rtol=1e-4, atol=1e-4)
