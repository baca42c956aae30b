"""Activations of features through training, all checkpoints in one UMAP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from saetrack.analysis import AnalysisResult, Observation, Probe, SweepAnalysis, figures
from saetrack.analysis.columns import top_positions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from saetrack.track import Snapshot, Track

__all__ = ["UMAPTrajectories"]


class UMAPTrajectories(SweepAnalysis):
    """Activations of chosen features at their top positions through training, in one UMAP for all checkpoints.

    Positions are chosen once, on the last snapshot: the largest activations of each feature, one of a document. At
    each checkpoint the LLM's activations there, less their mean over all positions of that checkpoint, are points.
    The points of all checkpoints are fitted together (cosine metric), so distances between panels mean what they do
    within one. UMAP keeps neighbourhoods, not distances: read groups off it, not sizes. The positions were selected
    on the last snapshot, so that the last panel is grouped best is no finding.

    Args:
        features: Features to follow. None: ``count`` features drawn at random among those that fire in enough
            documents at the last snapshot.
        count: How many to draw.
        contexts: Positions for each feature.
        selection_rows: Token rows of the selection split.
        neighbours: UMAP's ``n_neighbors``.
        min_dist: UMAP's ``min_dist``.
        panels: Panels in the figure, checkpoints spread evenly over the track, the first and last among them.
        seed: Of the draw of features and of UMAP.
    """

    def __init__(
        self,
        features: list[int] | None = None,
        count: int = 8,
        contexts: int = 25,
        selection_rows: int = 256,
        neighbours: int = 30,
        min_dist: float = 0.1,
        panels: int = 6,
        seed: int = 0,
    ) -> None:
        self.features, self.count, self.contexts, self.selection_rows = features, count, contexts, selection_rows
        self.neighbours, self.min_dist, self.panels, self.seed = neighbours, min_dist, panels, seed

    def begin(self, track: Track) -> Probe:
        """Ask for the rows that positions are chosen on."""
        self._chosen: tuple[np.ndarray, np.ndarray] | None = None  # feature and position of every point
        self._points: dict[int, np.ndarray] = {}  # LLM step to [n, d_in]
        return Probe(selection_rows=self.selection_rows)

    def observe(self, snapshot: Snapshot, observation: Observation) -> None:
        """Choose positions on the last snapshot, which comes first; keep the activations there."""
        split = observation.selection
        if split is None:
            raise RuntimeError("The sweep did not give the selection rows that `begin` asked for.")
        if self._chosen is None:
            top, _ = top_positions(split.latents, split.documents, self.contexts)  # [d_sae, contexts]
            features = self._choose(top)
            feature, rank = np.nonzero(top[features] >= 0)
            self._chosen = features[feature], top[features[feature], rank]
            self._places = pd.DataFrame(
                {"feature": self._chosen[0], "row": split.positions[self._chosen[1], 0]}
            ).assign(column=split.positions[self._chosen[1], 1])
        self._points[snapshot.step] = split.activations[self._chosen[1]] - split.activations.mean(axis=0)

    def _choose(self, top: np.ndarray) -> np.ndarray:
        if self.features is not None:
            missing = [f for f in self.features if not 0 <= f < len(top) or top[f, 0] < 0]
            if missing:
                raise ValueError(f"features {missing} do not fire at the last snapshot (of {len(top)}); choose others.")
            return np.array(self.features)
        enough = np.flatnonzero(top[:, -1] >= 0)
        if not len(enough):
            raise ValueError(
                f"No feature fires in {self.contexts} documents of {self.selection_rows} rows; lower `contexts` or "
                "raise `selection_rows`."
            )
        rng = np.random.default_rng(self.seed)
        return np.sort(rng.choice(enough, size=min(self.count, len(enough)), replace=False))

    def finish(self) -> AnalysisResult:
        """Fit once; one panel for each of some checkpoints."""
        from umap import UMAP  # takes seconds to import, which `saetrack analyses` should not cost

        steps = sorted(self._points)
        points = np.concatenate([self._points[step] for step in steps])
        fit: Any = UMAP(
            n_neighbors=min(self.neighbours, len(points) - 1),
            min_dist=self.min_dist,
            metric="cosine",
            random_state=self.seed,
            n_jobs=1,
        )
        xy = np.asarray(fit.fit_transform(points), dtype=np.float64)
        table = pd.concat([self._places.assign(step=step) for step in steps], ignore_index=True)
        table = table.assign(x=xy[:, 0], y=xy[:, 1])[["step", "feature", "row", "column", "x", "y"]]
        followed = sorted(int(f) for f in self._places["feature"].unique())
        settings = {
            "features": followed,
            "features_drawn": self.features is None,
            "contexts": self.contexts,
            "selection_rows": self.selection_rows,
            "neighbours": self.neighbours,
            "min_dist": self.min_dist,
            "metric": "cosine",
            "seed": self.seed,
        }
        summary = f"{len(points)} activations of {len(followed)} features at {len(steps)} LLM checkpoints, in one UMAP."
        return AnalysisResult({"points": table}, {"umap": self._figure(table, followed)}, {}, settings, summary)

    def _figure(self, table: pd.DataFrame, features: list[int]) -> Figure:
        steps = sorted(table["step"].unique())
        shown = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, self.panels).round().astype(int))]
        figure, axes = figures.small_multiples(
            len(shown),
            columns=3,
            title="LLM activations at the features' top positions, one UMAP",
            panel_width=2.9,
            panel_height=2.6,
            sharex=True,
            sharey=True,
        )
        colours = figures.colours("turbo", len(features)) if len(features) > 7 else figures.PALETTE
        for ax, step in zip(axes, shown, strict=True):
            ax.scatter(table["x"], table["y"], s=2, color="0.87", linewidths=0)
            now = table[table["step"] == step]
            for feature, colour in zip(features, colours, strict=False):
                own = now[now["feature"] == feature]
                ax.scatter(own["x"], own["y"], s=9, color=colour, linewidths=0, label=str(feature))
            ax.set_xticks([])
            ax.set_yticks([])
            figures.describe(ax, title=f"LLM step {step:,}", ylabel="")
        figures.legend(axes[-1], columns=4)
        return figure
