"""What each feature is a feature of, followed over the LLM checkpoints: scores, classes, and how they change.

Memory kept between checkpoints, for T checkpoints and F features: ``T * F * 350`` bytes of scores, and the latents of
the last checkpoint on the selection rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .positions import first_of_context, spread_positions
from .resampling import share_interval
from .semantics_classes import (
    CLASSES,
    CONCEPT,
    INSUFFICIENT,
    SILENT,
    SemanticThresholds,
    classify,
    sensitivity,
)
from .semantics_patterns import NullChain, overlap, pattern_table, patterns, splits, transition_table
from .semantics_scores import POSITIONS, Scorer, Scores, Vocabulary

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .base import SplitObservation
    from .identity_stretches import Kept

    Floats = NDArray[np.floating]
    Integers = NDArray[np.integer]

SCORES = (
    "n_eff_form", "n_eff_family", "r2_token", "r2_previous", "r2_position", "recall", "precision", "dispersion",
    "dispersion_p", "coherence_z",
)  # fmt: skip


class Meaning:
    """Scores and classes of every feature at every LLM checkpoint; the last is observed first.

    Args:
        thresholds: Of the classes.
        vocabulary: Forms and families of the tokens.
        embeddings: ``[V, d_in]``, the input embeddings of the last LLM checkpoint.
        selection: The last snapshot on the selection rows.
        evaluation: The last snapshot on the evaluation rows.
        seed: Of positions and random sets.
        counts: Which features count at the last snapshot ``[F]``; all, if not given.
    """

    def __init__(
        self,
        thresholds: SemanticThresholds,
        vocabulary: Vocabulary,
        embeddings: Floats,
        selection: SplitObservation,
        evaluation: SplitObservation,
        seed: int,
        counts: NDArray[np.bool_] | None = None,
    ) -> None:
        self.thresholds = thresholds
        self.seed = seed
        self._counts = np.ones(selection.latents.shape[1], dtype=bool) if counts is None else counts
        self._scorer = Scorer(vocabulary, embeddings, selection, seed)
        self._last = selection.latents
        self._unrepeated = first_of_context(selection)
        self._scores: dict[int, Scores] = {}
        self._splits: dict[int, NDArray[np.bool_]] = {}
        self.false_concepts = self._false_concepts(vocabulary, embeddings, selection, evaluation)

    def observe(self, place: int, selection: SplitObservation, evaluation: SplitObservation) -> None:
        """Score one LLM checkpoint.

        Args:
            place: Its place in the track.
            selection: On the selection rows.
            evaluation: On the evaluation rows.
        """
        self._scores[place] = self._scorer.scores(selection, evaluation)
        rng = np.random.default_rng([self.seed, 13])
        width = selection.latents.shape[1]
        anywhere, nowhere = np.zeros(width), np.full(width, np.inf)
        fires = spread_positions(selection, self._unrepeated, anywhere, nowhere, POSITIONS, rng)
        self._splits[place] = splits(fires, selection.latents, self._last)

    def _false_concepts(
        self, vocabulary: Vocabulary, embeddings: Floats, selection: SplitObservation, evaluation: SplitObservation
    ) -> float:
        """Share called a concept when the text is permuted under the latents: all of them are false."""
        rng = np.random.default_rng([self.seed, 14])
        permuted = [_permuted(split, rng) for split in (selection, evaluation)]
        scores = Scorer(vocabulary, embeddings, permuted[0], self.seed).scores(permuted[0], permuted[1])
        classes = classify(scores, self.thresholds)
        enough = (scores.firing_positions >= self.thresholds.min_firings) & self._counts
        return float((classes[enough] == CONCEPT).mean()) if enough.any() else np.nan

    def tables(self, steps: list[int], null: NullChain, kept: Kept | None = None) -> dict[str, pd.DataFrame]:
        """Tables over all checkpoints.

        Args:
            steps: LLM steps in the order of the track.
            null: The tables of the null chains, where there are some.
            kept: If given, classes and transitions are of the features that kept their identity in the stage, and
                patterns of those that kept it to the last checkpoint.

        Returns:
            ``meaning``, one row by step and feature; ``classes``, shares by step with their interval; ``transitions``
            and ``patterns``; ``sensitivity`` of the classes at the last checkpoint to the thresholds.
        """
        scores = [self._scores[place] for place in sorted(self._scores)]
        found = [self._splits[place] for place in sorted(self._splits)]
        classes = np.stack([classify(s, self.thresholds) for s in scores])  # [T, F]
        last = scores[-1]
        names = [
            patterns(before, classes[-1], overlap(s.families, s.shares, last.families, last.shares), split)
            for before, s, split in zip(classes[:-1], scores[:-1], found[:-1], strict=True)
        ]
        if kept is not None:
            names = [np.where(counts, name, "") for counts, name in zip(kept.to_last, names, strict=False)]
        columns: dict[str, Any] = {
            "step": np.repeat(steps, classes.shape[1]),
            "feature": np.tile(np.arange(classes.shape[1]), len(steps)),
            "class": classes.ravel(),
            "pattern": np.concatenate([*names, np.full(classes.shape[1], "")]),
        }
        for name in SCORES:
            columns[name] = np.concatenate([getattr(s, name) for s in scores]).astype(np.float32)
        return {
            "meaning": pd.DataFrame(columns),
            "classes": _class_table(steps, classes, None if kept is None else kept.at),
            "transitions": transition_table(steps, classes, null.transitions, None if kept is None else kept.into),
            "patterns": pattern_table(steps, names, null.patterns),
            "sensitivity": sensitivity(last, self.thresholds, self._counts),
        }


def _class_table(steps: list[int], classes: NDArray[np.str_], use: NDArray[np.bool_] | None) -> pd.DataFrame:
    """Share of each class among the features with firings enough, by step, with Wilson's 95 % interval."""
    tables = []
    for t, step in enumerate(steps):
        row = classes[t] if use is None else classes[t, use[t]]
        counts = np.array([int((row == name).sum()) for name in CLASSES if name not in (INSUFFICIENT, SILENT)])
        share, low, high = share_interval(counts, np.full(len(counts), counts.sum()))
        columns = {"class": CLASSES[: len(counts)], "features": counts, "share": share, "low": low, "high": high}
        tables.append(pd.DataFrame({"step": step, **columns}))
    return pd.concat(tables, ignore_index=True)


def _permuted(split: SplitObservation, rng: np.random.Generator) -> SplitObservation:
    """The same latents over the same tokens in random order."""
    row, column = split.positions.T
    tokens = np.array(split.rows.tokens)
    tokens[row, column] = rng.permutation(tokens[row, column])
    return replace(split, rows=replace(split.rows, tokens=tokens))
