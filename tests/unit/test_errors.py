"""One line instead of a page: in the words of a configuration, and once however many processes fail."""

import errno
import os

import pytest
from safetensors import SafetensorError

from saetrack import errors
from saetrack.errors import in_plain_words, one_line, said_by_rank_zero
from saetrack.training.datamodule import require_positive


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (
            'Parser key "steps": Does not validate against any of the Union subtypes Subtypes: [list[int], '
            "<class 'str'>, <class 'NoneType'>] Errors: - Expected a <class 'list'> - Expected a <class 'str'> "
            "Given value type: <class 'float'> Given value: 1.5",
            "steps is 1.5; expected a list of int, such as [0, 3]",
        ),
        (
            'Parser key "hookpoints": Expected a list[str]. Got value: layers.2',
            "hookpoints is layers.2; expected a list, which is written [layers.2]",
        ),
        (
            'Parser key "positions": Expected a list[int]. Got value: 3',
            "positions is 3; expected a list, which is written [3]",
        ),
        (
            "Parser key \"positions\": Expected a list[int]. Got value: ['abc']",
            "positions is ['abc']; expected a list of int, such as [0, 3]",
        ),
        (
            "Parser key \"seed\": Does not validate against any of the Union subtypes Subtypes: [<class 'bool'>, "
            "<class 'NoneType'>] Errors: - Expected a <class 'bool'> Given value type: <class 'str'> Given value: x",
            "seed is x; expected bool, null",
        ),
        (
            "Parser key \"warm_start\": Expected a typing.Literal['prior', 'scratch']. Got value: transport",
            "warm_start is transport; expected 'prior', 'scratch'",
        ),
        (
            'Parser key "analyses": Does not validate against any of the Union subtypes Subtypes: [a, b] Errors: - '
            "Problem with given class_path 'my.Thing': No module named 'my' - Problem with given class_path "
            "'my.Thing': No module named 'my' Given value type: <class 'str'> Given value: my.Thing",
            "analyses: my.Thing cannot be used: No module named 'my'",
        ),
        (
            'Parser key "track_dir": Not of type Path: expected str, bytes or os.PathLike object, not NoneType',
            "track_dir is missing. Begin with a configuration, such as --config configs/quickstart.yaml",
        ),
        ("Parser key \"config\": File does not exist: 'x.yaml'", "config: File does not exist: 'x.yaml'"),
        ("unrecognized arguments: --nope", "unrecognized arguments: --nope"),
    ],
)
def test_what_the_parser_finds_is_said_in_plain_words(found: str, line: str) -> None:
    assert in_plain_words(found) == line


def raised(error: Exception) -> Exception:
    """The error as one that something outside the package raised."""
    try:
        raise error
    except Exception as caught:
        return caught


def test_a_full_disk_and_a_file_of_the_systems_are_one_line_and_what_is_not_expected_is_none() -> None:
    for full in (
        OSError(errno.ENOSPC, "No space left on device", "/tmp/x"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ):
        assert (one_line(raised(full)) or "").startswith("The disk is full.")
    assert (one_line(raised(PermissionError(errno.EACCES, "Permission denied", "/x"))) or "").startswith(
        "/x: Permission denied."
    )
    assert one_line(raised(ValueError("a bug"))) is None
    with pytest.raises(ValueError, match="must be above 0") as ours:
        require_positive("data.batch_size", 0)
    assert one_line(ours.value) == str(ours.value)


def test_of_several_processes_that_fail_the_one_that_started_the_others_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(errors, "_SECONDS_TO_END", 0.1)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert not said_by_rank_zero()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not said_by_rank_zero(), "rank zero is alive, so only this one has failed"
    monkeypatch.setattr(errors, "_STARTED_BY", os.getppid() + 1)
    assert said_by_rank_zero()
