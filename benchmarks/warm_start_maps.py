"""Ways to begin a stage from the SAE of the stage before: those of the package, and those that only were tried.

Each changes an SAE in training units in place, and Adam's moments with it.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saetrack.sae import SAE
from saetrack.training.warm_start import orthogonal_map, recentre, transport

if TYPE_CHECKING:
    from warm_start_series import Place

Moments = dict[str, dict[str, Tensor]]
"""Adam's ``step``, ``exp_avg`` and ``exp_avg_sq`` by parameter; empty where they are not carried."""


def prior(sae: SAE, moments: Moments, before: "Place", now: "Place") -> None:
    """The weights as they are."""


def recentred(sae: SAE, moments: Moments, before: "Place", now: "Place") -> None:
    """``b_dec`` moves by the change of the mean activation."""
    recentre(sae, before.calibration, now.calibration)


def transported(sae: SAE, moments: Moments, before: "Place", now: "Place") -> None:
    """The dictionary turns by one rotation; Adam's first moments with it, the second ones mixed by its squares."""
    rotation = orthogonal_map(before.calibration_rows, now.calibration_rows)
    transport(sae, rotation, before.calibration, now.calibration)
    r = rotation.to(torch.float32)
    for name, state in moments.items():
        for moment, turn in (("exp_avg", r), ("exp_avg_sq", r.square())):
            if name == "W_enc":
                state[moment].copy_(turn.T @ state[moment])
            elif name in ("W_dec", "b_dec"):
                state[moment].copy_(state[moment] @ turn)


@torch.no_grad()
def affine(sae: SAE, moments: Moments, before: "Place", now: "Place") -> None:
    """Least squares in both directions: the decoder goes through that from before to now, the encoder the other.

    The singular values of the map are a scale for each direction. A row's new length goes into its latent, so the rows
    keep unit norm and the reconstruction is the old one carried over.
    """
    a, b, mean_a, mean_b = _centred(before, now)
    forward = _least_squares(a, b)
    _set(sae, _least_squares(b, a), mean_a, mean_b, sae.W_dec @ forward, mean_b + (sae.b_dec - mean_a) @ forward)


@torch.no_grad()
def regressed(sae: SAE, moments: Moments, before: "Place", now: "Place") -> None:
    """Directions that best explain the new activations by the old latents; encoder as in `affine`."""
    a, b, mean_a, mean_b = _centred(before, now)
    rows, b_dec = _regressed_rows(sae, before, now)
    _set(sae, _least_squares(b, a), mean_a, mean_b, rows, b_dec)


@torch.no_grad()
def regressed_rows(sae: SAE, moments: Moments, before: "Place", now: "Place") -> None:
    """The directions of `regressed`, with the encoder of `transported`."""
    rows, b_dec = _regressed_rows(sae, before, now)
    _, _, mean_a, mean_b = _centred(before, now)
    rotation = orthogonal_map(before.calibration_rows, now.calibration_rows)
    _set(sae, rotation.T.float(), mean_a, mean_b, rows, b_dec)


def _regressed_rows(sae: SAE, before: "Place", now: "Place") -> tuple[Tensor, Tensor]:
    """Rows by ridge towards the transported ones, with the weight of 100 firings; and the transported ``b_dec``."""
    a, b, mean_a, mean_b = _centred(before, now)
    z = sae.encode(a + mean_a).double()  # [n, d_sae]
    rotation = orthogonal_map(before.calibration_rows, now.calibration_rows)
    rows = sae.W_dec.double() @ rotation
    b_dec = mean_b.double() + (sae.b_dec - mean_a).double() @ rotation
    missed = b.double() + mean_b.double() - b_dec - z @ rows
    ridge = 100 * z.square().sum() / (z > 0).sum() * torch.eye(sae.d_sae, dtype=torch.float64)
    rows = rows + torch.linalg.solve(z.T @ z + ridge, z.T @ missed)
    return rows.float(), b_dec.float()


MAPS = {
    "prior": prior,
    "recentred": recentred,
    "transported": transported,
    "affine": affine,
    "regressed": regressed,
    "regressed rows": regressed_rows,
}


def _centred(before: "Place", now: "Place") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The calibration activations of both checkpoints in training units, without their means, and the means."""
    x = [place.calibration_rows * place.calibration.scale for place in (before, now)]
    means = [activations.mean(dim=0) for activations in x]
    return x[0] - means[0], x[1] - means[1], means[0], means[1]


def _least_squares(a: Tensor, b: Tensor) -> Tensor:
    """The map ``[d_in, d_in]`` with ``a @ map`` closest to ``b``, with a ridge of a thousandth of the mean variance."""
    a, b = a.double(), b.double()
    gram = a.T @ a
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.solve(gram + ridge, a.T @ b).float()


def _set(sae: SAE, backward: Tensor, mean_a: Tensor, mean_b: Tensor, rows: Tensor, b_dec: Tensor) -> None:
    """Give an SAE new decoder rows and ``b_dec``, and an encoder that reads what new activations say of the old ones.

    The old pre-activations of x = mean_a + (y - mean_b) @ backward, for an encoder that is given y - b_dec; then each
    row's length goes into its latent.
    """
    w_enc = backward @ sae.W_enc
    bias = sae.encoder_bias + (mean_a - sae.b_dec) @ sae.W_enc + (b_dec - mean_b) @ w_enc
    length = rows.norm(dim=1).clamp_min(1e-6)
    sae.W_dec.copy_(rows / length[:, None])
    sae.W_enc.copy_(w_enc * length)
    sae.encoder_bias.copy_(bias * length)
    sae.b_dec.copy_(b_dec)
