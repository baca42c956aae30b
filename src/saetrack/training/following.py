"""Following a series that is still being written: which LLM checkpoints a run visits, and when it waits for more."""

from __future__ import annotations

import sys

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
        ValueError: If the series has ended without any that is wanted, or is another now.
        SIGTERMException: If the process is asked to end while it waits.
    """

    def look() -> Growing:
        now: Growing = trainer.strategy.broadcast(watcher.look() if trainer.is_global_zero else None)  # type: ignore[assignment]
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
    ahead = {checkpoint.step for checkpoint in chosen[: len(known)]} - {checkpoint.step for checkpoint in known}
    if ahead:
        raise ValueError(
            f"The LLM checkpoint of step {min(ahead)} has come into {watcher.where} after step {known[-1].step} was "
            "taken; a series must be written in the order of its steps. Move it elsewhere, then `--ckpt_path last`."
        )
    return known + chosen[len(known) :]  # fewer than are known when the Hub is out of reach
