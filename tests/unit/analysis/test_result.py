"""AnalysisResult: what is written, and that it is written whole or not at all."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from saetrack.analysis import AnalysisResult, Probe
from saetrack.analysis import figures as shared_figures


def result(value: float = 1.0) -> AnalysisResult:
    figure, (ax,) = shared_figures.small_multiples(1, title="costs $5 or $6")
    shared_figures.line(ax, [0, 1, 10], [1.0, value, 3.0], color=shared_figures.BLUE, label="curve")
    shared_figures.band(ax, [0, 1, 10], [0.5, np.nan, 2.0], [1.5, np.nan, 4.0], color=shared_figures.BLUE)
    shared_figures.step_axis(ax, [0, 1, 10])
    shared_figures.legend(ax)
    table = pd.DataFrame({"step": [0, 1], "tokens": [["a", " b"], ["c"]], "activations": [[1.0, 2.0], [3.0]]})
    return AnalysisResult(
        tables={"features": table},
        figures={"curve": figure},
        scalars={"value": {0: value, 10: math.nan}},
        settings={"seed": np.int64(3), "array": np.arange(2), "threshold": np.inf, "path": Path("x"), "pair": (1, 2)},
        summary="One number.",
    )


def test_load_gives_back_what_save_wrote(tmp_path: Path) -> None:
    result(2.0).save(tmp_path / "analyses" / "mine")
    loaded = AnalysisResult.load(tmp_path / "analyses" / "mine")
    assert [list(tokens) for tokens in loaded.tables["features"]["tokens"]] == [["a", " b"], ["c"]]
    assert loaded.scalars["value"][0] == 2.0
    assert math.isnan(loaded.scalars["value"][10])
    assert loaded.settings == {"seed": 3, "array": [0, 1], "threshold": None, "path": "x", "pair": [1, 2]}
    assert loaded.summary == "One number."


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        result().save(tmp_path / name)
    written = {name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("a", "b")}
    assert set(written["a"]) == {"result.json", "features.parquet", "curve.svg"}
    assert written["a"] == written["b"]
    assert b"<dc:date>" not in written["a"]["curve.svg"]


def test_result_json_is_standard_json_with_the_version(tmp_path: Path) -> None:
    result().save(tmp_path / "mine")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    facts = json.loads((tmp_path / "mine" / "result.json").read_text(), parse_constant=refuse)
    assert facts["saetrack_version"] == "0.1.0"
    assert facts["tables"] == ["features"]


def test_saving_again_replaces_all_files_of_the_older_result(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    result().save(folder)
    AnalysisResult(tables={"other": pd.DataFrame({"x": [1]})}).save(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["other.parquet", "result.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_failed_save_leaves_the_older_result_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    result().save(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    broken = result(5.0)
    broken.settings["model"] = object()
    with pytest.raises(TypeError, match="not JSON serializable"):
        broken.save(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("name", ["../escape", "", ".hidden", "a b"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be a file name"):
        AnalysisResult(tables={name: pd.DataFrame()}).save(tmp_path / "mine")
    assert not list(tmp_path.iterdir())


def test_a_pyplot_figure_of_a_plugin_is_closed(tmp_path: Path) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    AnalysisResult(figures={"mine": plt.figure()}).save(tmp_path / "mine")
    assert plt.get_fignums() == []


def test_load_says_what_to_do_when_nothing_is_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="saetrack analyze"):
        AnalysisResult.load(tmp_path)


def test_a_probe_for_fewer_than_no_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="selection_rows is -1"):
        Probe(selection_rows=-1)


@pytest.mark.parametrize(
    "steps",
    [[0], [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, *range(1000, 144_000, 1000)], [143_000, 512, 0]],
    ids=["one checkpoint", "all of Pythia", "backward"],
)
def test_step_labels_do_not_overlap_and_name_the_last_step(steps: list[int]) -> None:
    figure, (ax,) = shared_figures.small_multiples(1)
    shared_figures.step_axis(ax, steps)
    figure.canvas.draw()
    boxes = sorted(
        (label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()), key=lambda b: b.x0
    )
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert shared_figures.step_label(max(steps)) in [label.get_text() for label in ax.get_xticklabels()]
