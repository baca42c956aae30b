"""How far the latents of a batch are from those that the previous SAE had on the previous LLM checkpoint."""

import torch
from torch import Tensor

from . import ranks
from .sparse import Latents

_LEAST = 0.01  # share of the activations' power; only the latents of an SAE that reconstructs next to nothing have less


def moved(
    centred: Tensor,
    pre: Tensor,
    latents: Tensor | Latents,
    before: Latents,
    new: Tensor | None,
) -> Tensor:
    """Compute `LossTerms.moved`.

    Args:
        centred: Activations without ``b_dec``, ``[batch, d_in]``.
        pre: Pre-activations at the entries of ``before``, ``[nnz]``; in GatedSAE those of the gate, for it decides.
        latents: Those of the batch, dense ``[batch, d_sae]`` or sparse.
        before: Those of the previous SAE at the same tokens; where they are 0 it had none.
        new: Latents that may fire where they did not, bool ``[d_sae]``: those that died and what AuxK revived. When one
            comes back it is another feature, and is marked as one; held to its silence it would come back less.

    Returns:
        A scalar, 0 where there was no latent before, as in a snapshot that has collapsed. With several ranks, its mean
        over them is that of the whole batch.
    """
    selection, values = before
    was = values > 0
    total = ((pre - values).square() * was).sum()
    held = torch.ones(selection.d_sae, device=values.device) if new is None else (~new).float()  # [d_sae]
    if isinstance(latents, Tensor):
        there = latents[selection.rows, selection.columns].float().square() * (held[selection.columns] * was)
        total = total + (latents * latents).sum(dim=0, dtype=torch.float32) @ held - there.sum()
    else:
        elsewhere = ~_among(latents.selection.keys, torch.where(was, selection.keys, -1))
        total = total + (latents.values.square() * (held[latents.selection.columns] * elsewhere)).sum()
    power, size = ranks.average(torch.stack([values.square().sum(), centred.square().sum()]))
    least = (_LEAST * size).clamp_min(torch.finfo(size.dtype).tiny)
    return torch.where(power > 0, total / torch.maximum(power, least), 0.0)


def _among(keys: Tensor, others: Tensor) -> Tensor:
    """Which of the keys, none below 0, are among others, bool ``[n]``. Keys are different, others too but for -1."""
    if not keys.is_cuda:
        return torch.isin(keys, others, assume_unique=True)
    # isin copies a number from the CPU, for which a GPU is waited for
    ordered = others.sort().values
    places = torch.searchsorted(ordered, keys)
    return torch.cat([ordered, ordered.new_full((1,), -1)])[places] == keys
