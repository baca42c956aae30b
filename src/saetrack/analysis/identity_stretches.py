"""Stretches: the neighbouring snapshots over which a feature's index kept its meaning, for any analysis to use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .base import AnalysisResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from saetrack.track import Track


def stretch_table(alive: NDArray[np.bool_], kept: NDArray[np.bool_], steps: Sequence[int]) -> pd.DataFrame:
    """Every feature's maximal runs of snapshots in which it is alive and keeps its identity.

    Args:
        alive: Whether a feature is alive in a snapshot, ``[T, F]``.
        kept: Whether it kept its identity on entering the snapshot from the one before, ``[T, F]``; row 0 is unused.
        steps: LLM steps, ``[T]``.

    Returns:
        Columns ``feature``, ``first_step``, ``last_step``, ``snapshots``; a feature that is alive in a snapshot is
        in exactly one stretch there, perhaps of that snapshot alone.

    Example:
        >>> alive = np.array([[True], [True], [True]])
        >>> kept = np.array([[False], [True], [False]])
        >>> stretch_table(alive, kept, [0, 8, 64])[["first_step", "last_step"]].values.tolist()
        [[0, 8], [64, 64]]
    """
    goes_on = np.zeros_like(alive)
    goes_on[1:] = kept[1:] & alive[1:] & alive[:-1]
    begins = alive & ~goes_on
    ends = alive.copy()
    ends[:-1] &= ~goes_on[1:]
    feature, first = np.nonzero(begins.T)
    _, last = np.nonzero(ends.T)  # the same order, and each stretch that begins ends
    at = np.asarray(steps)
    return pd.DataFrame(
        {"feature": feature, "first_step": at[first], "last_step": at[last], "snapshots": last - first + 1}
    )


def kept_between(stretches: pd.DataFrame, a: int, b: int, d_sae: int) -> NDArray[np.bool_]:
    """Which features have one stretch that holds two LLM steps; its sum is for how many a restricted result holds.

    Args:
        stretches: As `stretch_table` and `read_stretches` give it.
        a: LLM step of a snapshot.
        b: That of another, before or after it.
        d_sae: Number of features.

    Returns:
        ``[d_sae]``.
    """
    ends = stretches[["first_step", "last_step"]].to_numpy()
    holds = (ends.min(axis=1) <= min(a, b)) & (ends.max(axis=1) >= max(a, b))
    kept = np.zeros(d_sae, dtype=bool)
    kept[stretches["feature"].to_numpy()[holds]] = True
    return kept


def read_stretches(track: Track) -> pd.DataFrame:
    """The stretches that the identity analysis found in a track.

    Raises:
        FileNotFoundError: If it has not been run.
    """
    folder = track.analyses_dir / "identity"
    if not (folder / "result.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no stretches. Run `saetrack analyze {track.path} --analyses Identity` first."
        )
    return AnalysisResult.load(folder).tables["stretches"]
