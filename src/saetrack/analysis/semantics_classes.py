"""From scores to a class: the rule, its thresholds, and what other thresholds would give."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .semantics_scores import Scores

TOKEN, IN_CONTEXT, FAMILY, CONCEPT = "token", "token-in-context", "word-family", "concept"
POSITIONAL, UNRESOLVED, INSUFFICIENT, SILENT = "positional", "unresolved", "insufficient", "silent"
CLASSES = (TOKEN, IN_CONTEXT, FAMILY, CONCEPT, POSITIONAL, UNRESOLVED, INSUFFICIENT, SILENT)


@dataclass(frozen=True)
class SemanticThresholds:
    """Thresholds of the classes.

    Args:
        min_firings: Fewer firing positions on the selection rows are ``insufficient``.
        r2_position: A feature is positional from this share of variance that the place determines.
        r2_token: The same for tokens.
        few: Most effective forms of a token feature, most effective families of a word family.
        recall: A token feature fires at this share of its form's positions; below it is a token in context.
        many: A concept has more effective families than this.
        coherence_z: Least coherence of contexts of a concept, in deviations of random ones with the same tokens,
        dispersion_p: or the most random families that are as near each other as its own; 0 leaves this out, for it
            calls 90 % of features concepts on permuted text (docs/validation.md).
    """

    min_firings: int = 25
    r2_position: float = 0.5
    r2_token: float = 0.5
    few: float = 2.0
    recall: float = 0.3
    many: float = 4.0
    coherence_z: float = 3.0
    dispersion_p: float = 0.0


def classify(scores: Scores, thresholds: SemanticThresholds) -> NDArray[np.str_]:
    """The class of every feature, the first that holds.

    ``positional``: its place determines it. ``token``: one form, which determines it or at most of whose positions it
    fires; or a few families, which determine it. ``token-in-context``: one form, rarely. ``word-family``: several forms
    of one family. ``concept``: many families, and contexts alike or families near each other. Else ``unresolved``.

    A token that determines a feature of many families does not make it a token feature, other than in a rule that asks
    for R^2 alone: one that fires at every weekday would be called a token (docs/validation.md).

    Args:
        scores: Of every feature. A score that is NaN passes no threshold.
        thresholds: Of the rule.

    Returns:
        One of `CLASSES`, ``[d_sae]``.
    """
    t = thresholds
    one = scores.n_eff_form <= t.few
    determined = scores.r2_token >= t.r2_token
    alike = (scores.coherence_z >= t.coherence_z) | (scores.dispersion_p <= t.dispersion_p)
    rules = [
        (scores.firing_positions == 0, SILENT),
        (scores.firing_positions < t.min_firings, INSUFFICIENT),
        (scores.r2_position >= t.r2_position, POSITIONAL),
        (one & (determined | (scores.recall >= t.recall)), TOKEN),
        (one, IN_CONTEXT),
        (scores.n_eff_family <= t.few, FAMILY),
        (determined & (scores.n_eff_family <= t.many), TOKEN),
        ((scores.n_eff_family > t.many) & alike, CONCEPT),
    ]
    return np.select([condition for condition, _ in rules], [name for _, name in rules], UNRESOLVED)


def sensitivity(scores: Scores, thresholds: SemanticThresholds, counts: NDArray[np.bool_]) -> pd.DataFrame:
    """Share of each class, among features ``counts``, with every threshold at half and one and a half of its value.

    Returns:
        Columns ``threshold``, ``factor``, ``class``, ``share`` (of features with firings enough).
    """
    rows = []
    for name, value in asdict(thresholds).items():
        for factor in (0.5, 1.0, 1.5):
            classes = classify(scores, replace(thresholds, **{name: value * factor}))[counts]
            classes = classes[(classes != SILENT) & (classes != INSUFFICIENT)]
            rows += [
                {"threshold": name, "factor": factor, "class": kind, "share": float((classes == kind).mean())}
                for kind in CLASSES[:-2]
                if len(classes)
            ]
    return pd.DataFrame(rows, columns=["threshold", "factor", "class", "share"])
