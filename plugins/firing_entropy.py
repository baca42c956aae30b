"""A single-file analysis: put a file like this into ./plugins and name its class.

saetrack analyze runs/quickstart --analyses+=firing_entropy.FiringEntropy
"""

import numpy as np
import pandas as pd

from saetrack.analysis import Analysis, AnalysisResult, figures
from saetrack.track import Snapshot, Track


class FiringEntropy(Analysis):
    """Effective number of features in use: 2^H of the firing frequencies, by LLM step.

    Args:
        min_frequency: Features that fire on a smaller share of positions are left out.
    """

    def __init__(self, min_frequency: float = 0.0) -> None:
        self.min_frequency = min_frequency

    def run(self, track: Track) -> AnalysisResult:
        """Measure every snapshot."""
        table = pd.DataFrame({"step": track.steps, "effective_features": [self.effective(s) for s in track]})
        figure, (ax,) = figures.small_multiples(1, title="Features in use")
        figures.line(ax, table["step"], table["effective_features"], color=figures.BLUE)
        figures.step_axis(ax, track.steps)
        figures.describe(ax, title="Spread of firing over features", ylabel="effective features, $2^H$")
        scalars = {"effective_features": dict(zip(track.steps, table["effective_features"], strict=True))}
        settings = {"min_frequency": self.min_frequency}
        return AnalysisResult({"steps": table}, {"effective_features": figure}, scalars, settings)

    def effective(self, snapshot: Snapshot) -> float:
        """2^entropy of the share that each feature has in all firings of a snapshot."""
        frequency = snapshot.features["firing_frequency"].to_numpy()
        p = frequency[(frequency > 0) & (frequency >= self.min_frequency)]
        return float(2 ** -(p / p.sum() * np.log2(p / p.sum())).sum())
