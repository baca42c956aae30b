"""What is wrong with a published series, found before any training: missing weights, and weights that repeat.

Published checkpoints do repeat (step 0, 1 and 2 of Pythia are identical, and dozens of branches of some models serve
the final weights), and then a track shows no drift, or a jump, that the LLM's training never had.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from saetrack.lm import files
from saetrack.lm.checkpoints import CheckpointSource, LLMCheckpoint, commit_sha
from saetrack.lm.loading import fingerprint


@dataclass(frozen=True)
class AuditRow:
    """What the audit found of one LLM checkpoint.

    Args:
        checkpoint: Which one.
        commit: The commit of its revision; None for a folder.
        weight_hash: As ``weight_hash``; None when ``fault`` is set.
        equal_to: Step of the first checkpoint of the series with the same weights; None when there is no earlier one.
        fault: Why it cannot be loaded: weights missing, incomplete or truncated; None when it can.
    """

    checkpoint: LLMCheckpoint
    commit: str | None
    weight_hash: str | None
    equal_to: int | None
    fault: str | None


def audit(checkpoints: Sequence[LLMCheckpoint]) -> list[AuditRow]:
    """Look at the weights of every checkpoint, without loading any.

    Files in folders are read once to hash them; on the Hub their hashes are asked for, and nothing is downloaded.

    Returns:
        One row for each checkpoint, in the order given.
    """
    return _audited(checkpoints)


def problems(rows: Sequence[AuditRow]) -> list[str]:
    """One line for each thing that is wrong: faults, which stop a run, then repeated weights, which may be meant."""
    faults = [f"The LLM checkpoint of {row.checkpoint} cannot be used. {row.fault}" for row in rows if row.fault]
    return faults + [
        f"The LLM checkpoint of {row.checkpoint} has the same weights as that of step {row.equal_to}: between them "
        f"nothing can drift. Leave one out, or keep both as a null."
        for row in rows
        if row.equal_to is not None
    ]


def format_audit(rows: Sequence[AuditRow]) -> str:
    """The rows as a plain text table, with ``problems`` below it."""
    table = _table(
        ["step", "tokens", "LLM checkpoint", "commit", "weights", "equal to"],
        [
            [
                *_columns(row.checkpoint),
                (row.commit or "-")[:10],
                "ok" if row.fault is None else "FAULT",
                "-" if row.equal_to is None else f"step {row.equal_to}",
            ]
            for row in rows
        ],
    )
    return "\n".join([table, *(["", *problems(rows)] if problems(rows) else [])])


def describe_checkpoints(source: CheckpointSource, audit: bool = False) -> str:
    """What ``saetrack checkpoints SOURCE`` prints: the series as a plain text table.

    Args:
        source: The series.
        audit: Also look at the weights, as ``audit`` does.

    Raises:
        FileNotFoundError: If the source holds nothing.
        ValueError: If its steps are not in order.
    """
    series = source.checkpoints()
    if audit:
        return format_audit(_audited(series))
    return _table(["step", "tokens", "LLM checkpoint"], [_columns(checkpoint) for checkpoint in series])


def _audited(checkpoints: Sequence[LLMCheckpoint]) -> list[AuditRow]:
    first: dict[str, int] = {}
    rows: list[AuditRow] = []
    for checkpoint in checkpoints:
        try:
            commit, digest = commit_sha(checkpoint), fingerprint(checkpoint)
        except (FileNotFoundError, ValueError) as error:
            rows.append(AuditRow(checkpoint, None, None, None, str(error)))
            continue
        rows.append(AuditRow(checkpoint, commit, digest, first.get(digest), None))
        first.setdefault(digest, checkpoint.step)
    return rows


def _columns(checkpoint: LLMCheckpoint) -> list[str]:
    tokens = "-" if checkpoint.tokens is None else f"{checkpoint.tokens:,}"
    return [str(checkpoint.step), tokens, files.label(checkpoint.model, checkpoint.revision)]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart; the first two are numbers and stand to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if column < 2 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, *rows]
    ]
    return "\n".join(lines)
