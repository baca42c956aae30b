import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback
from rich.console import Console

from saetrack.training import ResumeFile, TrackProgressBar

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",  # the stream is a forward of the LLM in this process
)

BATCH = 128
BUDGETS = {0: 15 * BATCH, 2: 7 * BATCH, 10: 7 * BATCH}  # of 2,000 and 1,000 tokens, in whole batches


def said(tiny_fit: Callable[..., Any], run: Path, terminal: bool = False, **options: Any) -> tuple[str, Any]:
    """What the terminal got, and the fit."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, highlight=False, soft_wrap=True, color_system=None)
    callbacks = [TrackProgressBar(options.pop("every_seconds", 0.0), console), *options.pop("callbacks", [])]
    fitted = tiny_fit(run, callbacks=callbacks, trainer={"enable_progress_bar": True}, **options)
    return out.getvalue(), fitted


def stays(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("Snapshot")]


def test_a_log_file_gets_whole_lines_that_say_where_the_series_stands(
    tiny_fit: Callable[..., Any], tmp_path: Path
) -> None:
    text, fitted = said(tiny_fit, tmp_path / "run")
    assert "\r" not in text
    assert "\x1b" not in text
    lines = iter(text.splitlines())
    for position, (step, budget) in enumerate(BUDGETS.items(), start=1):
        heading = f"LLM checkpoint {position} of 3 (step {step}): "
        assert next(lines) == f"{heading}{budget:,} tokens"
        for batch in range(budget // BATCH):
            line = next(lines)
            assert line.startswith(f"{heading}{(batch + 1) * BATCH:,} of {budget:,} tokens, ")
            assert re.search(r", [\d,]+ tokens/s, FVU 0\.\d{3}, dead \d+\.\d%, (\d+ s|\d+ min) left$", line), line
        facts = fitted.track.at(step).metadata
        line = next(lines)
        assert line.startswith(f"Snapshot of step {step}: FVU {facts['fvu_before']:.3f} -> {facts['fvu']:.3f}, L0 4.0")
        assert f"dead {facts['dead_share']:.1%}" in line
        assert ("functional correlation" in line) == (step > 0)
    assert next(lines, None) is None


def test_between_lines_a_log_file_waits(tiny_fit: Callable[..., Any], tmp_path: Path) -> None:
    text, _ = said(tiny_fit, tmp_path / "run", every_seconds=1e6)
    assert len(text.splitlines()) == 3 + 3  # the start and the end of every stage


def test_the_fvu_and_the_time_left_are_of_the_run(tiny_fit: Callable[..., Any], tmp_path: Path) -> None:
    text, fitted = said(tiny_fit, tmp_path / "run")
    for step, budget in BUDGETS.items():
        curve = fitted.track.at(step).metadata["held_out_curve"]
        last = next(line for line in text.splitlines() if f"(step {step}): {budget:,} of" in line)
        assert f"FVU {curve[-1][1]:.3f}" in last
    # the last line of the last stage has nothing left to train
    assert last.endswith(", 1 s left")


def test_a_terminal_keeps_one_line_for_each_snapshot(tiny_fit: Callable[..., Any], tmp_path: Path) -> None:
    text, _ = said(tiny_fit, tmp_path / "run", terminal=True)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")
    assert [line.split(":")[0] for line in stays(plain)] == [f"Snapshot of step {step}" for step in BUDGETS]
    assert "LLM checkpoint 3 of 3 (step 10)" in plain


def test_with_two_hookpoints_a_line_says_which(tiny_fit: Callable[..., Any], tmp_path: Path) -> None:
    hookpoints = ["gpt_neox.layers.0", "gpt_neox.layers.1"]
    text, _ = said(tiny_fit, tmp_path / "run", every_seconds=1e6, hookpoints=hookpoints, steps=[0, 10])
    assert [line.split(":")[0] for line in stays(text)] == [
        f"Snapshot of step {step} ({hookpoint})" for step in (0, 10) for hookpoint in hookpoints
    ]


class Kill(Callback):
    """Ends the run after an optimizer step, as a power cut would."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 15 + 6:
            raise KeyError("killed")


def test_a_stage_resumed_in_its_middle_is_named_and_goes_on_counting(
    tiny_fit: Callable[..., Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(KeyError, match="killed"):
        tiny_fit(run, callbacks=[Kill()], steps=[0, 10])  # the second stage's resume file is of its step 4
    text, _ = said(tiny_fit, run, ckpt_path=ResumeFile.path(run), steps=[0, 10])
    lines = text.splitlines()
    assert lines[0] == "LLM checkpoint 2 of 2 (step 10): 896 tokens"
    assert [line.split(": ")[1].split(" tokens")[0] for line in lines[1:4]] == [
        f"{n * BATCH:,} of 896" for n in (5, 6, 7)
    ]
    assert len(lines) == 1 + 3 + 1
