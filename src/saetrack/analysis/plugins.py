"""Finding analyses: entry points of the group ``saetrack.analyses`` and single files in a folder ``plugins``.

The built-in analyses come through the same door as everybody's: an entry point. A plugin that cannot be imported is
told of in one warning and stays listed as broken; only who asks for it gets an error.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from .base import Analysis, AnyAnalysis, SweepAnalysis

GROUP = "saetrack.analyses"
PATH_VARIABLE = "SAETRACK_PLUGINS"

AnalysisClass = type[AnyAnalysis]


@dataclass(frozen=True)
class Plugin:
    """An analysis that was found.

    Args:
        name: Short name of an entry point, or ``module.Class`` for a single file.
        origin: The distribution with its version, or the file.
        class_path: Dotted name of the class, what a configuration's ``class_path`` takes.
        cls: The class, or None when it is broken.
        error: Why it is broken, or None.
    """

    name: str
    origin: str
    class_path: str
    cls: AnalysisClass | None
    error: Exception | None = None

    @property
    def cause(self) -> str:
        """Why the plugin is broken, in one line; empty when it is not."""
        return "" if self.error is None else f"{type(self.error).__name__}: {self.error}".splitlines()[0]

    @property
    def kind(self) -> str:
        """What it needs: ``track`` or ``sweep`` (the LLM at every checkpoint)."""
        if self.cls is None:
            return "?"
        return "sweep" if issubclass(self.cls, SweepAnalysis) else "track"

    @property
    def description(self) -> str:
        """First line of the docstring, or ``broken: cause``."""
        if self.cls is None:
            return f"broken: {self.cause}"
        lines = (self.cls.__doc__ or "").strip().splitlines()
        return lines[0] if lines else ""


_imported: dict[tuple[str, str, str], Plugin] = {}
"""Entry points that were tried. Each is imported once in a process, so a broken one warns once."""


def discover() -> dict[str, Plugin]:
    """Import every entry point of the group ``saetrack.analyses``, broken ones included.

    Returns:
        Short name to plugin, sorted. When two distributions claim a name, saetrack's own keeps it, then the first in
        alphabetical order; the other is listed as ``NAME@DISTRIBUTION`` and is broken.

    Warns:
        UserWarning: Once for each broken plugin, with its name, its distribution and the cause.
    """
    found: dict[str, Plugin] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda p: (p.name, _distribution(p) != "saetrack", _origin(p))):
        name = point.name if point.name not in found else f"{point.name}@{_distribution(point)}"
        key = (name, point.value, _origin(point))
        if key not in _imported:
            _imported[key] = plugin = _import(point, name, taken=name != point.name)
            if plugin.error is not None:
                warnings.warn(
                    f"The analysis {plugin.name!r} of {plugin.origin} cannot be used: {plugin.cause}. "
                    "Everything else works; repair or uninstall that distribution.",
                    stacklevel=2,
                )
        found[name] = _imported[key]
    return found


def load(name: str) -> AnalysisClass:
    """The class of an analysis.

    Args:
        name: Short name of an entry point (``quality``), or a dotted class path (``firing_entropy.FiringEntropy``),
            whose module may be a single file in a plugin folder, see `load_plugins`.

    Returns:
        A subclass of `Analysis` or `SweepAnalysis`.

    Raises:
        ValueError: If there is none of that name (the closest are listed), it cannot be imported, or it is no analysis.
    """
    if "." in name:
        module, _, attribute = name.rpartition(".")
        try:
            return _checked(getattr(importlib.import_module(module), attribute), name)
        except Exception as error:
            raise ValueError(
                f"The analysis {name!r} cannot be loaded: {type(error).__name__}: {error}. Expected MODULE.CLASS of an "
                f"installed module or of a file in ./plugins or in a folder of ${PATH_VARIABLE}."
            ) from error
    plugins = discover()
    if name not in plugins:
        close = difflib.get_close_matches(name, plugins) or sorted(plugins)
        raise ValueError(f"There is no analysis {name!r}. Closest: {', '.join(close)}. `saetrack analyses` lists all.")
    plugin = plugins[name]
    if plugin.cls is None:
        raise ValueError(
            f"The analysis {name!r} of {plugin.origin} cannot be loaded: {plugin.cause}. "
            "Repair or uninstall that distribution."
        ) from plugin.error
    return plugin.cls


def plugin_folders() -> list[Path]:
    """Folders of single-file plugins: ``plugins`` in the current directory, then those in ``$SAETRACK_PLUGINS``.

    Returns:
        Absolute paths, without repeats.

    Raises:
        FileNotFoundError: If a folder that ``$SAETRACK_PLUGINS`` names does not exist.
    """
    named = [Path(folder) for folder in os.environ.get(PATH_VARIABLE, "").split(os.pathsep) if folder]
    for folder in named:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"${PATH_VARIABLE} names {folder}, which is not a folder. Correct it, or unset the variable; several "
                f"folders are separated by {os.pathsep!r}."
            )
    here = [folder for folder in [Path("plugins")] if folder.is_dir()]
    return list(dict.fromkeys(folder.resolve() for folder in here + named))


def load_plugins() -> dict[str, Plugin]:
    """Make all analyses known: plugin folders on the import path, entry points imported.

    To be called before a command line is parsed: short class names resolve only among imported classes. Folders go to
    the end of the path, so that a plugin file cannot hide a module. Files in them are imported only when asked for.

    Returns:
        What `discover` returns.

    Raises:
        FileNotFoundError: As `plugin_folders`.
    """
    for folder in map(str, plugin_folders()):
        if folder not in sys.path:
            sys.path.append(folder)
    return discover()


def list_analyses() -> str:
    """A table of all analyses, for `saetrack analyses`.

    Returns:
        Name, kind (``track``, or ``sweep`` for those that need the LLM at every checkpoint), where it is from, and the
        first line of the docstring or ``broken: cause``.
    """
    plugins = [*load_plugins().values(), *_single_files()]
    rows = [("NAME", "KIND", "FROM", "WHAT"), *((p.name, p.kind, p.origin, p.description) for p in plugins)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    )


def _single_files() -> list[Plugin]:
    """The analyses in plugin folders.

    Only files whose text defines an analysis are run: a folder called ``plugins`` may belong to anything.
    """
    return [
        _single_file(class_path, os.path.relpath(path))
        for folder in plugin_folders()
        for path in sorted(folder.glob("*.py"))
        for class_path in _analysis_classes(path)
    ]


def _single_file(class_path: str, origin: str) -> Plugin:
    try:
        return Plugin(class_path, origin, class_path, load(class_path))
    except ValueError as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        return Plugin(class_path, origin, class_path, None, cause)


def _analysis_classes(path: Path) -> list[str]:
    """Dotted names of the classes in a file that name Analysis or SweepAnalysis as a base; nothing is run."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return []
    bases = {Analysis.__name__, SweepAnalysis.__name__}
    return [
        f"{path.stem}.{node.name}"
        for node in tree.body
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).split(".")[-1] in bases for base in node.bases)
    ]


