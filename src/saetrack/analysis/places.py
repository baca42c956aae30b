"""By what the snapshots of a track are told apart, and what to call them in a sentence."""

from __future__ import annotations

from collections.abc import Sequence


def share_a_step(steps: Sequence[int]) -> bool:
    """Whether snapshots share an LLM step, as in a null chain: they are told apart by their place then.

    Example:
        >>> share_a_step([0, 8]), share_a_step([0, 0])
        (False, True)
    """
    return len(set(steps)) < len(steps)


def place_names(steps: Sequence[int]) -> list[str]:
    """The name of each snapshot: its LLM step or, where snapshots share one as in a null chain, its place.

    Example:
        >>> place_names([0, 8]), place_names([0, 0])
        (['LLM step 0', 'LLM step 8'], ['place 0 of the chain', 'place 1 of the chain'])
    """
    if share_a_step(steps):
        return [f"place {place} of the chain" for place in range(len(steps))]
    return [f"LLM step {step}" for step in steps]
