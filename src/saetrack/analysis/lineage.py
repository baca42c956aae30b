"""What lies between two snapshots of a track: the stages on the way from one to the other.

A track that was trained in one direction is a chain, and between neighbours lies one stage. One that began in the
middle, or was extended, is a tree: the way leads up to the snapshot that both descend from, and down again. An SAE at
one end is compared with that at the other over all stages on the way, whichever direction they were trained in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .drift_rows import flags, transport_into

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from saetrack.track import Snapshot, Track

    Floats = NDArray[np.floating]


def stages_between(track: Track, a: Snapshot, b: Snapshot) -> tuple[list[Snapshot], list[Snapshot]]:
    """The snapshots whose stages lie on the way from ``a`` to ``b``.

    Args:
        track: The track.
        a: Where the way begins.
        b: Where it ends.

    Returns:
        Those whose stages are gone backwards, from ``a`` on, and those gone forwards, to ``b``.
    """
    up, down = _descent(track, a), _descent(track, b)
    shared = {s.number for s in up} & {s.number for s in down}
    return [s for s in up if s.number not in shared], [s for s in down if s.number not in shared][::-1]


def ends_of_stage(track: Track, a: Snapshot, b: Snapshot) -> tuple[Snapshot, Snapshot]:
    """The snapshots between which the stage from ``a`` to ``b`` lies, whose weights say what it changed.

    They are ``a`` and ``b`` themselves, except where one of them stands for LLM checkpoints of equal weights: the next
    stage began from the last of their snapshots, and training once more in between is no part of it.
    """
    if track.before(b) is a:
        return track.began_from(b) or a, b
    if track.before(a) is b:
        return a, track.began_from(a) or b
    return a, b


def rotation_between(track: Track, a: Snapshot, b: Snapshot) -> Floats | None:
    """The rotation ``[d_in, d_in]`` that leads from the activations at ``a`` to those at ``b``.

    The ``transport`` maps of the stages on the way, each the other way round (its transpose) where its stage is gone
    backwards; None where one began otherwise.
    """
    up, down = stages_between(track, a, b)
    maps = [transport_into(snapshot) for snapshot in (*up, *down)]
    whole: Floats | None = None
    for index, rotation in enumerate(maps):
        if rotation is None:
            return None
        step = rotation.T if index < len(up) else rotation
        whole = step if whole is None else whole @ step
    return whole


def revived_between(track: Track, a: Snapshot, b: Snapshot) -> NDArray[np.bool_]:
    """Which features were revived in a stage on the way, ``[d_sae]``: they are not the same at both ends."""
    up, down = stages_between(track, a, b)
    revived = np.zeros(len(a.features), dtype=bool)
    for snapshot in (*up, *down):
        revived |= flags(snapshot, "revived")
    return revived


def correlation_between(track: Track, a: Snapshot, b: Snapshot) -> Floats:
    """The functional correlation of each feature at ``a`` and ``b``, ``[d_sae]``, as training measured it.

    It is symmetric, so it does not matter which of them began from the other; NaN where neither did.
    """
    for snapshot, other in ((b, a), (a, b)):
        if track.before(snapshot) is other:
            correlation: Floats = snapshot.features["functional_correlation"].to_numpy(dtype=np.float64)
            return correlation
    return np.full(len(b.features), np.nan)


def _descent(track: Track, snapshot: Snapshot) -> list[Snapshot]:
    """A snapshot, the one that it began from, and so on to the first."""
    found: list[Snapshot] = []
    at: Snapshot | None = snapshot
    while at is not None:
        found.append(at)
        at = track.before(at)
    return found
