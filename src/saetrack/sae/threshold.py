"""What the SAEs that infer with a threshold share."""

from typing import Any

from torch import Tensor, nn


def above_threshold(pre: Tensor, threshold: Tensor) -> Tensor:
    """Keep what is above the threshold, which is never negative.

    Args:
        pre: Pre-activations, shape ``[..., d_sae]``.
        threshold: One for each latent, shape ``[d_sae]``.

    Returns:
        Latents, shape ``[..., d_sae]``.
    """
    # a product, so that NaN stays NaN and a diverged SAE shows; relu, so that no latent is -0.0
    return pre.relu() * (pre > threshold)


def refuse_negative_thresholds(sae: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuse weights with a threshold below zero or NaN; a pre-hook of ``load_state_dict``.

    Below zero, negative pre-activations would pass and become latents.

    Raises:
        ValueError: If there is one; the message counts them.
    """
    threshold = state_dict.get(f"{prefix}threshold")
    if threshold is not None and not (threshold >= 0).all():
        bad = int((~(threshold >= 0)).sum())
        raise ValueError(
            f"{bad} of {len(threshold)} thresholds to be loaded into the {type(sae).__name__} are negative or NaN; "
            "they must be at least 0. The weights are damaged or of another kind: restore them from a copy."
        )
