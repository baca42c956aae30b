"""Latents limited by the batch: the k * batch largest of all in training, those above a threshold in inference."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from .auxk import DeadLatents, auxiliary_loss
from .base import INITIAL_ROWS, SAE, LossTerms, squared_error, variance_of
from .firing import firing
from .select import select_batch_topk
from .sparse import Latents, Selection
from .threshold import above_threshold, refuse_negative_thresholds

THRESHOLD_RATE = 0.1
"""Share of the newest batch in the running mean, which so reaches back about 10 batches. A batch of thousands fixes its
smallest kept latent well; what a longer mean adds is the lag behind the SAE, worst in short stages."""


class BatchSelectionSAE(SAE):
    """An SAE with k active latents an activation on average, shared out over the batch.

    In training the ``k * batch`` largest positive latents of the whole batch are kept (under DDP, of the rank's part
    of it). Inference may not depend on what else is in a batch: it keeps the latents above ``threshold``, the running
    mean of the smallest latent that training batches kept.

    ``threshold`` is a float32 buffer ``[d_sae]`` of equal values, which is the form that SAELens reads as its
    ``jumprelu``. Training never reads it, so it goes on from a snapshot's state as it is.

    Args:
        d_in: Width of the activations.
        expansion_factor: Number of latents for each dimension of the activations.
        k: How many latents are active for one activation on average, 1 to d_sae.
        aux_coefficient: Weight of the auxiliary loss that revives dead latents; 0 turns it off.
        aux_k: How many dead latents reconstruct the error of one activation. None: d_in // 2.

    Raises:
        ValueError: If k does not lie between 1 and d_sae.
    """

    sparse_gradients = True
    threshold: Tensor

    def __init__(self, d_in: int, expansion_factor: int, k: int, aux_coefficient: float, aux_k: int | None) -> None:
        super().__init__(d_in, expansion_factor, aux_coefficient, aux_k)
        self.k = self._checked_k(k)
        self.register_buffer("threshold", torch.zeros(self.d_sae))
        self.register_load_state_dict_pre_hook(refuse_negative_thresholds)  # type: ignore[no-untyped-call]

    @abstractmethod
    def latents_and_reconstructions(
        self, centred: Tensor, selection: Selection, dead: DeadLatents | None
    ) -> tuple[Latents, list[Tensor], Tensor | None]:
        """Encode and reconstruct a batch in every way that the loss asks for.

        Args:
            centred: x - b_dec, without a gradient of its own, ``[batch, d_in]``.
            selection: The latents of the batch that were chosen.
            dead: Latents to be revived, or None.

        Returns:
            The latents; reconstructions, each ``[batch, d_in]``, the last of them that of all latents; and what the
            dead ones reconstruct, or None.
        """

    def activate(self, pre: Tensor) -> Tensor:
        """Keep the latents above the threshold."""
        return above_threshold(pre, self.threshold)

    def activate_batch(self, pre: Tensor) -> Tensor:
        """Keep the ``k * batch`` largest positive latents of the batch."""
        latents = pre.relu()
        values, positions = latents.flatten().topk(self.k * len(pre), sorted=False)  # [k * batch]
        return torch.zeros_like(latents).flatten().scatter(0, positions, values).view_as(latents)

    @torch.no_grad()
    def initialise(self, x: Tensor, generator: torch.Generator) -> None:
        """Start as :meth:`SAE.initialise` does, with the threshold that the data give."""
        super().initialise(x, generator)
        smallest = smallest_positive(self.activate_batch(self.preactivations(x.to(self.b_dec)[:INITIAL_ROWS])))
        self.threshold.copy_(smallest.nan_to_num(0.0).expand(self.d_sae))

    def loss(
        self, x: Tensor, dead: Tensor | None = None, before: Latents | None = None, new: Tensor | None = None
    ) -> LossTerms:
        """Compute the loss in the class's docstring; see :meth:`SAE.loss`."""
        self._check_width(x)
        with self._full_precision():
            centred = (x - self.b_dec).detach()  # [batch, d_in]
            selection = select_batch_topk(centred, self.W_enc, self.b_enc, self.k, self.precision, self.workspace)
            to_revive = self._dead_latents(dead)
            latents, (*narrower, x_hat), revived = self.latents_and_reconstructions(centred, selection, to_revive)
            variance = variance_of(x)
            loss = mse = squared_error(x, x_hat) / variance
            terms = {"mse": mse.detach()}
            if narrower:
                prefixes = torch.stack([squared_error(x, part) for part in narrower]).sum() / variance
                terms["prefix_mse"] = prefixes.detach()
                loss = loss + prefixes
            auxk = auxiliary_loss(x, x_hat, revived, to_revive)
            moved = self._moved(centred, latents, before, new)
        fired, l0 = firing(latents)
        return LossTerms(
            loss=loss + self.aux_coefficient * auxk,
            fired=fired,
            l0=l0,
            x_hat=x_hat.detach(),
            terms={**terms, "auxk": auxk.detach()},
            smallest_kept=smallest_positive(latents.values.detach()),
            moved=moved,
        )

    @torch.no_grad()
    def after_step_(self, smallest_kept: Tensor | None = None) -> None:
        """Bring the decoder rows back to unit norm, and the threshold towards the smallest latent of the batch."""
        super().after_step_()
        if smallest_kept is not None:
            # NaN, from a batch in which nothing was positive on some rank, leaves the threshold alone on all of them
            target = torch.where(smallest_kept.isnan(), self.threshold, smallest_kept)
            self.threshold.lerp_(target, THRESHOLD_RATE)

    def saelens_config(self) -> dict[str, Any]:
        """Give the part of SAELens's cfg.json that belongs to the architecture: a fixed threshold is a JumpReLU."""
        return {"architecture": "jumprelu"}


def smallest_positive(latents: Tensor) -> Tensor:
    """The smallest of the positive latents, a scalar; NaN if there is none.

    Example:
        >>> smallest_positive(torch.tensor([[0.0, 3.0], [0.5, 0.0]])).item()
        0.5
    """
    smallest = torch.where(latents > 0, latents, torch.inf).min()
    return torch.where(smallest.isinf(), torch.nan, smallest)
