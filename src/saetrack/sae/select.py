"""Which latents an activation uses: pre-activations whose only purpose is to be compared."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import native
from .sparse import Selection

_CHUNK_NUMBERS = 2**25  # 64 MiB of bfloat16: the pre-activations that are held at a time
_GROUP = 4  # 8 is as fast from 16,384 latents on, slower below
_SAME_ORDER = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


class Workspace:
    """Buffers that are kept from step to step.

    The C library hands a freed buffer of this size back to the system, which zeroes it page by page when it is asked
    for again: filling a new 256 MB took four times as long as filling a kept one. A copy of an SAE begins with none.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor; the next call with the same name gives the same memory again."""
        size = torch.Size(shape).numel()
        kept = self._buffers.get(name)
        if kept is None or kept.numel() < size or (kept.dtype, kept.device) != (dtype, device):
            kept = self._buffers[name] = torch.empty(size, dtype=dtype, device=device)
        return kept[:size].view(shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Workspace":
        return Workspace()

    def __getstate__(self) -> dict[str, Any]:
        return {"_buffers": {}}


@torch.no_grad()
def select_topk(
    centred: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype, workspace: Workspace
) -> Selection:
    """The k latents with the largest pre-activations of each activation.

    In bfloat16 a latent may be taken for another whose pre-activation is within three digits of its own. Among those
    below zero, which no SAE uses, the choice is arbitrary.

    Args:
        centred: x - b_dec, shape ``[batch, d_in]``.
        W_enc: Encoder, shape ``[d_in, d_sae]``.
        b_enc: Shape ``[d_sae]``.
        k: How many, 1 to d_sae.
        dtype: In which the pre-activations are computed and compared.
        workspace: Holds the pre-activations of a chunk.

    Returns:
        k latents for each activation, in no particular order.
    """
    indices = torch.empty(len(centred), k, dtype=torch.int64, device=centred.device)
    for rows, pre in _preactivations(centred, W_enc, b_enc, dtype, workspace):
        indices[rows] = largest(pre, k)
    return Selection.of_equal_counts(indices, len(b_enc))


@torch.no_grad()
def select_batch_topk(
    centred: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype, workspace: Workspace
) -> Selection:
    """The ``k * batch`` latents with the largest pre-activations of the whole batch.

    Arguments and precision are those of :func:`select_topk`. The batch's largest are looked for among the
    largest few of each activation: of every row 4 k, and twice as many until no row can hide another.

    Returns:
        Latents in increasing order of activation, a different number for each.
    """
    batch, d_sae = len(centred), len(b_enc)
    width = 4 * k
    while True:
        width = min(width, d_sae)
        indices = torch.empty(batch, width, dtype=torch.int64, device=centred.device)
        values = torch.empty(batch, width, dtype=dtype, device=centred.device)
        for rows, pre in _preactivations(centred, W_enc, b_enc, dtype, workspace):
            indices[rows] = largest(pre, width)
            values[rows] = pre.gather(1, indices[rows])
        # below zero the choice within a row is arbitrary, and no SAE uses it
        found, positions = values.relu_().flatten().topk(k * batch, sorted=False)
        if width == d_sae or not bool((values.amin(dim=1) > found.min()).any()):
            break
        width *= 2
    positions = positions.sort().values
    counts = torch.bincount(positions // width, minlength=batch)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Selection(indices.flatten()[positions], offsets, d_sae)


def _preactivations(
    centred: Tensor, W_enc: Tensor, b_enc: Tensor, dtype: torch.dtype, workspace: Workspace
) -> Iterator[tuple[slice, Tensor]]:
    """Pre-activations of a chunk of activations at a time, ``[rows, d_sae]``, in memory that the next one reuses."""
    d_sae = len(b_enc)
    weights = W_enc.T  # [d_sae, d_in]
    if dtype != W_enc.dtype:
        weights = workspace.buffer("W_enc", (d_sae, len(W_enc)), dtype, W_enc.device).copy_(weights)
    bias, inputs = b_enc.to(dtype), centred.to(dtype)
    size = max(1, _CHUNK_NUMBERS // d_sae)
    for start in range(0, len(inputs), size):
        part = inputs[start : start + size]
        pre = workspace.buffer("pre", (len(part), d_sae), dtype, inputs.device)
        yield slice(start, start + len(part)), torch.addmm(bias, part, weights.T, out=pre)


def largest(pre: Tensor, k: int) -> Tensor:
    """Where the k largest of each row are, ``[rows, k]``, in no particular order.

    Among values below zero the choice is arbitrary.
    """
    found = native.largest(pre, k)
    if found is not None:
        return found
    if pre.device.type != "cpu":
        return pre.topk(k, dim=1, sorted=False).indices
    # Read as integers, floats from zero up keep their order and the others stay below; integers compare faster.
    return _largest_by_groups(pre.view(_SAME_ORDER[pre.dtype]), k)


def _largest_by_groups(pre: Tensor, k: int) -> Tensor:
    """The k largest of a row lie in the k groups with the largest maxima, which are found in the same way.

    ``topk`` walks through all of a row with 12 bytes for each number; a maximum over groups only reads.
    """
    rows, d = pre.shape
    if d % _GROUP or d // _GROUP < 4 * k:
        return pre.topk(k, dim=1, sorted=False).indices
    step = d // _GROUP  # a group is every step-th number, so that the maximum runs along memory
    best = _largest_by_groups(pre.view(rows, _GROUP, step).amax(dim=1), k)  # [rows, k]
    candidates = best[:, :, None] + torch.arange(0, d, step, device=pre.device)  # [rows, k, _GROUP]
    candidates = candidates.view(rows, -1)
    return candidates.gather(1, pre.gather(1, candidates).topk(k, dim=1, sorted=False).indices)
