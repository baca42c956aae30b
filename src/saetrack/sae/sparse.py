"""The few latents that a sparse SAE uses, as a flat list: encode, decode and their gradients at just those.

A TopK step needs one dense product, the pre-activations that decide which latents are used, and that one needs no
gradient and no precision. Everything else, forward and backward, touches only the chosen (activation, latent) pairs.
It is plain PyTorch on any device, or the kernels of `native`, all without atomics: equal inputs give equal bits.
"""

from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from . import native, ranks
from .auxk import DeadLatents, Parameters
from .workspace import Workspace

# Reads two tables row against row without a [nnz, d_in] intermediate. A private op;
# `_row_dots` is the same in public ones, for a PyTorch that no longer has it.
_ROW_DOTS = getattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", None)
_FALLBACK_NUMBERS = 2**21  # 8 MiB of float32: the products that the fallback holds at a time
_PART_NUMBERS = 2**20  # 4 MiB of float32


class Selection:
    """Which latents each activation of a batch uses, in compressed rows.

    Activation n uses the latents ``columns[offsets[n] : offsets[n + 1]]``. The numbers may differ between activations.

    Args:
        columns: Latents, int64 ``[nnz]``, each at most once for one activation.
        offsets: Where each activation's part begins, int64 ``[batch + 1]``.
        d_sae: Number of latents that there are.
    """

    def __init__(self, columns: Tensor, offsets: Tensor, d_sae: int) -> None:
        self.columns = columns
        self.offsets = offsets
        self.d_sae = d_sae

    @classmethod
    def of_equal_counts(cls, indices: Tensor, d_sae: int) -> "Selection":
        """Every activation uses as many latents: those of its row of ``indices``, ``[batch, k]``."""
        offsets, rows = _equal_counts(*indices.shape, indices.device)
        selection = cls(indices.reshape(-1), offsets, d_sae)
        selection.rows = rows
        return selection

    @property
    def batch(self) -> int:
        """Number of activations."""
        return len(self.offsets) - 1

    @cached_property
    def rows(self) -> Tensor:
        """The activation that each entry belongs to, int64 ``[nnz]``."""
        counts = self.offsets.diff()
        activations = torch.arange(self.batch, device=self.columns.device)
        return activations.repeat_interleave(counts, output_size=len(self.columns))

    @property
    def keys(self) -> Tensor:
        """One number for each entry, the same in every selection of these activations, int64 ``[nnz]``."""
        return self.rows * self.d_sae + self.columns

    @cached_property
    def everywhere(self) -> "Selection":
        """That of the activations of all ranks, which have as many each."""
        offsets = torch.cat([self.offsets.new_zeros(1), self._counts_everywhere.cumsum(0)])
        columns = ranks.gather(self.columns.int(), self.entries_of_ranks)
        return Selection(columns.long(), offsets, self.d_sae)

    @cached_property
    def entries_of_ranks(self) -> list[int]:
        """How many entries of `everywhere` are of which rank."""
        counts: list[int] = self._counts_everywhere.view(-1, self.batch).sum(dim=1).tolist()
        return counts

    @cached_property
    def _counts_everywhere(self) -> Tensor:
        return ranks.gather(self.offsets.diff())

    @property
    def order(self) -> Tensor:
        """The entries sorted by latent, and by activation within one: int64 ``[nnz]``."""
        return self._sorted[0]

    @property
    def latent_offsets(self) -> Tensor:
        """Where each latent's part of :attr:`order` begins, int64 ``[d_sae + 1]``."""
        return self._sorted[1]

    @cached_property
    def rows_by_latent(self) -> Tensor:
        """The activations that use each latent, one latent after another, int64 ``[nnz]``."""
        return self.rows.index_select(0, self.order)

    @cached_property
    def columns_by_latent(self) -> Tensor:
        """The latents in the same order, so ascending, int64 ``[nnz]``."""
        latents = torch.arange(self.d_sae, device=self.columns.device)
        return latents.repeat_interleave(self.latent_offsets.diff(), output_size=len(self.columns))

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        if native.sorts(self.columns):
            return native.sort(self.columns.contiguous(), self.d_sae)
        # by a byte at a time, so few bytes are faster
        columns = self.columns.to(torch.int16 if self.d_sae < 2**15 else torch.int32)
        # stable, so that sums over one latent's activations always run in the same order
        columns, order = columns.sort(stable=True)
        latents = torch.arange(self.d_sae + 1, dtype=columns.dtype, device=columns.device)
        return order, torch.searchsorted(columns, latents)


