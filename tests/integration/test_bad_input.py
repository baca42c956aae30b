"""Whatever is wrong with the input, the user reads one line and loses nothing."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from saetrack import Track
from saetrack.cli import main
from saetrack.storage import claimed
from tests.trees import hashes

Config = dict[str, Any]


@pytest.fixture
def fails(fit_here: Callable[..., Any]) -> Callable[..., str]:
    """Runs ``saetrack fit`` in this process and returns the one line that it says."""

    def fit(config: Config, *options: str) -> str:
        done = fit_here(config, *options)
        assert done.returncode in (1, 2)
        lines: list[str] = [line for line in done.stderr.splitlines() if line]
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
    assert not Path(config["scheduler"]["track_dir"]).exists()


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


@pytest.mark.parametrize("when", ["analyses", "after_each_snapshot"])
def test_a_wrong_argument_of_an_analysis_is_said_as_the_analysis_says_it(
    when: str, config: Config, fails: Callable[..., str]
) -> None:
    wrong = {"class_path": "Quality", "init_args": {"min_firing_frequency": 3}}
    config["analyze"] = {when: ["Dictionaries" if when == "analyses" else "Drift", wrong]}
    assert "error: min_firing_frequency is 3.0" in fails(config)


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


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--trainer.max_steps", "5"], "trainer.max_steps is 5"),
        (["--trainer.max_epochs", "3"], "trainer.max_epochs is 3"),
        (["--trainer.devices", "two"], "`devices` selected with `CPUAccelerator`"),
        (["--trainer.strategy", "dpp"], "strategy='dpp'"),
        (["--ckpt_path", "lst"], "`--ckpt_path lst` needs lst, which is not there"),
        (["--data.tokens.split_share", "0.5"], "data.tokens.split_share is 0.5"),
        (["--trainer.max_time", "00:00:00:01"], "trainer.max_time is set"),
        (["--trainer.limit_train_batches", "3"], "trainer.limit_train_batches is 3"),
        (["--trainer.accumulate_grad_batches", "2"], "trainer.accumulate_grad_batches is 2"),
        (["--scheduler.steps", "[]"], "scheduler.steps is empty"),
        (["--scheduler.tokens_next", "100"], "scheduler.tokens_next is 100, less than one batch of 128"),
        (["--data.batch_size", "0"], "data.batch_size is 0"),
        (["--data.tokens.calibration_tokens", "-5"], "data.tokens.calibration_tokens is -5"),
        (["--model.optimizer.lr", "-1"], "model.optimizer.lr is -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_setting_that_makes_no_sense_is_refused_before_training(
    options: list[str], named: str, config: Config, fails: Callable[..., str]
) -> None:
    assert named in fails(config, *options)
    assert not list(Path(config["scheduler"]["track_dir"]).rglob("track.json"))


def test_a_file_where_the_run_folder_should_be(config: Config, fails: Callable[..., str]) -> None:
    Path(config["scheduler"]["track_dir"]).write_text("")
    assert config["scheduler"]["track_dir"] in fails(config)


def test_a_finished_run_is_kept_from_another_hookpoint_and_from_changed_weights_but_may_grow(
    config: Config,
    fails: Callable[..., str],
    fit_here: Callable[..., Any],
    make_series: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = make_series(tmp_path / "growing", steps=(0, 4, 8))
    later = tmp_path / "step8"
    (folder / "step8").rename(later)
    config["data"]["source"]["init_args"]["path"] = str(folder)
    config["scheduler"]["steps"] = None
    assert fit_here(config).returncode == 0
    run = Path(config["scheduler"]["track_dir"])
    resume = (run / "resume" / "last.ckpt").read_bytes()
    line = fails(config, "--data.hookpoints", "[gpt_neox.layers.1]")
    assert "holds the track of gpt_neox.layers.0" in line
    later.rename(folder / "step8")
    weights = folder / "step4" / "model.safetensors"
    was = weights.read_bytes()
    shutil.copy(make_series(tmp_path / "other", steps=(0, 5), seed=7) / "step5" / "model.safetensors", weights)
    assert "LLM checkpoint of step 4 has other weights now" in fails(config, "--ckpt_path", "last")
    assert (run / "resume" / "last.ckpt").read_bytes() == resume
    weights.write_bytes(was)
    assert fit_here(config, "--ckpt_path", "last").returncode == 0
    assert Track.open(run).steps == [0, 4, 8]


def test_a_complete_track_is_complete_wherever_its_llm_lies_and_however_its_steps_are_spelt(
    config: Config,
    fails: Callable[..., str],
    fit_here: Callable[..., Any],
    make_series: Callable[..., Path],
    tmp_path: Path,
) -> None:
    llm = make_series(tmp_path / "llm", steps=(0, 4))
    config["data"]["source"]["init_args"]["path"] = str(llm)
    config["scheduler"]["steps"] = [0, 4]
    assert fit_here(config).returncode == 0
    before = hashes(tmp_path / "run")
    llm.rename(tmp_path / "moved")
    moved = ("--data.source.init_args.path", os.path.relpath(tmp_path / "moved"), "--scheduler.steps", "0,4")
    assert "complete; nothing was changed" in fit_here(config, *moved).stdout
    other = make_series(tmp_path / "other", steps=(0, 4), seed=3)
    line = fails(config, "--data.source.init_args.path", str(other))
    assert f"made with data.source.init_args.path {llm}, not {other}" in line
    assert hashes(tmp_path / "run") == before
    later = make_series(tmp_path / "later", steps=(0, 4, 8))
    shutil.copytree(later / "step4", tmp_path / "moved" / "step8")  # half as far as the step 4 that is there
    assert fit_here(config, *moved[:2], "--scheduler.steps", "all", "--ckpt_path", "last").returncode == 0
    assert Track.open(tmp_path / "run").steps == [0, 4, 8]


def test_a_stage_goes_on_only_with_the_weights_it_began_with(
    config: Config, fails: Callable[..., str], make_series: Callable[..., Path], tmp_path: Path
) -> None:
    llm = make_series(tmp_path / "llm", steps=(0, 4))
    (tmp_path / "stopper.py").write_text(STOPPER)
    config["data"]["source"]["init_args"]["path"] = str(llm)
    config["scheduler"]["steps"] = None
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        stopping = {**config, "trainer": {**config["trainer"], "callbacks": [{"class_path": "stopper.Stop"}]}}
        assert "as a test asked" in fails(stopping)
    weights = llm / "step0" / "model.safetensors"
    shutil.copy(make_series(tmp_path / "other", steps=(0,), seed=7) / "step0" / "model.safetensors", weights)
    assert "LLM checkpoint of step 0 has other weights now than when its stage began" in fails(
        config, "--ckpt_path", "last"
    )


STOPPER = """
from lightning import Callback

