"""Tracks whose drift has planted rates: what phases should find regimes in, or none."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from saetrack.analysis.figures import step_position
from saetrack.track import Track

from .planted_track import begin, random_rows, snapshot

D_SAE, D_IN = 192, 8
PYTHIA = (0, *(2**i for i in range(10)), *range(1000, 11000, 1000), 20000, *range(40000, 143000, 20000), 143000)
EVEN = tuple(int(step) for step in np.round(np.geomspace(1, 1e9, 29)) - 1)
"""Steps that are even in log10(step + 1), more or less; 29 as in Pythia's."""


@dataclass(frozen=True)
class Rates:
    """The law of a track's drift.

    Args:
        llm: Rate per decade of LLM steps in every interval, ``[T - 1]``.
        null: What a stage adds whatever the LLM did, ``[T - 1]``.
        steps: LLM steps, ``[T]``.
        common: Standard deviation, in logarithms, of the noise that all features share at a checkpoint.
    """

    llm: np.ndarray
    null: np.ndarray
    steps: tuple[int, ...] = PYTHIA
    common: float = 0.1

    @classmethod
    def still(cls, level: float = 0.02, steps: tuple[int, ...] = PYTHIA) -> "Rates":
        """A null chain: its SAE goes on learning, at a rate that falls by half and more."""
        stages = np.arange(len(steps) - 1)
        return cls(np.zeros(len(stages)), level * (0.4 + 0.6 * np.exp(-stages / 6)), steps)

    @classmethod
    def three(cls, common: float, null: float = 0.0) -> "Rates":
        """Regimes of nine, ten and nine intervals, with rates of 0.05, 0.10 and 0.06 a decade."""
        return cls(np.repeat([0.05, 0.10, 0.06], [9, 10, 9]), cls.still(null).null, PYTHIA, common)

    def amounts(self, rng: np.random.Generator) -> np.ndarray:
        """1 - cosine of every feature in every stage ``[T - 1, D_SAE]``."""
        gaps = np.diff(step_position(list(self.steps)))
        stages = (self.llm * gaps + self.null) * np.exp(self.common * rng.normal(size=len(gaps)))
        features = np.exp(0.5 * rng.normal(size=D_SAE) + 0.3 * rng.normal(size=(len(gaps), D_SAE)))
        amounts: np.ndarray = stages[:, None] * features
        return amounts


def track_with_chain(path: Path, steps: tuple[int, ...], chain: bool) -> Track:
    """A track, and a null chain under it if asked for; their drift is yet to be planted."""
    rows = random_rows(np.random.default_rng(0), D_SAE, D_IN)
    track = begin(path, D_IN, D_SAE)
    for step in steps:
        snapshot(track, step, rows)
    if chain:
        control = {"kind": "null", "position": None, "stages": len(steps)}
        made = begin(path / "controls" / "null-chain-0", D_IN, D_SAE, control=control)
        for _ in steps:
            snapshot(made, steps[0], rows)
    return Track.open(path)


def plant_rates(track: Track, law: Rates, rng: np.random.Generator, null_steps: bool = False) -> None:
    """Write the drift analysis' table as it would be; with null steps at four stages if asked for."""
    cosines = 1 - np.concatenate([np.full((1, D_SAE), np.nan), law.amounts(rng)])
    columns = {
        "feature": np.tile(np.arange(D_SAE), len(track)),
        "step": np.repeat(track.steps, D_SAE),
        "status": "alive",
        "alive_before": True,
        "decoder_to_previous_without_rotation": cosines.ravel(),
        "decoder_to_previous": cosines.ravel(),
    }
    folder = track.analyses_dir / "drift"
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(columns).to_parquet(folder / "drift.parquet")
    if null_steps:
        at = np.linspace(1, len(track) - 1, 4).round().astype(int)
        drift_null = law.null[at - 1] * np.exp(law.common * rng.normal(size=4))
        table = pd.DataFrame({"step": np.asarray(track.steps)[at], "drift_null": drift_null})
        table.to_parquet(folder / "calibration.parquet")
