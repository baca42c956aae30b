"""Which latents an activation uses: pre-activations whose only purpose is to be compared."""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import int8, native
from .columns import beside
from .sparse import Selection, preactivations_at
from .workspace import Workspace

_CHUNK_NUMBERS = 2**25  # 64 MiB of bfloat16: the pre-activations that are held at a time
_CHUNK_NUMBERS_GPU = 2**26  # 128 MiB, for fewer launches
_SPARE = 8  # candidates beyond k that 8-bit numbers name at least; a quarter of k where that is more
_GROUP = 4  # 8 is as fast from 16,384 latents on, slower below
_SAMPLE = 64  # activations by which `select_positive` decides whether latents are few
_FEW = 1 / 32  # share of the latents up to which a sparse step is faster
_SAME_ORDER = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


@torch.no_grad()
def select_topk(
    centred: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype, workspace: Workspace
) -> tuple[Selection, Tensor | None]:
    """The k latents with the largest pre-activations of each activation.

    In lower precision a latent may be taken for another whose pre-activation is within three digits of its own. Among
    those below zero, which no SAE uses, the choice is arbitrary.

    Args:
        centred: x - b_dec, shape ``[batch, d_in]``.
        W_enc: Encoder, shape ``[d_in, d_sae]``.
        b_enc: Shape ``[d_sae]``.
        k: How many, 1 to d_sae.
        dtype: In which the pre-activations are computed and compared; bfloat16 also allows 8-bit numbers to name
            candidates, of which float32 takes the largest.
        workspace: Holds the pre-activations of a chunk.

    Returns:
        k latents for each activation, in no particular order, and their pre-activations in float32, ``[batch * k]``,
        where the choice has needed them.
    """
    d_sae = len(b_enc)
    if dtype == torch.bfloat16 and W_enc.dtype == torch.float32 and W_enc.device.type == "cpu":
        candidates = _candidates(centred, W_enc, b_enc, k, workspace)
        if candidates is not None:
            values = preactivations_at(centred, W_enc, b_enc, Selection.of_equal_counts(candidates, d_sae))
            best = values.view(candidates.shape).topk(k, dim=1, sorted=False)
            return Selection.of_equal_counts(candidates.gather(1, best.indices), d_sae), best.values.flatten()
    indices = torch.empty(len(centred), k, dtype=torch.int64, device=centred.device)
    for rows, pre in _preactivations(centred, W_enc, b_enc, dtype, workspace):
        indices[rows] = largest(pre, k)
    return Selection.of_equal_counts(indices, d_sae), None


def _candidates(centred: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, workspace: Workspace) -> Tensor | None:
    """The k latents and a few more that are largest by products of 8-bit numbers; None where bfloat16 is as fast."""
    (batch, d_in), d_sae = centred.shape, len(b_enc)
    width = min(d_sae, k + max(_SPARE, k // 4))
    found = native.candidates(centred, W_enc.T, b_enc, width, workspace)
    if found is None and int8.is_faster(batch, d_in, d_sae, k):
        found = torch.empty(batch, width, dtype=torch.int64)
        for rows, pre in int8.preactivations(centred, W_enc.T, b_enc, workspace):
            found[rows] = largest(pre, width)
            del pre  # the next is made in its memory
    return found


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


@torch.no_grad()
def select_positive(
    centred: Tensor, W_enc: Tensor, bias: Tensor, dtype: torch.dtype, workspace: Workspace
) -> Selection | None:
    """The latents with pre-activations above zero, if they are few.

    In bfloat16 some from just below zero are among them, so that none is missed; their float32 values tell.

    Args:
        centred: x - b_dec, shape ``[batch, d_in]``.
        W_enc: Encoder, shape ``[d_in, d_sae]``.
        bias: What is added, shape ``[d_sae]``; with a threshold taken off, the latents above it are found.
        dtype: In which the pre-activations are computed.
        workspace: Holds the pre-activations of a chunk.

    Returns:
        Latents in increasing order of activation, or None where a dense step is faster: in a sample of the batch they
        are more than a share of 1/32.
    """
    batch, d_sae = len(centred), len(bias)
    if dtype != W_enc.dtype:
        # ten standard deviations of what rounding both factors does to a product
        size = centred.square().mean().sqrt()
        bias = bias + 2**-6 * size * torch.linalg.vector_norm(W_enc, dim=0)
    sample = centred[:: max(1, batch // _SAMPLE)]
    if torch.count_nonzero(sample @ W_enc + bias > 0) > len(sample) * d_sae * _FEW:
        return None
    found = []
    for part, pre in _preactivations(centred, W_enc, bias, dtype, workspace):
        found.append(_where(pre > 0) + part.start * d_sae)
    positions = torch.cat(found)
    rows = positions.div(d_sae, rounding_mode="floor")
    counts = torch.bincount(rows, minlength=batch)
    return Selection(positions - rows * d_sae, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), d_sae)


def _where(mask: Tensor) -> Tensor:
    """Positions of the few ``True`` in a mask, in its order: eight are asked at a time, as one integer."""
    mask = mask.flatten()
    if len(mask) % 8:
        return mask.nonzero().squeeze(1)
    words = mask.view(torch.int64).nonzero().squeeze(1)
    within = mask.view(-1, 8)[words].nonzero()  # [found, 2]
    return words[within[:, 0]] * 8 + within[:, 1]


def _preactivations(
    centred: Tensor, W_enc: Tensor, b_enc: Tensor, dtype: torch.dtype, workspace: Workspace
) -> Iterator[tuple[slice, Tensor]]:
    """Pre-activations of a chunk of activations at a time, ``[rows, d_sae]``, in memory that the next one reuses.

    In lower precision, where the weights are copied anyway, the bias is two more columns of them, what it is rounded to
    and what that leaves, for inputs that are 1: added by ``addmm`` it took a ninth of the time.
    """
    d_sae = len(b_enc)
    low = dtype != W_enc.dtype
    if low:
        rounded = b_enc.to(dtype)
        weights = beside(W_enc.T, (rounded, b_enc - rounded), dtype, workspace)
        inputs = beside(centred, (centred.new_ones(len(centred)),) * 2, dtype)
    else:
        weights, inputs = W_enc.T, centred
    size = max(1, (_CHUNK_NUMBERS_GPU if W_enc.is_cuda else _CHUNK_NUMBERS) // d_sae)
    for start in range(0, len(inputs), size):
        part = inputs[start : start + size]
        pre = workspace.buffer("pre", (len(part), d_sae), dtype, inputs.device)
        product = torch.mm(part, weights.T, out=pre) if low else torch.addmm(b_enc, part, weights.T, out=pre)
        yield slice(start, start + len(part)), product


def largest(pre: Tensor, k: int) -> Tensor:
    """Where the k largest of each row are, ``[rows, k]``, in no particular order.

    Among values below zero the choice is arbitrary.
    """
    found = native.largest(pre, k)
    if found is not None:
        return found
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
