"""The auxiliary loss that revives dead latents."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ranks

_CHUNK_NUMBERS = 2**23  # 32 MiB of float32: the dead latents' dense pre-activations that are held at a time


def auxiliary_loss(
    centred: Tensor,
    x: Tensor,
    x_hat: Tensor,
    dead: Tensor | None,
    parameters: tuple[Tensor, Tensor, Tensor, Tensor],
    aux_k: int,
) -> Tensor:
    """Let the dead latents reconstruct what the living ones miss (AuxK).

    With e = x - x_hat, detached, and z the ``aux_k`` largest pre-activations among dead latents:
    ``L = min(1, n_dead / aux_k) * sum_n ||e_n - z_n W_dec||^2 / sum_n ||e_n - mean(e)||^2``.
    Gao et al. 2024 (arXiv 2406.04093), appendix A.2; the factor for fewer dead latents than
    ``aux_k`` is EleutherAI sparsify's, without which the last few dead latents are thrown about.
    No ReLU on z: the pre-activations of a dead latent are mostly below zero, where ReLU has no gradient. After
    an abrupt change of synthetic activations the share of dead latents ended at 0.08 (TopK) and 0.00 (StandardSAE)
    without it, 0.24 and 0.50 with it, 0.57 and 0.52 with no AuxK, and FVU was lowest without it.

    Args:
        centred: x - b_dec, shape ``[batch, d_in]``; it is detached here, and b_dec gets its gradient all the same.
        x: Activations, shape ``[batch, d_in]``.
        x_hat: Their reconstruction by the living, shape ``[batch, d_in]``; it is detached here.
        dead: Which latents are to be revived, bool ``[d_sae]``, or None for none.
        parameters: W_enc ``[d_in, d_sae]``, b_enc ``[d_sae]``, W_dec ``[d_sae, d_in]`` and b_dec ``[d_in]``.
        aux_k: How many dead latents reconstruct the error of one activation.

    Returns:
        Dimensionless scalar; 0 (no gradient) without dead latents or where the error is constant.

    Raises:
        ValueError: If ``dead`` does not have one entry for each latent.
    """
    if dead is None:
        return x.new_zeros(())
    b_enc = parameters[1]
    if dead.shape != b_enc.shape:
        raise ValueError(f"dead has shape {tuple(dead.shape)}; expected one entry for each of {len(b_enc)} latents.")
    candidates = dead.nonzero().squeeze(1)  # [n_dead]
    n_dead = len(candidates)
    if n_dead == 0:
        return x.new_zeros(())
    error = x - x_hat.detach()
    variance = ranks.total_variance(error)
    if variance == 0:
        return x.new_zeros(())
    reconstruct: Callable[..., Tensor] = _DeadReconstruction.apply
    missed = error - reconstruct(centred.detach(), *parameters, candidates, min(aux_k, n_dead))
    return min(1.0, n_dead / aux_k) * missed.square().sum() / variance


class _DeadReconstruction(torch.autograd.Function):
    """``z W_dec`` for the n largest pre-activations z among the candidates.

    The dead are few, so products with all of them cost less than picking n of them one by one, forward and backward.
    Only z itself is kept; the dense form exists for a chunk of activations at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        centred: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        candidates: Tensor,
        n: int,
    ) -> Tensor:
        encoder, bias, decoder = W_enc.T[candidates], b_enc[candidates], W_dec[candidates]  # [n_dead, ...]
        chosen = _Chosen(len(centred), n, len(candidates), centred.device)
        values = centred.new_empty(len(centred), n)
        reconstruction = torch.empty_like(centred)
        for rows in chosen.chunks:
            pre = torch.addmm(bias, centred[rows], encoder.T)  # [rows, n_dead]
            values[rows] = chosen.choose(rows, pre)
            torch.mm(chosen.dense(rows, values[rows]), decoder, out=reconstruction[rows])
        ctx.chosen = chosen
        ctx.d_sae = len(b_enc)
        ctx.save_for_backward(centred, values, encoder, decoder, candidates)
        return reconstruction

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        centred, values, encoder, decoder, candidates = ctx.saved_tensors
        into_encoder, into_decoder = torch.zeros_like(encoder), torch.zeros_like(decoder)
        into_bias = encoder.new_zeros(len(encoder))
        for rows in ctx.chosen.chunks:
            into_decoder.addmm_(ctx.chosen.dense(rows, values[rows]).T, grad[rows])
            into_pre = ctx.chosen.keep(rows, grad[rows] @ decoder.T)  # [rows, n_dead]
            into_encoder.addmm_(into_pre.T, centred[rows])
            into_bias.add_(into_pre.sum(dim=0))
        if ranks.factors_in_use():
            # every rank has the same dead latents, but activations of its own
            into = ranks.average(torch.cat([into_encoder, into_decoder, into_bias[:, None]], dim=1))
            d_in = centred.shape[1]
            into_encoder, into_decoder, into_bias = into[:, :d_in], into[:, d_in:-1], into[:, -1]

        def spread(part: Tensor) -> Tensor:
            """The gradient of all latents: zero for those that are alive."""
            return part.new_zeros(ctx.d_sae, *part.shape[1:]).index_copy_(0, candidates, part)

        into_b_dec = (into_bias @ encoder).neg_()
        return None, spread(into_encoder).T, spread(into_bias), spread(into_decoder), into_b_dec, None, None


class _Chosen:
    """Which n of the candidates each activation uses, all of them where there are no more.

    Args:
        batch: Number of activations.
        n: How many of the candidates one activation uses.
        n_candidates: How many there are.
        device: Where.
    """

    def __init__(self, batch: int, n: int, n_candidates: int, device: torch.device) -> None:
        self.n = n
        self.n_candidates = n_candidates
        self.positions = (
            torch.empty(batch, n, dtype=torch.int64, device=device) if n < n_candidates else None
        )  # [batch, n]
        size = max(1, _CHUNK_NUMBERS // n_candidates)
        self.chunks = [slice(start, start + size) for start in range(0, batch, size)]

    def choose(self, rows: slice, pre: Tensor) -> Tensor:
        """Remember which are largest in ``pre`` ``[rows, n_candidates]``, and give them, ``[rows, n]``."""
        if self.positions is None:
            return pre
        values, self.positions[rows] = pre.topk(self.n, dim=1, sorted=False)
        return values

    def dense(self, rows: slice, values: Tensor) -> Tensor:
        """The chosen ``values`` ``[rows, n]`` in their places among all candidates, zero elsewhere."""
        if self.positions is None:
            return values
        zeros = values.new_zeros(len(values), self.n_candidates)
        return zeros.scatter_(1, self.positions[rows], values)

    def keep(self, rows: slice, dense: Tensor) -> Tensor:
        """``dense`` ``[rows, n_candidates]`` with zeros where nothing was chosen."""
        if self.positions is None:
            return dense
        return self.dense(rows, dense.gather(1, self.positions[rows]))
