"""Matrices with further columns, so that biases and sums are part of a product instead of passes of their own."""

import torch
from torch import Tensor

# The fast products of a GPU ask for rows of 16 bytes; others take 2.5 times as long.
_ALIGNED = 8


def beside(matrix: Tensor, columns: tuple[Tensor, ...], dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """``matrix`` ``[n, d]`` and further columns ``[n]`` after it, in another dtype; on a GPU then columns of zeros.

    Args:
        matrix: What comes first.
        columns: What comes after it.
        dtype: Of the result.
        out: Memory for it, of `width_beside` columns; None for new.
    """
    n, d = matrix.shape
    width = width_beside(matrix, len(columns))
    joined = torch.empty(n, width, dtype=dtype, device=matrix.device) if out is None else out
    joined[:, :d].copy_(matrix)
    for i, column in enumerate(columns):
        joined[:, d + i].copy_(column)
    joined[:, d + len(columns) :].zero_()
    return joined


def width_beside(matrix: Tensor, columns: int) -> int:
    """How many columns `beside` gives."""
    width = matrix.shape[1] + columns
    return -(-width // _ALIGNED) * _ALIGNED if matrix.is_cuda else width
