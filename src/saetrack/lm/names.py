"""What the name of an LLM checkpoint says: one grammar for branches, folders, files and repositories.

``step1000``, ``checkpoint-500``, ``stage2-ingredient1-step1000-tokens5B``, ``ckpt_042``, ``step-001000-2BT``,
``global_step8``, ``epoch=0-step=3919.ckpt`` and a repository ``TinyLlama-1.1B-intermediate-step-1431k-3T`` all name a
step. ``registry.json`` adds what the names of known families leave out; what neither says stays unknown.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from fnmatch import fnmatch
from itertools import groupby, pairwise
from typing import Any

from saetrack.lm.registry import registry

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_NUMBER = r"\d{1,15}(?:\.\d{1,15})?"  # a longer one is no step
_WORD = r"(?:global-?)?(?P<word>checkpoint-step|checkpoint|step|ckpt|iter)-?"
_NAME = re.compile(
    r"(?:(?P<stage>stage\d{1,3}|lc-[a-z\d]+-to-[a-z\d]+|longctx|it)-)?(?:ingredient-?(?P<ingredient>\d{1,3})-)?(?:epoch-\d+-)?"
    rf"(?:{_WORD})?(?P<n>{_NUMBER})(?P<unit>[km])?"
    rf"(?:-(?:tokens?-?)?(?P<tokens>{_NUMBER})(?P<tokens_unit>[kmbt])t?)?(?:-unsharded)?(?:\.(?:ckpt|pt|pth))?",
    re.ASCII,
)
_IN_REPO_ID = re.compile(r"(?<=-)(?:global-?)?(?:checkpoint-step|checkpoint|step|ckpt|iter)-?\d.*")


@dataclass(frozen=True)
class ParsedName:
    """What one name says, without its neighbours.

    Args:
        step: The number in the name: a step of its stage, or an index where a family counts otherwise.
        stage: ``stage1``, ``lc-4k-to-32k``, ``longctx``, ...; empty where the name has none.
        ingredient: Number of the parallel branch, for a stage that was trained several times from one beginning.
        tokens: Tokens by the name, rounded as they are there; None where it has none.
        tokens_unit: What one unit of their last digit is worth.
        bare: Whether the name is a number without a word such as ``step``.
    """

    step: int
    stage: str = ""
    ingredient: int | None = None
    tokens: int | None = None
    tokens_unit: int = 0
    bare: bool = False


@dataclass(frozen=True)
class NamedStep:
    """One name with its place in the series.

    Args:
        step: Increases over the whole series: where a stage counts from 0 again, the stages before are added.
        name: As it was given; it is what shows the stage.
        tokens: Tokens of the whole series so far; None where neither name nor registry says.
    """

    step: int
    name: str
    tokens: int | None


@dataclass(frozen=True)
class Family:
    """What the registry knows of the names in one repository.

    Args:
        tokens_per_step: Tokens of a step, by stage; the empty name is a series without stages.
        stage_steps: Steps of a whole stage, where they are known without the names.
        global_stages: Stages that share one count of steps, if any; None where only the numbers can tell.
        unprefixed: The stage that names without one belong to.
    """

    tokens_per_step: dict[str, int] = field(default_factory=dict)
    stage_steps: dict[str, int] = field(default_factory=dict)
    global_stages: Sequence[str] | None = None
    unprefixed: str = ""


def family_of(repo: str, tokens_per_step: int | None = None) -> Family:
    """What the registry has about a repository; nothing for one that it does not know.

    Args:
        repo: Such as ``EleutherAI/pythia-70m``.
        tokens_per_step: Takes the place of what the registry says, for names without a stage.
    """
    known = (facts for facts in registry()["families"] if any(fnmatch(repo, glob) for glob in facts["repos"]))
    facts: dict[str, Any] = next(known, {})
    family = Family(**{key: facts[key] for key in Family.__dataclass_fields__ if key in facts})
    return family if tokens_per_step is None else replace(family, tokens_per_step={"": tokens_per_step})


def parse_name(name: str) -> ParsedName | None:
    """What a branch, folder or file says by its name; None when it names no step.

    Example:
        >>> parse_name("stage2-ingredient3-step1000-tokens5B")
        ParsedName(step=1000, stage='stage2', ingredient=3, tokens=5000000000, tokens_unit=1000000000, bare=False)
        >>> parse_name("main") is None
        True
    """
    match = _NAME.fullmatch(re.sub(r"[_=]", "-", name.lower()))
    if match is None:
        return None
    bare = match["word"] is None
    step = Decimal(match["n"]) * _UNITS[match["unit"] or ""]
    if step != int(step) or (bare and match["unit"]):
        return None
    tokens, unit = None, 0
    if match["tokens"]:
        unit = int(_UNITS[match["tokens_unit"]] * Decimal(10) ** int(Decimal(match["tokens"]).as_tuple().exponent))
        tokens = int(Decimal(match["tokens"]) * _UNITS[match["tokens_unit"]])
    ingredient = None if match["ingredient"] is None else int(match["ingredient"])
    return ParsedName(int(step), match["stage"] or "", ingredient, tokens, unit, bare)


def parse_repo_id(repo: str) -> ParsedName | None:
    """What a repository that holds one checkpoint says by its name; None when it names no step.

    Example:
        >>> parse_repo_id("google/multiberts-seed_0-step_20k").step
        20000
    """
    match = _IN_REPO_ID.search(re.sub(r"[_=]", "-", repo.split("/")[-1].lower()))
    return None if match is None else parse_name(match[0])


def without_step(names: Iterable[str]) -> list[str]:
    """The names that say no step, in their order: they are in no series.

    Example:
        >>> without_step(["step8", "main", "step9", "128"])
        ['main', '128']
    """
    names = list(names)
    said = {name for name, _ in _said_steps(names)}
    return [name for name in names if name not in said]


def series_of_names(
    names: Iterable[str], family: Family | None = None, ingredient: int | None = None, whole: bool = True
) -> list[NamedStep]:
    """The names that say a step, in the order of training; others are left out.

    Numbers alone count only where no name has a word beside its number. Stages follow each other by their numbers, the
    long-context ones after them. Where a stage counts from 0 again, which the registry says or its first number shows,
    the steps and tokens before it are added; its step 0 is the last
    of the stage before, and left out where that is there.

    Args:
        names: Branches, tags or folders.
        family: What the registry knows of them.
        ingredient: Which of several parallel branches of a stage to take.
        whole: Whether these are all names that there are. Where they are not, the last one of a stage need not be its
            end, so tokens of the stages behind it are known by the registry alone.

    Raises:
        ValueError: If a stage has parallel branches and none of them is chosen, the chosen one is not there, or two
            names are of one step.
    """
    family = family or Family()
    found = [(name, replace(p, stage=p.stage or family.unprefixed)) for name, p in _said_steps(names)]
    found = _one_ingredient(found, ingredient)
    found.sort(key=lambda item: (_stage_order(item[1].stage), item[1].step, item[0]))
    series: list[NamedStep] = []
    begin, last = _Begin(0, 0), 0  # of the stage in hand, and the last number in a name of the stage before
    for stage, group in groupby(found, key=lambda item: item[1].stage):
        members = list(group)
        if not _continues(stage, members[0][1].step, last, family):
            begin = _begin(stage, series, family, whole)
            if series and series[-1].step == begin.step:
                members = [(name, parsed) for name, parsed in members if parsed.step > 0]
        series += [NamedStep(begin.step + p.step, name, begin.plus(tokens_of(p, family))) for name, p in members]
        last = members[-1][1].step if members else 0
    _refuse_duplicates(series)
    return series


def tokens_of(parsed: ParsedName, family: Family) -> int | None:
    """Tokens of a stage so far: steps times the registry's rate, unless the name contradicts it; else the name's."""
    rate = family.tokens_per_step.get(parsed.stage)
    exact = None if rate is None else rate * parsed.step
    if exact is None or (parsed.tokens is not None and abs(exact - parsed.tokens) >= parsed.tokens_unit):
        return parsed.tokens
    return exact


@dataclass(frozen=True)
class _Begin:
    """Steps and tokens of all stages before one; tokens are None where one stage's are not known."""

    step: int
    tokens: int | None

    def plus(self, tokens: int | None) -> int | None:
        return None if self.tokens is None or tokens is None else self.tokens + tokens


