"""ReLU latents with an L1 penalty."""

from typing import Any, final

from torch import Tensor

from .base import SAE, LossTerms, require_coefficient, squared_error
from .firing import firing
from .sparse import Latents


@final
class StandardSAE(SAE):
    r"""ReLU autoencoder whose L1 penalty is weighted by the decoder's norms.

    ``f = ReLU((x - b_dec) W_enc + b_enc)``, ``x_hat = f W_dec + b_dec``,

    ``L = mean_b ||x_b - x_hat_b||^2 / d_in + l1_coefficient * mean_b sum_i f_bi ||W_dec,i|| / sqrt(d_in)
    + aux_coefficient * L_auxk``.

    The loss of Anthropic's "Circuits Updates, April 2024" with lambda = l1_coefficient * sqrt(d_in) (their 5 at
    width 4096 is 0.08 here), divided by d_in: in training units neither term then depends on the width. Weighting
    by the norms keeps the penalty from being escaped by small latents with long decoder rows.

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
        expansion_factor: int = 16,
        l1_coefficient: float = 0.08,
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
            latents, x_hat, sums = self._relu_reconstruct(centred, self.W_dec.norm(dim=1))
            mse = squared_error(x, x_hat) / x.numel()
            sparsity = sums.mean() / self.d_in**0.5
            auxk = self._auxiliary_loss(centred, x, x_hat, dead)
            moved = self._moved(centred, latents, before, new)
        loss = mse + self.l1_coefficient * sparsity + self.aux_coefficient * auxk
        fired, l0 = firing(latents)
        return LossTerms(
            loss=loss,
            fired=fired,
            l0=l0,
            x_hat=x_hat.detach(),
            terms={"mse": mse.detach(), "sparsity": sparsity.detach(), "auxk": auxk.detach()},
            moved=moved,
        )

    def saelens_config(self) -> dict[str, Any]:
        """Give the part of SAELens's cfg.json that belongs to the architecture."""
        return {"architecture": "standard"}
