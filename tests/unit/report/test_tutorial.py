"""docs/tutorial.ipynb: its cells run, on a small track whose formation is planted, and it holds what they put out."""

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from saetrack.analysis import AnalysisResult
from saetrack.track import Track

NOTEBOOK = Path(__file__).parents[3] / "docs" / "tutorial.ipynb"
PATH = 'path = "../runs/quickstart"'


def code_cells() -> list[dict[str, Any]]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def run(source: str, names: dict[str, Any]) -> Any:
    """Run a cell; the value of its last line if that is an expression, which is what a notebook shows."""
    body = ast.parse(source).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), str(NOTEBOOK), "exec"), names)
    return (
        eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names) if isinstance(last, ast.Expr) else None
    )


def plant_formation(track: Track) -> None:
    """Three features that formed, feature f at step f of (1, 4] to 10, and one that did not."""
    count = len(track.steps)
    features = pd.DataFrame(
        {
            "feature": [7, 8, 9, 10],
            "n_positions": 30,
            "status": ["formed"] * 3 + ["never"],
            "formed_step": [7.0, 8.0, 9.0, np.nan],
            "formed_low": 3.0,
            "formed_high": 10.0,
            "formed_after": 4.0,
            "formed_by": 10.0,
            "q_token": 0.04,
        }
    )
    steps = np.repeat(track.steps, 4)
    formation = pd.DataFrame(
        {"feature": [7, 8, 9, 10] * count, "step": steps, "progress_token": 0.5, "progress_se": 0.1}
    )
    edges = dict.fromkeys(("mean", "low", "high", "median", "q25", "q75"), 0.25)
    null = {"null_low": -0.02, "null_high": 0.03}
    population = pd.DataFrame({"step": track.steps, "baseline": "token", **edges, **null})
    formed = pd.DataFrame({"step": track.steps, "share": 0.3, "low": 0.2, "high": 0.4, "null_share": 0.0, **null})
    AnalysisResult(
        tables={"features": features, "formation": formation, "population": population, "formed": formed},
        settings={"status_of_false_features": {"never": 122, "unresolved": 5}},
    ).save(track.analyses_dir / "formation")


def test_the_tutorial_runs_and_its_claim_has_the_planted_interval_and_null(
    track: Track, capsys: pytest.CaptureFixture[str]
) -> None:
    plant_formation(track)
    sources = ["".join(cell["source"]) for cell in code_cells()]
    assert sum(PATH in source for source in sources) == 1
    names: dict[str, Any] = {}
    shown = [run(source.replace(PATH, f"path = {str(track.path)!r}"), names) for source in sources]
    assert sum(isinstance(value, Figure) for value in shown) == 4
    claim = capsys.readouterr().out.strip().splitlines()[-1]
    feature = names["feature"]
    assert feature in (7, 8, 9)
    assert (
        f"feature {feature} of gpt_neox.layers.0 fires became alike at LLM step {feature} (95 % interval 3 to 10)"
        in claim
    )
    assert "0.500 +- 0.196; 95 % of sets of random positions with the same tokens are between -0.020 and 0.030" in claim
    assert claim.endswith("The rule calls 0 of 127 false features formed.")


def test_the_tutorial_on_disk_holds_ten_cells_with_their_outputs() -> None:
    cells = code_cells()
    assert len(cells) == 10
    kinds = [
        {kind for output in cell["outputs"] for kind in output.get("data", {output["output_type"]: None})}
        for cell in cells
    ]
    assert all(kinds)
    assert not any("error" in kind for kind in kinds)
    assert sum("image/png" in kind for kind in kinds) == 4
