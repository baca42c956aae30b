"""`fit` follows an LLM that is still being trained."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from saetrack import Track
from saetrack.lm import watching
from tests.trees import hashes

SNAPSHOTS = "gpt_neox*/snapshots/**/*"


class Clock:
    """Time, for what waits: instead of a pause, the next thing happens in the folder."""

    def __init__(self, happenings: Iterator[object]) -> None:
        self.happenings = happenings
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        next(self.happenings)


def test_a_watched_series_gives_the_track_of_a_finished_one_however_the_waiting_is_broken_off(
    config: dict[str, Any],
    fit_here: Callable[..., subprocess.CompletedProcess[str]],
    tiny_series: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = tmp_path / "llm"

    def write() -> Iterator[object]:
        yield llm.mkdir()
        yield shutil.copytree(tiny_series / "step0", llm / "step0")
        (llm / "step1").mkdir()
        yield shutil.copy(tiny_series / "step1" / "config.json", llm / "step1")
        yield os.kill(os.getpid(), signal.SIGTERM)
        yield shutil.copytree(tiny_series / "step1", llm / "step1", dirs_exist_ok=True)
        shutil.copytree(tiny_series / "step2", llm / "step2")
        yield shutil.copytree(tiny_series / "step4", llm / "step4")
        yield (llm / "done").touch()

    monkeypatch.setattr(watching, "time", Clock(write()))
    watch = {"every_seconds": 0.1}
    config["data"]["source"] = {"class_path": "FolderSource", "init_args": {"path": str(llm), "watch": watch}}
    config["scheduler"]["steps"] = "every:2"
    stopped = fit_here(config)
    assert stopped.returncode == 128 + 15
    first, after_zero, partly, last = stopped.stderr.strip().splitlines()
    assert first.startswith(f"Waiting for an LLM checkpoint in {llm}, with a look every 0.1 s; the series ends with")
    assert "Waiting for an LLM checkpoint after step 0" in after_zero + partly
    assert f"The next one is not complete: {llm / 'step1'} has no weights" in partly
    assert last.endswith("Go on with the same command and `--ckpt_path last`.")
    assert Track.open(tmp_path / "run").steps == [0]
    done = fit_here(config, "--ckpt_path", "last")
    assert done.returncode == 0, done.stderr
    assert Track.open(tmp_path / "run").steps == [0, 2]

    again = fit_here(config)
    assert again.returncode == 0
    assert again.stdout.startswith(f"The track in {tmp_path / 'run'} is complete")
    del config["data"]["source"]["init_args"]["watch"]
    config["scheduler"]["track_dir"] = str(tmp_path / "whole")
    assert fit_here(config).returncode == 0
    assert hashes(tmp_path / "whole", SNAPSHOTS) == hashes(tmp_path / "run", SNAPSHOTS)


def test_what_needs_the_whole_series_is_refused_in_one_line(
    config: dict[str, Any], fit_here: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    config["data"]["source"]["init_args"]["watch"] = True
    refused = fit_here(config)
    assert refused.returncode == 1
    assert refused.stderr.startswith(
        "saetrack: error: scheduler.steps is [0, 2, 10], which needs the whole series, but"
    )
    assert len(refused.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_fit_follows_pretrain_in_another_process(
    config: dict[str, Any], write: Callable[[dict[str, Any]], Path], text: str, tmp_path: Path
) -> None:
    llm = tmp_path / "llm"
    init = {"path": str(llm), "watch": {"every_seconds": 0.2}}
    config["data"]["source"] = {"class_path": "FolderSource", "init_args": init}
    config["data"]["tokens"]["context_size"] = 16
    config["scheduler"]["steps"] = None
    saetrack = [sys.executable, "-m", "saetrack"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with (tmp_path / "said").open("w+") as said:
        fit = subprocess.Popen([*saetrack, "fit", "--config", str(write(config))], stderr=said, env=environment)
        while "Waiting for an LLM checkpoint in" not in (tmp_path / "said").read_text():
            assert fit.poll() is None
            time.sleep(0.2)
        tiny = "--steps 4 --n_layers 1 --d_model 16 --n_heads 2 --vocab_size 300 --context_size 16 --batch_size 4"
        corpus = ["--warmup_steps", "2", "--corpus", "TextCorpus", "--corpus.paths", f'["{text}"]']
        subprocess.run([*saetrack, "pretrain", str(llm), *tiny.split(), *corpus], check=True, env=environment)
        assert fit.wait(timeout=300) == 0, (tmp_path / "said").read_text()
    assert Track.open(tmp_path / "run").steps == [0, 1, 2, 4]