def _said_steps(names: Iterable[str]) -> list[tuple[str, ParsedName]]:
    """The names that say a step, with what they say; numbers alone only where all are."""
    found = [(name, parsed) for name in names if (parsed := parse_name(name)) is not None]
    bare = all(parsed.bare for _, parsed in found)
    return [(name, parsed) for name, parsed in found if parsed.bare == bare]


def _continues(stage: str, first: int, last: int, family: Family) -> bool:
    """Whether a stage goes on with the count of the one before: by the registry, or else by its first number."""
    if family.global_stages is not None:
        return stage in family.global_stages
    return stage not in family.stage_steps and first > last > 0


def _begin(stage: str, series: Sequence[NamedStep], family: Family, whole: bool) -> _Begin:
    """Where a stage that counts from 0 begins: after the stages that the registry knows, or after what is named."""
    earlier = [known for known in family.stage_steps if _stage_order(known) < _stage_order(stage)]
    if earlier:
        known_rates = all(stage in family.tokens_per_step for stage in earlier)
        tokens = sum(family.stage_steps[k] * family.tokens_per_step[k] for k in earlier) if known_rates else None
        return _Begin(sum(family.stage_steps[known] for known in earlier), tokens)
    if series:
        return _Begin(series[-1].step, series[-1].tokens if whole else None)
    return _Begin(0, 0 if _stage_order(stage) <= _stage_order("stage1") else None)


def _one_ingredient(found: list[tuple[str, ParsedName]], chosen: int | None) -> list[tuple[str, ParsedName]]:
    branches = {parsed.ingredient: name for name, parsed in found if parsed.ingredient is not None}
    if chosen is None and len(branches) > 1:
        numbers = sorted(branches, key=lambda number: number or 0)
        raise ValueError(
            f"{branches[numbers[0]]} and {branches[numbers[1]]} are parallel branches, which no series holds both of. "
            f"Choose one as `ingredient`, of {', '.join(map(str, numbers))}."
        )
    if chosen is not None and chosen not in branches:
        there = ", ".join(str(number) for number in branches) or "none"
        raise ValueError(f"`ingredient` is {chosen}, but the names have {there}. Give one of these, or leave it out.")
    return [item for item in found if chosen is None or item[1].ingredient in (None, chosen)]


def _stage_order(stage: str) -> tuple[int, int]:
    """Pretraining stages by number, then longer and longer contexts, then instruction tuning."""
    number = int((re.findall(r"\d+", stage) or ["0"])[0])
    kind = next((k for k, word in enumerate(("stage", "l", "it"), start=1) if stage.startswith(word)), 0)
    return kind, number


def _refuse_duplicates(series: Sequence[NamedStep]) -> None:
    for before, after in pairwise(series):
        if before.step == after.step:
            raise ValueError(f"{before.name} and {after.name} are both LLM checkpoints of step {after.step}.")
