"""Other forms of continuity than the package's `SAE._moved`: what is compared, and how much each feature counts."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saetrack.sae import SAE
from saetrack.sae.sparse import Latents, Selection, encode_at

if TYPE_CHECKING:
    from warm_start_series import Trained

Moved = Callable[[Tensor, Latents, Latents | None, Tensor | None], Tensor | None]
Form = Callable[[SAE, "Trained"], Moved]


def _weighted(
    sae: SAE, weights: Tensor, new_weights: Tensor, *, latents_only: bool = False, dead_too: bool = False
) -> Moved:
    """`SAE._moved` for sparse latents, each feature with a weight of its own.

    Args:
        sae: The SAE that is trained.
        weights: ``[d_sae]``, where a latent was active before.
        new_weights: ``[d_sae]``, where it is active and was not.
        latents_only: Whether a latent that fell out of the k largest counts as 0, without a gradient.
        dead_too: Whether what was dead is held to its silence, where the package lets it fire.
    """

    def moved(centred: Tensor, latents: Latents, before: Latents | None, new: Tensor | None) -> Tensor | None:
        if before is None:
            return None
        selection, values = before
        now = encode_at(centred, sae.W_enc, sae.encoder_bias, sae.b_dec, selection)
        if latents_only:
            now = now.relu() * torch.isin(selection.keys, latents.selection.keys, assume_unique=True)
        weight = weights[selection.columns]
        held = new_weights if new is None or dead_too else new_weights * ~new
        elsewhere = torch.isin(latents.selection.keys, selection.keys, assume_unique=True, invert=True)
        added = (held[latents.selection.columns] * latents.values.square())[elsewhere].sum()
        return ((weight * (now - values).square()).sum() + added) / (weight * values.square()).sum().clamp_min(1e-12)

    return moved


def latents(sae: SAE, before: "Trained") -> Moved:
    """Latents instead of pre-activations."""
    ones = torch.ones(sae.d_sae)
    return _weighted(sae, ones, ones, latents_only=True)


def dead_too(sae: SAE, before: "Trained") -> Moved:
    """Features that were dead are held too: firing again costs what any firing costs that was not there before."""
    ones = torch.ones(sae.d_sae)
    return _weighted(sae, ones, ones, dead_too=True)


def not_new(sae: SAE, before: "Trained") -> Moved:
    """Only where a latent was active before: firing elsewhere costs nothing."""
    return _weighted(sae, torch.ones(sae.d_sae), torch.zeros(sae.d_sae))


def equal(sae: SAE, before: "Trained") -> Moved:
    """Every feature counts the same, however often and however strongly it fires."""
    weight = _power(before) ** -1
    return _weighted(sae, weight, weight)


def between(sae: SAE, before: "Trained") -> Moved:
    """Half-way between the package's and `equal`, geometrically."""
    weight = _power(before) ** -0.5
    return _weighted(sae, weight, weight)


def half(sae: SAE, before: "Trained") -> Moved:
    """The package's own, on half of each batch."""
    return _on_a_part(sae, 2)


def quarter(sae: SAE, before: "Trained") -> Moved:
    """The package's own, on a quarter of each batch."""
    return _on_a_part(sae, 4)


FORMS: dict[str, Form] = {f.__name__: f for f in (latents, dead_too, not_new, equal, between, half, quarter)}


def _on_a_part(sae: SAE, parts: int) -> Moved:
    def first(of: Latents, batch: int) -> Latents:
        selection, values = of
        end = int(selection.offsets[batch])
        return Latents(
            Selection(selection.columns[:end], selection.offsets[: batch + 1], selection.d_sae), values[:end]
        )

    def moved(centred: Tensor, latents: Latents, before: Latents | None, new: Tensor | None) -> Tensor | None:
        if before is None:
            return None
        batch = len(centred) // parts
        return SAE._moved(sae, centred[:batch], first(latents, batch), first(before, batch), new)

    return moved


def _power(before: "Trained") -> Tensor:
    """Mean square of each latent, but at least that of ten firings: nobody shall be held without limit."""
    squares = torch.from_numpy(before.latents.multiply(before.latents).sum(axis=0)).float().reshape(-1)
    counts = before.frequency.float() * before.latents.shape[0]
    typical = squares.sum() / counts.sum()
    return squares.clamp_min(10 * float(typical)) / before.latents.shape[0]