@cache  # for good: a CUDA graph goes on reading what it was recorded with
@torch.inference_mode(mode=False)
def _equal_counts(batch: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`Selection.offsets` and `Selection.rows` where every activation has k latents: the same in every step."""
    rows = torch.arange(batch, device=device).repeat_interleave(k)
    return torch.arange(0, batch * k + 1, k, device=device), rows


class Latents(NamedTuple):
    """Latents of a batch at the entries of a selection; all others are zero.

    Attributes:
        selection: Which entries.
        values: ``[nnz]``.
    """

    selection: Selection
    values: Tensor

    def positive(self) -> "Latents":
        """Those above zero."""
        active = self.values > 0
        ends = torch.cat([active.new_zeros(1, dtype=torch.int64), active.cumsum(0)])[self.selection.offsets]
        selection = Selection(self.selection.columns[active], ends, self.selection.d_sae)
        return Latents(selection, self.values[active])


def encode_at(centred: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, selection: Selection) -> Tensor:
    """Pre-activations of the selected latents only.

    Gradients reach ``W_enc``, ``b_enc`` and ``b_dec``. That of b_dec is ``-W_enc @ grad(b_enc)``, one product of a
    matrix with a vector, where autograd would first make the gradient of ``centred``.

    Args:
        centred: x - b_dec, without a gradient of its own, shape ``[batch, d_in]``.
        W_enc: Encoder, shape ``[d_in, d_sae]``, fastest where ``W_enc.T`` is contiguous.
        b_enc: Shape ``[d_sae]``.
        b_dec: What was subtracted, shape ``[d_in]``; only its gradient matters here.
        selection: Which latents.

    Returns:
        ``(x - b_dec) W_enc + b_enc`` at the selection's entries, in their order, ``[nnz]``.
    """
    values: Tensor = _EncodeAt.apply(centred.detach(), W_enc, b_enc, b_dec, selection)  # type: ignore[no-untyped-call]
    return values


def decode_at(values: Tensor, selection: Selection, W_dec: Tensor) -> Tensor:
    """Sum the decoder rows of the selected latents.

    Args:
        values: Latents at the selection's entries, ``[nnz]``.
        selection: Which latents.
        W_dec: Decoder, shape ``[d_sae, d_in]``.

    Returns:
        ``latents @ W_dec`` for the latents that are ``values`` at the selection and 0 elsewhere, ``[batch, d_in]``.
    """
    x_hat: Tensor = _DecodeAt.apply(values, W_dec, selection)  # type: ignore[no-untyped-call]
    return x_hat


def reconstruct_at(
    centred: Tensor,
    parameters: Parameters,
    selection: Selection,
    pre: Tensor | None,
    dead: DeadLatents | None,
    workspace: Workspace,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """ReLU latents at the selection, what they and what dead latents reconstruct, with one backward pass for all.

    Args:
        centred: x - b_dec, without a gradient of its own, shape ``[batch, d_in]``.
        parameters: W_enc ``[d_in, d_sae]``, b_enc ``[d_sae]``, W_dec ``[d_sae, d_in]`` and b_dec ``[d_in]``.
        selection: Which latents.
        pre: Their pre-activations where they are known, ``[nnz]``; else None.
        dead: Latents to be revived, or None.
        workspace: Lends memory to the gradients of both matrices.

    Returns:
        Latents at the selection's entries, ``[nnz]``; the reconstruction with b_dec, ``[batch, d_in]``; and that of the
        dead latents, without b_dec, or None.
    """
    values: Tensor
    x_hat: Tensor
    revived: Tensor | None
    arguments = centred.detach().contiguous(), *parameters, selection, pre, dead, workspace
    values, x_hat, revived = _ReconstructAt.apply(*arguments)  # type: ignore[no-untyped-call]
    return values, x_hat, revived


def spread(per_latent: Tensor, selection: Selection) -> Tensor:
    """What belongs to each latent, ``[d_sae]``, at the selection's entries, ``[nnz]``."""
    values: Tensor = _Spread.apply(per_latent, selection)  # type: ignore[no-untyped-call]
    return values


class _Spread(torch.autograd.Function):
    """An index whose gradient is a sum in a fixed order."""

    @staticmethod
    def forward(ctx: Any, per_latent: Tensor, selection: Selection) -> Tensor:
        ctx.selection = selection
        return per_latent[selection.columns]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return latent_sums(grad, None, ctx.selection), None


class _EncodeAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, centred: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, selection: Selection) -> Tensor:
        ctx.save_for_backward(centred, W_enc)
        ctx.selection = selection
        return preactivations_at(centred, W_enc, b_enc, selection)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        centred, W_enc = ctx.saved_tensors
        selection = ctx.selection
        if ranks.factors_in_use():
            selection, grad = _everywhere(selection, grad)
            centred = ranks.gather_once(centred)
        # [d_sae, d_in] in memory, so its transpose has the layout of W_enc and becomes `.grad` without a copy
        into_W_enc = latent_sums(grad, centred, selection).T
        into_b_enc = latent_sums(grad, None, selection)
        return None, into_W_enc, into_b_enc, (W_enc @ into_b_enc).neg_(), None


