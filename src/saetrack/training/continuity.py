"""Keeping a feature the same feature while its SAE is trained on the next LLM checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Continuity:
    """How strongly, and for how long in a stage, latents are held to what they were at the LLM checkpoint before.

    The loss gets ``weight * sae.continuity(x, latents_before)``, where the latents before are those of the previous
    snapshot on the previous LLM checkpoint at the same tokens: another LLM in memory and another forward for as
    long as it lasts. Nothing is added in the first stage, nor to a ``scratch`` start.
    """

    weight: float = 0.1
    """Weight of the term; 0 turns it off."""
    hold: float = 1.0
    """Share of a stage for which the weight is whole; it then falls linearly."""
    end: float = 1.0
    """Share of a stage at which the weight reaches zero, at least ``hold``."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"model.continuity.weight is {self.weight}; it must be a finite number of at least 0.")
        if not 0 <= self.hold <= self.end <= 1:
            raise ValueError(
                f"model.continuity.hold ({self.hold}) and model.continuity.end ({self.end}) are shares of a stage; "
                "expected 0 <= hold <= end <= 1."
            )

    def weight_at(self, share: float) -> float:
        """The weight when ``share`` of the stage's budget is done.

        Example:
            >>> fading = Continuity(weight=0.2, hold=0.5, end=1.0)
            >>> [round(fading.weight_at(share), 3) for share in (0.0, 0.5, 0.75, 1.0)]
            [0.2, 0.2, 0.1, 0.0]
        """
        if share <= self.hold:
            return self.weight
        return self.weight * max(0.0, (self.end - share) / max(self.end - self.hold, 1e-9))
