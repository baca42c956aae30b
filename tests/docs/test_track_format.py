"""docs/track-format.md and a real track hold the same files, columns, keys and arrays."""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from saetrack.track import SCHEMA

from .pages import ROOT

PAGE = (ROOT / "docs" / "track-format.md").read_text(encoding="utf-8")
NESTED = {"llm", "sae", "control", "metadata"}
"""Keys of json files whose own keys are named on the page."""


def documented() -> dict[str, set[str]]:
    """For each heading that is a file, what the first column of its tables names."""
    found: dict[str, set[str]] = {}
    for section in re.split(r"^### `", PAGE, flags=re.MULTILINE)[1:]:
        name, _, text = section.partition("`")
        text = re.split(r"^#", text, flags=re.MULTILINE)[0]
        cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
        found[name] = {code for cell in cells for code in re.findall(r"`([^`]+)`", cell)}
    return found


def names_in(file: Path) -> set[str]:
    """Columns of a table, names of arrays, keys of facts."""
    if file.suffix == ".parquet":
        return set(pq.read_schema(file).names)
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as arrays:
            return set(arrays.keys())
    facts = json.loads(file.read_text(encoding="utf-8"))
    return {
        name
        for key, value in facts.items()
        for name in ([f"{key}.{inner}" for inner in value] if key in NESTED else [key])
    }


def found_in(track: Path) -> dict[str, set[str]]:
    """What all files of a track hold, by the headings of the page; snapshots together, controls together."""
    found: dict[str, set[str]] = {}
    for file in sorted(p for p in track.rglob("*") if p.suffix in (".json", ".parquet", ".safetensors")):
        heading = re.sub(r"\d{4}-step\d+", "NNNN-stepS", file.relative_to(track).as_posix())
        if heading.startswith("controls/"):
            if file.name != "track.json":
                continue  # the same files as the track's
            heading = "controls/track.json"
        if file.name == "result.json":
            heading = "analyses/NAME/result.json"
        found.setdefault(heading, set()).update(names_in(file))
    if "controls/track.json" in found:
        found["controls/track.json"] -= found["track.json"]
    return found


def test_every_file_and_everything_in_it_is_documented_and_nothing_else(finished_run: Path) -> None:
    real, page = found_in(finished_run / "runs" / "quickstart" / "gpt_neox.layers.2"), documented()
    assert set(real) - set(page) == set(), "files that the page lacks"
    assert set(page) - set(real) == set(), "files that the page names and nobody writes"
    assert {name: real[name] - page[name] for name in real if real[name] - page[name]} == {}, "not documented"
    assert {name: page[name] - real[name] for name in real if page[name] - real[name]} == {}, "documented, not there"


def test_figures_and_the_other_files_of_a_run_are_named(finished_run: Path) -> None:
    run = finished_run / "runs" / "quickstart"
    figures = {p.name for p in run.rglob("*.svg")}
    assert len(figures) > 10
    assert [name for name in sorted(figures) if f"`{name}`" not in PAGE] == []
    others = {p.relative_to(run).parts[0] for p in run.rglob("*") if p.is_file()} - {"gpt_neox.layers.2"}
    assert [name for name in sorted(others) if not re.search(rf"^ +{re.escape(name)}", PAGE, re.MULTILINE)] == []


def test_the_schema_version_is_the_one_that_is_written() -> None:
    assert f"**Schema version: {SCHEMA}**" in PAGE


def test_an_undocumented_column_would_be_found(finished_run: Path, tmp_path: Path) -> None:
    import shutil

    import pandas as pd

    track = tmp_path / "track"
    table = Path("snapshots/0000-step0/features.parquet")
    (track / table).parent.mkdir(parents=True)
    shutil.copy(finished_run / "runs" / "quickstart" / "gpt_neox.layers.2" / table, track / table)
    pd.read_parquet(track / table).assign(novelty=1).to_parquet(track / table)
    (heading,) = found_in(track)
    assert found_in(track)[heading] - documented()[heading] == {"novelty"}


@pytest.mark.parametrize("name", ["feature", "firing_frequency"])
def test_the_page_is_read_as_it_is_meant(name: str) -> None:
    assert name in documented()["snapshots/NNNN-stepS/features.parquet"]
