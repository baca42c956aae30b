"""Training on several processes: who forms which gradient, and what Lightning's DDP is to leave alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from saetrack.sae import Exchange, use_exchange

if TYPE_CHECKING:
    from saetrack.training.module import SAEModule


def share_gradients(module: SAEModule, trainer: Trainer, batch_size: int) -> None:
    """Choose how the ranks come to equal gradients, before DDP wraps the module.

    Of a sparse SAE they exchange what the gradients are made of, unless a batch has more activations than the
    dictionary has latents: then the gradients are no larger, and DDP averages them.

    Args:
        module: Has its SAEs.
        trainer: The trainer.
        batch_size: Activations in an optimizer step, over all ranks.

    Raises:
        ValueError: If several processes are to share a step in another way than DDP's, or cannot share a batch.
    """
    if trainer.world_size == 1:
        use_exchange("nothing")
        return
    if not isinstance(trainer.strategy, DDPStrategy):
        name = type(trainer.strategy).__name__
        raise ValueError(
            f"trainer.strategy is {name}, but only DDP is known to give right gradients; set `trainer.strategy: ddp`."
        )
    if batch_size % trainer.world_size:
        raise ValueError(
            f"data.batch_size is {batch_size} activations over all processes, which {trainer.world_size} processes "
            f"cannot share equally; choose a multiple of {trainer.world_size}."
        )
    exchange = exchange_for(module, batch_size)
    use_exchange(exchange)
    # b_dec, which every loss reaches by a dense way as well, stays with DDP; averaging an average does nothing to it,
    # so a PyTorch that no longer knows this private method would be slower and not wrong
    weights = {"W_enc", "b_enc", "W_dec"} if exchange == "factors" else set()
    mine = [name for name, _ in module.named_parameters() if name.rpartition(".")[2] in weights]
    # every rank counts the features for itself, from what all of them saw
    counted = [name for name, _ in module.named_buffers() if name.startswith("features.")]
    leave_alone: Callable[..., None] = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    leave_alone(module, [*mine, *counted])


def exchange_for(module: SAEModule, batch_size: int) -> Exchange:
    """What several ranks exchange."""
    saes = [module.sae(hookpoint) for hookpoint in module.hookpoints]
    return "factors" if all(sae.sparse_gradients and batch_size <= sae.d_sae for sae in saes) else "gradients"
