"""What to call the snapshots of a track in a sentence."""

from __future__ import annotations

from collections.abc import Sequence


def place_names(steps: Sequence[int]) -> list[str]:
    """The name of each snapshot: its LLM step or, where snapshots share one as in a null chain, its place.

    Example:
        >>> place_names([0, 8]), place_names([0, 0])
        (['LLM step 0', 'LLM step 8'], ['place 0 of the chain', 'place 1 of the chain'])
    """
    if len(set(steps)) < len(steps):
        return [f"place {place} of the chain" for place in range(len(steps))]
    return [f"LLM step {step}" for step in steps]
