"""A planted series: activations and latents whose answer is known, without an LLM.

Every document is one row of tokens. The activation at a position is its token's embedding, noise that stays through
training (the text is the same), noise that does not, a large common mean, and for every planted feature that fires
there its direction, by a strength that rises with the LLM step. The latents are those of a finished SAE.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import scipy.sparse as sp

from saetrack.analysis.base import AnalysisResult, Observation, SplitObservation, SweepAnalysis
from saetrack.lm.tokens import TokenRows

D_IN = 64
STEPS = (0, 1, 3, 9, 31, 99, 315, 999)  # even on the axis log10(step + 1), more or less


def rising(onset: float, width: float) -> Callable[[int], float]:
    """Strength by step: logistic in log10(step + 1), half at ``onset``, from 12 to 88 per cent in 4 ``width``."""
    return lambda step: float(1 / (1 + np.exp(-(np.log10(step + 1) - np.log10(onset + 1)) / width)))


def sudden(onset: float) -> Callable[[int], float]:
    return lambda step: float(step >= onset)


@dataclass(frozen=True)
class PlantedFeature:
    """Fires at a share of the positions whose token is one of ``tokens``; then adds its direction by ``strength``."""

    tokens: tuple[int, ...]
    share: float
    strength: Callable[[int], float]


@dataclass(frozen=True)
class PlantedSeries:
    features: tuple[PlantedFeature, ...]
    documents: int = 150
    length: int = 24
    vocabulary: int = 12
    amplitude: float = 3.0
    seed: int = 0

    def split(self, name: str, step: int) -> SplitObservation:
        """One split at one LLM step: the text and the latents are the same at every step."""
        number = ("selection", "evaluation").index(name)
        rng = np.random.default_rng([self.seed, number])
        tokens = rng.integers(1, self.vocabulary + 1, size=(self.documents, self.length)).astype(np.int32)
        tokens[:, 0] = 0
        documents = np.repeat(np.arange(self.documents, dtype=np.int32)[:, None], self.length, axis=1)
        positions = np.argwhere(tokens != 0)
        token = tokens[positions[:, 0], positions[:, 1]]
        fires = np.stack([np.isin(token, f.tokens) & (rng.random(len(token)) < f.share) for f in self.features], axis=1)
        latents = fires * (0.5 + rng.random(fires.shape))
        lasting = rng.normal(size=(len(token), D_IN))
        world = np.random.default_rng(self.seed)  # the same in both splits
        embeddings = world.normal(size=(self.vocabulary + 1, D_IN))
        directions = world.normal(size=(len(self.features), D_IN))
        directions *= self.amplitude / np.linalg.norm(directions, axis=1, keepdims=True)
        strengths = np.array([f.strength(step) for f in self.features])
        fresh = 0.3 * np.random.default_rng([self.seed, number, step]).normal(size=lasting.shape)
        activations = 20.0 + embeddings[token] + lasting + fresh + (fires * strengths) @ directions
        rows = TokenRows(tokens, documents, 0)
        return SplitObservation(
            rows, positions, activations.astype(np.float32), sp.csr_array(latents.astype(np.float32))
        )

    def observation(self, step: int) -> Observation:
        return Observation(self.split("selection", step), self.split("evaluation", step))


def sweep(analysis: SweepAnalysis, observe: Callable[[int], Observation], steps: tuple[int, ...]) -> AnalysisResult:
    """As `run_analyses` does it: the last snapshot first."""
    track: Any = SimpleNamespace(steps=list(steps), path="planted")
    analysis.begin(track)
    for step in (steps[-1], *steps[:-1]):
        snapshot: Any = SimpleNamespace(step=step)
        analysis.observe(snapshot, observe(step))
    return analysis.finish()
