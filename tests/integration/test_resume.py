"""Stopping anywhere and going on gives the bytes of a run that was never stopped."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saetrack import Track
from tests.trees import hashes

TRACKS = "gpt_neox*/**/*"

KILLER = '''
import os
from lightning import Callback

class KillAt(Callback):
    """Ends the process as a power cut would (9), or as a batch system does (15), after so many optimizer steps."""

    def __init__(self, step: int, signal: int = 9) -> None:
        self.step = step
        self.signal = signal

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.signal)
'''


@pytest.fixture
def killable(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (tmp_path / "killer.py").write_text(KILLER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return config


@pytest.mark.parametrize("warm_start", ["transported", "prior"])
def test_killed_and_continued_equals_uninterrupted(
    warm_start: str, killable: dict[str, Any], run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    killable["scheduler"]["warm_start"] = warm_start
    assert run(killable).returncode == 0
    expected = hashes(tmp_path / "run", TRACKS)
    killable["scheduler"]["track_dir"] = str(tmp_path / "killed")
    # stages have 46, 23 and 23 steps, and a resume file is written every 11: before the first of them, just after
    # a snapshot, and in the last stage
    for step in (5, 47, 85):
        killer = {"class_path": "killer.KillAt", "init_args": {"step": step}}
        dying = run({**killable, "trainer": {**killable["trainer"], "callbacks": [killer]}}, "--ckpt_path", "last")
        assert dying.returncode == -9, dying.stderr
    done = run(killable, "--ckpt_path", "last")
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "killed", TRACKS) == expected


@pytest.mark.parametrize(
    ("sae", "arguments"),
    [("BatchTopKSAE", {"k": 4}), ("JumpReLUSAE", {"l0_coefficient": 0.01})],
    ids=["a buffer", "a parameter"],
)
def test_thresholds_are_in_the_resume_file(
    sae: str,
    arguments: dict[str, Any],
    killable: dict[str, Any],
    run: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    killable["model"]["sae"] = {"class_path": sae, "init_args": {"expansion_factor": 4, **arguments}}
    killable["scheduler"]["steps"] = [0, 10]
    assert run(killable).returncode == 0
    expected = hashes(tmp_path / "run", TRACKS)
    thresholds = [snapshot.tensor("threshold") for snapshot in Track.open(tmp_path / "run")]
    assert (thresholds[0] != thresholds[1]).all()
    killable["scheduler"]["track_dir"] = str(tmp_path / "killed")
    killer = {"class_path": "killer.KillAt", "init_args": {"step": 60}}  # in the second stage
    assert run({**killable, "trainer": {**killable["trainer"], "callbacks": [killer]}}).returncode == -9
    done = run(killable, "--ckpt_path", "last")
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "killed", TRACKS) == expected


def test_a_run_stopped_by_sigterm_says_how_to_go_on_and_does(
    killable: dict[str, Any], run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    killer = {"class_path": "killer.KillAt", "init_args": {"step": 60, "signal": 15}}
    stopped = run({**killable, "trainer": {**killable["trainer"], "callbacks": [killer]}})
    assert stopped.returncode == 128 + 15
    assert stopped.stderr.splitlines()[-1].endswith("Go on with the same command and `--ckpt_path last`.")
    assert run(killable, "--ckpt_path", "last").returncode == 0


def test_a_finished_track_takes_more_steps_and_refuses_changes(
    config: dict[str, Any], fit_here: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    config["scheduler"]["steps"] = [0, 2]
    assert fit_here(config).returncode == 0
    config["scheduler"]["steps"] = [0, 2, 10]
    fresh = fit_here(config)
    assert fresh.returncode == 1
    assert fresh.stderr.startswith("saetrack: error: ")
    assert "already holds 2 of 3 snapshots" in fresh.stderr
    refused = fit_here(config, "--ckpt_path", "last", "--model.sae.init_args.k", "3")
    assert refused.returncode == 1
    assert "model.sae.init_args.k is 3, but the resume file was written with 4" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    refused = fit_here(config, "--ckpt_path", "last", "--model.optimizer.lr", "0.5")
    assert "model.optimizer.lr is 0.5, but the resume file was written with 0.001" in refused.stderr
    done = fit_here(config, "--ckpt_path", "last")
    assert done.returncode == 0, done.stderr
    assert Track.open(tmp_path / "run").steps == [0, 2, 10]
