"""The loss of the paper that introduced SAE-Track."""

from typing import Any, final

import torch
from torch import Tensor

from .base import SAE, LossTerms, require_coefficient
from .firing import firing
from .sparse import Latents


@final
class SAETrackSAE(SAE):
    r"""ReLU autoencoder with the loss of the SAE-Track paper.

    ``f = ReLU((x - b_dec) W_enc + b_enc)``, ``x_hat = f W_dec + b_dec``,

    ``L = mean_bj (x_hat_bj - x_bj)^2 / ||x_b - mean(x)|| + l1_coefficient * mean_b ||f_b||_1
    + aux_coefficient * L_auxk``.

    Xu et al., "Tracking the Feature Dynamics in LLM Training" (arXiv 2412.17626), and its code. The error is
    divided by the norm, not by its square, so both terms grow with the activations alike and the balance between
    them is the same at every LLM checkpoint. It does depend on d_in; 8e-5 was chosen for widths of 768 to 2048.
    Two things differ from the published code: the L1 coefficient is applied in every stage (there it was ignored
    in all but the first), and AuxK revives dead latents where the paper's ghost gradients were off after stage one.

    Args:
        d_in: Width of the activations. Filled in from the LLM by ``saetrack fit``.
        expansion_factor: Number of latents for each dimension of the activations; d_sae = d_in * expansion_factor.
        l1_coefficient: Weight of the sparsity penalty, at least 0; larger gives fewer active latents.
        aux_coefficient: Weight of the auxiliary loss that revives dead latents; 0 turns it off.
        aux_k: How many dead latents reconstruct the error of one activation. None: d_in // 2.
    """

    def __init__(
        self,
        d_in: int,
        expansion_factor: int = 64,
        l1_coefficient: float = 8e-5,
        aux_coefficient: float = 1 / 32,
        aux_k: int | None = None,
    ) -> None:
        super().__init__(d_in, expansion_factor, aux_coefficient, aux_k)
        require_coefficient("l1_coefficient", l1_coefficient)
        self.l1_coefficient = l1_coefficient

    def activate(self, pre: Tensor) -> Tensor:
        """Apply ReLU."""
        return pre.relu()

    def loss(
        self, x: Tensor, dead: Tensor | None = None, before: Latents | None = None, new: Tensor | None = None
    ) -> LossTerms:
        """Compute the loss in the class's docstring; see :meth:`SAE.loss`."""
        self._check_width(x)
        with self._full_precision():
            centred = (x - self.b_dec).detach()  # [batch, d_in]
            latents, x_hat, sums = self._relu_reconstruct(centred, torch.ones_like(self.b_enc))
            spread = torch.linalg.vector_norm(x - x.mean(dim=0), dim=1, keepdim=True)  # [batch, 1]
            # An activation at the batch mean has no spread; its error is then left as it is instead of becoming NaN.
            mse = ((x - x_hat).square() / torch.where(spread > 0, spread, 1.0)).mean()
            sparsity = sums.mean()
            auxk = self._auxiliary_loss(centred, x, x_hat, dead)
            moved = self._moved(centred, latents, before, new)
        fired, l0 = firing(latents)
        return LossTerms(
            loss=mse + self.l1_coefficient * sparsity + self.aux_coefficient * auxk,
            fired=fired,
            l0=l0,
            x_hat=x_hat.detach(),
            terms={"mse": mse.detach(), "sparsity": sparsity.detach(), "auxk": auxk.detach()},
            moved=moved,
        )

    def saelens_config(self) -> dict[str, Any]:
        """Give the part of SAELens's cfg.json that belongs to the architecture."""
        return {"architecture": "standard"}
