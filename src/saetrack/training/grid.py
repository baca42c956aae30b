"""Which LLM checkpoints a track visits: those asked for, or those that the LLM's change makes worth visiting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

from saetrack.lm.checkpoints import LLMCheckpoint
from saetrack.lm.selection import Selection, pick_steps


def select_checkpoints(available: list[LLMCheckpoint], steps: list[int] | str | None) -> list[LLMCheckpoint]:
    """The LLM checkpoints to visit, by increasing step.

    Args:
        available: What the source has, by increasing step.
        steps: The steps wanted, a text as ``Selection`` reads it, or None for all.

    Raises:
        ValueError: If a wanted step is not there, or the text takes none.
    """
    try:
        return pick_steps(available, steps) if isinstance(steps, list) else Selection(steps or "all").of(available)
    except ValueError as error:
        raise ValueError(f"scheduler.steps: {error}") from error


@dataclass(frozen=True)
class Choice:
    """Why a stage follows another, as its snapshot records it.

    Args:
        index: How many LLM checkpoints were skipped.
        max_rise: The bound.
        rises: Relative rise of FVU on each LLM checkpoint that was looked at, by its step, in the order of looking.
        skipped: Steps of those skipped.
    """

    index: int
    max_rise: float
    rises: dict[int, float]
    skipped: list[int]

    @property
    def facts(self) -> dict[str, Any]:
        """Plain values, for json and for the resume file."""
        return asdict(self)


def rise_from(
    here: LLMCheckpoint, fvu_on: Callable[[LLMCheckpoint], Mapping[str, float]]
) -> Callable[[LLMCheckpoint], float]:
    """How far the SAEs' FVU rises from one LLM checkpoint to another, as a share, the largest over hookpoints.

    Args:
        here: What the SAEs were trained on; its FVU is taken when a rise is first asked for.
        fvu_on: FVU by hookpoint.
    """
    fvu_here = cache(partial(fvu_on, here))

    def rise_on(checkpoint: LLMCheckpoint) -> float:
        return max(fvu / fvu_here()[hookpoint] - 1 for hookpoint, fvu in fvu_on(checkpoint).items())

    return rise_on


def farthest_within(
    ahead: Sequence[LLMCheckpoint], rise_on: Callable[[LLMCheckpoint], float], max_rise: float
) -> Choice:
    """The farthest LLM checkpoint on which the SAE is still good enough, or the next one where none is.

    Looks 1, 2, 4, ... checkpoints beyond the next, then halves the interval between the last one within the bound
    and the first beyond it: a look costs the load of an LLM, and what is near is looked at first. It supposes that
    the FVU rises with distance; where it falls again, it may stop short, never go too far.

    Args:
        ahead: The LLM checkpoints to come, at least one.
        rise_on: Relative rise of the SAE's FVU on one of them.
        max_rise: The bound.

    Example:
        >>> series = [LLMCheckpoint("llm", None, step) for step in (2, 3, 4, 5, 6, 7)]
        >>> choice = farthest_within(series, lambda c: c.step / 10, max_rise=0.55)
        >>> series[choice.index].step, choice.rises
        (5, {3: 0.3, 5: 0.5, 7: 0.7, 6: 0.6})
    """
    rises: dict[int, float] = {}

    def within(index: int) -> bool:
        rises[ahead[index].step] = rise = rise_on(ahead[index])
        return rise <= max_rise

    good, bad, stride = 0, len(ahead), 1  # `good` may be taken; nothing from `bad` on is
    while bad - good > 1:
        index = min(good + stride, bad - 1)
        if within(index):
            good, stride = index, 2 * stride
        else:
            bad = index
        if bad < len(ahead):
            stride = (bad - good) // 2
    return Choice(good, max_rise, rises, [checkpoint.step for checkpoint in ahead[:good]])
