"""An SAE that has diverged: in a step, and whose fault it is, or by the end of a stage."""

import math

import torch
from torch import Tensor

from saetrack.sae import SAE, Kernels, use_exchange, use_kernels


def refuse_divergence(hookpoint: str, sae: SAE, loss: float, kernels: Kernels, x: Tensor, dead: Tensor) -> None:
    """Raise if the loss of a batch is no number, and say whether the reference gives one.

    Args:
        hookpoint: Where the SAE reads.
        sae: As it was when it gave the loss.
        loss: Of the batch.
        kernels: Those in use.
        x: The batch, ``[batch, d_in]``.
        dead: Latents that AuxK was to revive, bool ``[d_sae]``.

    Raises:
        ValueError: If the loss is NaN or infinite.
    """
    if math.isfinite(loss):
        return
    precision = sae.precision
    sae.precision = torch.float32
    use_kernels("pytorch")
    use_exchange("nothing")  # the other ranks may not be here, and this one goes no further
    try:
        with torch.no_grad():
            reference = float(sae.loss(x, dead).loss)
    finally:
        sae.precision = precision
        use_kernels(kernels, x.device.type)
    if math.isfinite(reference):
        fast = f"model.precision {str(precision).removeprefix('torch.')} and model.kernels {kernels}"
        raise ValueError(
            f"The loss of {hookpoint} is {loss} with {fast}, but {reference:.4g} in float32 with PyTorch's kernels. "
            "Set `model.precision: float32` and `model.kernels: pytorch`, and report it."
        )
    raise ValueError(
        f"The SAE of {hookpoint} has diverged: its loss is {loss}. No snapshot of this stage was written. Lower "
        "`model.optimizer.lr`, or set `trainer.gradient_clip_val: 1.0`."
    )


def refuse_diverged(hookpoint: str, step: int, fvu: float, before: float) -> None:
    """Raise if a stage has ended worse than the mean activation and than it began.

    Args:
        hookpoint: Where the SAE reads.
        step: The LLM's.
        fvu: At the end of the stage.
        before: At its beginning.

    Raises:
        ValueError: If it has, or ``fvu`` is NaN.
    """
    if math.isnan(fvu) or fvu > max(1.0, before):
        raise ValueError(
            f"The SAE of {hookpoint} has diverged on LLM step {step}: FVU {fvu:.4g}, from {before:.4g}. No snapshot "
            "was written. Lower `model.optimizer.lr`, or set `trainer.gradient_clip_val: 1.0`."
        )