def _import(point: EntryPoint, name: str, *, taken: bool) -> Plugin:
    class_path = point.value.replace(":", ".")
    if taken:
        return Plugin(name, _origin(point), class_path, None, ValueError(f"the name {point.name!r} is taken"))
    try:
        cls = _checked(point.load(), point.value)
    except Exception as error:
        return Plugin(name, _origin(point), class_path, None, error)
    return Plugin(name, _origin(point), class_path, cls)


def _checked(cls: object, name: str) -> AnalysisClass:
    if isinstance(cls, type) and issubclass(cls, Analysis | SweepAnalysis):
        return cls
    raise TypeError(f"{name} is not a subclass of saetrack.analysis.Analysis or SweepAnalysis")


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "?"


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown distribution"


def name_analyses(analyses: Iterable[AnyAnalysis]) -> dict[str, AnyAnalysis]:
    """The analyses by the names under which their results are kept: the entry point's, else ``module.Class``.

    Raises:
        ValueError: If one class comes twice.
    """
    short = {plugin.cls: plugin.name for plugin in discover().values() if plugin.cls is not None}
    named: dict[str, AnyAnalysis] = {}
    for analysis in analyses:
        cls = type(analysis)
        name = short.get(cls, f"{cls.__module__}.{cls.__qualname__}")
        if name in named:
            raise ValueError(f"The analysis {name!r} is asked for twice; its results would replace each other.")
        named[name] = analysis
    return named
