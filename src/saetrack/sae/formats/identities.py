"""Changes of an SAE's weights that leave what it computes as it was.

They lead from one library's conventions to another's. Products run in float64 and are rounded once.
"""

from typing import TypeVar

import torch
from torch import Tensor

from saetrack.sae.base import SAE
from saetrack.sae.gated import GatedSAE

S = TypeVar("S", bound=SAE)


@torch.no_grad()
def read_centred_(sae: S) -> S:
    """Make weights that were meant for ``x W_enc + b_enc`` give the same from ``(x - b_dec) W_enc + b_enc``.

    ``b_enc += b_dec W_enc``; in a gated SAE ``b_gate`` and, with ``exp(r_mag)``, ``b_mag``. In place.
    """
    _shift_(sae, sae.b_dec.double() @ sae.W_enc.double())
    return sae


@torch.no_grad()
def read_uncentred_(sae: S) -> S:
    """Make an SAE of ours give the same without taking ``b_dec`` from its input; undoes :func:`read_centred_`."""
    _shift_(sae, -(sae.b_dec.double() @ sae.W_enc.double()))
    return sae


@torch.no_grad()
def fold_decoder_norms_(sae: S) -> S:
    """Give every decoder row unit norm and its latent the row's norm n: ``W_enc n``, ``b_enc n``, ``W_dec / n``.

    The reconstruction stays. Latents become n times as large and thresholds with them, so which latents a threshold
    or ReLU lets through stays too; top-k chooses as if it had compared latents times n. A row of zeros stays one, and
    its latent becomes 0. In place.
    """
    norms = torch.linalg.vector_norm(sae.W_dec.double(), dim=1)  # [d_sae]
    sae.W_enc.copy_(sae.W_enc.double() * norms)
    sae.W_dec.copy_(sae.W_dec.double() / norms.clamp_min(torch.finfo(norms.dtype).tiny)[:, None])
    for name in ("b_enc", "b_gate", "b_mag", "threshold"):
        values = getattr(sae, name, None)
        if isinstance(values, Tensor):
            values.copy_(values.double() * norms)
    return sae


def _shift_(sae: SAE, shift: Tensor) -> None:
    sae.encoder_bias.copy_(sae.encoder_bias.double() + shift)
    if isinstance(sae, GatedSAE):
        sae.b_mag.copy_(sae.b_mag.double() + shift * sae.r_mag.double().exp())
