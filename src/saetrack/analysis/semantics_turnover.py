"""How fast a feature's strongest positions change from one LLM checkpoint to the next, against two nulls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .resampling import bootstrap_means

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]
    Integers = NDArray[np.integer]

NULL_DRAWS = 10


def turnover_series(
    tops: list[Integers],
    tokens: Integers,
    rng: np.random.Generator,
    replicates: int,
    counts: NDArray[np.bool_] | None = None,
) -> dict[str, Any]:
    """Turnover into each checkpoint with its interval and nulls, arrays ``[T]``, and by feature ``[T, F]``.

    Args:
        tops: For each checkpoint ``[F, k]`` positions, -1 for none.
        tokens: Token at every position, ``[P]``.
        rng: Of the nulls and the bootstrap.
        replicates: Bootstrap replicates.
        counts: ``[T, F]``, which features count on entering a checkpoint; all, if not given.
    """
    by_feature = np.full((len(tops), len(tops[0])), np.nan)
    nulls = {name: np.full((len(tops), NULL_DRAWS), np.nan) for name in ("other_feature", "same_tokens")}
    for t in range(1, len(tops)):
        by_feature[t] = turnover(tops[t - 1], tops[t])
        if counts is not None:
            by_feature[t, ~counts[t]] = np.nan
        both = np.flatnonzero(np.isfinite(by_feature[t]))
        if len(both) < 2:
            continue
        before, after = tops[t - 1][both], tops[t][both]
        for draw in range(NULL_DRAWS):
            shift = rng.integers(1, len(both))
            order = rng.permutation(len(both))
            other = after[order][np.roll(np.arange(len(both)), shift)][np.argsort(order)]  # never the feature itself
            nulls["other_feature"][t, draw] = turnover(before, other).mean()
            nulls["same_tokens"][t, draw] = turnover(before, same_tokens(before, tokens, rng)).mean()
    mean, low, high = bootstrap_means(by_feature, rng, replicates)
    return {
        "by_feature": by_feature,
        "turnover": mean,
        "turnover_low": low,
        "turnover_high": high,
        "features_compared": np.isfinite(by_feature).sum(axis=1),
        **{f"turnover_{name}": draws.mean(axis=1) for name, draws in nulls.items()},
    }


def turnover(before: Integers, after: Integers) -> Floats:
    """``1 - Jaccard`` of two sets of positions, for every feature.

    Args:
        before: ``[F, k]``, distinct positions in each row; -1 for none.
        after: ``[F, k]``, likewise.

    Returns:
        ``[F]``; NaN where either set is empty.

    Example:
        >>> turnover(np.array([[3, 5], [4, -1]]), np.array([[5, 9], [-1, -1]])).tolist()
        [0.6666666666666667, nan]
    """
    sizes = [(part >= 0).sum(axis=1) for part in (before, after)]
    merged = np.sort(np.hstack([before, np.where(after >= 0, after, -2)]), axis=1)
    shared = ((merged[:, 1:] == merged[:, :-1]) & (merged[:, 1:] >= 0)).sum(axis=1)
    known = (sizes[0] > 0) & (sizes[1] > 0)
    union = np.where(known, sizes[0] + sizes[1] - shared, 1)
    result: Floats = np.where(known, 1 - shared / union, np.nan)
    return result


def same_tokens(positions: Integers, tokens: Integers, rng: np.random.Generator) -> Integers:
    """Random sets of positions with the same tokens: for each feature, as many positions of each token, all distinct.

    Args:
        positions: ``[F, k]``; -1 for none.
        tokens: Token at every position, ``[P]``.
        rng: Source of the draw.

    Returns:
        ``[F, k]``; -1 for none.
    """
    shuffled = rng.permutation(len(tokens))
    by_token = shuffled[np.argsort(tokens[shuffled], kind="stable")]  # positions by token, in random order within each
    ordered = np.sort(np.where(positions >= 0, tokens[positions], -1), axis=1)  # [F, k]
    starts = np.searchsorted(tokens[by_token], ordered)
    counts = np.searchsorted(tokens[by_token], ordered, side="right") - starts
    place = np.broadcast_to(np.arange(ordered.shape[1]), ordered.shape)
    begins = np.ones(ordered.shape, dtype=bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    rank = place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)  # among equal tokens of the feature
    offset = (rng.random((len(ordered), 1)) * counts).astype(np.int64)
    drawn = by_token[np.minimum(starts + (offset + rank) % np.maximum(counts, 1), len(tokens) - 1)]
    result: Integers = np.where(ordered >= 0, drawn, -1)
    return result
