"""Two processes give one track: the tokens and quality of one process, and the same bytes when killed and continued."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saetrack import Track
from tests.trees import hashes

TRACKS = "gpt_neox*/**/*"
TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
AS_MANY_LATENTS_AS_ACTIVATIONS = 8
"""The expansion factor, in a batch: from there on the ranks of a sparse SAE exchange factors."""


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
    # at 5e-3 so short a training of one process ends up to 12 % apart between three seeds
    config["model"]["optimizer"]["lr"] = 2.0e-3
    config["model"]["sae"]["init_args"]["expansion_factor"] = AS_MANY_LATENTS_AS_ACTIVATIONS
    tracks = []
    (tmp_path / "killer.py").write_text(KILL_RANK_ZERO)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
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


def start(launcher: list[str], config: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    """A process that is not waited for."""
    return subprocess.Popen(
        [*launcher, "-m", "saetrack", "fit", "--config", str(config), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_both_processes_of_torchrun_have_one_threshold(
    config: dict[str, Any],
    write: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "recorder.py").write_text(RECORD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    config["scheduler"] |= {"steps": [0, 10], "tokens_first": 4_000, "tokens_next": 2_000}
    # each rank chooses another number of latents
    sae = {"expansion_factor": AS_MANY_LATENTS_AS_ACTIVATIONS, "k": 4}
    config["model"]["sae"] = {"class_path": "BatchTopKSAE", "init_args": sae}
    config["trainer"]["callbacks"] = [{"class_path": "recorder.RecordThreshold"}]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    pair = start(torchrun, write(config), *TWO)
    said, _ = pair.communicate(timeout=300)
    assert pair.returncode == 0, said
    zero, one = ((tmp_path / f"threshold-{rank}.txt").read_text().splitlines() for rank in (0, 1))
    assert zero == one
    assert len(set(zero)) == len(zero) > 40  # it moves in every step


def test_a_task_of_slurm_on_each_of_two_machines(
    config: dict[str, Any], write: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    """What srun tells its tasks; Lightning takes rank, machine and the first machine's address from it."""
    config["scheduler"] |= {"track_dir": str(tmp_path / "run"), "steps": [0], "tokens_first": 1_000}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "track", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}
    machines = {"SLURM_NNODES": "2", "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": port}
    options = ("--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.strategy", "ddp")
    tasks = [
        start(
            *([sys.executable], write(config), *options),
            **{**job, **machines, "SLURM_PROCID": str(i), "SLURM_NODEID": str(i), "SLURM_LOCALID": "0"},
        )
        for i in (0, 1)
    ]
    said = [task.communicate(timeout=300)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    track = Track.open(tmp_path / "run")
    assert track.steps == [0]
    assert track[0].metadata["tokens_trained"] == 896  # whole batches of 128 of both together
    assert "FVU" in said[0]  # one that tells
    assert "FVU" not in said[1]
