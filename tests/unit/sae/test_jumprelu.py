from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from saetrack.sae import JumpReLUSAE


def activations(n: int = 60, seed: int = 0) -> Tensor:
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))
    return x * 8**0.5 / x.norm(dim=1).mean()


def started(**arguments: float) -> JumpReLUSAE:
    sae = JumpReLUSAE(8, 4, **{"l0_coefficient": 0.02, "bandwidth": 0.2, **arguments})
    sae.initialise(activations(), torch.Generator().manual_seed(1))
    with torch.no_grad():
        sae.threshold.copy_(torch.linspace(0.0, 0.4, 32))
    return sae


def test_thresholds_get_the_papers_estimate_of_their_gradient() -> None:
    sae, x = started(), activations(seed=2)
    pre = sae.preactivations(x).detach()
    latents = sae.activate(pre).requires_grad_()
    mse = (x - sae.decode(latents)).square().mean()
    (by_latent,) = torch.autograd.grad(mse, latents)
    expected = np.zeros(32)
    for n in range(60):
        for i in range(32):
            t = sae.threshold[i].item()
            if abs(pre[n, i].item() - t) < 0.2 / 2:
                expected[i] -= by_latent[n, i].item() * t / 0.2 + 0.02 / 60 / 0.2
    sae.loss(x).loss.backward()
    assert sae.threshold.grad is not None
    assert (expected != 0).all()
    np.testing.assert_allclose(sae.threshold.grad, expected, rtol=1e-4, atol=1e-6)


def test_other_parameters_get_the_gradient_of_the_error_at_fixed_latents() -> None:
    sae, x = started(), activations(seed=2)
    sae.loss(x).loss.backward()
    straight = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad()
    pre = sae.preactivations(x)
    (x - sae.decode(pre * (pre > sae.threshold).detach())).square().mean().backward()
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(straight[name], sae.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


def test_thresholds_start_at_the_bandwidth_and_never_fall_below_zero() -> None:
    sae = JumpReLUSAE(8, 4, bandwidth=0.03)
    sae.initialise(activations(), torch.Generator().manual_seed(1))
    assert torch.equal(sae.threshold.detach(), torch.full((32,), 0.03))
    with torch.no_grad():
        sae.threshold[:5] = -0.5
        sae.W_dec.mul_(3.0)
    sae.after_step_()
    assert sae.threshold[:5].tolist() == [0.0] * 5
    assert (sae.threshold[5:] == 0.03).all()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))


def test_a_threshold_at_zero_still_learns() -> None:
    sae = started()
    with torch.no_grad():
        sae.threshold.zero_()
    sae.loss(activations(seed=2)).loss.backward()
    assert sae.threshold.grad is not None
    assert (sae.threshold.grad < 0).all()  # the L0 penalty lifts it


def test_a_larger_coefficient_gives_fewer_active_latents() -> None:
    l0 = []
    for coefficient in (0.0, 3e-3, 3e-2):
        sae = started(l0_coefficient=coefficient)
        optimizer = torch.optim.Adam(sae.parameters(), lr=5e-3)
        for step in range(200):
            optimizer.zero_grad()
            sae.loss(activations(128, seed=step)).loss.backward()
            optimizer.step()
            sae.after_step_()
        l0.append(sae.loss(activations(512, seed=1000)).l0.item())
    assert l0[0] > 1.2 * l0[1] > 1.2**2 * l0[2] > 0


def test_the_state_is_the_trained_threshold_and_a_negative_one_is_refused() -> None:
    sae, twin = started(), JumpReLUSAE(8, 4)
    twin.load_state_dict(sae.state_dict())
    assert torch.equal(twin.threshold, sae.threshold)
    holder, state = torch.nn.ModuleList([twin]), {f"0.{k}": v.clone() for k, v in sae.state_dict().items()}
    state["0.threshold"][3] = -1e-3
    with pytest.raises(ValueError, match="1 of 32 thresholds to be loaded into the JumpReLUSAE are negative or NaN"):
        holder.load_state_dict(state)
    assert torch.equal(twin.threshold, sae.threshold)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JumpReLUSAE(8, bandwidth=0.0), "sae.bandwidth must be a finite number above 0, but is 0.0"),
        (lambda: JumpReLUSAE(8, bandwidth=float("inf")), "sae.bandwidth must be .* but is inf"),
        (lambda: JumpReLUSAE(8, l0_coefficient=-1e-3), "sae.l0_coefficient must be .* at least 0, but is -0.001"),
    ],
)
def test_bad_input_says_what_was_wrong(make: Callable[[], JumpReLUSAE], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
