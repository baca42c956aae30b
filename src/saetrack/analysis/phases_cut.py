"""One perspective on one axis: its rates, how many phases they have, where those begin, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from .phases_segment import Segmentations, advantage, labels, levels, random_walk_advantage, segment
from .resampling import bootstrap_replicates

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]
    Integers = NDArray[np.integer]

NullKind = Literal["permutation in time", "permutation in time and null chain"]


@dataclass(frozen=True)
class Resampling:
    """Draws.

    Args:
        replicates: Of the bootstrap.
        permutations: Of the null.
        seed: Of both, and of the random walks.
    """

    replicates: int = 500
    permutations: int = 200
    seed: int = 0


@dataclass(frozen=True)
class Cut:
    """The phases of one series of rates.

    Args:
        ends: Index of the checkpoint at the end of each rate's interval ``[n]``.
        rates: Mean over features ``[n]``, in amounts per unit of the axis.
        errors: Their standard errors over features, NaN where there are no features ``[n]``.
        features: How many count ``[n]``.
        levels: Fitted level of the phases accepted ``[n]``.
        found: The segmentations of this one series.
        advantage: Over a smooth curve, by number of phases ``[K]``.
        null: What the score was compared with.
        null_score: 95 % quantile of the best score under it; of two, the larger.
        walk_advantage: 95 % quantile of the advantage of random walks.
        phases: The number accepted.
        boundaries: Checkpoints at which a phase ends and the next begins ``[phases - 1]``, as indices.
        replicates: The same in each bootstrap replicate ``[B, phases - 1]``.
        best_in_replicates: Share of replicates in which each number of phases scores best ``[K]``.
    """

    ends: Integers
    rates: Floats
    errors: Floats
    features: Integers
    levels: Floats
    found: Segmentations
    advantage: Floats
    null: NullKind
    null_score: float
    walk_advantage: float
    phases: int
    boundaries: Integers
    replicates: Integers
    best_in_replicates: Floats

    @property
    def label(self) -> Integers:
        """Number of the phase of every rate ``[n]``."""
        return labels(self.found.boundaries[self.phases - 1][0], len(self.rates))

    @property
    def why_one(self) -> str:
        """Why there is one phase, in words, where more are not accepted."""
        best = int(self.found.best[0])
        if best == 1:
            return f"none of at most {len(self.advantage)} scores better"
        if self.found.score[0, best - 1] <= self.null_score:
            return f"{best} gain {self.found.score[0, best - 1]:.2f}, and by {self.null} up to {self.null_score:.2f}"
        return f"{best} fit no better than a smooth curve"

    def interval(self) -> tuple[Integers, Integers]:
        """95 % interval of each boundary, as indices of checkpoints."""
        low = np.quantile(self.replicates, 0.025, axis=0, method="lower")
        high = np.quantile(self.replicates, 0.975, axis=0, method="higher")
        return low.astype(np.int64), high.astype(np.int64)


def cut(amounts: Floats, gaps: Floats, chains: Sequence[Floats], draws: Resampling) -> Cut:
    """Cut one perspective's rates into phases.

    The number of phases is the one with the best score, if that score is above the 95 % quantile of the best score
    under the null and if phases fit better than a smooth curve with as many free numbers, by more than 95 % of random
    walks do. Otherwise there is one phase. The null is the features' own rates permuted in time, each feature by itself
    among the times at which it has one: whatever all features have in common at a time is gone, and how many count at a
    time stays. Where there are null chains the score must be above theirs too (their features resampled): a control
    can take phases away and never makes any.

    A boundary's interval is from replicates of the series: the fitted levels, with the features resampled and the
    residuals of the fit drawn anew from each other. The second is noise that all features share at a checkpoint,
    which no bootstrap over features can show.

    Args:
        amounts: ``[T - 1, F]``; rows without any feature are left out.
        gaps: Length of each interval on the axis ``[T - 1]``.
        chains: Amounts of null chains, of the same shape.
        draws: Numbers of draws and their seed.

    Raises:
        ValueError: If fewer than three rows hold a value.
    """
    known = np.isfinite(amounts).any(axis=1)
    amounts, gaps, chains = amounts[known], gaps[known], [chain[known] for chain in chains]
    rates, errors, weights = _rates(amounts / gaps[:, None], gaps)
    found = segment(rates[None], weights)
    over_curve = advantage(rates[None], weights, found)[0]
    scores = [_permuted_scores(amounts / gaps[:, None], gaps, draws)]
    if chains:
        scores.append(_chain_scores(chains, gaps, draws))
    null_score = max(float(np.quantile(part, 0.95)) for part in scores)
    walks = random_walk_advantage(weights, np.random.default_rng([draws.seed, 2]))
    best = int(found.best[0])
    accepted = found.score[0, best - 1] > null_score and over_curve[best - 1] > walks
    phases = best if accepted else 1
    replicates = segment(_replicates(amounts, gaps, found.boundaries[phases - 1][0], weights, draws), weights)
    ends = np.flatnonzero(known) + 1
    return Cut(
        ends=ends,
        rates=rates,
        errors=errors,
        features=np.isfinite(amounts).sum(axis=1),
        levels=levels(rates, weights, found.boundaries[phases - 1][0]),
        found=found,
        advantage=over_curve,
        null="permutation in time and null chain" if chains else "permutation in time",
        null_score=null_score,
        walk_advantage=walks,
        phases=phases,
        boundaries=ends[found.boundaries[phases - 1][0] - 1],
        replicates=ends[replicates.boundaries[phases - 1] - 1],
        best_in_replicates=np.bincount(replicates.best - 1, minlength=len(over_curve)) / draws.replicates,
    )


def mean_and_error(values: Floats) -> tuple[Floats, Floats]:
    """Mean over features ``[..., n]`` of ``[..., n, F]`` and its standard error, NaN for fewer than two features.

    The standard error is the deviation over the root of the number, which is what a bootstrap over features tends to.
    """
    count = np.isfinite(values).sum(axis=-1)
    mean = np.nansum(values, axis=-1) / count
    squares = np.nansum(np.square(values - mean[..., None]), axis=-1)
    several = np.where(count > 1, count, 2)
    return mean, np.where(count > 1, np.sqrt(squares / (several - 1) / several), np.nan)


def steady(errors: Floats) -> Floats:
    """Standard errors drawn half-way to their mean square, for use as weights; equal ones where there are none.

    An interval in which nothing happened to any feature has no spread, which is no reason to trust it beyond measure;
    and what all features share at a checkpoint is not in their spread.
    """
    square = np.square(np.nan_to_num(errors))
    half_way = (square + square.mean(axis=-1, keepdims=True)) / 2
    return np.sqrt(np.where(half_way > 0, half_way, 1.0))


def _rates(rates: Floats, gaps: Floats) -> tuple[Floats, Floats, Floats]:
    """Means over features ``[..., n]`` of ``[..., n, F]``, their standard errors, and the weights of the cut."""
    mean, errors = mean_and_error(rates)
    return mean, errors, np.square(gaps / steady(errors * gaps))


def _permuted_scores(rates: Floats, gaps: Floats, draws: Resampling) -> Floats:
    """Best score of each permutation of ``rates`` ``[n, F]`` in time, of a feature's known values among their times."""
    rng = np.random.default_rng([draws.seed, 1])
    known = np.isfinite(rates)
    places = np.argsort(~known, axis=0, kind="stable")  # each feature's times, those with a value first
    means, weights = np.empty((2, draws.permutations, len(rates)))
    for draw in range(draws.permutations):
        drawn = np.argsort(np.where(known, rng.random(rates.shape), np.inf), axis=0)
        permuted = np.empty_like(rates)
        np.put_along_axis(permuted, places, np.take_along_axis(rates, drawn, axis=0), axis=0)
        means[draw], _, weights[draw] = _rates(permuted, gaps)
    best: Floats = segment(means, weights).score.max(axis=1)
    return best


