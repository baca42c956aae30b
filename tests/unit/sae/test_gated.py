import pytest
import torch
from torch import Tensor

from saetrack.sae import GatedSAE


def activations(n: int = 60, seed: int = 0) -> Tensor:
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))
    return x * 8**0.5 / x.norm(dim=1).mean()


def started(l1_coefficient: float = 0.08) -> GatedSAE:
    sae = GatedSAE(8, 4, l1_coefficient)
    generator = torch.Generator().manual_seed(1)
    sae.initialise(activations(), generator)
    with torch.no_grad():
        for bias in (sae.b_gate, sae.b_mag, sae.r_mag):
            bias.add_(0.1 * torch.randn(32, generator=generator))
    return sae


def test_a_new_gate_and_its_magnitude_are_equal() -> None:
    sae = started()
    sae.initialise(activations(), torch.Generator().manual_seed(1))
    x = activations(seed=2)
    torch.testing.assert_close(sae.encode(x), sae.preactivations(x).relu())


def test_the_gate_alone_is_penalised_and_its_reconstruction_leaves_the_decoder_alone() -> None:
    x, gradients = activations(seed=2), []
    for coefficient in (0.0, 1.0):
        sae = started(coefficient)
        sae.loss(x).loss.backward()
        gradients.append({name: p.grad for name, p in sae.named_parameters()})
    sae = started()
    (x - sae(x)).square().mean().backward()
    for name in ("W_dec", "b_mag", "r_mag"):
        for found in gradients:
            torch.testing.assert_close(found[name], sae.get_parameter(name).grad)
    assert not torch.allclose(gradients[0]["b_gate"], gradients[1]["b_gate"])
    assert sae.b_gate.grad is not None
    assert gradients[0]["b_gate"].any()  # by the gate's own reconstruction, for the step has no gradient


def test_latents_need_an_open_gate_and_a_positive_magnitude() -> None:
    sae, x = started(), activations(seed=2)
    with torch.no_grad():
        sae.b_gate[:8], sae.b_mag[:8] = -50.0, 5.0
        sae.b_gate[8:16], sae.b_mag[8:16] = 50.0, -50.0
    latents, out = sae.encode(x), sae.loss(x)
    assert not latents[:, :16].any()
    assert not out.fired[:16].any()
    assert latents[:, 16:].any(dim=0).all()


def test_a_larger_coefficient_gives_fewer_active_latents() -> None:
    l0 = []
    for coefficient in (0.0, 0.1, 0.5):
        sae = started(coefficient)
        optimizer = torch.optim.Adam(sae.parameters(), lr=5e-3)
        for step in range(200):
            optimizer.zero_grad()
            sae.loss(activations(128, seed=step)).loss.backward()
            optimizer.step()
            sae.after_step_()
        l0.append(sae.loss(activations(512, seed=1000)).l0.item())
    assert l0[0] > 1.2 * l0[1] > 1.2**2 * l0[2] > 0


def test_a_negative_coefficient_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sae.l1_coefficient must be .* at least 0, but is -1.0"):
        GatedSAE(8, l1_coefficient=-1.0)
