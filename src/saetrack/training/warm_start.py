"""How a stage's SAE begins: what is done to the SAE of the stage before when the LLM checkpoint changes.

All of it happens in training units, in which the activations of every LLM checkpoint have mean norm
sqrt(d_in).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saetrack.lm.outliers import take, within, within_all
from saetrack.sae import SAE
from saetrack.track import Snapshot

WarmStart = Literal["prior", "recentred", "transported", "scratch"]

_ERROR_ROWS = 1024  # of these an error is taken, which only has to say how large errors are


@dataclass(frozen=True)
class Calibration:
    """What is known of one LLM checkpoint's activations at one hookpoint, in the LLM's own units.

    Args:
        mean: ``[d_in]``, float64.
        covariance: ``[d_in, d_in]``, float64.
        scale: Factor that brings the mean norm to sqrt(d_in).
        norm_limit: Norm over which activations are outliers and left out everywhere, here too.
    """

    mean: Tensor
    covariance: Tensor
    scale: float
    norm_limit: float = math.inf

    @classmethod
    def measure(cls, x: Tensor, norm_limit: float = math.inf) -> Calibration:
        """Measure the activations ``x`` ``[n, d_in]`` of a norm up to ``norm_limit``.

        Raises:
            ValueError: If all of them are zero.
        """
        x = take(x, within(x, norm_limit)).to(torch.float64, copy=True)
        norm = x.norm(dim=1).mean().item()
        if norm == 0:
            raise ValueError(f"All {len(x)} calibration activations are zero, so they have no scale.")
        mean = x.mean(dim=0)
        centred = x.sub_(mean)  # in place: in float64 a copy of these is larger than many an LLM
        return cls(mean.cpu(), (centred.T @ centred / len(x)).cpu(), x.shape[1] ** 0.5 / norm, norm_limit)

    @classmethod
    def of(cls, snapshot: Snapshot) -> Calibration:
        """What a snapshot keeps of its LLM checkpoint's activations."""
        mean, covariance = (snapshot.statistics(name).double() for name in ("mean", "covariance"))
        return cls(mean, covariance, snapshot.statistics("scale").item(), snapshot.norm_limit)


@torch.no_grad()
def own_error(sae: SAE, calibration: Calibration, activations: Tensor) -> float:
    """Reconstruction error that an SAE has on its own LLM checkpoint, as the loss of its class counts it.

    Args:
        sae: The SAE, in the LLM's own units.
        calibration: What is known of that LLM checkpoint.
        activations: Some of its activations, in its own units, ``[n, d_in]``.
    """
    x = take(activations, within(activations, calibration.norm_limit)) * calibration.scale
    trained = sae.folded(1 / calibration.scale).to(x.device)
    terms = trained.loss(x[:: max(1, len(x) // _ERROR_ROWS)]).terms
    # Matryoshka's prefixes reconstruct too; what Gated's gate does is an auxiliary loss, as AuxK is
    return sum(float(terms[name]) for name in ("mse", "prefix_mse") if name in terms)


def in_both(before: Tensor, now: Tensor, last: Calibration, calibration: Calibration) -> tuple[Tensor, Tensor]:
    """The activations at the positions that are no outliers at either LLM checkpoint."""
    mask = within_all(within(before, last.norm_limit), within(now, calibration.norm_limit))
    return take(before, mask), take(now, mask)


def orthogonal_map(before: Tensor, after: Tensor) -> Tensor:
    """The rotation that best carries one LLM checkpoint's activations onto another's.

    Orthogonal Procrustes: with centred A and B, R = U V^T where U S V^T is the singular value decomposition of
    A^T B; it minimises ||A R - B||_F (Schoenemann 1966).

    Args:
        before: ``[n, d_in]``, activations of the earlier checkpoint.
        after: ``[n, d_in]``, activations of the later one at the same tokens.

    Returns:
        Orthogonal ``[d_in, d_in]``, float64: ``(before - mean) @ R`` is closest to ``after - mean``.

    Raises:
        ValueError: If the shapes differ, as when two LLM checkpoints have different widths.

    Example:
        >>> turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
        >>> torch.allclose(orthogonal_map(x, x @ turn), turn.double())
        True
    """
    if before.shape != after.shape:
        raise ValueError(
            f"The activations before have shape {tuple(before.shape)} and after {tuple(after.shape)}; "
            "they must be of the same tokens and width."
        )
    a, b = (x.to(torch.float64, copy=True) for x in (before, after))
    a -= a.mean(dim=0)
    b -= b.mean(dim=0)
    u, _, vt = torch.linalg.svd((a.T @ b).cpu())
    rotation: Tensor = u @ vt
    return rotation


@torch.no_grad()
def recentre(sae: SAE, before: Calibration, after: Calibration) -> None:
    """Move ``b_dec`` by the change of the mean activation."""
    shift = after.scale * after.mean - before.scale * before.mean
    sae.b_dec.add_(shift.to(sae.b_dec))


@torch.no_grad()
def transport(sae: SAE, rotation: Tensor, before: Calibration, after: Calibration) -> None:
    """Move the whole dictionary by a rotation of the activations about their means.

    The SAE then does to ``(x - mean_before) @ rotation + mean_after`` what it did to ``x``: equal latents.

    Args:
        sae: Changed in place.
        rotation: Orthogonal, ``[d_in, d_in]``.
        before: Calibration of the LLM checkpoint that the SAE was trained on.
        after: Calibration of the next one.
    """
    r = rotation.to(sae.W_dec)
    mean_before = (before.scale * before.mean).to(sae.b_dec)
    mean_after = (after.scale * after.mean).to(sae.b_dec)
    sae.W_dec.copy_(sae.W_dec @ r)
    sae.W_enc.copy_(r.T @ sae.W_enc)
    sae.b_dec.copy_(mean_after + (sae.b_dec - mean_before) @ r)
