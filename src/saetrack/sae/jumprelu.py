"""Latents with a threshold each, trained by a straight-through estimator."""

import math
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .base import SAE, LossTerms, require_coefficient, squared_error
from .firing import count_positive, firing
from .select import select_positive
from .sparse import Latents, Selection, decode_at, encode_at, latent_sums
from .threshold import above_threshold, refuse_negative_thresholds


@final
class JumpReLUSAE(SAE):
    r"""Autoencoder whose latents jump from zero to their value at a trained threshold, with an L0 penalty.

    ``z = (x - b_dec) W_enc + b_enc``, ``f = z H(z - threshold)``, ``x_hat = f W_dec + b_dec``,

    ``L = mean_b ||x_b - x_hat_b||^2 / d_in + l0_coefficient * mean_b sum_i H(z_bi - threshold_i)
    + aux_coefficient * L_auxk``,

    with H the unit step. Where H has no gradient for the threshold t, the estimator with the kernel K(u) = 1 for
    |u| < 1/2 and bandwidth w stands in: ``dH(z - t)/dt = -K((z - t) / w) / w``, ``df/dt = -(t / w) K((z - t) / w)``.

    Rajamanoharan et al. 2024, "Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders"
    (arXiv 2407.14435), section 3 and appendix J. Theirs is for activations of norm 1, so ``/ d_in`` here, where the
    norm is sqrt(d_in), gives ``l0_coefficient`` their scale. Three things differ. The threshold itself is
    trained and kept at 0 or above after each step, not its logarithm: Adam moves a parameter by about the learning
    rate a step, too little for the logarithm to leave its start within a stage; and so the snapshot, which SAELens
    opens as ``jumprelu``, holds the trained parameter, not a function of it. b_dec is taken from the input, as in all
    classes here. AuxK revives dead latents, where the paper, with one LLM and a long run, had few and left them.

    Args:
        d_in: Width of the activations. Filled in from the LLM by ``saetrack fit``.
        expansion_factor: Number of latents for each dimension of the activations; d_sae = d_in * expansion_factor.
        l0_coefficient: What one active latent costs, in shares of the activations' power, at least 0; larger gives
            fewer active latents. The default gave an L0 of 54 at FVU 0.043 on the quickstart's LLM (1,000 steps of 512
            tokens, learning rate 1e-3, d_sae 2048). Thresholds travel about the sum of the learning rates: in 244
            steps of 2048 tokens, L0 came down only to 168, and to 171 with a coefficient of 1e-3.
        bandwidth: Width of the estimator's kernel, in training units, above 0; also where the thresholds start.
            Wider has less noise and more bias.
        aux_coefficient: Weight of the auxiliary loss that revives dead latents; 0 turns it off.
        aux_k: How many dead latents reconstruct the error of one activation. None: d_in // 2.

    Raises:
        ValueError: If a coefficient is negative or the bandwidth not above 0.
    """

    def __init__(
        self,
        d_in: int,
        expansion_factor: int = 16,
        l0_coefficient: float = 3e-3,
        bandwidth: float = 0.05,
        aux_coefficient: float = 1 / 32,
        aux_k: int | None = None,
    ) -> None:
        super().__init__(d_in, expansion_factor, aux_coefficient, aux_k)
        require_coefficient("l0_coefficient", l0_coefficient)
        if not (math.isfinite(bandwidth) and bandwidth > 0):
            raise ValueError(f"sae.bandwidth must be a finite number above 0, but is {bandwidth}.")
        self.l0_coefficient = l0_coefficient
        self.bandwidth = bandwidth
        self.threshold = nn.Parameter(torch.zeros(self.d_sae))
        self.register_load_state_dict_pre_hook(refuse_negative_thresholds)  # type: ignore[no-untyped-call]

    def activate(self, pre: Tensor) -> Tensor:
        """Keep the latents above their thresholds."""
        return above_threshold(pre, self.threshold)

    @torch.no_grad()
    def initialise(self, x: Tensor, generator: torch.Generator) -> None:
        """Start as :meth:`SAE.initialise` does, with every threshold at the bandwidth, as in the paper."""
        self.threshold.zero_()  # the factor of W_enc is fitted to a plain ReLU
        super().initialise(x, generator)
        self.threshold.fill_(self.bandwidth)

    def loss(
        self, x: Tensor, dead: Tensor | None = None, before: Latents | None = None, new: Tensor | None = None
    ) -> LossTerms:
        """Compute the loss in the class's docstring; see :meth:`SAE.loss`."""
        self._check_width(x)
        latents: Tensor | Latents
        with self._full_precision():
            centred = (x - self.b_dec).detach()  # [batch, d_in]
            # nothing below the kernel's lower edge has a value or a gradient
            bias = self.b_enc - self.threshold + self.bandwidth / 2
            selection = select_positive(centred, self.W_enc, bias, self.precision, self.workspace)
            if selection is not None:
                pre = encode_at(centred, self.W_enc, self.b_enc, self.b_dec, selection)  # [nnz]
                values, l0 = _StraightThrough.apply(pre, self.threshold, self.bandwidth, selection)  # type: ignore[no-untyped-call]
                latents = Latents(selection, values)
                x_hat = decode_at(values, selection, self.W_dec) + self.b_dec
        if selection is None:
            centred, pre = self._dense_preactivations(x)
            dense, l0 = _StraightThrough.apply(pre, self.threshold, self.bandwidth, None)  # type: ignore[no-untyped-call]
            latents, x_hat = dense, self._decode_low(dense)
        with self._full_precision():
            mse = squared_error(x, x_hat) / x.numel()
            auxk = self._auxiliary_loss(centred, x, x_hat, dead)
            moved = self._moved(centred, latents, before, new)
        return LossTerms(
            loss=mse + self.l0_coefficient * l0 + self.aux_coefficient * auxk,
            fired=firing(latents)[0],
            l0=l0.detach(),
            x_hat=x_hat.detach(),
            terms={"mse": mse.detach(), "sparsity": l0.detach(), "auxk": auxk.detach()},
            moved=moved,
        )

    @torch.no_grad()
    def after_step_(self, smallest_kept: Tensor | None = None) -> None:
        """Bring the decoder rows back to unit norm, and thresholds that fell below zero back to it."""
        super().after_step_()
        # Not in the forward pass, where a clamp would take the gradient of a threshold that has come to zero.
        self.threshold.clamp_(min=0.0)

    def saelens_config(self) -> dict[str, Any]:
        """Give the part of SAELens's cfg.json that belongs to the architecture."""
        return {"architecture": "jumprelu"}


