"""What a series is refused for before anything is trained: LLM checkpoints in disorder, options that cut stages."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from lightning import Trainer
from lightning.pytorch.callbacks import Timer

from saetrack.lm.audit import audit, problems
from saetrack.lm.checkpoints import LLMCheckpoint

logger = logging.getLogger(__name__)


def audited(
    trainer: Trainer, checkpoints: Sequence[LLMCheckpoint], allow_duplicates: bool, before: Mapping[int, str | None]
) -> dict[int, str | None]:
    """Hash of the weights of every LLM checkpoint, by step; None where it is not known.

    Args:
        trainer: The trainer; one rank reads the weights of the whole series for all.
        checkpoints: The series.
        allow_duplicates: Whether equal weights under two names are only warned of.
        before: What this gave for those of the series that were audited before.

    Raises:
        ValueError: If the audit finds a fault.
    """
    known = {digest: step for step, digest in reversed(list(before.items())) if digest is not None}
    rows = trainer.strategy.broadcast(audit(list(dict.fromkeys(checkpoints)), known) if trainer.is_global_zero else [])
    found = problems(rows)
    faulty = any(row.fault for row in rows)
    if found and (faulty or not allow_duplicates):
        more = f" ({len(found) - 1} more; `saetrack checkpoints SOURCE --audit` lists them.)" if found[1:] else ""
        remedy = "" if faulty else ", or go on all the same with `scheduler.allow_duplicates: true`"
        raise ValueError(f"{found[0]}{more} Choose the others with `scheduler.steps`{remedy}.")
    for line in found:
        logger.warning(line)
    return {row.checkpoint.step: row.weight_hash for row in rows}


def refuse_what_cuts_stages(trainer: Trainer) -> None:
    """Refuse options of Lightning's that would end a stage before its budget, or change what a step or a stage is."""
    if trainer.reload_dataloaders_every_n_epochs != 1:  # type: ignore[attr-defined]
        raise ValueError(
            "Every stage has its own activations, so the trainer must ask for a new loader in every epoch; "
            "give Trainer(reload_dataloaders_every_n_epochs=1)."
        )
    options: dict[str, tuple[float | None, float]] = {
        "max_steps": (trainer.max_steps, -1),
        "limit_train_batches": (trainer.limit_train_batches, 1.0),
        "accumulate_grad_batches": (trainer.accumulate_grad_batches, 1),
    }
    if trainer.max_epochs != 1000:  # Lightning's own, where none is given
        options["max_epochs"] = (trainer.max_epochs, -1)
    changed = [f"trainer.{name} is {value}" for name, (value, default) in options.items() if value != default]
    if any(isinstance(callback, Timer) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        changed.append("trainer.max_time is set")
    if changed:
        raise ValueError(
            f"{changed[0]}, which would cut every stage short or change its steps. Leave it out; a stage is as long as "
            "`scheduler.tokens_first` and `scheduler.tokens_next`, and a run can be killed and continued at any moment."
        )
