"""The kernels of `native` on a GPU, in Triton, which comes with PyTorch's builds for one.

A step in plain PyTorch is some 150 launches there, which take a processor longer than the GPU needs for them. These
take the place of its inner loops. No atomics: equal inputs give equal bits.
"""

# Triton has no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from .sparse import Selection

_TILE = 8192  # numbers of a table that one program reads at a time: 64 registers of 128 threads
_GROUP = 8
_WIDEST = 4096  # numbers in a row that `_select` compares at once; in more it is slower than PyTorch's topk
_TINY = torch.finfo(torch.float32).tiny


def row_dots(left: Tensor, right: Tensor, selection: "Selection") -> Tensor:
    """``left[row] . right[latent]`` at the selection's entries, ``[nnz]``; as `native.row_dots`."""
    _require_contiguous(left, right)
    dots = left.new_empty(len(selection.columns))
    _row_dots[(len(left),)](left, right, selection.columns, selection.offsets, dots, left.shape[1], **_tiles(left))
    return dots


@triton.jit
def _row_dots(left, right, columns, offsets, dots, d, ENTRIES: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    x = tl.load(left + row * d + at, mask=at < d, other=0.0)
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    for first in range(begin, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        there = entry < end
        latent = tl.load(columns + entry, mask=there, other=0)
        inside = there[:, None] & (at < d)[None, :]
        table = tl.load(right + latent[:, None] * d + at[None, :], mask=inside, other=0.0)
        tl.store(dots + entry, tl.sum(table * x[None, :], axis=1), mask=there)


def decode(values: Tensor, table: Tensor, bias: Tensor, columns: Tensor, offsets: Tensor) -> Tensor:
    """As `native.decode`."""
    _require_contiguous(values, table, bias, columns, offsets)
    out = table.new_empty(len(offsets) - 1, table.shape[1])
    _decode[(len(out),)](values, table, bias, columns, offsets, out, out.shape[1], **_tiles(out))
    return out


@triton.jit
def _decode(values, table, bias, columns, offsets, out, d, ENTRIES: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    total = tl.load(bias + at, mask=at < d, other=0.0)
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    for first in range(begin, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        there = entry < end
        latent = tl.load(columns + entry, mask=there, other=0)
        value = tl.load(values + entry, mask=there, other=0.0)
        inside = there[:, None] & (at < d)[None, :]
        rows = tl.load(table + latent[:, None] * d + at[None, :], mask=inside, other=0.0)
        total += tl.sum(rows * value[:, None], axis=0)
    tl.store(out + row * d + at, total, mask=at < d)


def backward(
    centred: Tensor,
    grad: Tensor,
    W_dec: Tensor,
    values: Tensor,
    into_values: Tensor | None,
    selection: "Selection",
) -> tuple[Tensor, Tensor, Tensor]:
    """As `native.backward`."""
    _require_contiguous(centred, grad, W_dec, values)
    into_W_enc, into_W_dec = torch.empty_like(W_dec), torch.empty_like(W_dec)
    into_b_enc = W_dec.new_empty(len(W_dec))
    own = values if into_values is None else into_values.contiguous()
    _backward[(len(W_dec),)](
        centred,
        grad,
        W_dec,
        values,
        own,
        selection.rows_by_latent,
        selection.order,
        selection.latent_offsets,
        into_W_enc,
        into_b_enc,
        into_W_dec,
        W_dec.shape[1],
        HAS_OWN=into_values is not None,
        **_tiles(W_dec),
    )
    return into_W_enc, into_b_enc, into_W_dec


@triton.jit
def _backward(
    centred,
    grad,
    W_dec,
    values,
    into_values,
    rows,
    order,
    offsets,
    into_W_enc,
    into_b_enc,
    into_W_dec,
    d,
    HAS_OWN: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    direction = tl.load(W_dec + latent * d + at, mask=at < d, other=0.0)
    encoder = tl.zeros([WIDTH], dtype=tl.float32)
    decoder = tl.zeros([WIDTH], dtype=tl.float32)
    bias = tl.zeros([ENTRIES], dtype=tl.float32)
    begin, end = tl.load(offsets + latent), tl.load(offsets + latent + 1)
    for first in range(begin, end, ENTRIES):
        place = first + tl.arange(0, ENTRIES)
        there = place < end
        inside = there[:, None] & (at < d)[None, :]
        row = tl.load(rows + place, mask=there, other=0)
        entry = tl.load(order + place, mask=there, other=0)
        value = tl.load(values + entry, mask=there, other=0.0)
        error = tl.load(grad + row[:, None] * d + at[None, :], mask=inside, other=0.0)
        decoder += tl.sum(error * value[:, None], axis=0)
        into_pre = tl.sum(error * direction[None, :], axis=1)
        if HAS_OWN:
            into_pre += tl.load(into_values + entry, mask=there, other=0.0)
        into_pre = tl.where(there & (value > 0), into_pre, 0.0)
        x = tl.load(centred + row[:, None] * d + at[None, :], mask=inside, other=0.0)
        encoder += tl.sum(x * into_pre[:, None], axis=0)
        bias += into_pre
    tl.store(into_W_enc + latent * d + at, encoder, mask=at < d)
    tl.store(into_W_dec + latent * d + at, decoder, mask=at < d)
    tl.store(into_b_enc + latent, tl.sum(bias, axis=0))


def remove_parallel_(table: Tensor, grad: Tensor) -> None:
    """As `native.remove_parallel_`."""
    _require_contiguous(table, grad)
    _remove_parallel[(len(table),)](table, grad, table.shape[1], _TINY, WIDTH=_width(table))


@triton.jit
def _remove_parallel(table, grad, d, tiny, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    place = tl.program_id(0).to(tl.int64) * d + at
    row = tl.load(table + place, mask=at < d, other=0.0)
    change = tl.load(grad + place, mask=at < d, other=0.0)
    along = tl.sum(change * row, axis=0) / tl.maximum(tl.sum(row * row, axis=0), tiny)
    tl.store(grad + place, change - along * row, mask=at < d)


def normalise_(table: Tensor) -> None:
    """As `native.normalise_`."""
    _require_contiguous(table)
    _normalise[(len(table),)](table, table.shape[1], _TINY, WIDTH=_width(table))


@triton.jit
def _normalise(table, d, tiny, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    place = tl.program_id(0).to(tl.int64) * d + at
    row = tl.load(table + place, mask=at < d, other=0.0)
    tl.store(table + place, row / tl.maximum(tl.sqrt(tl.sum(row * row, axis=0)), tiny), mask=at < d)


def largest(pre: Tensor, k: int) -> Tensor | None:
    """As `native.largest`: the k groups with the largest maxima hold the k largest, and are found in the same way."""
    if k * _GROUP > _WIDEST:
        return None
    # Read as integers, floats from zero up keep their order and the others stay below.
    return _largest(pre.view(torch.int16), k)


def _largest(keys: Tensor, k: int) -> Tensor | None:
    rows, d = keys.shape
    step = d // _GROUP  # a group is every step-th number, so that the maximum runs along memory
    narrow = d % _GROUP != 0 or step < 4 * k
    if narrow and d > _WIDEST:
        return None
    out = torch.empty(rows, k, dtype=torch.int64, device=keys.device)
    if narrow:
        best, group, width = out, 0, d  # `best` is not read
    else:
        found = _largest(keys.view(rows, _GROUP, step).amax(dim=1), k)  # [rows, k]
        if found is None:
            return None
        best, group, width = found, _GROUP, _GROUP * k
    size = triton.next_power_of_2(width)
    _select[(rows,)](keys, best, out, d, k, step, width, GROUP=group, SIZE=size, num_warps=max(1, min(8, size // 256)))
    return out


@triton.jit
def _select(keys, best, out, d, k, step, width, GROUP: tl.constexpr, SIZE: tl.constexpr):
    """The k largest of a row, among all of it, or among the numbers of its best groups."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SIZE)
    there = i < width
    at = i
    if GROUP > 0:
        at = tl.load(best + row * k + i // GROUP, mask=there, other=0).to(tl.int32) + (i % GROUP) * step
    key = tl.load(keys + row * d + at, mask=there, other=-1).to(tl.int32)
    least, over = 0, 32768
    # the largest key that k of the row reach, or 0 where fewer are above zero
    for _ in range(15):
        middle = (least + over) // 2
        enough = tl.sum((key >= middle).to(tl.int32), axis=0) >= k
        least = tl.where(enough, middle, least)
        over = tl.where(enough, over, middle)
    above = key > least
    lowest = tl.where(least == 0, -32768, least)  # below zero the choice is arbitrary
    equal = there & (key <= least) & (key >= lowest)
    n_above = tl.sum(above.to(tl.int32), axis=0)
    # both counts run in one sum: at most 4,096 each
    counts = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), axis=0)
    tl.store(out + row * k + (counts & 65535) - 1, at.to(tl.int64), mask=above)
    place = n_above + (counts >> 16) - 1
    tl.store(out + row * k + place, at.to(tl.int64), mask=equal & (place < k))


def _require_contiguous(*tensors: Tensor) -> None:
    """The kernels count numbers from the first of a tensor; they know no strides."""
    assert all(tensor.is_contiguous() for tensor in tensors)


def _width(table: Tensor) -> int:
    return int(triton.next_power_of_2(table.shape[1]))


def _tiles(table: Tensor) -> dict[str, Any]:
    """How many entries a program takes at a time, and how wide it reads."""
    width = _width(table)
    return {"ENTRIES": max(1, min(16, _TILE // width)), "WIDTH": width, "num_warps": 4}
