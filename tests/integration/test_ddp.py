"""Two processes give one track: the tokens and quality of one process, and the same bytes when killed and continued."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saetrack import Track
from tests.trees import hashes

TRACKS = "gpt_neox*/**/*"
TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


KILL_RANK_ZERO = """
import os, signal
from lightning import Callback

class KillRankZero(Callback):
    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        if trainer.global_step == 120 and trainer.is_global_zero:
            os.kill(os.getpid(), signal.SIGKILL)
"""


RECORD = """
from pathlib import Path
from lightning import Callback

class RecordThreshold(Callback):
    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        with open(Path(__file__).parent / f"threshold-{trainer.global_rank}.txt", "a") as file:
            print(pl_module.saes[0].threshold.unique().tolist(), file=file)
"""


def test_two_processes_agree_with_one_and_a_killed_pair_continues_to_the_same_bytes(
    config: dict[str, Any],
    run: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config["scheduler"] |= {"steps": [0, 10], "tokens_first": 12_000, "tokens_next": 8_000}
    config["model"]["optimizer"]["lr"] = 5.0e-3
    tracks = []
    (tmp_path / "killer.py").write_text(KILL_RANK_ZERO)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name, options in (("one", ()), ("two", TWO), ("killed", (*TWO, "--ckpt_path", "last"))):
        config["scheduler"]["track_dir"] = str(tmp_path / name)
        if name == "killed":  # in the second stage
            dying = {**config, "trainer": {**config["trainer"], "callbacks": [{"class_path": "killer.KillRankZero"}]}}
            assert run(dying, *TWO).returncode == -9
            assert Track.open(tmp_path / name).steps == [0]
        done = run(config, *options)
        assert done.returncode == 0, done.stderr
        tracks.append(Track.open(tmp_path / name))
    one, two, _ = tracks
    assert hashes(tmp_path / "two", TRACKS) == hashes(tmp_path / "killed", TRACKS)
    assert hashes(tmp_path / "one", TRACKS).keys() == hashes(tmp_path / "two", TRACKS).keys()
    for a, b in zip(one, two, strict=True):
        assert a.metadata["tokens_trained"] == b.metadata["tokens_trained"]
        assert a.metadata["evaluation_tokens"] == b.metadata["evaluation_tokens"]
        assert a.metadata["ce_clean"] == pytest.approx(b.metadata["ce_clean"], rel=1e-6)
        assert b.metadata["fvu"] == pytest.approx(a.metadata["fvu"], rel=0.05)
        assert b.metadata["fvu"] != a.metadata["fvu"]  # the ranks read rows of their own


def test_both_processes_have_one_threshold(
    config: dict[str, Any],
    run: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "recorder.py").write_text(RECORD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    config["scheduler"] |= {"steps": [0, 10], "tokens_first": 4_000, "tokens_next": 2_000}
    config["model"]["sae"] = {"class_path": "BatchTopKSAE", "init_args": {"expansion_factor": 4, "k": 4}}
    config["trainer"]["callbacks"] = [{"class_path": "recorder.RecordThreshold"}]
    done = run(config, *TWO)
    assert done.returncode == 0, done.stderr
    zero, one = ((tmp_path / f"threshold-{rank}.txt").read_text().splitlines() for rank in (0, 1))
    assert zero == one
    assert len(set(zero)) == len(zero) > 40  # it moves in every step
