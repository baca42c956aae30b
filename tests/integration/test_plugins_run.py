"""Analyses of a user's own, run by ``saetrack fit`` and by ``saetrack analyze``; broken ones harm nobody else."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saetrack import Track
from saetrack.cli import main

Config = dict[str, Any]

MINE = """
import pandas as pd
from saetrack.analysis import Analysis, AnalysisResult, Observation, Probe, SweepAnalysis


class Alive(Analysis):
    \"\"\"Number of features that fire.

    Args:
        above: Lowest firing frequency that counts.
    \"\"\"

    def __init__(self, above: float = 0.0) -> None:
        self.above = above

    def run(self, track):
        counts = [int((s.features["firing_frequency"] > self.above).sum()) for s in track]
        return AnalysisResult({"alive": pd.DataFrame({"step": track.steps, "alive": counts})}, settings=vars(self))


class Visited(SweepAnalysis):
    \"\"\"LLM steps in the order of the sweep.\"\"\"

    def begin(self, track):
        self.steps = []
        return Probe(evaluation_rows=4)

    def observe(self, snapshot, observation):
        assert observation.evaluation.latents.shape[1] == snapshot.metadata["sae"]["arguments"]["d_in"] * 4
        self.steps.append(snapshot.step)

    def finish(self):
        return AnalysisResult({"visited": pd.DataFrame({"step": self.steps})})


class Raises(Analysis):
    \"\"\"Fails on its first use.\"\"\"

    def run(self, track):
        raise ZeroDivisionError("by mistake")
"""

BROKEN = """
import a_module_that_is_not_there
from saetrack.analysis import Analysis


class Broken(Analysis):
    pass
"""


@pytest.fixture(autouse=True)
def _plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin folder with a good file and a broken one, in a process that looks like a fresh one."""
    folder = tmp_path / "my_plugins"
    folder.mkdir()
    (folder / "mine_in_fit.py").write_text(MINE)
    (folder / "broken_in_fit.py").write_text(BROKEN)
    monkeypatch.setenv("SAETRACK_PLUGINS", str(folder))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["saetrack"])
    sys.modules.pop("mine_in_fit", None)


@pytest.fixture
def fit(config: Config, write: Callable[[Config], Path]) -> Callable[[list[Any]], Path]:
    """Follows an SAE through two LLM checkpoints, runs analyses, and returns the run's folder."""

    def run_fit(analyses: list[Any]) -> Path:
        config["scheduler"] |= {"steps": [0, 10], "tokens_first": 2_000, "tokens_next": 1_000}
        config["analyze"] = {"analyses": analyses}
        main(["fit", "--config", str(write(config))])
        return Path(config["scheduler"]["track_dir"])

    return run_fit


def test_a_single_file_runs_in_fit_and_in_analyze_beside_a_broken_one(
    fit: Callable[[list[Any]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    alive = {"class_path": "mine_in_fit.Alive", "init_args": {"above": 0.01}}
    folder = fit([alive, "mine_in_fit.Visited"])
    track = Track.open(folder)
    assert {p.name for p in track.analyses_dir.iterdir()} == {"mine_in_fit.Alive", "mine_in_fit.Visited"}
    result = json.loads((track.analyses_dir / "mine_in_fit.Alive" / "result.json").read_text())
    assert result["settings"] == {"above": 0.01, "steps": [0, 10], "equal_weights": []}
    assert "mine_in_fit.Alive" in capsys.readouterr().out

    main(["analyze", str(folder), "--analyses+=mine_in_fit.Alive", "--analyses.above=0.2", "--analyses+=Drift"])
    assert {p.name for p in track.analyses_dir.iterdir()} == {"mine_in_fit.Alive", "mine_in_fit.Visited", "drift"}
    result = json.loads((track.analyses_dir / "mine_in_fit.Alive" / "result.json").read_text())
    assert result["settings"] == {"above": 0.2, "steps": [0, 10], "equal_weights": []}

    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["analyze", str(folder), "--analyses+=broken_in_fit.Broken"])
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("saetrack analyze: error: ")
    assert "a_module_that_is_not_there" in first

    main(["analyses"])
    lines = capsys.readouterr().out.splitlines()
    assert any("mine_in_fit.Alive" in line and "Number of features that fire" in line for line in lines)
    assert any("broken_in_fit.Broken" in line and "broken: ModuleNotFoundError" in line for line in lines)


def test_an_analysis_that_raises_costs_neither_the_track_nor_the_others(
    fit: Callable[[list[Any]], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fit(["mine_in_fit.Raises", "mine_in_fit.Alive"])
    assert stopped.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("saetrack: error: Analysis 'mine_in_fit.Raises' failed: ZeroDivisionError: by mistake.")
    track = Track.open(tmp_path / "run")
    assert track.steps == [0, 10]
    assert {p.name for p in track.analyses_dir.iterdir()} == {"mine_in_fit.Alive"}
