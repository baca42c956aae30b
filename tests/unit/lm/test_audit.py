import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from saetrack.lm.audit import audit, describe_checkpoints, format_audit, problems
from saetrack.lm.checkpoints import FolderSource, LLMCheckpoint, weight_hash


@pytest.fixture
def faulty(tmp_path: Path, make_series: Callable[..., Path]) -> FolderSource:
    """Steps 0, 1, 2 with equal weights as Pythia has them, step 4 truncated, step 10 without weights, step 11 good."""
    make_series(tmp_path, steps=[0, 4, 10, 11])
    for step in (1, 2):
        shutil.copytree(tmp_path / "step0", tmp_path / f"step{step}")
    weights = tmp_path / "step4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    (tmp_path / "step10" / "model.safetensors").unlink()
    return FolderSource(tmp_path)


def test_a_good_series_has_no_problems(tiny_series: Path) -> None:
    series = FolderSource(tiny_series).checkpoints()
    rows = audit(series)
    assert [row.checkpoint for row in rows] == series
    assert [row.weight_hash for row in rows] == [weight_hash(checkpoint) for checkpoint in series]
    assert len({row.weight_hash for row in rows}) == 5
    assert problems(rows) == []


def test_repeated_missing_and_truncated_weights_are_found(faulty: FolderSource) -> None:
    rows = audit(faulty.checkpoints())
    assert {row.checkpoint.step: row.equal_to for row in rows} == {0: None, 1: 0, 2: 0, 4: None, 10: None, 11: None}
    assert [row.checkpoint.step for row in rows if row.fault] == [4, 10]
    assert [row.checkpoint.step for row in rows if row.weight_hash is None] == [4, 10]


def test_each_problem_is_one_line_that_names_the_checkpoint(faulty: FolderSource) -> None:
    truncated, missing, first, second = problems(audit(faulty.checkpoints()))
    assert "step 4 " in truncated
    assert "truncated" in truncated
    assert "step 10 " in missing
    assert "has no weights" in missing
    assert "same weights as that of step 0" in first
    assert "step 2 " in second
    assert not any("\n" in line for line in (truncated, missing, first, second))


def test_the_table_has_a_line_for_each_checkpoint_and_the_problems_below(faulty: FolderSource) -> None:
    rows = audit(faulty.checkpoints())
    lines = format_audit(rows).splitlines()
    assert lines[0].split() == ["step", "tokens", "LLM", "checkpoint", "commit", "weights", "equal", "to"]
    assert lines[2].split()[-2:] == ["step", "0"]
    assert "FAULT" in lines[4]
    assert lines[7] == ""
    assert lines[8:] == problems(rows)


def test_without_the_audit_only_names_are_read(faulty: FolderSource) -> None:
    text = describe_checkpoints(faulty)
    assert [line.split()[0] for line in text.splitlines()] == ["step", "0", "1", "2", "4", "10", "11"]
    assert "FAULT" not in text
    assert describe_checkpoints(faulty, audit=True) == format_audit(audit(faulty.checkpoints()))


def test_a_revision_that_is_nowhere_is_a_fault(tmp_path: Path) -> None:
    (row,) = audit([LLMCheckpoint("no/where", "step1", 1, tokens=2_097_152, cache_dir=str(tmp_path))])
    assert row.fault is not None
    assert "`hf download no/where --revision step1`" in row.fault
    assert "2,097,152" in format_audit([row])
