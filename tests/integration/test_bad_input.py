"""Whatever is wrong with the input, the user reads one line and loses nothing."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saetrack import Track
from saetrack.cli import main

Config = dict[str, Any]


@pytest.fixture
def fails(write: Callable[[Config], Path], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs ``saetrack fit`` in this process and returns the one line that it says."""

    def fit(config: Config, *options: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(["fit", "--config", str(write(config)), *options])
        assert stopped.value.code in (1, 2)
        lines = [line for line in capsys.readouterr().err.splitlines() if line]
        assert len(lines) == 1, lines
        assert lines[0].startswith(("saetrack: error: ", "saetrack fit: error: "))
        return lines[0]

    return fit


def test_unknown_hookpoint_lists_the_closest(config: Config, fails: Callable[..., str]) -> None:
    config["data"]["hookpoints"] = ["gpt_neox.layer.1"]
    assert "gpt_neox.layers.1" in fails(config)


def test_empty_folder(config: Config, fails: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config["data"]["source"]["init_args"]["path"] = str(tmp_path / "empty")
    assert str(tmp_path / "empty") in fails(config)


def test_two_checkpoints_of_one_step(
    config: Config, fails: Callable[..., str], make_series: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_series(tmp_path / "twice", steps=(0, 4))
    shutil.copytree(folder / "step4", folder / "checkpoint-4")
    config["data"]["source"]["init_args"]["path"] = str(folder)
    assert "4" in fails(config)


def test_equal_weights_are_refused_before_training(
    config: Config, fails: Callable[..., str], make_series: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_series(tmp_path / "equal", steps=(0, 4))
    shutil.copytree(folder / "step4", folder / "step5")
    config["data"]["source"]["init_args"]["path"] = str(folder)
    config["scheduler"]["steps"] = None
    line = fails(config)
    assert "same weights" in line
    assert "scheduler.allow_duplicates" in line
    assert not list(Path(config["scheduler"]["track_dir"]).rglob("track.json"))


def test_steps_out_of_order(config: Config, fails: Callable[..., str]) -> None:
    config["scheduler"]["steps"] = [0, 10, 2]
    assert "2 follows 10 at position 2" in fails(config)


def test_a_step_that_is_not_there(config: Config, fails: Callable[..., str]) -> None:
    config["scheduler"]["steps"] = [0, 3]
    assert "LLM step 3" in fails(config)


def test_corpus_shorter_than_the_budget(config: Config, fails: Callable[..., str]) -> None:
    config["scheduler"]["tokens_first"] = 10_000_000
    line = fails(config)
    assert "10,000,000" in line
    assert "scheduler.tokens_first" in line


def test_context_longer_than_the_llm_reads(config: Config, fails: Callable[..., str]) -> None:
    config["data"]["tokens"]["context_size"] = 128
    line = fails(config)
    assert "data.tokens.context_size is 128" in line
    assert "at most 64" in line


def test_a_mistyped_analysis_points_to_the_list(config: Config, fails: Callable[..., str]) -> None:
    config["analyze"] = {"analyses": ["Drft"]}
    line = fails(config)
    assert "Drft" in line
    assert "`saetrack analyses`" in line


def test_unknown_option(config: Config, fails: Callable[..., str]) -> None:
    config["model"]["learning_rate"] = 1.0
    assert "learning_rate" in fails(config)


def test_broken_plugin(
    config: Config, fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_plugin.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config["analyze"] = {"analyses": [{"class_path": "broken_plugin.Broken"}]}
    assert "broken_plugin" in fails(config)


def test_nan_activations_and_another_width_leave_the_finished_snapshots(
    config: Config, fails: Callable[..., str], make_series: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_series(tmp_path / "poisoned", steps=(0, 4, 8))
    weights = folder / "step8" / "model.safetensors"
    tensors = load_file(weights)
    tensors["gpt_neox.embed_in.weight"][5:] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    config["data"]["source"]["init_args"]["path"] = str(folder)
    config["scheduler"]["steps"] = None
    line = fails(config)
    assert "LLM checkpoint step 8" in line
    assert "forward batch 0" in line
    track = Track.open(config["scheduler"]["track_dir"])
    assert track.steps == [0, 4]
    assert track.metrics()["fvu"].notna().all()
    assert "already holds 2 of 3 snapshots" in fails(config)


@pytest.mark.parametrize("command", [["checkpoints", "{}"], ["checkpoints", "{}", "--audit"], ["analyses"]])
def test_commands_that_list(command: list[str], tiny_series: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([word.format(tiny_series) for word in command])
    out = capsys.readouterr().out
    assert ("formation" if command == ["analyses"] else "step10") in out


def test_analyze_names_what_it_cannot_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["analyze", str(tmp_path / "nothing")])
    assert capsys.readouterr().err.startswith(f"saetrack: error: {tmp_path / 'nothing'} holds no track")