class _DecodeAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, selection: Selection) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.selection = selection
        return activation_sums(values, W_dec, selection)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        grad = grad.contiguous()
        selection = ctx.selection
        into_values = row_dots(grad, W_dec, selection)
        if not ctx.needs_input_grad[1]:
            return into_values, None, None
        if ranks.factors_in_use():
            selection, values = _everywhere(selection, values)
            grad = ranks.gather(grad)
        return into_values, latent_sums(values, grad, selection), None


def _everywhere(selection: Selection, values: Tensor) -> tuple[Selection, Tensor]:
    """The entries of all ranks, and their values divided by the number of ranks, for DDP's gradients are means."""
    entries = selection.entries_of_ranks
    return selection.everywhere, ranks.gather(values, entries).div_(len(entries))


class _ReconstructAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        centred: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        selection: Selection,
        pre: Tensor | None,
        dead: DeadLatents | None,
        workspace: Workspace,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if pre is None:
            pre = preactivations_at(centred, W_enc, b_enc, selection)
        values = pre.relu()
        if native.in_use(values, W_dec):
            x_hat = native.decode(values, W_dec, b_dec, selection.columns, selection.offsets)
        else:
            x_hat = activation_sums(values, W_dec, selection).add_(b_dec)
        ctx.save_for_backward(centred, W_enc, W_dec, values)
        ctx.selection, ctx.dead, ctx.workspace = selection, dead, workspace
        ctx.set_materialize_grads(False)
        return values, x_hat, None if dead is None else dead.reconstruct(centred, W_enc, b_enc, W_dec)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, into_values: Tensor | None, grad: Tensor | None, into_revived: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        centred, W_enc, W_dec, values = ctx.saved_tensors
        selection: Selection = ctx.selection
        grad = torch.zeros_like(centred) if grad is None else grad.contiguous()
        into_b_dec = grad.sum(dim=0)
        if native.in_use(grad, values, W_dec) and not ranks.factors_in_use():
            into_W_enc, into_b_enc, into_W_dec = native.backward(
                centred, grad, W_dec, values, into_values, selection, ctx.workspace
            )
        else:
            into_pre = row_dots(grad, W_dec, selection)
            if into_values is not None:
                into_pre.add_(into_values)
            into_pre.mul_(values > 0)
            inputs = centred
            if ranks.factors_in_use():
                values, (selection, into_pre) = _everywhere(selection, values)[1], _everywhere(selection, into_pre)
                inputs, grad = ranks.gather_once(centred), ranks.gather(grad)
            for_W_enc, for_W_dec = (
                None if grad.is_cuda else ctx.workspace.lend_like(name, W_dec) for name in ("into_W_enc", "into_W_dec")
            )
            into_W_dec = latent_sums(values, grad, selection, for_W_dec)
            # [d_sae, d_in] in memory, so its transpose has the layout of W_enc and becomes `.grad` without a copy
            into_W_enc = latent_sums(into_pre, inputs, selection, for_W_enc)
            into_b_enc = latent_sums(into_pre, None, selection)
        if into_revived is not None:
            ctx.dead.add_gradients_(centred, into_revived, into_W_enc, into_b_enc, into_W_dec)
        into_b_dec.addmv_(W_enc, into_b_enc, alpha=-1)
        return None, into_W_enc.T, into_b_enc, into_W_dec, into_b_dec, None, None, None, None


