"""Each class beside SAELens's training class of the same kind: equal weights, latents, reconstruction, gradients.

SAELens sums the squared error over d_in where these classes divide by d_in (Standard, JumpReLU, Gated) or by the
batch's variance (BatchTopK, Matryoshka), so each term is compared after that factor; in float64, for some are
differences.
``rescale_acts_by_decoder_norm`` is off there, and decoder rows have norm 1 where SAELens weighs a penalty by it.
"""

import warnings
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from saetrack.sae import SAE, BatchTopKSAE, GatedSAE, JumpReLUSAE, MatryoshkaSAE, StandardSAE

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its imports (transformer_lens, ...) warn of deprecations of their own
    from sae_lens.saes import batchtopk_sae, gated_sae, jumprelu_sae, matryoshka_batchtopk_sae, standard_sae
    from sae_lens.saes.sae import TrainStepInput

D, LATENTS, N = 16, 64, 48
PREFIXES = [8, 24, 64]
S = TypeVar("S", bound=SAE)


def activations(seed: int) -> Tensor:
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(seed)) + 0.5
    return (x * D**0.5 / x.norm(dim=1).mean()).double()


def started(sae: S) -> S:
    generator = torch.Generator().manual_seed(1)
    sae.initialise(activations(0), generator)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name != "W_dec":
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.abs() if name == "threshold" else noise)
    return sae.double()


