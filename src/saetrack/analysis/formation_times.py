"""When a curve of progress has formed: its amplitude, the time at which it reaches a share of it, and its status.

Curves are ``[T, N]`` over LLM checkpoints, times are on the axis ``u = log10(step + 1)``. N are features, or features
times bootstrap replicates: every rule here is a function of one curve, so an interval is the rule on each replicate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import isotonic_regression

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]
    Bools = NDArray[np.bool_]

MIN_CHECKPOINTS = 6  # below this base, rise and plateau cannot be told apart
PLATEAU = 3  # checkpoints at the end whose mean is the plateau; the first checkpoint alone is the base
TOLERANCE = 0.15  # of the amplitude: how far a formed curve may fall back, and how far a plateau may still move
_INTERVAL = (0.025, 0.975)
# curves worked on at once: about ten arrays of _BLOCK * T * 8 bytes
_BLOCK = 100_000

AT_INIT, FORMED, TRANSIENT, NEVER = "at-init", "formed", "transient", "never"
NOT_PLATEAUED, UNRESOLVED, INSUFFICIENT = "not plateaued", "unresolved", "insufficient"
NOT_AVAILABLE = "not available"
NOT_KEPT = "not kept"  # of an analysis that is restricted to features that kept their identity throughout
STATUSES = (AT_INIT, FORMED, NOT_PLATEAUED, TRANSIENT, UNRESOLVED, NEVER, INSUFFICIENT)


def amplitudes(curves: Floats) -> Floats:
    """Plateau less base, ``[N]``: the mean of the last three checkpoints less the first."""
    rise: Floats = curves[-PLATEAU:].mean(axis=0) - curves[0]
    return rise


def crossing_times(curves: Floats, u: Floats, share: float) -> Floats:
    """First time at which a curve has risen by a share of its amplitude, to stay.

    With base ``M_0`` and amplitude ``a`` it is the first checkpoint with ``M >= M_0 + share a`` there and at the next
    one, and with ``M >= M_0 + (share - 0.15) a`` ever after, interpolated linearly in ``u`` from the checkpoint before.

    Args:
        curves: ``[T, N]``.
        u: ``[T]``, increasing.
        share: Of the amplitude, above 0.15 and at most 1.

    Returns:
        ``[N]``; infinite for a curve whose amplitude is not positive or that never stays.
    """
    return np.concatenate(
        [
            _crossing_times(curves[:, start : start + _BLOCK], u, share)
            for start in range(0, max(curves.shape[1], 1), _BLOCK)
        ]
    )


def _crossing_times(curves: Floats, u: Floats, share: float) -> Floats:
    base, rise = curves[0], amplitudes(curves)
    level = base + share * rise
    above = curves >= level
    stays = np.minimum.accumulate(curves[::-1], axis=0)[::-1] >= level - TOLERANCE * rise
    ok = above & stays
    ok[:-1] &= above[1:]
    first = ok.argmax(axis=0)
    index = np.arange(curves.shape[1])
    before = np.maximum(first - 1, 0)
    low, high = curves[before, index], curves[first, index]
    below = low < level
    part = np.divide(level - low, high - low, out=np.ones(len(index)), where=below & (high > low))
    times = u[before] + part * (u[first] - u[before])
    return np.where(ok.any(axis=0) & (rise > 0), times, np.inf)


def isotonic_times(curves: Floats, u: Floats, share: float) -> Floats:
    """The same time on the best increasing curve, a second estimator that shares no rule with the first.

    Returns:
        ``[N]``; infinite where the increasing fit is flat.
    """
    times = np.full(curves.shape[1], np.inf)
    for i in range(curves.shape[1]):
        fit = isotonic_regression(curves[:, i]).x
        level = fit[0] + share * (fit[-1] - fit[0])
        if fit[-1] > fit[0]:
            after = int(np.argmax(fit >= level))
            times[i] = np.interp(level, fit[after - 1 : after + 1], u[after - 1 : after + 1])
    return times


@dataclass(frozen=True)
class Times:
    """What `measure_times` finds, each ``[F]``; times are infinite where there is none.

    Args:
        amplitude: Plateau less base.
        amplitude_error: Its standard error.
        half: Time of half the amplitude, with ``half_low`` and ``half_high``, its 95 % interval.
        most: Time of 0.9 of it, with its interval.
        isotonic: Time of half the rise of the increasing fit.
        fallen: Whether the curve was higher before its plateau, by 3 standard errors and by 0.3 of its maximum.
        moving: Whether the last three checkpoints still change, by 2 standard errors and by 0.15 of the amplitude.
    """

    amplitude: Floats
    amplitude_error: Floats
    half: Floats
    half_low: Floats
    half_high: Floats
    most: Floats
    most_low: Floats
    most_high: Floats
    isotonic: Floats
    fallen: Bools
    moving: Bools


def measure_times(curves: Floats, replicates: Floats, u: Floats) -> Times:
    """Amplitude and times of every feature with their bootstrap intervals.

    Args:
        curves: ``[T, F]``.
        replicates: ``[T, F, R]``, the same documents' weights at every checkpoint.
        u: ``[T]``.
    """
    checkpoints, features, count = replicates.shape
    flat = replicates.reshape(checkpoints, features * count)
    intervals = []
    for share in (0.5, 0.9):
        times = crossing_times(flat, u, share).reshape(features, count)
        # a quantile that is one of the values: between a time and infinity there is nothing to interpolate
        intervals.append(np.quantile(times, _INTERVAL, axis=1, method="inverted_cdf"))
    plateau, spread = curves[-PLATEAU:].mean(axis=0), replicates[-PLATEAU:].mean(axis=0)
    # a peak inside the plateau is a curve that still moves, and one at the end is a curve that still rises
    peak = curves[:-PLATEAU].argmax(axis=0)
    index = np.arange(features)
    fall, fall_error = curves[peak, index] - plateau, (replicates[peak, index] - spread).std(axis=1, ddof=1)
    change = curves[-1] - curves[-PLATEAU]
    change_error = (replicates[-1] - replicates[-PLATEAU]).std(axis=1, ddof=1)
    amplitude = amplitudes(curves)
    return Times(
        amplitude=amplitude,
        amplitude_error=(spread - replicates[0]).std(axis=1, ddof=1),
        half=crossing_times(curves, u, 0.5),
        half_low=intervals[0][0],
        half_high=intervals[0][1],
        most=crossing_times(curves, u, 0.9),
        most_low=intervals[1][0],
        most_high=intervals[1][1],
        isotonic=isotonic_times(curves, u, 0.5),
        fallen=(fall > 3 * fall_error) & (fall > 0.3 * curves[peak, index]),
        moving=(np.abs(change) > 2 * change_error) & (np.abs(change) > TOLERANCE * np.abs(amplitude)),
    )


def statuses(times: Times, significant: Bools) -> NDArray[np.str_]:
    """One of `STATUSES` for every feature, the first that holds, in the order of the code below.

    Args:
        times: From `measure_times`.
        significant: ``[T, F]``, where a feature's positions are more alike than matched ones.
    """
    error = times.amplitude_error
    rose = (times.amplitude > 3 * error) & np.isfinite(times.half_high)
    return np.select(
        [
            ~significant.any(axis=0),
            times.fallen,
            significant[0] & (times.amplitude < 2 * error),
            rose & times.moving,
            rose,
        ],
        [NEVER, TRANSIENT, AT_INIT, NOT_PLATEAUED, FORMED],
        UNRESOLVED,
    )
