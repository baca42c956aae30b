"""What is wrong with a published series, found before any training: missing weights, and weights that repeat.

Published checkpoints do repeat (step 0, 1 and 2 of Pythia are identical, and dozens of branches of some models serve
the final weights), and then a track shows no drift, or a jump, that the LLM's training never had.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from saetrack.lm import files
from saetrack.lm.finite import not_finite
from saetrack.lm.hub_listing import label
from saetrack.lm.loading import LLMCheckpoint, commit_sha, fingerprints, read_config
from saetrack.lm.names import parse_name
from saetrack.lm.selection import Selection
from saetrack.lm.source import CheckpointSource


@dataclass(frozen=True)
class AuditRow:
    """What the audit found of one LLM checkpoint.

    Args:
        checkpoint: Which one.
        commit: The commit of its revision; None for a folder.
        weight_hash: As ``weight_hash``; None when ``fault`` is set.
        equal_to: Step of the first checkpoint of the series with the same weights; None when there is no earlier one.
        fault: Why it cannot be used: weights or config.json missing, incomplete or truncated, or weights that are no
            numbers (which only ``saetrack checkpoints --audit`` looks for); None when it can.
        doubt: What contradicts its place in the series: another step in its ``trainer_state.json``, or fewer tokens
            than an earlier one; None when nothing does.
        is_main: Whether it serves the weights of its repository's ``main`` although a later checkpoint follows.
    """

    checkpoint: LLMCheckpoint
    commit: str | None
    weight_hash: str | None
    equal_to: int | None
    fault: str | None
    doubt: str | None = None
    is_main: bool = False


def audit(checkpoints: Sequence[LLMCheckpoint], known: Mapping[str, int] | None = None) -> list[AuditRow]:
    """Look at the weights of every checkpoint, without loading any, and at those of ``main`` beside them.

    Files in folders are read once to hash them; on the Hub their hashes are asked for, and nothing is downloaded.

    Args:
        checkpoints: Those to look at.
        known: Steps of earlier ones of the series by the hash of their weights.

    Returns:
        One row for each checkpoint, in the order given.
    """
    return _audited(checkpoints, known or {})


def problems(rows: Sequence[AuditRow]) -> list[str]:
    """One line for each thing that is wrong: faults, which stop a run, then what may be meant."""
    faults = [f"The LLM checkpoint of {row.checkpoint} cannot be used. {row.fault}" for row in rows if row.fault]
    of_main = [
        f"The LLM checkpoint of {row.checkpoint} has the weights of main, the finished LLM, so it is not what its name "
        f"says. Leave it out."
        for row in rows
        if row.is_main
    ]
    repeated = [
        f"The LLM checkpoint of {row.checkpoint} has the same weights as that of step {row.equal_to}: between them "
        f"nothing can drift. Leave one out, or keep both as a null."
        for row in rows
        if row.equal_to is not None and not row.is_main
    ]
    doubts = [
        f"The LLM checkpoint of {row.checkpoint} {row.doubt}. Leave out the wrong one." for row in rows if row.doubt
    ]
    return faults + of_main + doubts + repeated


def format_audit(rows: Sequence[AuditRow]) -> str:
    """The rows as a plain text table, with ``problems`` below it."""
    table = _table(
        ["step", "tokens", "LLM checkpoint", "commit", "weights", "equal to"],
        [
            [
                *_columns(row.checkpoint),
                (row.commit or "-")[:10],
                "ok" if row.fault is None else "FAULT",
                ", ".join([*["main"][: row.is_main], *[f"step {s}" for s in [row.equal_to] if s is not None]]) or "-",
            ]
            for row in rows
        ],
    )
    return "\n".join([table, *(["", *problems(rows)] if problems(rows) else [])])


def describe_checkpoints(source: CheckpointSource, audit: bool = False, select: str = "all") -> str:
    """What ``saetrack checkpoints SOURCE`` prints: the series as a plain text table.

    Args:
        source: The series.
        audit: Also look at the weights, as ``audit`` does.
        select: Which of them, as ``Selection`` reads it.

    Raises:
        FileNotFoundError: If the source holds nothing.
        ValueError: If its steps are not in order, or ``select`` is no choice among them.
    """
    series = Selection(select).of(source.checkpoints())
    if audit:
        parts = [format_audit([_with_values(row) for row in _audited(series, {})]), _describe_tokenizer(source, series)]
    else:
        parts = [_table(["step", "tokens", "LLM checkpoint"], [_columns(checkpoint) for checkpoint in series])]
    return "\n\n".join([*parts, *_describe_left_out(source.left_out())])


def _audited(checkpoints: Sequence[LLMCheckpoint], known: Mapping[str, int]) -> list[AuditRow]:
    first = dict(known)
    rows: list[AuditRow] = []
    mains = _main_fingerprints(checkpoints)
    # the last one may well be the finished LLM
    last = max((checkpoint.step for checkpoint in checkpoints), default=0)
    for checkpoint in checkpoints:
        try:
            commit, found = commit_sha(checkpoint), _loadable(checkpoint)
        except (FileNotFoundError, ValueError) as error:
            rows.append(AuditRow(checkpoint, None, None, None, str(error)))
            continue
        equal_to = next((first[digest] for digest in found if digest in first), None)
        is_main = checkpoint.step < last and not mains.get(checkpoint.model, set()).isdisjoint(found)
        rows.append(AuditRow(checkpoint, commit, found[0], equal_to, None, _doubt(checkpoint, checkpoints), is_main))
        first = {**dict.fromkeys(found, checkpoint.step), **first}
    return rows


def _with_values(row: AuditRow) -> AuditRow:
    """The row, with a fault where the weights hold a NaN or an infinity; weights that are not on this disk do not."""
    try:
        name = not_finite(row.checkpoint) if row.fault is None else None
    except (FileNotFoundError, ValueError) as error:
        return replace(row, fault=str(error))
    return row if name is None else replace(row, fault=f"Its tensor {name} holds NaN or infinite values: it diverged.")


def _doubt(checkpoint: LLMCheckpoint, series: Sequence[LLMCheckpoint]) -> str | None:
    """What contradicts its place in a series, in whatever order that is given, in words that follow its name."""
    said = files.trainer_state(Path(checkpoint.model)).get("global_step") if files.is_folder(checkpoint.model) else None
    if said is not None and said != (parse_name(Path(checkpoint.model).name) or checkpoint).step:
        return f"has a trainer_state.json of step {said}, so it is not what its name says"
    earlier = [(c.tokens, c.step) for c in series if c.step < checkpoint.step and c.tokens is not None]
    most, at = max(earlier, default=(0, 0))
    if checkpoint.tokens is None or checkpoint.tokens >= most:
        return None
    return f"has seen {checkpoint.tokens:,} tokens, fewer than the {most:,} of the earlier step {at}"


def _loadable(checkpoint: LLMCheckpoint) -> list[str]:
    """The fingerprints of the weights, once there is a configuration to load them with."""
    found = fingerprints(checkpoint)
    if checkpoint.format is None and "config.json" not in files.file_names(
        checkpoint.model, checkpoint.revision, checkpoint.cache_dir
    ):
        raise FileNotFoundError(
            f"{label(checkpoint.model, checkpoint.revision)} has weights but no config.json, which says what LLM "
            f"they are of. Put that of another checkpoint beside them, or leave this one out."
        )
    if checkpoint.format is None and files.is_folder(checkpoint.model):
        read_config(checkpoint, Path(checkpoint.model))
    return found


def _main_fingerprints(checkpoints: Sequence[LLMCheckpoint]) -> dict[str, set[str]]:
    """Fingerprints of ``main`` by repository, in each format that it has; none where it has no weights."""
    mains: dict[str, set[str]] = {}
    for repo, cache in {c.model: c.cache_dir for c in checkpoints if c.revision not in (None, "main")}.items():
        with contextlib.suppress(FileNotFoundError, ValueError):
            mains[repo] = set(fingerprints(LLMCheckpoint(repo, "main", 0, cache_dir=cache)))
    return mains


def _describe_tokenizer(source: CheckpointSource, series: Sequence[LLMCheckpoint]) -> str:
    without = sum(c.format is None and not files.has_tokenizer(c.model, c.revision, c.cache_dir) for c in series)
    try:
        name, revision = source.tokenizer_name
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    if not files.has_tokenizer(name, revision, series[-1].cache_dir):
        return f"There is no tokenizer in {label(name, revision)}. Name one as `tokenizer` of the source."
    absent = f"; {without} of {len(series)} LLM checkpoints have none of their own" if without else ""
    return f"The tokenizer of the whole series is that of {label(name, revision)}{absent}."


def _describe_left_out(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 20} more" if names[20:] else ""
    return [f"Left out, for their names say no step: {', '.join(names[:20])}{more}."]


def _columns(checkpoint: LLMCheckpoint) -> list[str]:
    tokens = "-" if checkpoint.tokens is None else f"{checkpoint.tokens:,}"
    return [str(checkpoint.step), tokens, label(checkpoint.model, checkpoint.revision)]


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