def lens_of(sae: SAE) -> Any:
    """SAELens's training class with the SAE's weights."""
    common: dict[str, Any] = {"d_in": D, "d_sae": LATENTS, "dtype": "float64", "normalize_activations": "none"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(sae, JumpReLUSAE):
            config = jumprelu_sae.JumpReLUTrainingSAEConfig(jumprelu_bandwidth=sae.bandwidth, **common)
            lens: Any = jumprelu_sae.JumpReLUTrainingSAE(config)
        elif isinstance(sae, StandardSAE):
            lens = standard_sae.StandardTrainingSAE(standard_sae.StandardTrainingSAEConfig(**common))
        elif isinstance(sae, GatedSAE):
            lens = gated_sae.GatedTrainingSAE(gated_sae.GatedTrainingSAEConfig(**common))
        else:
            assert isinstance(sae, (BatchTopKSAE, MatryoshkaSAE))
            common |= {"k": sae.k, "rescale_acts_by_decoder_norm": False, "aux_loss_coefficient": 1.0}
            if isinstance(sae, MatryoshkaSAE):
                nested = matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAEConfig(
                    matryoshka_widths=list(sae.prefixes), **common
                )
                lens = matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAE(nested)
            else:
                lens = batchtopk_sae.BatchTopKTrainingSAE(batchtopk_sae.BatchTopKTrainingSAEConfig(**common))
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            lens.get_parameter(name).copy_(parameter)
    return lens


def lens_step(lens: Any, x: Tensor, dead: Tensor | None = None) -> Any:
    return lens.training_forward_pass(TrainStepInput(x, {"l0": 1.0, "l1": 1.0}, dead, 0, False))


def gradients(loss: Tensor, module: Any, names: list[str]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, [module.get_parameter(n) for n in names], retain_graph=True, allow_unused=True)
    zeros = (torch.zeros_like(module.get_parameter(n)) for n in names)
    return {n: zero if g is None else g for n, g, zero in zip(names, found, zeros, strict=True)}


def agree(ours: dict[str, Tensor], theirs: dict[str, Tensor], factor: float) -> None:
    """To 1e-5 of the gradient's size; it is not zero everywhere."""
    assert any(g.any() for g in theirs.values())
    for name, gradient in theirs.items():
        wanted = gradient * factor
        atol = 1e-5 * max(wanted.abs().max().item(), 1e-6)
        torch.testing.assert_close(ours[name].to(wanted), wanted, rtol=1e-5, atol=atol)


@pytest.mark.parametrize(
    "sae", [BatchTopKSAE(D, 4, k=5), MatryoshkaSAE(D, 4, k=5, prefixes=PREFIXES)], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("n_dead", [3, 20], ids=["fewer dead than aux_k", "more dead"])
def test_batch_selection(sae: BatchTopKSAE | MatryoshkaSAE, n_dead: int) -> None:
    started(sae)
    lens, x = lens_of(sae), activations(5)
    dead = torch.arange(LATENTS) < n_dead
    ours, theirs = sae.loss(x, dead), lens_step(lens, x, dead)
    latents = sae.activate_batch(sae.preactivations(x))
    torch.testing.assert_close(latents, theirs.feature_acts.to_dense(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.x_hat, theirs.sae_out, rtol=1e-5, atol=1e-5)
    assert ours.smallest_kept is not None
    torch.testing.assert_close(lens.cfg.topk_threshold_lr * ours.smallest_kept, lens.topk_threshold)

    names = [name for name, _ in sae.named_parameters()]
    factor = N / (x - x.mean(0)).square().sum().item()  # sum over d_in, mean over the batch -> share of the variance
    error = x - ours.x_hat
    factor_auxk = N / (error - error.mean(0)).square().sum().item()
    auxk = theirs.losses.pop("auxiliary_reconstruction_loss")
    assert ours.terms["auxk"].item() == pytest.approx(auxk.item() * factor_auxk, rel=1e-5)
    assert ours.terms["mse"].item() == pytest.approx(theirs.losses["mse_loss"].item() * factor, rel=1e-5)
    without = sae.loss(x).loss  # no dead latent: only the reconstruction errors
    agree(gradients(without, sae, names), gradients(sum(theirs.losses.values()), lens, names), factor)
    agree(
        gradients((ours.loss - without) / sae.aux_coefficient, sae, names),
        gradients(auxk, lens, names),
        factor_auxk,
    )
    assert len(theirs.losses) == (3 if isinstance(sae, MatryoshkaSAE) else 1)


def test_standard() -> None:
    sae, free = started(StandardSAE(D, 4, l1_coefficient=0.5)), StandardSAE(D, 4, l1_coefficient=0.0).double()
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2.0, LATENTS)[:, None])  # the penalty is weighted by the norms in both
    free.load_state_dict(sae.state_dict())
    lens, x = lens_of(sae), activations(5)
    ours, theirs = sae.loss(x), lens_step(lens, x)
    torch.testing.assert_close(sae.encode(x), theirs.feature_acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.x_hat, theirs.sae_out, rtol=1e-5, atol=1e-5)
    assert ours.terms["sparsity"].item() == pytest.approx(theirs.losses["l1_loss"].item() / D**0.5, rel=1e-5)
    names = [name for name, _ in sae.named_parameters()]
    error = gradients(free.loss(x).loss, free, names)
    agree(error, gradients(theirs.losses["mse_loss"], lens, names), 1 / D)
    both = gradients(ours.loss, sae, names)
    penalty = {name: (both[name] - error[name]) / 0.5 for name in names}
    agree(penalty, gradients(theirs.losses["l1_loss"], lens, names), 1 / D**0.5)


each_step = pytest.mark.parametrize("few", [0.0, 1.0], ids=["dense step", "sparse step"])


@each_step
def test_jumprelu(few: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saetrack.sae.select._FEW", few)
    sae = started(JumpReLUSAE(D, 4, l0_coefficient=0.5, bandwidth=0.2))
    free = JumpReLUSAE(D, 4, l0_coefficient=0.0, bandwidth=0.2).double()
    free.load_state_dict(sae.state_dict())
    lens, x = lens_of(sae), activations(5)
    ours, theirs = sae.loss(x), lens_step(lens, x)
    torch.testing.assert_close(sae.encode(x), theirs.feature_acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.x_hat, theirs.sae_out, rtol=1e-5, atol=1e-5)
    assert ours.l0.item() == pytest.approx(theirs.losses["l0_loss"].item(), rel=1e-5)
    names = [name for name, _ in sae.named_parameters()]
    assert "threshold" in names
    error = gradients(free.loss(x).loss, free, names)
    agree(error, gradients(theirs.losses["mse_loss"], lens, names), 1 / D)
    both = gradients(ours.loss, sae, names)
    penalty = {name: (both[name] - error[name]) / 0.5 for name in names}
    agree({"threshold": penalty["threshold"]}, gradients(theirs.losses["l0_loss"], lens, ["threshold"]), 1.0)
    assert not any(penalty[name].any() for name in names if name != "threshold")


@each_step
def test_gated(few: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saetrack.sae.select._FEW", few)
    sae, free = started(GatedSAE(D, 4, l1_coefficient=0.5)), GatedSAE(D, 4, l1_coefficient=0.0).double()
    free.load_state_dict(sae.state_dict())
    lens, x = lens_of(sae), activations(5)
    ours, theirs = sae.loss(x), lens_step(lens, x)
    torch.testing.assert_close(sae.encode(x), theirs.feature_acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.x_hat, theirs.sae_out, rtol=1e-5, atol=1e-5)
    assert ours.terms["mse"].item() == pytest.approx(theirs.losses["mse_loss"].item() / D, rel=1e-5)
    gate = theirs.losses["auxiliary_reconstruction_loss"]
    assert ours.terms["gate_mse"].item() == pytest.approx(gate.item() / D, rel=1e-5)
    assert ours.terms["sparsity"].item() == pytest.approx(theirs.losses["l1_loss"].item() / D**0.5, rel=1e-5)
    # SAELens lets the gate's reconstruction and its penalty move the decoder, which the paper holds fixed in them; so
    # the decoder is compared in the error of x_hat alone, and the encoder in everything
    names = ["W_enc", "b_gate", "b_mag", "r_mag"]
    agree(gradients(free.loss(x).loss, free, names), gradients(theirs.losses["mse_loss"] + gate, lens, names), 1 / D)
    agree(
        {
            n: (g - gradients(free.loss(x).loss, free, [n])[n]) / 0.5
            for n, g in gradients(ours.loss, sae, names).items()
        },
        gradients(theirs.losses["l1_loss"], lens, names),
        1 / D**0.5,
    )
    agree(gradients(ours.loss, sae, ["W_dec"]), gradients(theirs.losses["mse_loss"], lens, ["W_dec"]), 1 / D)
