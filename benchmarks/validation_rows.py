"""What the rows of docs/validation.md are made of."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats


@dataclass(frozen=True)
class Row:
    """What one instrument got right: ``right`` of ``cases``, or an estimate over its truth.

    Args:
        what: The row's name in issue 4, section 3.
        must: What it must be.
        right: Cases that came out right; NaN for a ratio.
        cases: How many there were.
        ratio: The estimate over the truth, of a row that is a ratio.
    """

    what: str
    must: str
    right: float
    cases: int
    ratio: float = float("nan")


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
        found = ", ".join(f"{row.ratio:.2f}" for row in repeats)
    else:
        found = "not available"
    return f"| {repeats[0].what} | {repeats[0].must} | {found} | {cases:,} |"
