"""Latents limited to the k largest."""

from typing import Any, final

import torch
from torch import Tensor

from .auxk import auxiliary_loss
from .base import SAE, LossTerms, squared_error, variance_of
from .firing import firing
from .select import select_topk
from .sparse import Latents, encode_at, reconstruct_at


@final
class TopKSAE(SAE):
    r"""Autoencoder that keeps the k largest latents of each activation.

    ``f = ReLU(TopK((x - b_dec) W_enc + b_enc))``, ``x_hat = f W_dec + b_dec``,

    ``L = sum_b ||x_b - x_hat_b||^2 / sum_b ||x_b - mean(x)||^2 + aux_coefficient * L_auxk``.

    Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093), sections 2.3-2.4: the
    normalised mean squared error, with the auxiliary loss of dead latents.

    Args:
        d_in: Width of the activations. Filled in from the LLM by ``saetrack fit``.
        expansion_factor: Number of latents for each dimension of the activations; d_sae = d_in * expansion_factor.
        k: How many latents may be active for one activation, 1 to d_sae.
        aux_coefficient: Weight of the auxiliary loss that revives dead latents; 0 turns it off.
        aux_k: How many dead latents reconstruct the error of one activation. None: d_in // 2, as in Gao et al.
    """

    sparse_gradients = True
    static_shapes = True

    def __init__(
        self,
        d_in: int,
        expansion_factor: int = 16,
        k: int = 32,
        aux_coefficient: float = 1 / 32,
        aux_k: int | None = None,
    ) -> None:
        super().__init__(d_in, expansion_factor, aux_coefficient, aux_k)
        self.k = self._checked_k(k)

    def activate(self, pre: Tensor) -> Tensor:
        """Keep the k largest, then apply ReLU."""
        values, indices = pre.topk(self.k, dim=-1, sorted=False)  # [..., k]
        return torch.zeros_like(pre).scatter(-1, indices, values.relu())

    def loss(
        self, x: Tensor, dead: Tensor | None = None, before: Latents | None = None, new: Tensor | None = None
    ) -> LossTerms:
        """Compute the loss in the class's docstring; see :meth:`SAE.loss`."""
        self._check_width(x)
        with self._full_precision():
            centred = (x - self.b_dec).detach()  # [batch, d_in]
            selection, pre = select_topk(centred, self.W_enc, self.b_enc, self.k, self.precision, self.workspace)
            parameters = self.W_enc, self.b_enc, self.W_dec, self.b_dec
            to_revive = self._dead_latents(dead)
            values, x_hat, revived = reconstruct_at(centred, parameters, selection, pre, to_revive, self.workspace)
            latents = Latents(selection, values)  # [batch * k]
            nmse = squared_error(x, x_hat) / variance_of(x)
            auxk = auxiliary_loss(x, x_hat, revived, to_revive)
            moved = self._moved(centred, latents, before, new)
        fired, l0 = firing(latents)
        return LossTerms(
            loss=nmse + self.aux_coefficient * auxk,
            fired=fired,
            l0=l0,
            x_hat=x_hat.detach(),
            terms={"mse": nmse.detach(), "auxk": auxk.detach()},
            moved=moved,
        )

    @torch.no_grad()
    def sparse_latents(self, x: Tensor) -> Latents:
        """The positive latents for activations ``[batch, d_in]``, without their dense form.

        On a GPU there are zeros among them: it would have to be waited for before the others' number is known.
        """
        centred = x - self.b_dec
        selection, pre = select_topk(centred, self.W_enc, self.b_enc, self.k, self.precision, self.workspace)
        if pre is None:
            pre = encode_at(centred, self.W_enc, self.b_enc, self.b_dec, selection)
        return Latents(selection, pre.relu()) if pre.is_cuda else Latents(selection, pre).positive()

    def saelens_config(self) -> dict[str, Any]:
        """Give the part of SAELens's cfg.json that belongs to the architecture."""
        # Without rescaling, folding (which makes the rows longer or shorter) leaves the choice of the k largest alone.
        return {"architecture": "topk", "k": self.k, "rescale_acts_by_decoder_norm": False}
