"""The two plugins of `plugins/` run, as a user runs them: a single file, and an installed distribution."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from saetrack.analysis import AnalysisResult, plugins
from saetrack.analysis.sweep import run_analyses
from saetrack.track import Track

PLUGINS = Path(__file__).parents[3] / "plugins"

RUN_UMAP = """
import sys
from saetrack.analysis.plugins import list_analyses, load
from saetrack.analysis.sweep import run_analyses
from saetrack.track import Track

print(list_analyses())
umap = load("umap")(count=3, contexts=4, neighbours=5, panels=3, seed=1)
run_analyses(Track.open(sys.argv[1]), {"umap": umap})
"""


def test_the_single_file_runs(tiny_track: Track, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.PATH_VARIABLE, str(PLUGINS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert "firing_entropy.FiringEntropy  track" in plugins.list_analyses()
    analysis = plugins.load("firing_entropy.FiringEntropy")()
    result = run_analyses(tiny_track, {"firing_entropy": analysis})["firing_entropy"]
    shares = tiny_track[0].features["firing_frequency"] / tiny_track[0].features["firing_frequency"].sum()
    by_hand = 2 ** -sum(p * np.log2(p) for p in shares if p > 0)
    assert result.scalars["effective_features"][0] == pytest.approx(by_hand)
    assert (tiny_track.analyses_dir / "firing_entropy" / "effective_features.svg").is_file()


def test_the_installed_distribution_runs(tiny_track: Track, tmp_path: Path) -> None:
    pytest.importorskip("umap")
    # a copy, because a build leaves files beside the source
    source, site = tmp_path / "source", tmp_path / "site"
    subprocess.run(["cp", "-r", PLUGINS / "saetrack-umap", source], check=True)
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", site, source]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)
    # without Numba's compiler: for so few points it takes longer to compile than UMAP to run
    environment = {**os.environ, "PYTHONPATH": str(site), "NUMBA_DISABLE_JIT": "1"}
    command = [sys.executable, "-c", RUN_UMAP, str(tiny_track.path)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("umap ")]
    assert line.split()[1:4] == ["sweep", "saetrack-umap", "0.1.0"]
    folder = tiny_track.analyses_dir / "umap"
    table = AnalysisResult.load(folder).tables["points"]
    assert table["step"].unique().tolist() == [0, 1, 4, 10]
    assert table["feature"].nunique() == 3
    places = {step: part[["feature", "row", "column"]].to_numpy().tolist() for step, part in table.groupby("step")}
    assert places[0] == places[1] == places[4] == places[10]
    assert np.isfinite(table[["x", "y"]]).all(axis=None)
    assert (folder / "umap.svg").is_file()
