"""A whole run that takes seconds: tiny LLM checkpoints, generated text, a config file as a user would write it."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from saetrack.cli import main

WORDS = "the cat sat on a mat and dog ran home while birds sang over hills near river bank at dawn def return print"

Config = dict[str, Any]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A glob of 200 documents of 150 words."""
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    for i in range(200):
        (folder / f"{i:03d}.txt").write_text(" ".join(draw.choices(WORDS.split(), k=150)))
    return str(folder / "*.txt")


@pytest.fixture(scope="session")
def configure(tiny_series: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Config]:
    """The configuration of a run in a folder, over LLM steps 0, 2 and 10 of the tiny series: ``configure(run)``."""
    cache = tmp_path_factory.mktemp("tokens")

    def configuration(run: Path) -> Config:
        return {
            "seed_everything": 1,
            "scheduler": {
                "track_dir": str(run),
                "steps": [0, 2, 10],
                "tokens_first": 6_000,
                "tokens_next": 3_000,
            },
            "data": {
                "source": {"class_path": "FolderSource", "init_args": {"path": str(tiny_series)}},
                "hookpoints": ["gpt_neox.layers.0"],
                "corpus": {"class_path": "TextCorpus", "init_args": {"paths": [text]}},
                "batch_size": 128,
                "chunk_tokens": 1024,
                "tokens": {
                    "context_size": 32,
                    "calibration_tokens": 2000,
                    "selection_tokens": 2000,
                    "evaluation_tokens": 2000,
                    "ce_tokens": 1000,
                    "split_share": 0.1,
                    "cache_dir": str(cache),
                },
            },
            "model": {
                "sae": {"class_path": "TopKSAE", "init_args": {"expansion_factor": 4, "k": 4}},
                "optimizer": {"warmup_tokens": 500},
                "dead_after_tokens": 2000,
                "log_every_tokens": 512,
            },
            "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
            "resume": {"every_tokens": 1500},
        }

    return configuration


@pytest.fixture
def config(configure: Callable[[Path], Config], tmp_path: Path) -> Config:
    """The configuration as a dictionary, to be changed by a test before ``write`` puts it into a file."""
    return configure(tmp_path / "run")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Config], Path]:
    """Writes a configuration to a file."""

    def write_config(config: Config) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write_config


@pytest.fixture
def run(write: Callable[[Config], Path]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``python -m saetrack fit`` in a process of its own, as a user runs it."""

    def fit(config: Config, *options: str) -> subprocess.CompletedProcess[str]:
        return saetrack("fit", "--config", str(write(config)), *options)

    return fit


@pytest.fixture
def fit_here(
    write: Callable[[Config], Path], capfd: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``saetrack fit`` in this process, which saves the seconds that a start takes."""

    def fit(config: Config, *options: str) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        command = ["fit", "--config", str(write(config)), *options]
        try:
            main(command)
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        said = capfd.readouterr()
        return subprocess.CompletedProcess(command, code, said.out, said.err)

    return fit


def saetrack(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "saetrack", *args], capture_output=True, text=True, timeout=300, env=environment()
    )


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