def _chain_scores(chains: Sequence[Floats], gaps: Floats, draws: Resampling) -> Floats:
    """Best score of null chains, as if their stages had lain as far apart as the track's, features resampled."""
    best = []
    for chain in chains:
        mean, _, weights = _rates(chain / gaps[:, None], gaps)
        means = bootstrap_replicates(chain, np.random.default_rng([draws.seed, 1]), draws.permutations) / gaps
        best.append(segment(np.where(np.isfinite(means), means, mean), weights).score.max(axis=1))
    return np.concatenate(best)


def _replicates(amounts: Floats, gaps: Floats, places: Integers, weights: Floats, draws: Resampling) -> Floats:
    """Replicates of the rates ``[B, n]``; the same features are drawn for every perspective."""
    rng = np.random.default_rng([draws.seed, 0])
    resampled = bootstrap_replicates(amounts, rng, draws.replicates) / gaps
    rates = mean_and_error(amounts)[0] / gaps
    fitted = levels(rates, weights, places)
    n, free = len(rates), 2 * len(places) + 1
    residuals = (rates - fitted) * np.sqrt(weights) * np.sqrt(n / max(n - free, 1))
    drawn = residuals[rng.integers(n, size=(draws.replicates, n))] / np.sqrt(weights)
    resampled = np.where(np.isfinite(resampled), resampled, rates)
    replicates: Floats = fitted + (resampled - rates) + drawn
    return replicates