class _StraightThrough(torch.autograd.Function):
    """Latents of JumpReLU and their mean number, with the estimated gradients of the class's docstring."""

    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float, selection: Selection | None
    ) -> tuple[Tensor, Tensor]:
        """Give the latents and the mean number of active ones, a scalar.

        Without a selection ``pre`` and the latents are ``[batch, d_sae]``; with one, ``[nnz]`` at its entries.
        """
        each = threshold if selection is None else threshold[selection.columns]
        latents = above_threshold(pre, each)
        ctx.save_for_backward(pre, each, threshold)
        ctx.bandwidth, ctx.selection = bandwidth, selection
        return latents, count_positive(latents) / (len(pre) if selection is None else selection.batch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Give the gradients of the pre-activations and of the threshold."""
        grad_latents, grad_l0 = gradients
        pre, each, threshold = ctx.saved_tensors
        near = (pre - each).abs() < ctx.bandwidth / 2
        if ctx.selection is None:
            sums, counts, batch = (grad_latents * near).sum(dim=0), near.sum(dim=0), len(pre)
        else:
            selection = ctx.selection
            sums = latent_sums(grad_latents * near, None, selection)
            counts, batch = latent_sums(near.to(pre.dtype), None, selection), selection.batch
        along = threshold * sums + grad_l0 / batch * counts
        return grad_latents * (pre > each), -along / ctx.bandwidth, None, None
