"""Matrices with further columns, so that biases and sums are part of a product instead of passes of their own."""

import torch
from torch import Tensor

from .workspace import Workspace

# The fast products of a GPU ask for rows of 16 bytes; others take 2.5 times as long.
_ALIGNED = 8


def beside(
    matrix: Tensor, columns: tuple[Tensor, ...], dtype: torch.dtype, workspace: Workspace | None = None
) -> Tensor:
    """``matrix`` ``[n, d]`` and further columns ``[n]`` after it, in another dtype; on a GPU then columns of zeros.

    Args:
        matrix: What comes first.
        columns: What comes after it.
        dtype: Of the result.
        workspace: Keeps its memory for the next; None for new memory.
    """
    n, d = matrix.shape
    width = d + len(columns)
    if matrix.is_cuda:
        width = -(-width // _ALIGNED) * _ALIGNED
    if workspace is None:
        joined = torch.empty(n, width, dtype=dtype, device=matrix.device)
    else:
        joined = workspace.buffer("beside", (n, width), dtype, matrix.device)
    joined[:, :d].copy_(matrix)
    for i, column in enumerate(columns):
        joined[:, d + i].copy_(column)
    joined[:, d + len(columns) :].zero_()
    return joined
