"""Stretches: the neighbouring snapshots over which a feature's index kept its meaning, for any analysis to use."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .base import AnalysisResult
from .outdated import outdated
from .places import share_a_step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from saetrack.track import Track


def kept_stages(
    correlation: NDArray[np.floating], limit: NDArray[np.floating], alive: NDArray[np.bool_], revived: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Whether a feature kept its identity on entering a snapshot from the one before; all that says so reads this.

    It is alive on both sides, was not revived in between, and its correlation reaches the limit.

    Args:
        correlation: With the snapshot before, ``[T, F]``; NaN is below every limit.
        limit: Of the stage into each snapshot, ``[T]``.
        alive: ``[T, F]``.
        revived: In the stage into each snapshot, ``[T, F]``.

    Returns:
        ``[T, F]``; the first row is False, for no stage leads there.
    """
    kept: NDArray[np.bool_] = (correlation >= limit[:, None]) & alive & ~revived
    kept[1:] &= alive[:-1]
    kept[0] = False
    return kept


def stretch_table(alive: NDArray[np.bool_], kept: NDArray[np.bool_], steps: Sequence[int]) -> pd.DataFrame:
    """Every feature's maximal runs of snapshots in which it is alive and keeps its identity.

    Args:
        alive: Whether a feature is alive in a snapshot, ``[T, F]``.
        kept: From `kept_stages`, ``[T, F]``.
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
    begins = alive & ~kept
    ends = alive.copy()
    ends[:-1] &= ~kept[1:]
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
        ValueError: If it was run on other snapshots than the track has now.
    """
    folder = track.analyses_dir / "identity"
    command = f"`saetrack analyze {track.path} --analyses+=Identity`"
    if not (folder / "result.json").is_file():
        raise FileNotFoundError(f"{folder} holds no stretches. Run {command} first.")
    result = AnalysisResult.load(folder)
    old = outdated(track, result.settings)
    if old is not None:
        raise ValueError(f"{folder} is old, {old}. Run {command} again.")
    return result.tables["stretches"]


@dataclass(frozen=True)
class Kept:
    """Where features kept their identity: what a restricted analysis counts.

    Args:
        steps: LLM steps, ``[T]``.
        into: Whether a feature kept it on entering a snapshot from the one before, ``[T, F]``; the first row is all
            true.
        to_last: Whether one stretch holds a snapshot and the last, ``[T, F]``.
    """

    steps: list[int]
    into: NDArray[np.bool_]
    to_last: NDArray[np.bool_]

    @classmethod
    def of(cls, track: Track) -> Kept:
        """That of a track, from the identity analysis.

        Raises:
            FileNotFoundError: If the identity analysis has not been run.
            ValueError: If it was run on other snapshots, or snapshots share LLM steps.
        """
        steps, d_sae = track.steps, int(track.facts["d_sae"])
        if share_a_step(steps):
            raise ValueError(
                f"{track.path} has LLM steps {steps}, and stretches are told apart by them; --only_kept needs a track "
                "whose steps increase. Leave out --only_kept, or give the track that this one controls."
            )
        stretches, into = read_stretches(track), [np.ones(d_sae, dtype=bool)]
        into += [kept_between(stretches, *pair, d_sae) for pair in pairwise(steps)]
        to_last = [kept_between(stretches, step, steps[-1], d_sae) for step in steps]
        return cls(steps, np.stack(into), np.stack(to_last))

    @property
    def at(self) -> NDArray[np.bool_]:
        """Whose state at a snapshot counts, ``[T, F]``: who kept it on entering; at the first, in the stage from it."""
        return np.concatenate([self.into[1:2], self.into[1:]]) if len(self.into) > 1 else self.into

    @property
    def throughout(self) -> NDArray[np.bool_]:
        """Whether one stretch holds all snapshots, ``[F]``."""
        throughout: NDArray[np.bool_] = self.to_last[0]
        return throughout

    def facts(self) -> dict[str, Any]:
        """For how many features a restricted result holds, by LLM step: for the settings of the result."""
        return {
            "into": dict(zip(self.steps[1:], self.into[1:].sum(axis=1).tolist(), strict=True)),
            "to_last": dict(zip(self.steps, self.to_last.sum(axis=1).tolist(), strict=True)),
            "throughout": int(self.throughout.sum()),
            "of": self.into.shape[1],
        }

    def summary(self) -> str:
        """The same in a sentence."""
        counts = self.into[1:].sum(axis=1)
        return (
            f" Restricted to stretches in which a feature kept its identity: {counts.min()} to {counts.max()} of "
            f"{self.into.shape[1]} features in a stage, {int(self.throughout.sum())} from the first snapshot to the "
            "last."
        )
