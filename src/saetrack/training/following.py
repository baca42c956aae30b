"""Following a series that is still being written: which LLM checkpoints a run visits, and when it waits for more."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from saetrack.lm.checkpoints import LLMCheckpoint, Watcher
from saetrack.lm.selection import Selection
from saetrack.lm.watching import Growing


def refuse_what_needs_the_end(
    steps: list[int] | str | None, direction: str, max_rise: float | None, start: str | None
) -> None:
    """Refuse settings of the scheduler that cannot be followed while there is no last LLM checkpoint.

    Raises:
        ValueError: If there is one.
    """
    if direction != "forward":
        found = f"scheduler.direction is {direction}"
    elif start is not None:
        found = f"model.start is {start}"
    elif max_rise is not None:
        found = f"scheduler.max_rise is {max_rise}"
    elif isinstance(steps, list) or not Selection(steps or "all").keeps_growing:
        found = f"scheduler.steps is {steps!r}"
    else:
        return
    raise ValueError(
        f"{found}, which needs the whole series, but data.source has `watch` and waits for more. Go forward with "
        "`scheduler.steps` all, every:10, dense:512+every:10, steps:0-64000 or tokens:1B-10B, or leave `watch` out."
    )


def follow(
    trainer: Trainer, watcher: Watcher, steps: str | None, known: list[LLMCheckpoint], wait: bool
) -> list[LLMCheckpoint]:
    """The LLM checkpoints to visit of those that are complete, the same on every rank.

    Args:
        trainer: The trainer.
        watcher: Looks at the series; only rank zero does.
        steps: Which of them, as ``Selection`` reads it.
        known: Those that it has given before.
        wait: Whether to wait until there is one more, or the series has ended.

    Raises:
        ValueError: If the series has ended without any that is wanted, or one has come late or is lost.
        SIGTERMException: If the process is asked to end while it waits.
    """

    def look() -> Growing:
        now: Growing = trainer.strategy.broadcast(watcher.look() if trainer.is_global_zero else None)  # type: ignore[assignment]
        refuse_lost(watcher.where, now.series, known)
        return now

    def leave_when_asked() -> None:
        if trainer.received_sigterm:
            raise SIGTERMException

    def say(line: str) -> None:
        if trainer.is_global_zero:
            sys.stderr.write(f"{line} Ctrl-C stops; the same command with `--ckpt_path last` goes on.\n")

    seen = -1
    while True:
        now = watcher.wait(seen, look, leave_when_asked, say)
        seen = len(now.series)
        try:
            chosen = Selection(steps or "all").of(now.series) if now.series else []
        except ValueError as error:  # none of them is wanted so far
            if now.ended:
                raise ValueError(f"scheduler.steps: {error}") from error
            chosen = []
        if now.ended or not wait or len(chosen) > len(known):
            break
    if not chosen and not known:
        raise ValueError(f"The series in {watcher.where} has ended without any LLM checkpoint.")
    last, taken = known[-1].step if known else -1, {checkpoint.step for checkpoint in known}
    late = [c.step for c in chosen if c.step < last and c.step not in taken]
    if late:
        raise ValueError(
            f"The LLM checkpoint of step {late[0]} has come into {watcher.where} after step {last} was taken; a series "
            "must be written in the order of its steps. Move it elsewhere, then `--ckpt_path last`."
        )
    return known + chosen[len(known) :]  # fewer than are known when the Hub is out of reach


def refuse_lost(where: str, series: Sequence[LLMCheckpoint], known: Sequence[LLMCheckpoint]) -> None:
    """Refuse a series that goes on, but has lost what was taken of it: what is taken next would be another choice.

    Raises:
        ValueError: If there is a later LLM checkpoint than those known, and one of these is not there any more.
    """
    there = {checkpoint.step for checkpoint in series}
    lost = [checkpoint.step for checkpoint in known if checkpoint.step not in there]
    if lost and max(there, default=-1) > known[-1].step:
        raise ValueError(
            f"The LLM checkpoint of step {lost[0]} is no longer in {where}; a series that is followed must keep its "
            "LLM checkpoints (`save_total_limit` of Hugging Face's Trainer deletes them). Put it back, then "
            "`--ckpt_path last`."
        )
