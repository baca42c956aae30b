"""Whether an analysis' result is of its track as it is now, and the track whole: it grows, and may lose a snapshot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .plugins import discover

if TYPE_CHECKING:
    from saetrack.track import Track


def outdated(track: Track, settings: Mapping[str, Any]) -> str | None:
    """What of a track a result is of, where that is not all of the track as it is now.

    Args:
        track: The track, opened for reading.
        settings: Of the result. One of 0.1.0 does not say what it is of, and counts as current.

    Returns:
        A phrase such as "made on 4 of the track's 10 snapshots (LLM steps 0 to 16)"; None for a current result.
    """
    now, equal = track.whole.steps, track.whole.equal_weights
    of = settings.get("steps", now)
    if of == now:
        other = settings.get("equal_weights", equal) != equal
        return "made when other LLM checkpoints than now counted as one" if other else None
    steps = f"LLM steps {of[0]} to {of[-1]}" if len(of) > 1 else f"LLM step {', '.join(map(str, of))}"
    there = (Counter(of) & Counter(now)).total()  # the snapshots of a null chain share a step
    if there == len(of):
        return f"made on {there} of the track's {len(now)} snapshots ({steps})"
    others = f" and {len(now) - there} others" if len(now) > there else ""
    return f"made on {len(of)} snapshots ({steps}), of which the track has {there}{others}"


def missing(track: Track) -> list[int]:
    """Numbers of the snapshots that must have been there, for later ones are, and are not."""
    here = {snapshot.number for snapshot in track.whole}
    return [number for number in range(max(here, default=0)) if number not in here]


def command_for(track: Track, name: str) -> str:
    """The command that runs an analysis again.

    Args:
        track: The track.
        name: The folder of its result, ``drift``, ``drift-kept`` or ``file.Class``.
    """
    analysis = name.removesuffix("-kept")
    plugin = discover().get(analysis)
    cls = analysis if plugin is None else plugin.class_path.rpartition(".")[2]
    kept = " --only_kept true" if analysis != name else ""
    return f"saetrack analyze {track.path} --analyses+={cls}{kept}"