def preactivations_at(centred: Tensor, W_enc: Tensor, b_enc: Tensor, selection: Selection) -> Tensor:
    """What `encode_at` gives, without gradients."""
    return row_dots(centred, W_enc.T, selection).add_(b_enc.index_select(0, selection.columns))


def row_dots(left: Tensor, right: Tensor, selection: Selection) -> Tensor:
    """Dot products of the selected pairs of rows: ``sum_d left[row, d] * right[column, d]``, ``[nnz]``.

    Args:
        left: One row for each activation, ``[batch, d]``.
        right: One row for each latent, ``[d_sae, d]``.
        selection: Which pairs.
    """
    left, right = left.contiguous(), right.contiguous()
    if native.in_use(left, right):
        return native.row_dots(left, right, selection)
    # One latent after another: its row stays in the cache while those of the activations, which are fewer, go by.
    rows = selection.rows_by_latent
    if _ROW_DOTS is None:
        dots = _row_dots(left, rows, right, selection.columns_by_latent)
    else:
        dots = _ROW_DOTS(right, left, rows, selection.latent_offsets[:-1], selection.columns_by_latent, 0, -1)
    return torch.empty_like(dots).index_copy_(0, selection.order, dots)


def _row_dots(left: Tensor, rows: Tensor, right: Tensor, columns: Tensor) -> Tensor:
    entries = max(1, _FALLBACK_NUMBERS // left.shape[1])
    parts = zip(torch.split(rows, entries), torch.split(columns, entries), strict=True)
    return torch.cat([torch.linalg.vecdot(left[n], right[j]) for n, j in parts])


def activation_sums(values: Tensor, table: Tensor, selection: Selection) -> Tensor:
    """For each activation, the sum of its latents' rows: ``sum_j value_j * table[column_j]``, ``[batch, d]``."""
    return _bag(table.detach().contiguous(), selection.columns, selection.offsets, values.detach())


def latent_sums(values: Tensor, table: Tensor | None, selection: Selection, out: Tensor | None = None) -> Tensor:
    """For each latent, the sum over the activations that use it.

    Args:
        values: Weights of the entries, ``[nnz]``.
        table: One row for each activation, ``[batch, d]``; None sums the values alone.
        selection: Which entries.
        out: Memory for the sums over a table; None for new memory.

    Returns:
        ``sum_n value_n * table[n]``, ``[d_sae, d]``, or ``sum_n value_n``, ``[d_sae]``.
    """
    values = values.detach()
    offsets = selection.latent_offsets
    if table is None:
        # index_add would sum in an order of its own on a GPU
        return _bag(values[:, None], selection.order, offsets, None).squeeze(1)
    table, rows, weights = table.detach(), selection.rows_by_latent, values.index_select(0, selection.order)
    if out is None:
        return _bag(table, rows, offsets, weights)
    # No operator writes there, but parts are copied there from the cache. New memory of this size is zeroed page by
    # page in every step, which takes twice as long as the sums and the copies.
    latents = max(1, _PART_NUMBERS // table.shape[1])
    bounds = [*offsets[:-1:latents].tolist(), len(rows)]
    for i, part in enumerate(torch.split(out, latents)):
        entries, own = slice(*bounds[i : i + 2]), offsets[i * latents : i * latents + len(part) + 1]
        part.copy_(_bag(table, rows[entries], own - own[0], weights[entries]))
    return out


def _bag(table: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
    """Sums of rows, each with its weight: bag j has ``rows[offsets[j] : offsets[j + 1]]``."""
    return functional.embedding_bag(
        rows, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
