"""A TopK step beside sparsify's and dictionary_learning's: equal weights, latents, reconstruction, gradients."""

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("sparsify")

from saetrack.sae import TopKSAE, resolve_precision
from saetrack.sae.native import use_kernels

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
D, LATENTS, K = 32, 256, 8


def started() -> tuple[TopKSAE, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sae, x = TopKSAE(D, LATENTS // D, K, aux_coefficient=1.0, aux_k=D // 2), torch.randn(200, D, generator=generator)
    sae.initialise(x, generator)
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.b_enc, sae.b_dec):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        sae.b_enc.add_(1.0)  # so that k pre-activations are positive: sparsify's ReLU comes before its top-k
    return sae, x


def close(mine: Tensor | None, theirs: Tensor | None) -> None:
    assert mine is not None
    assert theirs is not None
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", ["pytorch", "native"])
def test_sparsify(kernels: Any) -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    sae, x = started()
    peer = SparseCoder(D, SparseCoderConfig(num_latents=LATENTS, k=K), dtype=torch.float32)
    with torch.no_grad():
        peer.encoder.weight.copy_(sae.W_enc.T)
        peer.encoder.bias.copy_(sae.b_enc)
        peer.W_dec.copy_(sae.W_dec)
        peer.b_dec.copy_(sae.b_dec)
    out = peer(x=x, y=x)
    out.fvu.backward()
    use_kernels(kernels)
    try:
        if kernels == "native":
            sae.precision = resolve_precision("auto", x.device)
        mine = sae.loss(x)
        mine.loss.backward()
    finally:
        use_kernels("pytorch")
    close(mine.x_hat, out.sae_out)
    close(sae.encode(x).gather(1, out.latent_indices), out.latent_acts)
    close(mine.loss, out.fvu)
    close(sae.W_enc.grad, peer.encoder.weight.grad.T)
    close(sae.b_enc.grad, peer.encoder.bias.grad)
    close(sae.W_dec.grad, peer.W_dec.grad)
    close(sae.b_dec.grad, peer.b_dec.grad)


def test_dictionary_learning() -> None:
    if "nnsight" not in sys.modules:  # its activation buffer imports this, and is not used here
        stub = types.ModuleType("nnsight")
        stub.LanguageModel = object  # type: ignore[attr-defined]
        sys.modules["nnsight"] = stub
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    sae, x = started()
    peer = AutoEncoderTopK(D, LATENTS, K)
    with torch.no_grad():
        peer.encoder.weight.copy_(sae.W_enc.T)
        peer.encoder.bias.copy_(sae.b_enc)
        peer.decoder.weight.copy_(sae.W_dec.T)
        peer.b_dec.copy_(sae.b_dec)
    latents = peer.encode(x)
    x_hat = peer.decode(latents)
    ((x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum()).backward()
    mine = sae.loss(x)
    mine.loss.backward()
    close(sae.encode(x), latents)
    close(mine.x_hat, x_hat)
    close(sae.W_enc.grad, peer.encoder.weight.grad.T)
    close(sae.W_dec.grad, peer.decoder.weight.grad.T)
    close(sae.b_enc.grad, peer.encoder.bias.grad)
    close(sae.b_dec.grad, peer.b_dec.grad)
