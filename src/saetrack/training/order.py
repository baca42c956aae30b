"""In which order LLM checkpoints are trained on, and from which snapshot each stage begins.

A track grows outward from where it began: to later LLM steps from the last snapshot, to earlier ones from the first,
and to one in between from the nearest earlier snapshot. So a series in one direction is a chain, and one that began in
the middle, or was extended, a tree whose stages still lie between neighbours of the time of their training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from saetrack.lm.checkpoints import LLMCheckpoint
from saetrack.lm.selection import pick_steps

Direction = Literal["forward", "backward", "both"]


def reachable(
    chosen: list[LLMCheckpoint], available: list[LLMCheckpoint], start: int | None, direction: Direction, named: bool
) -> list[LLMCheckpoint]:
    """The LLM checkpoints of a track, by increasing step: those chosen, on the side of its start that is visited.

    Args:
        chosen: Those that `scheduler.steps` takes, by increasing step.
        available: What the source has, by increasing step.
        start: LLM step of the snapshot that the track begins with; None when it begins with a fresh SAE.
        direction: Which side of the start is visited.
        named: Whether the user named each step, so that none may be left out in silence.

    Raises:
        ValueError: If the source lacks the start's step, a named step is on the other side, or no step is left.
    """
    if start is None:
        if direction == "both":
            raise ValueError(
                "scheduler.direction is both, but there is nothing to go both ways from; name a snapshot as "
                "`model.start`, or choose forward or backward."
            )
        return chosen
    try:
        begin = pick_steps(available, [start])
    except ValueError as error:
        raise ValueError(f"model.start: {error}") from error
    others = [c for c in chosen if c.step != start]
    kept = [c for c in others if direction in ("both", "forward" if c.step > start else "backward")]
    left_out = [c.step for c in others if c not in kept]
    if named and left_out:
        raise ValueError(
            f"scheduler.steps names {left_out[0]}, which does not lie {direction} from the start at LLM step {start}; "
            "take it out, or set `scheduler.direction: both`."
        )
    if not kept:
        raise ValueError(
            f"Nothing is left to train {direction} from model.start at LLM step {start}; add LLM steps to "
            "`scheduler.steps`, or set `scheduler.direction`."
        )
    return sorted([*kept, *begin], key=lambda c: c.step)


def training_order(wanted: Sequence[LLMCheckpoint], visited: Sequence[int]) -> list[LLMCheckpoint]:
    """The LLM checkpoints in the order of their stages.

    Args:
        wanted: Those of the track, by increasing step.
        visited: Steps whose stages are done or begun, in their order, or that where a new track begins; each is wanted.

    Example:
        >>> series = [LLMCheckpoint("llm", None, step) for step in (0, 1, 2, 4, 10)]
        >>> [c.step for c in training_order(series, [10])]
        [10, 4, 2, 1, 0]
        >>> [c.step for c in training_order(series, [2])]
        [2, 4, 10, 1, 0]
        >>> [c.step for c in training_order(series, [1, 4])]
        [1, 4, 2, 10, 0]
    """
    by_step = {checkpoint.step: checkpoint for checkpoint in wanted}
    missing = sorted(by_step.keys() - set(visited))
    later = [step for step in missing if step > min(visited)]
    earlier = [step for step in missing if step < min(visited)]
    return [by_step[step] for step in (*visited, *later, *reversed(earlier))]


def source_of(steps: Sequence[int], position: int) -> int | None:
    """Which stage's snapshot the stage at a position begins from.

    Args:
        steps: LLM steps in the order of their stages.
        position: Of the stage.

    Returns:
        The position of the nearest earlier LLM step among the stages before it, else of the nearest later one; None
        for the first stage.

    Example:
        >>> [source_of([2, 10, 4, 1, 0], position) for position in range(5)]
        [None, 0, 0, 0, 3]
    """
    earlier = [i for i in range(position) if steps[i] < steps[position]]
    if earlier:
        return max(earlier, key=lambda i: steps[i])
    return min(range(position), key=lambda i: steps[i], default=None)


def branch_ahead(ordered: Sequence[LLMCheckpoint], position: int) -> list[LLMCheckpoint]:
    """The stages from a position on that lead away from one and the same snapshot, in one direction.

    Example:
        >>> series = [LLMCheckpoint("llm", None, step) for step in (2, 4, 10, 1, 0)]
        >>> [c.step for c in branch_ahead(series, 1)], [c.step for c in branch_ahead(series, 3)]
        ([4, 10], [1, 0])
    """
    source = source_of([c.step for c in ordered], position) if position < len(ordered) else None
    if source is None:
        return []
    since = ordered[source].step
    forward = ordered[position].step > since
    taken: list[LLMCheckpoint] = []
    for checkpoint in ordered[position:]:
        if (checkpoint.step > since) != forward:
            break
        taken.append(checkpoint)
    return taken