class Stop(Callback):
    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        if trainer.global_step == 13:
            raise OSError(5, "as a test asked", "nowhere")
"""


@pytest.mark.parametrize(
    ("content", "found"),
    [(None, "is damaged"), (b"nonsense", "is damaged"), ({"epoch": 1}, "is no resume file of saetrack")],
    ids=["cut", "nonsense", "another"],
)
def test_a_damaged_resume_file_is_named_and_the_snapshots_can_be_begun_from(
    content: bytes | dict[str, int] | None, found: str, config: Config, fails: Callable[..., str], begun: Path
) -> None:
    path = begun / "resume" / "last.ckpt"
    if isinstance(content, dict):
        torch.save(content, path)
    else:
        path.write_bytes(path.read_bytes()[:-1000] if content is None else content)
    before = hashes(begun)
    line = fails({**config, "scheduler": {**config["scheduler"], "track_dir": str(begun)}}, "--ckpt_path", "last")
    assert f"{path} {found}" in line
    assert f"`--model.start {begun}@0`" in line
    assert hashes(begun) == before


@pytest.fixture
def begun(configure: Callable[[Path], Config], fit_here: Callable[..., Any], tmp_path: Path) -> Path:
    """The folder of a run of one stage."""
    config = configure(tmp_path / "begun")
    config["scheduler"] |= {"steps": [0], "tokens_first": 1_000}
    assert fit_here(config).returncode == 0
    return tmp_path / "begun"


def test_a_damaged_configuration_of_a_complete_track_is_named(
    config: Config, fails: Callable[..., str], begun: Path
) -> None:
    (begun / "config.yaml").write_text("data: [")
    config["scheduler"] |= {"track_dir": str(begun), "steps": [0]}
    assert f"{begun / 'config.yaml'} cannot be read" in fails(config)
    (begun / "config.yaml").unlink()
    assert f"{begun / 'config.yaml'} cannot be read" in fails(config)


def test_a_complete_track_gets_the_analyses_that_a_killed_run_did_not_come_to(
    config: Config, fit_here: Callable[..., Any]
) -> None:
    config["scheduler"]["steps"] = [0, 10]
    config["analyze"] = {"analyses": ["Quality", "Drift"]}
    assert fit_here(config).returncode == 0
    track = Track.open(config["scheduler"]["track_dir"])
    shutil.rmtree(track.analyses_dir / "drift")
    assert "complete; ran drift, which had no result yet" in fit_here(config).stdout
    events = EventAccumulator(str(track.path.parent / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("track_drift/drift")] == [10, 10], (
        "by the first run, and by this one"
    )
    facts = json.loads((track.analyses_dir / "drift" / "result.json").read_text())
    assert facts["settings"]["steps"] == [0, 10]
    facts["settings"]["steps"] = [0]  # as if the track had been extended since
    (track.analyses_dir / "drift" / "result.json").write_text(json.dumps(facts))
    config["analyze"]["analyses"].remove("Drift")
    old = f"  drift: old, made on 1 of the track's 2 snapshots (LLM step 0). Run `saetrack analyze {track.path} --analy"
    said = fit_here(config).stdout
    assert "complete; nothing was changed" in said
    assert old in said
    assert facts["summary"] not in said
    config["analyze"]["analyses"].append("Drift")
    assert "complete; ran drift, which had no result yet" in fit_here(config).stdout
    assert "complete; nothing was changed" in fit_here(config).stdout


def test_files_have_the_rights_of_other_files(config: Config, fit_here: Callable[..., Any], tmp_path: Path) -> None:
    config["scheduler"]["steps"] = [0]
    assert fit_here(config).returncode == 0
    (tmp_path / "plain").write_text("")
    modes = {p.stat().st_mode & 0o777 for p in Path(config["scheduler"]["track_dir"]).glob("gpt*/**/*") if p.is_file()}
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}


def test_a_folder_that_another_run_writes_into_is_refused(
    config: Config, fails: Callable[..., str], tmp_path: Path
) -> None:
    with claimed(tmp_path / "run"):
        assert "Another saetrack is writing into" in fails(config)
    assert not list((tmp_path / "run").glob("*/track.json"))
