"""The contract between saetrack and an analysis: what it is given, what it gives back, and how that is stored."""

from __future__ import annotations

import json
import math
import re
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import matplotlib as mpl
import numpy as np
import pandas as pd

from saetrack.storage import whole_folder, write_json

if TYPE_CHECKING:
    import scipy.sparse
    import torch
    from matplotlib.figure import Figure

    from saetrack.lm.forward import EditableLLM
    from saetrack.lm.tokens import TokenRows
    from saetrack.track import Snapshot, Track

    from .identity_stretches import Kept

RESULT_FILE = "result.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass
class AnalysisResult:
    """What an analysis found.

    Args:
        tables: Name to table. Each becomes ``NAME.parquet``.
        figures: Name to figure, made without pyplot (see `saetrack.analysis.figures`). Each becomes ``NAME.svg``.
        scalars: Name to ``{LLM step: value}``. They go to TensorBoard with the LLM step as the x axis.
        settings: Every selection, seed and threshold that the numbers depend on; json-able.
        summary: One or two sentences with numbers.
        captions: Name of a figure to what it shows and what it cannot show.
    """

    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    summary: str = ""
    captions: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the result into ``folder``, in place of what an earlier run left there.

        Everything is written into a hidden sibling which is then renamed, so ``folder`` never holds half a
        result. The same result gives the same bytes: the SVG files carry no date and no random identifiers.

        Args:
            folder: Usually ``track.analyses_dir / NAME``. Its parent is made when missing.

        Raises:
            ValueError: If the name of a table or figure cannot be a file name.
        """
        for kind, names in (("table", self.tables), ("figure", self.figures)):
            for name in names:
                if not _NAME.fullmatch(name):
                    raise ValueError(
                        f"The {kind} name {name!r} cannot be a file name. "
                        "Use letters, digits, '_', '-' and '.', beginning with a letter or digit."
                    )
        with whole_folder(Path(folder)) as new:
            self._write(new)

    def _write(self, folder: Path) -> None:
        for name, table in self.tables.items():
            table.to_parquet(folder / f"{name}.parquet", index=False)
        with mpl.rc_context({"svg.hashsalt": "saetrack"}):
            for name, figure in self.figures.items():
                figure.savefig(folder / f"{name}.svg", format="svg", bbox_inches="tight", metadata={"Date": None})
                _close(figure)
        facts = {
            "saetrack_version": _saetrack_version(),
            "summary": self.summary,
            "settings": self.settings,
            "scalars": {name: {str(k): v for k, v in by_step.items()} for name, by_step in self.scalars.items()},
            "tables": list(self.tables),
            "figures": list(self.figures),
            "captions": self.captions,
        }
        write_json(folder / RESULT_FILE, _plain(facts))

    @classmethod
    def load(cls, folder: Path) -> AnalysisResult:
        """Read back what `save` wrote, except for the figures, which stay the SVG files in ``folder``.

        Args:
            folder: A folder under ``analyses/`` of a track.

        Returns:
            The result with tables, scalars, settings and summary. Undefined scalars are NaN.

        Raises:
            FileNotFoundError: If ``folder`` holds no ``result.json``.
        """
        path = Path(folder) / RESULT_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {RESULT_FILE}. Run the analysis first: `saetrack analyze`.")
        facts = json.loads(path.read_text(encoding="utf-8"))
        scalars = {
            name: {int(step): math.nan if value is None else float(value) for step, value in by_step.items()}
            for name, by_step in facts["scalars"].items()
        }
        tables = {name: pd.read_parquet(path.parent / f"{name}.parquet") for name in facts["tables"]}
        return cls(
            tables=tables,
            scalars=scalars,
            settings=facts["settings"],
            summary=facts["summary"],
            captions=facts.get("captions", {}),  # 0.1.0 wrote none
        )


class AnyAnalysis:
    """What `Analysis` and `SweepAnalysis` share; an analysis is one of these."""

    min_snapshots: ClassVar[int] = 1
    """On shorter tracks `saetrack analyze` leaves it out, unless it is asked for by name."""
    restrictable: ClassVar[bool] = False
    """Whether it heeds ``kept``."""
    kept: Kept | None = None
    """Set by ``saetrack analyze --only_kept true``: only features count where they kept their identity."""


class Analysis(AnyAnalysis, ABC):
    """An analysis that needs only what the track holds: weights, statistics, tables.

    Subclasses take plain typed arguments, documented under ``Args:`` in the class docstring; they are what
    ``saetrack analyze --analyses.NAME value`` sets. The first line of the docstring is shown by `saetrack analyses`.
    """

    reads_results: ClassVar[bool] = False
    """Whether it reads the results of other analyses; it then runs after them."""

    @abstractmethod
    def run(self, track: Track) -> AnalysisResult:
        """Analyse a track.

        Args:
            track: The track, opened for reading.

        Returns:
            Tables, figures and scalars. The caller saves them.
        """


@dataclass(frozen=True)
class Probe:
    """Which token rows a `SweepAnalysis` wants to see: the first so many of each split.

    A track that holds fewer rows gives all that it has; the analysis learns the number from the observation.

    Args:
        selection_rows: Rows of the split that selections are made on (top contexts, thresholds).
        evaluation_rows: Rows of the split that what was selected is evaluated on.
        embeddings: Whether the LLM's input embeddings are wanted too.
        unembedding: Whether its unembedding is.
        llm: Whether the LLM itself is, to run it with its activations changed.
    """

    selection_rows: int = 0
    evaluation_rows: int = 0
    embeddings: bool = False
    unembedding: bool = False
    llm: bool = False

    def __post_init__(self) -> None:
        for name in ("selection_rows", "evaluation_rows"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but a number of rows cannot be negative.")


@dataclass(frozen=True)
class SplitObservation:
    """One LLM checkpoint and its SAE on the rows of one split. Shared between analyses: do not write into it.

    Args:
        rows: The token rows, ``tokens`` and ``documents`` of shape ``[R, T]``.
        positions: ``[P, 2]`` int64, (row, column) of every position that counts (`rows.usable`), in row-major order.
        activations: ``[P, d_in]`` float32, in the LLM's own units.
        latents: ``[P, d_sae]`` float32, sorted indices, no stored zeros. Activations over the snapshot's `norm_limit`,
            which the SAE is not made for, have none.
    """

    rows: TokenRows
    positions: np.ndarray
    activations: np.ndarray
    latents: scipy.sparse.csr_array

    @property
    def tokens(self) -> np.ndarray:
        """Token id at every position, ``[P]`` int64."""
        return np.asarray(self.rows.tokens[self.positions[:, 0], self.positions[:, 1]], dtype=np.int64)

    @property
    def documents(self) -> np.ndarray:
        """Document number at every position, ``[P]`` int64."""
        return np.asarray(self.rows.documents[self.positions[:, 0], self.positions[:, 1]], dtype=np.int64)


@dataclass(frozen=True)
class Observation:
    """What a `SweepAnalysis` is shown at one LLM checkpoint. What it did not ask for is None.

    Args:
        selection: The rows of the selection split.
        evaluation: The rows of the evaluation split.
        embeddings: ``[vocabulary, d_model]`` float32, the LLM's input embeddings.
        unembedding: ``[vocabulary, d_model]`` float32, with the final norm's gain folded in, see
            `saetrack.lm.read_unembedding`. Both are shared between analyses: do not write into them.
        llm: The LLM, to be run with its activations at the track's hookpoint changed. Do not keep it: the next LLM
            checkpoint is loaded into the memory that it takes.
    """

    selection: SplitObservation | None = None
    evaluation: SplitObservation | None = None
    embeddings: torch.Tensor | None = None
    unembedding: torch.Tensor | None = None
    llm: EditableLLM | None = None


class SweepAnalysis(AnyAnalysis, ABC):
    """An analysis that needs the LLM at every checkpoint.

    The sweep calls `begin` once, `observe` once for each snapshot, then `finish`. The **last snapshot is observed
    first** and the others follow in the order of training, so that an analysis may choose its positions on the
    finished model and follow them from the beginning. All analyses of a sweep share each LLM load and forward.
    Arguments and docstring are as for `Analysis`.
    """

    @abstractmethod
    def begin(self, track: Track) -> Probe:
        """Reset all state and say which token rows are wanted.

        Args:
            track: The track, opened for reading.

        Returns:
            The wanted rows.
        """

    @abstractmethod
    def observe(self, snapshot: Snapshot, observation: Observation) -> None:
        """Look at one LLM checkpoint and its SAE.

        Args:
            snapshot: The snapshot; ``snapshot.step`` is the LLM's step.
            observation: Activations and latents on the rows that `begin` asked for. Keep reductions, not the
                arrays: memory is stated for one observation at a time.
        """

    @abstractmethod
    def finish(self) -> AnalysisResult:
        """Put together what was observed.

        Returns:
            Tables, figures and scalars. The caller saves them.
        """


def _saetrack_version() -> str:
    try:
        return version("saetrack")
    except PackageNotFoundError:
        return "unknown"


def _close(figure: Figure) -> None:
    """Let go of a figure that a plugin made with pyplot, which would otherwise keep it open for ever."""
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close(figure)


def _plain(value: Any) -> Any:
    """The value with NumPy types, paths and tuples made plain, and NaN and infinity made None (JSON has neither)."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value
