"""A workspace as a reader of the documentation has one: a finished run at runs/quickstart, configs/ and plugins/.

The run is a real one: `saetrack fit` with the shipped configuration, made small, then a control and all analyses.
"""

import gc
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib.figure import Figure
from transformers import GPTNeoXForCausalLM

from saetrack.cli import main
from tests.conftest import build_llm, build_tokenizer

from .pages import ROOT

STEPS = [0, 4, 8, 16, 32, 64, 128]
WORDS = "the cat sat on a mat and dog ran home while birds sang over hills near river bank at dawn def return print"
SMALLER: dict[str, Any] = {
    "scheduler": {"steps": None, "tokens_first": 2_000, "tokens_next": 1_000},
    "data": {
        "source": {"class_path": "FolderSource", "init_args": {"path": "runs/quickstart-llm"}},
        "corpus": {"class_path": "TextCorpus", "init_args": {"paths": ["text/*.txt"]}},
        "batch_size": 128,
        "chunk_tokens": 1024,
        "tokens": {
            "context_size": 32,
            "calibration_tokens": 1_000,
            "selection_tokens": 1_500,
            "evaluation_tokens": 1_500,
            "held_out_tokens": 200,
            "ce_tokens": 200,
            "split_share": 0.1,
            "cache_dir": "runs/quickstart-llm/tokens",
        },
    },
    "model": {"optimizer": {"warmup_tokens": 500}, "dead_after_tokens": 2_000},
    "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    "analyze": {"analyses": []},
}
CONTROLS = [
    {"name": "null-chain", "kind": "null", "position": None, "stages": len(STEPS)},
    {"name": "scratch-first", "kind": "scratch", "position": None, "stages": len(STEPS), "first_budget": True},
    {"name": "thinned-2-next", "kind": "thinned", "position": None, "stages": len(STEPS), "thin": 2},
]


def smaller(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The configuration with changes in it; a section with another class is replaced whole."""
    merged = dict(config)
    for key, value in changes.items():
        nested = isinstance(value, dict) and "class_path" not in value and key in config
        merged[key] = smaller(config[key], value) if nested else value
    return merged


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace, made once. Read only: `workspace` is one's own."""
    folder = tmp_path_factory.mktemp("reader")
    draw = random.Random(0)
    (folder / "text").mkdir()
    for i in range(200):
        (folder / "text" / f"{i:03d}.txt").write_text(" ".join(draw.choices(WORDS.split(), k=150)))
    shutil.copytree(ROOT / "plugins", folder / "plugins")
    (folder / "configs").symlink_to(ROOT / "configs")
    build_llms(folder / "runs" / "quickstart-llm")
    shipped = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    (folder / "small.yaml").write_text(yaml.safe_dump(smaller(shipped, SMALLER)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["saetrack"])
        patch.setattr(Figure, "savefig", lambda figure, path, **options: Path(path).touch())  # drawing takes seconds
        gc.collect()
        gc.freeze()  # an LLM's release collects garbage, which among all that pytest holds costs most of a tiny run
        main(["fit", "--config", "small.yaml"])
        main(["control", "runs/quickstart", "--kind", "null", "--positions", "[1]", "--replicas", "1"])
        copy_controls(folder / "runs" / "quickstart" / "gpt_neox.layers.2")
        main(["analyze", "runs/quickstart"])
    # the patches end here: a fixture of the session must not be felt in the tests of other folders
    gc.unfreeze()
    return folder


def build_llms(folder: Path) -> None:
    """LLM checkpoints with the quickstart's hookpoint, whose weights move on a line."""
    config = build_llm(0).config
    config.num_hidden_layers = 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llm, end = GPTNeoXForCausalLM(config), GPTNeoXForCausalLM(config).state_dict()
    start = {name: tensor.clone() for name, tensor in llm.state_dict().items()}
    for step in STEPS:
        llm.load_state_dict({name: torch.lerp(start[name], end[name], step / STEPS[-1]) for name in start})
        llm.save_pretrained(folder / f"step{step}")
        build_tokenizer().save_pretrained(folder / f"step{step}")


def copy_controls(track: Path) -> None:
    """The other kinds of controls, as copies of the track: their files are the same, and training them takes long."""
    null = json.loads((track / "controls" / "null-0001-0" / "track.json").read_text())
    for changes in CONTROLS:
        for replica in range(2):
            facts = dict(changes)
            copy = track / "controls" / f"{facts.pop('name')}-{replica}"
            shutil.copytree(track / "snapshots", copy / "snapshots")
            shutil.copy(track / "tokens.safetensors", copy)
            control = null["control"] | facts | {"replica": replica}
            (copy / "track.json").write_text(json.dumps(null | {"control": control}))


@pytest.fixture
def workspace(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One's own copy of the workspace, as the current directory of a fresh process."""
    folder = tmp_path / "reader"
    shutil.copytree(finished_run, folder, symlinks=True)
    text = folder / "data" / "shakespeare_char" / "input.txt"  # where nanoGPT has it
    text.parent.mkdir(parents=True)
    text.write_text("to be, or not to be\n")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["saetrack"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: Path(path).touch())
    return Path(os.curdir)
