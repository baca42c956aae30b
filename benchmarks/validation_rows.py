"""What the rows of docs/validation.md are made of."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
from numpy.typing import NDArray

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Row:
    """What one instrument got right: ``right`` of ``cases``, or the sum of its estimates over that of the truth.

    Args:
        what: The row's name in issue 4, section 3.
        must: What it must be.
        right: Cases that came out right; NaN for a ratio.
        cases: How many there were.
        ratio: The estimate over the truth, of a row that is a ratio.
        low: Lower end of its 95 % interval; NaN where there is none.
        high: Upper end.
    """

    what: str
    must: str
    right: float
    cases: int
    ratio: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")


def ratio_row(what: str, must: str, estimates: Floats, truths: Floats, seed: int = 0) -> Row:
    """A ratio of means with its interval: a bootstrap over the features ``[F]``, which share a fit all the same."""
    if not len(estimates):
        return Row(what, must, float("nan"), 0)
    drawn = np.random.default_rng(seed).integers(len(estimates), size=(2000, len(estimates)))
    low, high = np.quantile(estimates[drawn].mean(axis=1) / truths[drawn].mean(axis=1), [0.025, 0.975])
    ratio = float(estimates.mean() / truths.mean())
    return Row(what, must, float("nan"), len(estimates), ratio, float(low), float(high))


def interval(right: int, cases: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    low, high = scipy.stats.binomtest(right, cases).proportion_ci(0.95, method="wilson")
    return float(low), float(high)


HEADER = "| what | must be | found | cases |\n|---|---|---:|---:|"


def line(repeats: Sequence[Row]) -> str:
    """A row of all repeats as Markdown: a share over all cases, a ratio as its values."""
    right, cases = sum(row.right for row in repeats), sum(row.cases for row in repeats)
    if np.isfinite(right) and cases:
        low, high = interval(int(right), cases)
        found = f"{right / cases:.3f} [{low:.3f}, {high:.3f}]"
    elif cases:
        known = [
            f"{row.ratio:.2f}" + (f" [{row.low:.2f}, {row.high:.2f}]" * bool(np.isfinite(row.low))) for row in repeats
        ]
        found = ", ".join(known)
    else:
        found = "not available"
    return f"| {repeats[0].what} | {repeats[0].must} | {found} | {cases:,} |"
