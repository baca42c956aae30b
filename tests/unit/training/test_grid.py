import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback

from saetrack.lm import LLMCheckpoint
from saetrack.training.grid import farthest_within, select_checkpoints
from saetrack.training.scheduler import CheckpointScheduler
from tests.trees import hashes


def test_a_text_or_a_list_chooses_the_steps_of_a_track(tmp_path: Path) -> None:
    series = [LLMCheckpoint("llm", None, step) for step in (0, 1, 2, 4, 10)]
    assert [c.step for c in select_checkpoints(series, "every:2")] == [0, 2, 10]
    assert [c.step for c in select_checkpoints(series, [1, 4])] == [1, 4]
    assert select_checkpoints(series, None) == series
    with pytest.raises(ValueError, match=r"scheduler\.steps: LLM step 3 is asked for"):
        select_checkpoints(series, [3])
    with pytest.raises(ValueError, match="'often' is no choice of LLM checkpoints"):
        CheckpointScheduler(tmp_path, steps="often")


def test_it_goes_as_far_as_the_bound_allows_and_looks_only_a_few_times() -> None:
    draw = random.Random(0)
    for n in range(1, 60):
        rises = sorted(draw.random() for _ in range(n))
        series = [LLMCheckpoint("llm", None, step) for step in range(n)]
        bound = draw.random()
        choice = farthest_within(series, lambda c, rises=rises: rises[c.step], bound)
        # the next one is always taken; beyond it, the last within the bound
        assert choice.index == max([0, *(i for i, rise in enumerate(rises) if i and rise <= bound)])
        assert choice.skipped == list(range(choice.index))
        assert len(choice.rises) <= 2 * n.bit_length()
        assert all(choice.rises[step] == rises[step] for step in choice.rises)


class Stop(Callback):
    """Ends the run as an exception would, after so many optimizer steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise ConnectionError("pulled")


def test_a_grid_that_follows_the_llm_is_recorded_and_resumes_to_the_same_bytes(
    tiny_fit: Callable[..., Any], tmp_path: Path
) -> None:
    """The weights move on a line, so the SAE of step 0 is worse the later the LLM checkpoint."""
    every = {"steps": [0, 1, 2, 4, 10]}
    assert tiny_fit(tmp_path / "near", max_rise=1e-9, **every).track.steps == [0, 1, 2, 4, 10]
    assert tiny_fit(tmp_path / "far", max_rise=1e9, **every).track.steps == [0, 10]
    near = tiny_fit(tmp_path / "near2", max_rise=1e-9, steps=[0, 10]).track
    fvu, shift = near[0].metadata["fvu"], near[1].metadata["fvu_shift"]
    bound = 0.3 * (shift / fvu - 1)
    whole = tiny_fit(tmp_path / "whole", max_rise=bound, **every).track
    assert 2 < len(whole) < 5
    assert "choice" not in whole[0].metadata
    choice = whole[1].metadata["choice"]
    assert choice["max_rise"] == bound
    assert choice["skipped"] == [step for step in every["steps"] if 0 < step < whole.steps[1]]
    assert all((rise <= bound) == (int(step) <= whole.steps[1]) for step, rise in choice["rises"].items())
    with pytest.raises(ConnectionError):
        tiny_fit(tmp_path / "stopped", [Stop(21)], max_rise=bound, **every)
    tiny_fit(tmp_path / "stopped", ckpt_path=tmp_path / "stopped" / "resume" / "last.ckpt", max_rise=bound, **every)
    assert hashes(tmp_path / "stopped", "gpt_neox*/**/*") == hashes(tmp_path / "whole", "gpt_neox*/**/*")
