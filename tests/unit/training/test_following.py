"""What a run can follow while there is no last LLM checkpoint."""

import re
from typing import Any

import pytest

from saetrack.lm import LLMCheckpoint
from saetrack.training.downloads import HubDownloads
from saetrack.training.following import refuse_lost, refuse_what_needs_the_end

FORWARD = {"steps": None, "direction": "forward", "max_rise": None, "start": None}


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"direction": "backward"}, "scheduler.direction is backward"),
        ({"direction": "both"}, "scheduler.direction is both"),
        ({"start": "runs/imported"}, "model.start is runs/imported"),
        ({"max_rise": 0.5}, "scheduler.max_rise is 0.5"),
        ({"steps": "log:3"}, "scheduler.steps is 'log:3'"),
        ({"steps": [0, 2]}, "scheduler.steps is [0, 2]"),
    ],
    ids=["backward", "both", "start", "max_rise", "log", "list"],
)
def test_what_needs_the_whole_series_is_refused(options: dict[str, Any], found: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{found}, which needs the whole series, but data.source has")):
        refuse_what_needs_the_end(**{**FORWARD, **options})


@pytest.mark.parametrize("steps", [None, "all", "every:3", "dense:512+every:10"])
def test_what_grows_with_the_series_is_followed(steps: str | None) -> None:
    refuse_what_needs_the_end(**{**FORWARD, "steps": steps})


def series(*steps: int) -> list[LLMCheckpoint]:
    return [LLMCheckpoint(f"llm/step{step}", None, step) for step in steps]


def test_a_series_that_goes_on_but_has_lost_what_was_taken_is_refused() -> None:
    # Trainer's save_total_limit: as many folders as before, but others
    with pytest.raises(ValueError, match=r"step 500 is no longer in runs/llm; .*`save_total_limit`"):
        refuse_lost("runs/llm", series(1000, 1500), series(500, 1000))
    refuse_lost("runs/llm", series(500, 1000, 1500), series(500, 1000))
    refuse_lost("runs/llm", series(1000), series(500, 1000))  # the Hub is out of reach, and this is its cache
    refuse_lost("runs/llm", [], series(500))
    refuse_lost("runs/llm", series(500), [])


def test_fewer_llm_checkpoints_than_a_stage_reads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"hub\.keep_checkpoints is 2; it must be at least 3"):
        HubDownloads(keep_checkpoints=2)
