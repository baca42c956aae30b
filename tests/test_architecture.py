"""The rules that keep the package small enough to hold in the head; CONTRIBUTING.md gives their reasons."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import saetrack

PACKAGE = Path(saetrack.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
LAYER = {
    "errors": -2,
    "storage": -1,
    "hub": -1,
    "pickles": -1,
    "terminal": -1,
    "tensor_files": -1,
    "sae": 0,
    "metrics": 0,
    "lm": 0,
    "snapshot": 1,
    "track": 2,
    "analysis": 3,
    "training": 3,
    "exchange": 3,
    "report": 4,
    "cli": 5,
    "__main__": 6,
}
MAY_ALSO_USE = {
    "track.py": {"report"},
    "training/callbacks.py": {"analysis"},
    "training/cli.py": {"analysis"},
    "training/panels.py": {"analysis"},
    "training/track_logger.py": {"analysis"},
}


def part(path: Path) -> str:
    """The folder or module of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Which parts of the package a file imports, at its top or anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # ruff's TID252 forbids what begins with two dots, so one dot is a module of the same part
            module = f"saetrack.{part(path)}" if node.level else node.module
            names += [f"{module}.{alias.name}" for alias in node.names]
    own = {name.split(".")[1] for name in names if name.startswith("saetrack.")}
    return own & LAYER.keys()


@pytest.mark.parametrize("path", [m for m in MODULES if part(m) in LAYER], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    here = part(path)
    allowed = MAY_ALSO_USE.get(str(path.relative_to(PACKAGE)), set()) | {here}
    wrong = {p for p in imported_parts(path) if LAYER[p] >= LAYER[here]} - allowed
    assert not wrong, f"{here} (layer {LAYER[here]}) may not import {wrong}; see CONTRIBUTING.md"


def test_the_reading_half_does_not_import_lightning() -> None:
    parts = ("", ".cli", ".sae", ".lm", ".metrics", ".analysis.sweep", ".report")
    reading = f"import sys, {', '.join(f'saetrack{part}' for part in parts)}"
    code = f"{reading}; saetrack.Track; sys.exit('lightning' in sys.modules or 'pytorch_lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 430
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node, clean=False)
            lines = node.end_lineno - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)
            assert lines <= 65, f"{node.name} has {lines} lines"
            if node.name == "__init__":
                assert len(node.args.args) + len(node.args.kwonlyargs) - 1 <= 8, f"line {node.lineno}"


def test_public_names_exist_and_are_documented() -> None:
    for name in saetrack.__all__:
        thing = getattr(saetrack, name)
        assert name == "__version__" or inspect.getdoc(thing), name
