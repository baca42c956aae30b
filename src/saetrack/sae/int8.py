"""Pre-activations from products of 8-bit numbers, in PyTorch on a CPU with VNNI: half the time of bfloat16's.

They are good enough to name a few more latents than are wanted, among which float32 decides (`select`). The product is
part of PyTorch's quantisation for Intel's instructions, under a private name; without it there is bfloat16.
"""

from bisect import bisect_right
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from .workspace import Workspace

_CHUNK_NUMBERS = 2**22  # 8 MiB of bfloat16: what is multiplied is compared while it is in the cache
_CACHED_NUMBERS = 2**19  # 2 MiB of float32
_LARGEST = 127


def is_faster(batch: int, d_in: int, d_sae: int, k: int) -> bool:
    """Whether candidates from here and their float32 values cost less than a choice in bfloat16.

    Packing the weights has to be worth it, and so has choosing twice. On two cores of Zen 4 a step with k 32, batch
    4,096 and 16,384 x 512 weights took 0.8 of the time; at sizes that are refused here it took 1.02 to 1.6 of it.
    """
    return batch >= 2048 and d_in >= 256 and d_in * d_sae >= 2**21 and d_sae >= 128 * k and has_product()


@cache
def has_product() -> bool:
    """Whether PyTorch has the product and this CPU has VNNI for it, and no AMX, with which bfloat16 is as fast."""
    names = ("qlinear_prepack", "qlinear_pointwise")
    asks = ("_is_vnni_supported", "_is_amx_tile_supported")  # private names too; one that is missing means "no"
    has_vnni, has_amx = (bool(getattr(torch.cpu, ask, bool)()) for ask in asks)
    return has_vnni and not has_amx and all(hasattr(torch.ops.onednn, name) for name in names)


def preactivations(
    centred: Tensor, weights: Tensor, bias: Tensor, workspace: Workspace
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pre-activations of a few activations at a time.

    Both factors are rounded to 255 levels: the weights of each latent by their largest number, the activations by that
    of a chunk of those of similar size, for the product knows one scale for all that it is given.

    Args:
        centred: x - b_dec, float32, ``[batch, d_in]``.
        weights: W_enc^T, float32, ``[d_sae, d_in]``.
        bias: Float32, ``[d_sae]``.
        workspace: Holds the 8-bit weights.

    Yields:
        Which activations, int64 ``[rows]``, and ``(x - b_dec) W_enc + b_enc`` for them, bfloat16, ``[rows, d_sae]``.
    """
    smooth = smoothing(centred)
    packed, scales = _packed(weights, smooth, workspace)
    # NaN counts as the largest of all, so a latent of bad weights is chosen, and shows
    scales, bias = torch.where(scales.isfinite(), scales, 0.0), torch.where(scales.isfinite(), bias, torch.nan)
    factors = packed, scales, torch.zeros(len(scales), dtype=torch.int64)  # the last are the zero points
    inputs = centred / smooth
    sizes, order = _sizes(inputs).sort()
    inputs = inputs.index_select(0, order)
    for rows in similar(sizes.tolist(), max(1, _CHUNK_NUMBERS // len(scales))):
        scale = sizes[rows.stop - 1].item() / _LARGEST or 1.0
        levels = (inputs[rows] / scale).round_()
        yield order[rows], _product(levels, scale, factors, bias)


def smoothing(centred: Tensor) -> Tensor:
    """What activations are divided by and weights multiplied with before rounding, ``[d_in]``.

    A direction in which activations are large would take the precision of all others; half of it goes to the weights.
    Xiao et al. 2023, "SmoothQuant" (arXiv 2211.10438), equation 4 with the activations' part alone.
    """
    smooth = torch.maximum(centred.amax(dim=0), -centred.amin(dim=0)).sqrt()
    return torch.where((smooth > 0) & smooth.isfinite(), smooth, 1.0)


def similar(sizes: list[float], most: int) -> Iterator[slice]:
    """Parts of an ascending list, of at most ``most`` numbers, none of them more than twice the part's first.

    Example:
        >>> list(similar([0.0, 0.0, 1.0, 1.5, 2.5, 2.6], most=10))
        [slice(0, 2, None), slice(2, 4, None), slice(4, 6, None)]
    """
    start = 0
    while start < len(sizes):
        stop = min(start + most, bisect_right(sizes, 2 * sizes[start], lo=start + 1))
        yield slice(start, stop)
        start = stop


def _packed(weights: Tensor, smooth: Tensor, workspace: Workspace) -> tuple[Tensor, Tensor]:
    """The weights in 8 bits as the product wants them, and each latent's scale, ``[d_sae]``."""
    levels = workspace.buffer("int8", tuple(weights.shape), torch.int8, weights.device)
    scales = torch.empty(len(weights))
    rows = max(1, _CACHED_NUMBERS // weights.shape[1])
    parts = (torch.split(tensor, rows) for tensor in (weights, levels, scales))
    for part, into, scale in zip(*parts, strict=True):
        smoothed = part * smooth
        sizes = _sizes(smoothed)
        scale.copy_(torch.where(sizes == 0, 1.0, sizes / _LARGEST))
        into.copy_(smoothed.div_(scale[:, None]).round_())
    return torch.ops.onednn.qlinear_prepack(levels, None), scales


def _sizes(rows: Tensor) -> Tensor:
    """The largest absolute number of each row; in PyTorch 2.13 a norm takes twenty times as long."""
    return torch.maximum(rows.amax(dim=1), -rows.amin(dim=1))


def _product(levels: Tensor, scale: float, weights: tuple[Tensor, Tensor, Tensor], bias: Tensor) -> Tensor:
    """``scale * levels weights^T + bias`` in bfloat16; the product wants its inputs without a sign."""
    zero = _LARGEST + 1
    inputs = levels.add_(zero).to(torch.uint8)
    pre: Tensor = torch.ops.onednn.qlinear_pointwise(
        inputs, scale, zero, *weights, bias, 1.0, 0, torch.bfloat16, "none", [], ""
    )
    return pre
