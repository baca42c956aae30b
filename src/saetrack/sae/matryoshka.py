"""Nested dictionaries: the first latents must reconstruct alone."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from .auxk import DeadLatents, revive
from .batch_selection import BatchSelectionSAE
from .sparse import Latents, Selection, decode_at, encode_at


@final
class MatryoshkaSAE(BatchSelectionSAE):
    r"""Batch-top-k autoencoder in which each prefix of the latents reconstructs the activations by itself.

    ``f = BatchTopK(ReLU((x - b_dec) W_enc + b_enc))``, ``x_hat_m = f[:m] W_dec[:m] + b_dec`` for each prefix m,

    ``L = sum_m sum_b ||x_b - x_hat_m,b||^2 / sum_b ||x_b - mean(x)||^2 + aux_coefficient * L_auxk``.

    Bussmann et al. 2025, "Learning Multi-Level Features with Matryoshka Sparse Autoencoders" (arXiv 2503.17547),
    with the normalisation of the error of `TopKSAE`. General features gather among the first latents and
    are absorbed less by special ones. The k * batch latents are chosen once, from all; AuxK works on the error of the
    full reconstruction. Inference is that of `BatchTopKSAE`.

    Args:
        d_in: Width of the activations. Filled in from the LLM by ``saetrack fit``.
        expansion_factor: Number of latents for each dimension of the activations; d_sae = d_in * expansion_factor.
        k: How many latents are active for one activation on average, 1 to d_sae.
        prefixes: Numbers of latents that reconstruct by themselves, increasing strictly, the last one d_sae.
            None: groups of 1/32, 1/16, 1/8, 1/4 and the rest of d_sae, as in the paper.
        aux_coefficient: Weight of the auxiliary loss that revives dead latents; 0 turns it off.
        aux_k: How many dead latents reconstruct the error of one activation. None: d_in // 2, as in Gao et al.

    Raises:
        ValueError: If k or the prefixes do not fit d_sae.
    """

    def __init__(
        self,
        d_in: int,
        expansion_factor: int = 16,
        k: int = 32,
        prefixes: list[int] | None = None,
        aux_coefficient: float = 1 / 32,
        aux_k: int | None = None,
    ) -> None:
        super().__init__(d_in, expansion_factor, k, aux_coefficient, aux_k)
        self.prefixes = default_prefixes(self.d_sae) if prefixes is None else list(prefixes)
        _check_prefixes(self.prefixes, self.d_sae)

    def latents_and_reconstructions(
        self, centred: Tensor, selection: Selection, dead: DeadLatents | None
    ) -> tuple[Latents, list[Tensor], Tensor | None]:
        """Reconstruct from each prefix."""
        values = encode_at(centred, self.W_enc, self.b_enc, self.b_dec, selection).relu()  # [k * batch]
        latents = Latents(selection, values)
        revived = revive(centred, (self.W_enc, self.b_enc, self.W_dec, self.b_dec), dead)
        return latents, self.reconstructions(latents), revived

    def reconstructions(self, latents: Latents) -> list[Tensor]:
        """Reconstruct from each prefix; each adds its own latents to the one before, so none is decoded twice.

        The latents that a prefix adds are decoded as if they belonged to activations of their own, all in one go.
        """
        selection, values = latents
        batch, device = selection.batch, values.device
        group = torch.bucketize(selection.columns, torch.tensor(self.prefixes, device=device), right=True)  # [nnz]
        part, order = (group * batch + selection.rows).sort(stable=True)
        counts = torch.bincount(part, minlength=len(self.prefixes) * batch)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        parts = decode_at(values[order], Selection(selection.columns[order], offsets, self.d_sae), self.W_dec)
        return list((parts.view(len(self.prefixes), batch, self.d_in).cumsum(dim=0) + self.b_dec).unbind())


def default_prefixes(d_sae: int) -> list[int]:
    """Prefixes that end after 1/32, 3/32, 7/32, 15/32 and all of the latents; fewer where d_sae is below 32.

    Example:
        >>> default_prefixes(65536)
        [2048, 6144, 14336, 30720, 65536]
    """
    return sorted({d_sae * share // 32 for share in (1, 3, 7, 15, 32)} - {0})


def _check_prefixes(prefixes: Sequence[int], d_sae: int) -> None:
    for i, (before, after) in enumerate(zip([0, *prefixes], prefixes, strict=False)):
        if after <= before:
            raise ValueError(
                f"sae.prefixes must be positive and increase strictly, but {after} follows {before} at position {i}."
            )
    if not prefixes or prefixes[-1] != d_sae:
        raise ValueError(
            f"sae.prefixes must end at d_sae = {d_sae}, but ends at {prefixes[-1] if prefixes else 'nothing'}; "
            f"add {d_sae}, or leave it out for {default_prefixes(d_sae)}."
        )
