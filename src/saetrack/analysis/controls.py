"""The controls of a track that an analysis may compare it with; one made otherwise is refused, not averaged in."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saetrack.track import Track


def one_step_controls(track: Track, kind: str) -> dict[int, list[Track]]:
    """The controls that repeat one stage, by the position of that stage.

    Args:
        track: The track that they calibrate.
        kind: ``null`` or ``replica``.

    Returns:
        Position to controls; snapshot 0 of each is the track's at the position before.

    Raises:
        ValueError: If a control begins with another snapshot than the track's, or was made by another recipe.
    """
    found: dict[int, list[Track]] = {}
    for control in track.controls(kind):
        position = control.facts["control"]["position"]
        if position is None:
            continue
        _refuse_foreign(track, control, position - 1)
        found.setdefault(position, []).append(control)
    return found


def null_chains(track: Track) -> list[Track]:
    """The null chains: the track's first snapshot trained again and again on the first LLM checkpoint.

    Args:
        track: The track that they calibrate.

    Raises:
        ValueError: If a chain begins with another snapshot than the track's, or was made by another recipe.
    """
    chains = [control for control in track.controls("null") if control.facts["control"]["position"] is None]
    for chain in chains:
        _refuse_foreign(track, chain, 0)
    return chains


def scratch_controls(track: Track) -> dict[str, list[Track]]:
    """The fresh SAEs at LLM checkpoints of the track, by budget (``first`` or ``next``), a control for each seed.

    Args:
        track: The track that they calibrate.

    Raises:
        ValueError: If a control was made by another recipe.
    """
    found: dict[str, list[Track]] = {}
    for control in track.controls("scratch"):
        _refuse_foreign(track, control, None)
        budget = "first" if control.facts["control"]["first_budget"] else "next"
        found.setdefault(budget, []).append(control)
    return found


def _refuse_foreign(track: Track, control: Track, start: int | None) -> None:
    """Refuse another recipe, and another snapshot at the beginning than the track has at position ``start``."""
    if track.training_recipe != control.training_recipe:
        what = f"was made by another recipe than {track.path}"
    elif start is not None and {**control[0].metadata, "position": start} != track[start].metadata:
        what = f"begins with another snapshot than {track.path} has at position {start}"
    else:
        return
    kind = control.facts["control"]["kind"]
    raise ValueError(
        f"The control {control.path} {what}, so it cannot calibrate it. Remove it and run "
        f"`saetrack control {track.path} --kind {kind}`."
    )
