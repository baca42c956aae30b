"""Which latents of a batch fired, and how many."""

import torch
from torch import Tensor

from .sparse import Latents


def firing(latents: Tensor | Latents) -> tuple[Tensor, Tensor]:
    """Which latents, never negative, fired at all, bool ``[d_sae]``, and how many did for one activation on average."""
    if isinstance(latents, Latents):
        selection, active = latents.selection, latents.values.detach() > 0
        fired = torch.zeros(selection.d_sae + 1, dtype=torch.bool, device=active.device)
        fired.index_fill_(0, torch.where(active, selection.columns, selection.d_sae), True)
        return fired[:-1], active.sum() / selection.batch
    latents = latents.detach()
    return latents.amax(dim=0) > 0, count_positive(latents) / len(latents)


def count_positive(latents: Tensor) -> Tensor:
    """How many latents, never negative, are above zero, a scalar.

    On a CPU a sum of booleans takes twenty times as long as ``count_nonzero``, which in turn takes twenty times as long
    on floats; on a GPU that writes other tensors of their size, and takes seven times as long as a norm.
    """
    if latents.is_cuda:
        wide = torch.promote_types(latents.dtype, torch.float32)  # bfloat16 would count to 256
        number: Tensor = torch.linalg.vector_norm(latents, ord=0, dtype=wide)
        return number
    return torch.count_nonzero(latents > 0)
