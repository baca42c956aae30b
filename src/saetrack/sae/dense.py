"""The dense ReLU step: five products, and as few other passes over ``[batch, d_sae]`` as there can be.

Latents and their gradient are the only matrices of that size, in memory that is kept. The biases and the sparsity
penalty are columns of the products: as passes of their own they took a tenth of the step.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .columns import beside
from .workspace import Workspace

_RELU_BACKWARD = getattr(torch.ops.aten, "threshold_backward", None)  # not documented; there is another way without it


def relu_reconstruct(
    centred: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor, Tensor],
    weights: Tensor,
    dtype: torch.dtype,
    workspace: Workspace,
) -> tuple[Tensor, Tensor, Tensor]:
    """ReLU latents, what they reconstruct, and their weighted sums.

    Args:
        centred: x - b_dec, without a gradient of its own, shape ``[batch, d_in]``.
        parameters: W_enc ``[d_in, d_sae]``, b_enc ``[d_sae]``, W_dec ``[d_sae, d_in]`` and b_dec ``[d_in]``.
        weights: What each latent counts in the sums, ``[d_sae]``.
        dtype: Of the products and the latents.
        workspace: Lends memory to the latents and their gradient.

    Returns:
        Latents ``[batch, d_sae]`` in ``dtype``, the reconstruction with b_dec ``[batch, d_in]`` and
        ``latents @ weights`` ``[batch]``, both float32.
    """
    latents: Tensor
    latents, x_hat, sums = _ReLUReconstruct.apply(centred.detach(), *parameters, weights, dtype, workspace)  # type: ignore[no-untyped-call]
    return latents, x_hat, sums


class _ReLUReconstruct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        centred: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        weights: Tensor,
        dtype: torch.dtype,
        workspace: Workspace,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, d_sae = len(centred), len(b_enc)
        rounded = b_enc.to(dtype)
        # each with at least so many columns
        encoder = beside(W_enc.T, (rounded, b_enc - rounded), dtype)  # [d_sae, d_in + 2]
        inputs = beside(centred, (centred.new_ones(batch),) * 2, dtype)  # [batch, d_in + 2]
        decoder = beside(W_dec, (weights,), dtype)  # [d_sae, d_in + 1]
        latents = workspace.lend("latents", (batch, d_sae), dtype, centred.device)
        torch.mm(inputs, encoder.T, out=latents).relu_()
        out = latents @ decoder  # [batch, d_in + 1]
        ctx.save_for_backward(inputs, W_enc, decoder, latents)
        ctx.workspace = workspace
        ctx.set_materialize_grads(False)
        d_in = len(b_dec)
        return latents, out[:, :d_in] + b_dec, out[:, d_in].to(b_dec.dtype)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, into_latents: Tensor | None, grad: Tensor | None, into_sums: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        inputs, W_enc, decoder, latents = ctx.saved_tensors
        dtype, batch, d_in = latents.dtype, len(inputs), len(W_enc)
        grad = W_enc.new_zeros(batch, len(W_enc)) if grad is None else grad
        sums = grad.new_zeros(batch) if into_sums is None else into_sums
        outputs = beside(grad, (sums,), dtype)  # [batch, d_in + 1]
        into_pre = ctx.workspace.lend("into_latents", tuple(latents.shape), dtype, latents.device)
        torch.mm(outputs, decoder.T, out=into_pre)
        if into_latents is not None:
            into_pre.add_(into_latents)
        _zero_where_inactive_(into_pre, latents)
        into_decoder = latents.T @ outputs  # [d_sae, d_in + 1]
        into_encoder = into_pre.T @ inputs  # [d_sae, d_in + 2]
        into_W_enc = into_encoder[:, :d_in].to(W_enc.dtype, memory_format=torch.contiguous_format)
        into_b_enc = into_encoder[:, d_in].to(W_enc.dtype)
        into_W_dec = into_decoder[:, :d_in].to(W_enc.dtype, memory_format=torch.contiguous_format)
        into_weights = into_decoder[:, d_in].to(W_enc.dtype)
        into_b_dec = grad.sum(dim=0).addmv_(W_enc, into_b_enc, alpha=-1)
        return None, into_W_enc.T, into_b_enc, into_W_dec, into_b_dec, into_weights, None, None


def _zero_where_inactive_(gradient: Tensor, latents: Tensor) -> None:
    """Set to zero, in place, where the latent is; NaN counts as active, and shows."""
    # ReLU's own kernel in place: ten times as fast as a mask, which would be another matrix of this size
    if _RELU_BACKWARD is None:
        gradient.masked_fill_(latents <= 0, 0.0)
    else:
        _RELU_BACKWARD.grad_input(gradient, latents, 0, grad_input=gradient)
