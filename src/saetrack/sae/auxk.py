"""The auxiliary loss that revives dead latents."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ranks

_CHUNK_NUMBERS = 2**23  # 32 MiB of float32: the dead latents' dense pre-activations that are held at a time
_FEW_NUMBERS = 2**17  # weights of the dead latents up to which products in float32 take next to nothing of a step
Parameters = tuple[Tensor, Tensor, Tensor, Tensor]
"""W_enc ``[d_in, d_sae]``, b_enc ``[d_sae]``, W_dec ``[d_sae, d_in]`` and b_dec ``[d_in]``."""


class DeadLatents:
    """The latents that are to be revived in one step: what they reconstruct of a batch, and the gradients of that.

    For each activation the ``aux_k`` with the largest pre-activations reconstruct, ``z W_dec``. No ReLU on z: the
    pre-activations of a dead latent are mostly below zero, where ReLU has no gradient. After an abrupt change of
    synthetic activations the share of dead latents ended at 0.08 (TopK) and 0.00 (StandardSAE) without it, 0.24 and
    0.50 with it, 0.57 and 0.52 with no AuxK, and FVU was lowest without it.

    The dead are few, so products with all of them cost less than picking some of them one by one, forward and backward.
    Only z itself is kept; the dense form exists for a chunk of activations at a time.

    Args:
        latents: Which, int64 ``[n]``, no one twice, at least one.
        aux_k: How many reconstruct one activation, where there are as many.
        dtype: Of the products.
        n_dead: How many of ``latents``, from the first, are dead, a scalar; the others only fill places, and nothing
            comes from them or goes to them. None for all.
    """

    def __init__(self, latents: Tensor, aux_k: int, dtype: torch.dtype, n_dead: Tensor | None = None) -> None:
        self.latents = latents
        self.dtype = dtype
        self.weight = min(1.0, len(latents) / aux_k) if n_dead is None else (n_dead / aux_k).clamp(max=1.0)
        """EleutherAI sparsify's factor, without which the last few dead latents are thrown about."""
        self._free = None if n_dead is None else torch.arange(len(latents), device=latents.device) >= n_dead
        self._n = min(aux_k, len(latents))
        self._chosen: list[tuple[Tensor, Tensor | None]]  # as `_choose` gives them, for each chunk

    @classmethod
    def where(
        cls, dead: Tensor, W_dec: Tensor, aux_k: int, dtype: torch.dtype, places: int | None = None
    ) -> "DeadLatents | None":
        """Those of a mask; None without any. Where they are few, their products are in float32.

        Args:
            dead: Which latents are dead, bool ``[d_sae]``.
            W_dec: ``[d_sae, d_in]``.
            aux_k: How many reconstruct one activation.
            dtype: Of the products where they are many.
            places: Work on as many latents, at least those of the mask, so that no shape depends on it; all of them
                count for whether they are few. None works on just those.

        Raises:
            ValueError: If ``dead`` does not have one entry for each row of ``W_dec`` ``[d_sae, d_in]``.
        """
        d_sae, d_in = W_dec.shape
        if dead.shape != (d_sae,):
            raise ValueError(f"dead has shape {tuple(dead.shape)}; expected one entry for each of {d_sae} latents.")
        if places is None:
            latents, n_dead = dead.nonzero().squeeze(1), None
        else:  # the dead, then the first of the living
            latents, n_dead = dead.byte().sort(descending=True, stable=True).indices[:places], dead.sum()
        if len(latents) == 0:
            return None
        low = dtype != torch.float32 and len(latents) * d_in > _FEW_NUMBERS
        return cls(latents, aux_k, dtype if low else W_dec.dtype, n_dead)

    def reconstruct(self, centred: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor) -> Tensor:
        """What they give for x - b_dec, ``[batch, d_in]`` as that is, without a gradient."""
        encoder, self._decoder, bias = (self._rows(table).to(self.dtype) for table in (W_enc.T, W_dec, b_enc))
        reconstruction = torch.empty_like(centred)
        self._chosen = []
        for rows in self._chunks(len(centred)):
            chosen = self._choose(torch.addmm(bias, centred[rows].to(self.dtype), encoder.T))
            self._chosen.append(chosen)
            reconstruction[rows] = self._dense(*chosen) @ self._decoder
        return reconstruction

    def add_gradients_(
        self, centred: Tensor, grad: Tensor, into_W_enc: Tensor, into_b_enc: Tensor, into_W_dec: Tensor
    ) -> None:
        """Add to the gradients of W_enc^T ``[d_sae, d_in]``, b_enc and W_dec, in place, what `reconstruct` gives them.

        Args:
            centred: As it was given.
            grad: Gradient of the reconstruction, ``[batch, d_in]``.
            into_W_enc: No row of it but those of `latents` is touched, nor of the others.
            into_b_enc: That of b_dec is ``-W_enc @ into_b_enc``.
            into_W_dec: That of the decoder.
        """
        d_in = centred.shape[1]
        into = grad.new_zeros(len(self.latents), 2 * d_in + 1)  # of a latent's weights, row and bias
        for rows, (values, positions) in zip(self._chunks(len(centred)), self._chosen, strict=True):
            missed = grad[rows].to(self.dtype)
            into_pre = missed @ self._decoder.T  # [rows, n_dead]
            if positions is not None:
                into_pre = self._dense(into_pre.gather(1, positions), positions)
            into[:, :d_in] += into_pre.T @ centred[rows].to(self.dtype)
            into[:, d_in:-1] += self._dense(values, positions).T @ missed
            into[:, -1] += into_pre.sum(dim=0, dtype=into.dtype)
        if ranks.factors_in_use():
            # every rank has the same dead latents, but activations of its own
            into = ranks.average(into)
        for total, part in ((into_W_enc, into[:, :d_in]), (into_W_dec, into[:, d_in:-1]), (into_b_enc, into[:, -1])):
            # no latent is there twice, so no sum depends on an order
            total.index_copy_(0, self.latents, total[self.latents] + part)

    def _chunks(self, batch: int) -> list[slice]:
        size = max(1, _CHUNK_NUMBERS // len(self.latents))
        return [slice(start, start + size) for start in range(0, batch, size)]

    def _rows(self, table: Tensor) -> Tensor:
        """Those of the latents; zeros for those that only fill places."""
        rows = table[self.latents]
        if self._free is not None:
            rows.masked_fill_(self._free if rows.ndim == 1 else self._free[:, None], 0.0)
        return rows

    def _choose(self, pre: Tensor) -> tuple[Tensor, Tensor | None]:
        """The largest of each row, ``[rows, n]``, and where they are; None where that is everywhere."""
        if self._n == len(self.latents):
            return pre, None
        if self._free is not None:
            pre = pre.masked_fill(self._free, -torch.inf)
        values, positions = pre.topk(self._n, dim=1, sorted=False)
        return values if self._free is None else values.masked_fill(values.isneginf(), 0.0), positions

    def _dense(self, values: Tensor, positions: Tensor | None) -> Tensor:
        """The chosen ``values`` in their places among all dead latents, ``[rows, n_dead]``, zero elsewhere."""
        if positions is None:
            return values
        return values.new_zeros(len(values), len(self.latents)).scatter_(1, positions, values)


def revive(centred: Tensor, parameters: Parameters, dead: DeadLatents | None) -> Tensor | None:
    """`DeadLatents.reconstruct` with its gradients, for a loss whose reconstruction does not bring them.

    Args:
        centred: x - b_dec, shape ``[batch, d_in]``; it is detached here, and b_dec gets its gradient all the same.
        parameters: Of the SAE.
        dead: Which latents reconstruct, or None.

    Returns:
        ``[batch, d_in]``, or None.
    """
    if dead is None:
        return None
    revived: Tensor = _Revive.apply(centred.detach(), *parameters, dead)  # type: ignore[no-untyped-call]
    return revived


class _Revive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, centred: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, dead: DeadLatents
    ) -> Tensor:
        ctx.save_for_backward(centred, W_enc)
        ctx.dead = dead
        return dead.reconstruct(centred, W_enc, b_enc, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        centred, W_enc = ctx.saved_tensors
        into_W_enc, into_W_dec = (torch.zeros_like(W_enc.T) for _ in range(2))
        into_b_enc = W_enc.new_zeros(W_enc.shape[1])
        ctx.dead.add_gradients_(centred, grad, into_W_enc, into_b_enc, into_W_dec)
        return None, into_W_enc.T, into_b_enc, into_W_dec, (W_enc @ into_b_enc).neg_(), None


def auxiliary_loss(x: Tensor, x_hat: Tensor, revived: Tensor | None, dead: DeadLatents | None) -> Tensor:
    """How much of what the living latents miss the dead ones miss too (AuxK).

    With e = x - x_hat, detached:
    ``L = min(1, n_dead / aux_k) * sum_n ||e_n - revived_n||^2 / sum_n ||e_n - mean(e)||^2``.
    Gao et al. 2024 (arXiv 2406.04093), appendix A.2.

    Args:
        x: Activations, shape ``[batch, d_in]``.
        x_hat: Their reconstruction by the living, shape ``[batch, d_in]``; it is detached here.
        revived: What the dead latents give, shape ``[batch, d_in]``; None without any.
        dead: Those latents; None without any.

    Returns:
        Dimensionless scalar; 0 (no gradient) without dead latents or where the error is constant.
    """
    if revived is None or dead is None:
        return x.new_zeros(())
    error = x - x_hat.detach()
    variance = ranks.total_variance(error)
    # by infinity, not an `if`, for which a GPU would be waited for
    return dead.weight * (error - revived).square().sum() / torch.where(variance > 0, variance, torch.inf)
