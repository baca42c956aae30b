"""What the processes of a run tell each other within a step, so that all have the gradients of the whole batch.

A sparse step's gradients are sums over few (activation, latent) pairs. What these sums are made of, a row for each
activation and a number for each pair, is far less than the gradients of a large dictionary: so the ranks exchange that,
and each forms the sums of the whole batch for itself.
"""

from typing import Literal

import torch
from torch import Tensor
from torch import distributed as dist

Exchange = Literal["nothing", "gradients", "factors"]

_exchange: Exchange = "nothing"
_gathered: tuple[Tensor, int, Tensor] | None = None


def use_exchange(exchange: Exchange) -> None:
    """Choose what a step of this process exchanges with the other ranks.

    Args:
        exchange: ``nothing`` with one process. ``gradients``: only what the loss is normalised by; DDP averages the
            gradients. ``factors``: that, and what gradients of sparse steps are made of; they come out of a backward
            pass averaged over the ranks, and DDP must leave them alone.
    """
    global _exchange, _gathered
    _exchange, _gathered = exchange, None


def factors_in_use() -> bool:
    """Whether gradients of sparse steps are to be those of all ranks."""
    return _exchange == "factors"


def average(x: Tensor) -> Tensor:
    """Mean over the ranks, the same bits on all of them; ``x`` itself with one process. It has no gradient."""
    if _exchange == "nothing":
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total.div_(dist.get_world_size())


def total_variance(x: Tensor) -> Tensor:
    """``sum_n ||x_n - mean||^2`` over a batch ``[n, d]``: what squared errors are normalised by.

    With several ranks, the batch's divided by their number, so that the ranks' mean loss is that of the whole batch.
    """
    return average(torch.linalg.vector_norm(x - average(x.mean(dim=0))).square())


def gather(x: Tensor, lengths: list[int] | None = None) -> Tensor:
    """Concatenate the tensors of all ranks, ``[n, ...]``, in the order of the ranks.

    Args:
        x: This rank's.
        lengths: First dimension of each rank's; None where all are equal.
    """
    lengths = lengths or [len(x)] * dist.get_world_size()
    width = max(lengths)
    # collectives want equal shapes
    sent = x if len(x) == width else torch.cat([x, x.new_zeros(width - len(x), *x.shape[1:])])
    everywhere = x.new_empty(len(lengths) * width, *x.shape[1:])
    parts = list(everywhere.view(len(lengths), width, *x.shape[1:]).unbind())
    dist.all_gather(parts, sent.contiguous())
    if min(lengths) == width:
        return everywhere
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def gather_once(x: Tensor) -> Tensor:
    """As `gather` for equal shapes; asked for the same memory again, give the same tensor again."""
    global _gathered
    if _gathered is None or (_gathered[0].data_ptr(), _gathered[0].shape, _gathered[1]) != (
        x.data_ptr(),
        x.shape,
        x._version,
    ):
        _gathered = (x, x._version, gather(x))
    return _gathered[2]
