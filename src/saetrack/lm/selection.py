"""Which LLM checkpoints of a series to take, said in one short text such as ``dense:512+every:10``."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from math import inf, log

from saetrack.lm.loading import LLMCheckpoint
from saetrack.lm.registry import registry

Series = Sequence[LLMCheckpoint]

GRAMMAR = (
    "all, every:10, log:20, dense:512, 0,1,2,4, steps:1000-64000, tokens:1B-10B, paper:NAME, or several joined by +"
)
_RANGES = {"dense", "steps", "tokens"}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?|\d+(?:_\d+)+)([kmbt]?)", re.IGNORECASE)


@dataclass(frozen=True)
class Selection:
    """A choice among the LLM checkpoints of a series, written as text.

    * ``all``: every one.
    * ``every:10``: the first and every tenth after it.
    * ``log:20``: 20 of them, their steps as evenly spaced in the logarithm as can be, first and last among them.
    * ``dense:512``: all up to step 512.
    * ``0,1,2,4``: these steps.
    * ``steps:1000-64000``, ``tokens:1B-10B``: all in this range, both ends in it; either end may be left out.
    * ``paper:pythia-410m-deduped``: the steps that SAE-Track (arXiv 2412.17626) visits.

    Joined by ``+``, each begins at the last checkpoint that the one before it took, so ``dense:512+every:10`` is all
    up to step 512 and then every tenth. Amounts may be written ``1k``, ``1.5M``, ``10B``, ``1_000``.

    Args:
        text: Such a text.

    Raises:
        ValueError: If it is none.
    """

    text: str

    def __post_init__(self) -> None:
        _ = self._terms

    @property
    def keeps_growing(self) -> bool:
        """Whether what it takes of a series is still taken when the series has grown."""
        *before, last = (term.partition(":")[0].strip() for term in self.text.split("+"))
        return {last} <= {"all", "every", *_RANGES} and set(before) <= _RANGES

    @cached_property
    def _terms(self) -> list[Callable[[Series], Series]]:
        return [_term(term.strip(), self.text) for term in self.text.split("+")]

    def of(self, series: Series) -> list[LLMCheckpoint]:
        """The chosen ones, by increasing step.

        Args:
            series: All there are, by increasing step.

        Raises:
            ValueError: If nothing is left, a named step is not there, or tokens are asked for that are not known.
        """
        chosen: list[LLMCheckpoint] = []
        for term in self._terms:
            rest = [c for c in series if not chosen or c.step >= chosen[-1].step]
            chosen += [c for c in term(rest) if not chosen or c.step > chosen[-1].step]
        if not chosen:
            raise ValueError(
                f"{self.text!r} takes none of the {len(series)} LLM checkpoints, whose steps are "
                f"{series[0].step} to {series[-1].step}. `saetrack checkpoints` lists them."
            )
        return chosen


def pick_steps(series: Series, steps: Sequence[int]) -> list[LLMCheckpoint]:
    """The checkpoints of these steps.

    Raises:
        ValueError: If one is not there; the message names the nearest ones that are.
    """
    by_step = {checkpoint.step: checkpoint for checkpoint in series}
    for step in steps:
        if step not in by_step:
            nearest = sorted(sorted(by_step, key=lambda s: abs(s - step))[:3])
            raise ValueError(
                f"LLM step {step} is asked for, which the source does not have; the nearest are {nearest}. "
                "`saetrack checkpoints` lists them all."
            )
    return [by_step[step] for step in steps]


def _term(term: str, text: str) -> Callable[[Series], Series]:
    kind, _, value = (part.strip() for part in term.partition(":"))
    if kind == "all" and not value:
        return lambda series: series
    if kind in ("every", "log", "dense") and (amount := _amount(value)) is not None:
        if kind == "dense":
            return lambda series: [c for c in series if c.step <= amount]
        if amount > 0:
            return lambda series: series[::amount] if kind == "every" else _log_spaced(series, amount)
    if kind in ("steps", "tokens") and (ends := _ends(value)) is not None:
        return lambda series: _within(series, kind, *ends)
    if kind == "paper":
        subsets = registry()["subsets"]
        if value not in subsets:
            raise ValueError(f"There is no subset {value!r} of the paper's; expected one of {', '.join(subsets)}.")
        return lambda series: pick_steps(series, subsets[value])
    steps = [_amount(step) for step in term.split(",")]
    named = [step for step in steps if step is not None]
    if len(named) == len(steps) and named == sorted(set(named)):
        return lambda series: pick_steps(series, named)
    of = "" if term == text else f" of {text!r}"
    raise ValueError(f"{term!r}{of} is no choice of LLM checkpoints; expected {GRAMMAR}. Steps and ranges increase.")


def _amount(text: str) -> int | None:
    """``1_000``, ``64k`` or ``1.5B`` as a number; None where it is none."""
    match = _AMOUNT.fullmatch(text.strip())
    number = Decimal(match[1].replace("_", "")) * _UNITS[match[2].lower()] if match else Decimal("0.5")
    return int(number) if number == int(number) else None


def _ends(text: str) -> tuple[int, float] | None:
    """``1k-64k``, ``1k-`` or ``-64k`` as lowest and highest; None where it is no range."""
    low, dash, high = (part.strip() for part in text.partition("-"))
    ends = _amount(low or "0"), (_amount(high) if high else inf)
    if not dash or not (low or high) or ends[0] is None or ends[1] is None or ends[0] > ends[1]:
        return None
    return ends[0], ends[1]


def _log_spaced(series: Series, n: int) -> Series:
    """For each of n targets the nearest free checkpoint in the logarithm, such that the later ones find theirs too.

    The first target is the first checkpoint; the logarithm begins at the first step above 0.
    """
    if n > len(series):
        raise ValueError(f"log:{n} asks for {n} LLM checkpoints, but there are {len(series)}. Take fewer, or all.")
    zeros = 1 if series[0].step == 0 and n > 1 and len(series) > 1 else 0
    logs = [log(max(checkpoint.step, 1)) for checkpoint in series]
    targets = n - zeros
    chosen = list(range(zeros))
    for i in range(targets):
        target = logs[zeros] + (logs[-1] - logs[zeros]) * (i / (targets - 1) if targets > 1 else zeros)
        free = range(chosen[-1] + 1 if chosen else 0, len(series) - (targets - 1 - i))
        chosen.append(min(free, key=lambda index: abs(logs[index] - target)))
    return [series[index] for index in chosen]


def _within(series: Series, kind: str, low: int, high: float) -> Series:
    unknown = next((c for c in series if c.tokens is None), None)
    if kind == "tokens" and unknown is not None:
        raise ValueError(
            f"tokens:... needs the tokens of every LLM checkpoint, and those of {unknown} are not known. Give "
            f"`tokens_per_step` of a HubSource, or choose by steps:..."
        )
    at = {c.step: (c.step if kind == "steps" else c.tokens) or 0 for c in series}
    return [c for c in series if low <= at[c.step] <= high]
