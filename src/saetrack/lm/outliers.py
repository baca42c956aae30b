"""Activations of outlier norm, such as attention sinks: found by the median norm of their LLM checkpoint."""

import math

import numpy as np
import scipy.sparse
import torch
from torch import Tensor


def norm_limit(x: Tensor, multiple: float | None) -> float:
    """The norm over which activations are outliers: a multiple of the median norm.

    Args:
        x: Activations that the median is taken of, shape ``[n, d_in]``.
        multiple: How many medians; None sets no limit.

    Returns:
        In the units of ``x``; infinite without a limit.

    Example:
        >>> import torch
        >>> norm_limit(torch.tensor([[3.0, 4.0], [0.0, 5.0], [300.0, 400.0]]), 10)
        50.0
    """
    return math.inf if multiple is None else multiple * x.double().norm(dim=1).median().item()


def within(x: Tensor, limit: float) -> Tensor | None:
    """Which activations ``[n, d_in]`` are no outliers, ``[n]``; None for all where there is no limit."""
    return None if math.isinf(limit) else x.norm(dim=-1) <= limit


def within_all(*masks: Tensor | None) -> Tensor | None:
    """Where every mask of `within` holds, ``[n]``; None for all where none of them has a limit."""
    limited = [mask for mask in masks if mask is not None]
    return torch.stack(limited).all(dim=0) if limited else None


def take(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of a mask; all where it is None."""
    return x if mask is None else x[mask]


def spread(latents: scipy.sparse.csr_array, mask: Tensor | None) -> scipy.sparse.csr_array:
    """The latents of what was taken, back at their rows; the rows that were left out have none.

    Args:
        latents: Shape ``[number of True in mask, d_sae]``.
        mask: Shape ``[n]``, or None where nothing was left out.

    Returns:
        Shape ``[n, d_sae]``.

    Example:
        >>> import torch
        >>> spread(scipy.sparse.csr_array([[1.0, 2.0]]), torch.tensor([False, True])).toarray().tolist()
        [[0.0, 0.0], [1.0, 2.0]]
    """
    if mask is None:
        return latents
    counts = np.zeros(len(mask) + 1, dtype=latents.indptr.dtype)
    counts[1:][mask.cpu().numpy()] = np.diff(latents.indptr)
    parts = (latents.data, latents.indices, np.cumsum(counts, dtype=latents.indptr.dtype))
    return scipy.sparse.csr_array(parts, shape=(len(mask), latents.shape[1]))
