"""Latents limited to k on average over a batch."""

from typing import final

from torch import Tensor

from .auxk import DeadLatents
from .batch_selection import BatchSelectionSAE
from .sparse import Latents, Selection, reconstruct_at


@final
class BatchTopKSAE(BatchSelectionSAE):
    r"""Autoencoder that keeps the k * batch largest latents of a batch, so that each activation takes what it needs.

    ``f = BatchTopK(ReLU((x - b_dec) W_enc + b_enc))``, ``x_hat = f W_dec + b_dec``,

    ``L = sum_b ||x_b - x_hat_b||^2 / sum_b ||x_b - mean(x)||^2 + aux_coefficient * L_auxk``.

    Bussmann, Leask and Nanda 2024, "BatchTopK Sparse Autoencoders" (arXiv 2412.06410), with the normalisation of
    the error of `TopKSAE`. Inference keeps the latents above a threshold, the mean over batches of the smallest
    latent kept (their eq. 6); it is part of the snapshot, which SAELens opens as ``jumprelu``. L0 measured on other
    text is therefore near k, not equal to it.

    Args:
        d_in: Width of the activations. Filled in from the LLM by ``saetrack fit``.
        expansion_factor: Number of latents for each dimension of the activations; d_sae = d_in * expansion_factor.
        k: How many latents are active for one activation on average, 1 to d_sae.
        aux_coefficient: Weight of the auxiliary loss that revives dead latents; 0 turns it off.
        aux_k: How many dead latents reconstruct the error of one activation. None: d_in // 2, as in Gao et al.
    """

    def __init__(
        self,
        d_in: int,
        expansion_factor: int = 16,
        k: int = 32,
        aux_coefficient: float = 1 / 32,
        aux_k: int | None = None,
    ) -> None:
        super().__init__(d_in, expansion_factor, k, aux_coefficient, aux_k)

    def latents_and_reconstructions(
        self, centred: Tensor, selection: Selection, dead: DeadLatents | None
    ) -> tuple[Latents, list[Tensor], Tensor | None]:
        """Reconstruct from all latents, once."""
        parameters = self.W_enc, self.b_enc, self.W_dec, self.b_dec
        values, x_hat, revived = reconstruct_at(centred, parameters, selection, None, dead, self.workspace)
        return Latents(selection, values), [x_hat], revived
