"""Discovery: entry points, single files, and broken ones of each."""

import importlib
import os
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest

from saetrack.analysis import SweepAnalysis, plugins
from saetrack.analysis.quality import Quality
from saetrack.analysis.semantics import Semantics

AddEntryPoints = Callable[..., None]

SINGLE_FILE = '''"""A module."""
from saetrack.analysis import Analysis, AnalysisResult
{extra}

class {name}(Analysis):
    """Counts snapshots.

    More text.
    """

    def run(self, track):
        return AnalysisResult(scalars={{"n": {{0: len(track)}}}})
'''


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No memory of earlier discoveries, no plugin folder, an import path and modules of one's own."""
    monkeypatch.setattr(plugins, "_imported", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv(plugins.PATH_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()


def entry_point(name: str, value: str, distribution: str = "their-package") -> EntryPoint:
    point = EntryPoint(name, value, plugins.GROUP)
    vars(point)["dist"] = SimpleNamespace(name=distribution, version="1.2")
    return point


@pytest.fixture
def with_entry_points(monkeypatch: pytest.MonkeyPatch) -> AddEntryPoints:
    """Adds entry points to the installed ones."""
    installed = list(plugins.entry_points(group=plugins.GROUP))

    def add(*points: EntryPoint) -> None:
        monkeypatch.setattr(plugins, "entry_points", lambda group: [*installed, *points])

    return add


def test_the_built_in_analyses_come_as_entry_points() -> None:
    found = plugins.discover()
    assert found["quality"].cls is Quality
    assert found["semantics"].cls is Semantics
    assert found["quality"].origin == "saetrack 0.1.0"
    assert (found["quality"].kind, found["semantics"].kind) == ("track", "sweep")
    assert plugins.load("quality") is Quality


def test_a_class_path_loads_without_an_entry_point() -> None:
    assert plugins.load("saetrack.analysis.semantics.Semantics") is Semantics


def test_a_single_file_in_plugins_loads_by_class_path_and_is_listed() -> None:
    Path("plugins").mkdir()
    Path("plugins/counting_one.py").write_text(SINGLE_FILE.format(name="Counting", extra=""))
    plugins.load_plugins()
    assert plugins.load("counting_one.Counting").__name__ == "Counting"
    (line,) = [line for line in plugins.list_analyses().splitlines() if "counting_one" in line]
    assert line.split() == ["counting_one.Counting", "track", "plugins/counting_one.py", "Counts", "snapshots."]


def test_folders_of_the_environment_variable_are_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"counting_{name}.py").write_text(SINGLE_FILE.format(name=f"Counting{name}", extra=""))
    monkeypatch.setenv(plugins.PATH_VARIABLE, os.pathsep.join([str(tmp_path / "a"), str(tmp_path / "b")]))
    table = plugins.list_analyses()
    assert "counting_a.Countinga" in table
    assert "counting_b.Countingb" in table


def test_a_folder_that_does_not_exist_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.PATH_VARIABLE, "/no/such/folder")
    with pytest.raises(FileNotFoundError, match=r"\$SAETRACK_PLUGINS names /no/such/folder"):
        plugins.load_plugins()


def test_a_plugin_file_cannot_hide_a_module() -> None:
    Path("plugins").mkdir()
    Path("plugins/json.py").write_text("raise RuntimeError('imported instead of the real one')")
    plugins.load_plugins()
    assert sys.path[-1] == str(Path("plugins").resolve())


def test_a_file_that_defines_no_analysis_is_not_run() -> None:
    Path("plugins").mkdir()
    Path("plugins/foreign.py").write_text("raise RuntimeError('was run')")
    Path("plugins/half.py").write_text("class Broken(Analysis")
    assert "foreign" not in plugins.list_analyses()


def test_a_broken_single_file_is_listed_without_a_warning_and_fails_who_asks() -> None:
    Path("plugins").mkdir()
    Path("plugins/broken_one.py").write_text(SINGLE_FILE.format(name="Broken", extra="import no_such_module_x"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (line,) = [line for line in plugins.list_analyses().splitlines() if "broken_one" in line]
    assert "broken: ModuleNotFoundError: No module named 'no_such_module_x'" in line
    with pytest.raises(ValueError, match=r"'broken_one.Broken' cannot be loaded: ModuleNotFoundError.*MODULE.CLASS"):
        plugins.load("broken_one.Broken")


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        ("no_such_module_y:Thing", "ModuleNotFoundError: No module named 'no_such_module_y'"),
        ("json:nothing", "AttributeError"),
        ("json:JSONDecoder", "TypeError: json:JSONDecoder is not a subclass of saetrack.analysis.Analysis"),
    ],
    ids=["no module", "no attribute", "no analysis"],
)
def test_a_broken_entry_point_warns_once_and_fails_only_who_asks(
    with_entry_points: AddEntryPoints, value: str, cause: str
) -> None:
    with_entry_points(entry_point("thing", value))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plugins.load_plugins()
        plugins.discover()
        table = plugins.list_analyses()
        assert plugins.load("quality") is Quality
        with pytest.raises(ValueError, match=r"'thing' of their-package 1.2 cannot be loaded"):
            plugins.load("thing")
    (warning,) = caught
    for part in ("'thing'", "their-package 1.2", cause):
        assert part in str(warning.message)
    (line,) = [line for line in table.splitlines() if line.startswith("thing ")]
    assert f"broken: {cause}" in line


def test_a_taken_name_stays_with_saetrack(with_entry_points: AddEntryPoints) -> None:
    with_entry_points(entry_point("quality", "saetrack.analysis.semantics:Semantics", distribution="a-first"))
    with pytest.warns(UserWarning, match="name 'quality' is taken"):
        found = plugins.discover()
    assert found["quality"].cls is Quality
    assert found["quality@a-first"].cls is None


def test_an_unknown_name_lists_the_closest() -> None:
    with pytest.raises(ValueError, match=r"There is no analysis 'qualty'\. Closest: quality"):
        plugins.load("qualty")


def test_the_table_says_what_each_is() -> None:
    header, *lines = plugins.list_analyses().splitlines()
    assert header.split() == ["NAME", "KIND", "FROM", "WHAT"]
    (line,) = [line for line in lines if line.startswith("semantics")]
    assert "sweep" in line
    assert (Semantics.__doc__ or "").splitlines()[0] in line
    assert issubclass(plugins.load("semantics"), SweepAnalysis)
