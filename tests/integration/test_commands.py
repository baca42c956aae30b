"""The commands beside ``fit``, as typed, and series whose LLM checkpoints do not belong together."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from saetrack import Track
from saetrack.cli import main
from tests.trees import hashes

Config = dict[str, Any]


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["saetrack"])


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    commands = ("pretrain", "checkpoints", "control", "analyze", "report", "analyses", "export", "import")
    assert all(f"{command}: " in out for command in commands)


@pytest.mark.parametrize("typed", [["frobnicate"], []], ids=["unknown", "none"])
def test_a_command_that_is_not_there_is_one_line(typed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(typed)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("saetrack: error: ")
    assert "fit, pretrain, checkpoints, control, analyze, report, analyses, export, import" in err
    assert err.count("\n") == 1


def test_pretrain_writes_a_series_and_lists_it(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [
        "--n_layers=1",
        "--d_model=16",
        "--n_heads=2",
        "--vocab_size=300",
        "--context_size=16",
        "--batch_size=4",
        "--steps=4",
    ]
    corpus = ["--corpus=TextCorpus", f"--corpus.paths=[{text}]"]
    main(["pretrain", str(tmp_path / "llm"), *sizes, "--warmup_steps=1", *corpus])
    out = capsys.readouterr().out
    assert all(f"step{step}" in out for step in (0, 1, 2, 4))
    assert (tmp_path / "llm" / "step4" / "model.safetensors").is_file()


@pytest.mark.parametrize("warm_start", ["transported", "prior"])
def test_an_llm_checkpoint_of_another_width_stops_before_its_stage(
    warm_start: str,
    config: Config,
    write: Callable[[Config], Path],
    tiny_series: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wide = GPTNeoXConfig(
        vocab_size=64, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    GPTNeoXForCausalLM(wide).save_pretrained(tmp_path / "wide")
    folders = {0: tiny_series / "step0", 10: tmp_path / "wide"}
    listed = [{"model": str(folder), "revision": None, "step": step} for step, folder in folders.items()]
    config["data"]["source"] = {"class_path": "ListSource", "init_args": {"checkpoints": listed}}
    config["scheduler"] |= {"steps": None, "warm_start": warm_start}
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(write(config))])
    assert stopped.value.code == 1
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("saetrack: error: gpt_neox.layers.0 of LLM checkpoint step 10")
    assert "is 24 wide, but that of the first is 16" in err[-1]
    assert Track.open(config["scheduler"]["track_dir"]).steps == [0]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--data.source.init_args.path={other}", "The LLM checkpoint of step 0 has other weights now"),
        ("--scheduler.warm_start=prior", "scheduler.warm_start is prior, but the resume file was written with"),
        ("--scheduler.steps=[0,4]", "scheduler.steps lacks LLM step 2, on which this track is trained"),
        ("--seed_everything=7", "seed is 7, but"),
    ],
    ids=["model", "warm start", "steps", "seed"],
)
def test_a_resumed_run_that_differs_is_refused_and_harms_nothing(
    option: str, message: str, begun: Config, make_series: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(begun["track_dir"])
    other = folder.parent / "other"
    if "{other}" in option:
        make_series(other, seed=5)
    before = hashes(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", begun["config"], "--ckpt_path", "last", option.format(other=other)])
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"saetrack: error: {message.format(other=other)}")
    assert hashes(folder) == before


@pytest.fixture
def begun(config: Config, write: Callable[[Config], Path]) -> Config:
    """A run of two stages whose configuration now asks for a third."""
    config["scheduler"] |= {"steps": [0, 2], "tokens_first": 1_000, "tokens_next": 1_000}
    main(["fit", "--config", str(write(config))])
    config["scheduler"]["steps"] = [0, 2, 10]
    return {"config": str(write(config)), "track_dir": config["scheduler"]["track_dir"]}
