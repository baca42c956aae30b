"""What every feature responds to at every LLM checkpoint: its top contexts, its tokens, and how fast they change.

Memory between checkpoints, for T checkpoints, F features, k contexts and windows of w tokens:
``T * F * k * (12 + 4 w)`` bytes. The table of contexts that `finish` builds takes about ``T * F * k * (400 + 12 w)``
bytes more while it is written.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from . import semantics_figures
from .base import AnalysisResult, Observation, Probe, SweepAnalysis
from .columns import TokenStatistics, token_share, token_statistics, top_positions, values_at
from .places import place_names, share_a_step
from .resampling import bootstrap_means
from .semantics_classes import SemanticThresholds
from .semantics_meaning import Meaning
from .semantics_patterns import NullChain, random_classes
from .semantics_scores import Vocabulary
from .semantics_turnover import NULL_DRAWS, turnover_series
from .token_text import token_strings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from saetrack.lm.tokens import TokenRows
    from saetrack.track import Snapshot, Track

    from .base import SplitObservation

    Floats = NDArray[np.floating]
    Integers = NDArray[np.integer]

REPLICATES = 500
MIN_FIRINGS = 25  # of the examples drawn


@dataclass(frozen=True)
class _Seen:
    """What is kept of one checkpoint. ``top`` are indices of positions ``[F, k]``, -1 where there are fewer."""

    statistics: TokenStatistics
    evaluation_share: Floats  # [F]
    shuffled_entropy: Floats  # [F]
    top: Integers
    values: Floats  # [F, k]
    windows: Floats  # [N, w], of the entries of top that are not -1, row by row


class Semantics(SweepAnalysis):
    """What every feature responds to: top contexts, tokens, N_eff and turnover at every LLM checkpoint.

    For every feature that fires on the selection rows of a checkpoint:

    * its top contexts, at most one per document, with the tokens and the feature's activations around them;
    * N_eff = 2^H of the distribution of its activation mass over tokens, plain and Chao-Shen corrected, beside the
      same with the tokens shuffled over positions (one seeded permutation for all checkpoints);
    * its top token (most activation mass). Its share is given on the selection rows, where it was chosen, and on the
      evaluation rows.

    * its scores and its class: token, token-in-context, word-family, concept, positional, unresolved or insufficient
      (``semantics_classes``), and how it comes to the end: maintaining, shifting, grouping, splitting, death or other
      (``semantics_patterns``). The null chain's transitions and patterns stand beside, where semantics was run on it
      (``saetrack analyze TRACK/controls/null-chain-0``), and the classes of the random controls, an LLM never trained.

    Turnover between a checkpoint and the one before it in LLM steps is ``1 - Jaccard`` of a feature's two sets of top
    positions, over features that fire at both; the interval is a bootstrap over features. It has two nulls, each the
    mean over features of 10 seeded draws. *Other feature*: the set after is that of another feature drawn at random
    (what turnover would be if indices had no meaning). *Same tokens*: the set after is drawn at random among positions
    with the same tokens as the set before (a feature that keeps its tokens but has no preference among contexts).

    Restricted (``--only_kept``), at every checkpoint the features count that kept their identity in the stage that led
    there (at the first, in the one from it), and patterns are of those that kept it to the last. Null chains and random
    LLMs have no stretches and are left out.

    Args:
        selection_rows: Token rows of the selection split; all there are, if fewer.
        evaluation_rows: Token rows of the evaluation split, for the top token's share.
        contexts: Top contexts kept for each feature and checkpoint.
        left: Tokens shown before the position.
        right: Tokens shown after it.
        examples: Features in the figure of examples, drawn at random among those that fire at 25 positions or more
            at the last snapshot.
        seed: Of the nulls, the random sets, the bootstrap and the draw of examples.
        thresholds: Of the classes.
    """

    restrictable: ClassVar[bool] = True

    def __init__(
        self,
        selection_rows: int = 256,
        evaluation_rows: int = 256,
        contexts: int = 8,
        left: int = 10,
        right: int = 5,
        examples: int = 12,
        seed: int = 0,
        thresholds: SemanticThresholds = SemanticThresholds(),
    ) -> None:
        self.settings = {
            "selection_rows": selection_rows,
            "evaluation_rows": evaluation_rows,
            "contexts": contexts,
            "left": left,
            "right": right,
            "examples": examples,
            "seed": seed,
        }
        for name in ("selection_rows", "evaluation_rows", "contexts"):
            if self.settings[name] < 1:
                raise ValueError(f"{name} is {self.settings[name]}; expected 1 or more.")
        for name in ("left", "right", "examples", "seed"):
            if self.settings[name] < 0:
                raise ValueError(f"{name} is {self.settings[name]}; expected 0 or more.")
        self.selection_rows, self.evaluation_rows = selection_rows, evaluation_rows
        self.contexts, self.left, self.right = contexts, left, right
        self.examples, self.seed, self.thresholds = examples, seed, thresholds

    def begin(self, track: Track) -> Probe:
        """Forget what was seen; ask for the rows."""
        self._track = track
        self._seen: dict[int, _Seen] = {}  # by place in the track: a null chain has one LLM step many times
        self._steps: dict[int, int] = {}
        self._meaning: Meaning | None = None
        self._selection: tuple[TokenRows, Integers] | None = None
        return Probe(self.selection_rows, self.evaluation_rows, embeddings=True)

    def observe(self, snapshot: Snapshot, observation: Observation) -> None:
        """Reduce one checkpoint to statistics by feature, top positions and the activations around them."""
        selection, evaluation = observation.selection, observation.evaluation
        assert selection is not None  # begin asked for both; the type checker cannot know
        assert evaluation is not None
        self._selection = (selection.rows, selection.positions)
        self._rows_read = {"selection": len(selection.rows.tokens), "evaluation": len(evaluation.rows.tokens)}
        if self._meaning is None:  # the last snapshot comes first
            self._strings = token_strings(
                self._track.tokenizer(), np.union1d(selection.rows.tokens, evaluation.rows.tokens)
            )
            assert observation.embeddings is not None
            self._meaning = Meaning(
                self.thresholds,
                Vocabulary.of(self._strings.tolist()),
                observation.embeddings[: len(self._strings)].numpy(),
                selection,
                evaluation,
                self.seed,
                None if self.kept is None else self.kept.at[-1],
            )
        self._steps[snapshot.position] = snapshot.step
        self._meaning.observe(snapshot.position, selection, evaluation)
        statistics = token_statistics(selection.latents, selection.tokens)
        shuffled = np.random.default_rng([self.seed, 0]).permutation(selection.tokens)
        top, values = top_positions(selection.latents, selection.documents, self.contexts)
        self._seen[snapshot.position] = _Seen(
            statistics=statistics,
            evaluation_share=token_share(evaluation.latents, evaluation.tokens, statistics.top_token),
            shuffled_entropy=token_statistics(selection.latents, shuffled).entropy,
            top=top,
            values=values,
            windows=self._windows(selection, top),
        )

    def finish(self) -> AnalysisResult:
        """Tables of features, contexts and checkpoints, and two figures."""
        if self._selection is None:
            raise RuntimeError("Semantics.finish was called before observe: nothing was seen yet.")
        assert self._meaning is not None
        places = sorted(self._seen)
        steps = [self._steps[place] for place in places]
        rows, positions = self._selection
        features = pd.concat([self._feature_table(place) for place in places], ignore_index=True)
        contexts = pd.concat([self._context_table(place) for place in places], ignore_index=True)
        tops = [self._seen[place].top for place in places]
        tokens = rows.tokens[positions[:, 0], positions[:, 1]]
        into = None if self.kept is None else self.kept.into
        turnover = turnover_series(tops, tokens, np.random.default_rng([self.seed, 1]), REPLICATES, into)
        where = _index(features, places)
        features["turnover"] = turnover.pop("by_feature")[where]
        null = NullChain.of(self._track) if self.kept is None else NullChain(None, None)
        meaning = self._meaning.tables(steps, null, self.kept)
        scores = meaning.pop("meaning").drop(columns=["step", "feature"])
        scores = scores.iloc[np.ravel_multi_index(where, (len(places), len(tops[0])))]
        features = pd.concat([features, scores.reset_index(drop=True)], axis=1)
        # a null chain's snapshots share one LLM step and are told apart by their place, as in drift
        features = (
            features.rename(columns={"place": "position"}) if share_a_step(steps) else features.drop(columns="place")
        )
        untrained = random_classes(self._track) if self.kept is None else None
        by_step = self._step_table(places, turnover)
        examples = self._draw_examples(features)
        settings = {
            **self.settings,
            "thresholds": asdict(self.thresholds),
            "rows_read": self._rows_read,
            "null_draws": NULL_DRAWS,
            "example_features": examples,
            "false_concept_share": self._meaning.false_concepts,
            "class_shares_random_llm": None if untrained is None else untrained.to_dict(),
        }
        return AnalysisResult(
            tables={"features": features, "contexts": contexts, "steps": by_step, **meaning},
            figures={
                "semantics": semantics_figures.curves(by_step),
                "classes": semantics_figures.class_shares(
                    meaning["classes"], steps, self._meaning.false_concepts, untrained
                ),
                "examples": semantics_figures.examples(features, steps, examples, self.seed),
            },
            scalars={
                name: {int(s): float(v) for s, v in zip(steps, by_step[name], strict=True) if np.isfinite(v)}
                for name in ("firing_features", "n_eff_median", "top_token_share_median", "turnover")
            },
            settings=settings,
            summary=_summary(by_step) + self._class_summary(meaning["classes"]),
            captions=semantics_figures.CAPTIONS,
        )

    def _class_summary(self, classes: pd.DataFrame) -> str:
        assert self._meaning is not None
        last = classes.tail(classes["class"].nunique())
        if not last["features"].sum():
            return ""
        shares = ", ".join(
            f"{row.share:.0%} {kind}" for kind, row in zip(last["class"], last.itertuples(), strict=True)
        )
        false = self._meaning.false_concepts
        return f" In the end {shares}; with the text permuted {false:.1%} would be called a concept."

    def _windows(self, selection: SplitObservation, top: Integers) -> Floats:
        """Activations of the feature around its top positions ``[N, w]``; NaN beyond the row and at BOS."""
        feature, rank = np.nonzero(top >= 0)
        row, column = selection.positions[top[feature, rank]].T
        index = np.full(selection.rows.tokens.shape, -1, dtype=np.int64)  # [R, T]
        index[selection.positions[:, 0], selection.positions[:, 1]] = np.arange(len(selection.positions))
        columns = column[:, None] + np.arange(-self.left, self.right + 1)  # [N, w]
        width = selection.rows.tokens.shape[1]
        inside = (columns >= 0) & (columns < width)
        position = np.where(inside, index[row[:, None], columns.clip(0, width - 1)], -1)
        values = values_at(selection.latents, position, feature[:, None])
        return np.where(position >= 0, values, np.float32(np.nan))

    def _feature_table(self, place: int) -> pd.DataFrame:
        seen, statistics, strings = self._seen[place], self._seen[place].statistics, self._strings
        feature = np.flatnonzero((statistics.firing_positions > 0) & self._counts(place))
        return pd.DataFrame(
            {
                "place": place,
                "step": self._steps[place],
                "feature": feature,
                "firing_positions": statistics.firing_positions[feature],
                "max_activation": seen.values[feature, 0],
                "n_eff": 2.0 ** statistics.entropy[feature],
                "n_eff_chao_shen": 2.0 ** statistics.entropy_chao_shen[feature],
                "n_eff_shuffled": 2.0 ** seen.shuffled_entropy[feature],
                "top_token_id": statistics.top_token[feature],
                "top_token": strings[statistics.top_token[feature]],
                "top_token_share": statistics.top_token_share[feature],
                "top_token_share_evaluation": seen.evaluation_share[feature],
            }
        )

    def _context_table(self, place: int) -> pd.DataFrame:
        assert self._selection is not None
        rows, positions = self._selection
        seen, strings = self._seen[place], self._strings
        feature, rank = np.nonzero(seen.top >= 0)
        counts = self._counts(place)[feature]
        windows = seen.windows[counts]
        feature, rank = feature[counts], rank[counts]
        row, column = positions[seen.top[feature, rank]].T
        columns = column[:, None] + np.arange(-self.left, self.right + 1)
        width = rows.tokens.shape[1]
        tokens = strings[rows.tokens[row[:, None], columns.clip(0, width - 1)]]  # [N, w]
        first = np.maximum(self.left - column, 0)
        end = np.minimum(width - column + self.left, columns.shape[1])
        return pd.DataFrame(
            {
                "step": self._steps[place],
                "feature": feature,
                "rank": rank,
                "document": rows.documents[row, column],
                "row": row,
                "column": column,
                "token": tokens[:, self.left],
                "activation": seen.values[feature, rank],
                "tokens": [t[a:b] for t, a, b in zip(tokens, first, end, strict=True)],
                "activations": [v[a:b] for v, a, b in zip(windows, first, end, strict=True)],
                "center": self.left - first,
            }
        )

    def _step_table(self, places: list[int], turnovers: dict[str, Any]) -> pd.DataFrame:
        seen = [self._seen[place] for place in places]
        counts = np.stack([self._counts(place) for place in places])  # [T, F]
        fires = np.stack([s.statistics.firing_positions > 0 for s in seen])
        columns: dict[str, Any] = {
            "step": [self._steps[place] for place in places],
            "firing_features": (fires & counts).sum(axis=1),
        }
        series = {
            "n_eff": np.stack([2.0**s.statistics.entropy for s in seen]),
            "n_eff_chao_shen": np.stack([2.0**s.statistics.entropy_chao_shen for s in seen]),
            "n_eff_shuffled": np.stack([2.0**s.shuffled_entropy for s in seen]),
            "top_token_share": np.stack([s.statistics.top_token_share for s in seen]),
            "top_token_share_evaluation": np.stack([s.evaluation_share for s in seen]),
        }
        for name, every in series.items():  # [T, F]
            values = np.where(counts, every, np.nan)
            quartiles = [
                np.quantile(v[np.isfinite(v)], [0.25, 0.5, 0.75]) if np.isfinite(v).any() else np.full(3, np.nan)
                for v in values
            ]
            for place, suffix in enumerate(("low", "median", "high")):
                columns[f"{name}_{suffix}"] = [q[place] for q in quartiles]
        entropy = np.where(counts, np.stack([s.statistics.entropy for s in seen]), np.nan)
        rng = np.random.default_rng([self.seed, 2])
        for suffix, values in zip(("", "_low", "_high"), bootstrap_means(entropy, rng, REPLICATES), strict=True):
            columns[f"entropy_mean{suffix}"] = values
        return pd.DataFrame({**columns, **turnovers})

    def _counts(self, place: int) -> NDArray[np.bool_]:
        """Which features count at a snapshot ``[F]``: all, or those that kept their identity."""
        if self.kept is None:
            return np.ones(len(self._seen[place].top), dtype=bool)
        counts: NDArray[np.bool_] = self.kept.at[place]
        return counts

    def _draw_examples(self, features: pd.DataFrame) -> list[int]:
        last = features[(features["step"] == self._track[-1].step) & (features["firing_positions"] >= MIN_FIRINGS)]
        rng = np.random.default_rng([self.seed, 3])
        drawn = rng.choice(last["feature"].to_numpy(), size=min(self.examples, len(last)), replace=False)
        return [int(feature) for feature in np.sort(drawn)]


def _index(features: pd.DataFrame, places: list[int]) -> tuple[Integers, Integers]:
    return np.searchsorted(places, features["place"].to_numpy()), features["feature"].to_numpy()


def _summary(table: pd.DataFrame) -> str:
    first, last, names = table.iloc[0], table.iloc[-1], place_names(table["step"].tolist())
    text = (
        f"The median feature that fires spreads its activation over N_eff {first['n_eff_median']:.1f} tokens at "
        f"{names[0]} and {last['n_eff_median']:.1f} at {names[-1]} (tokens shuffled: "
        f"{last['n_eff_shuffled_median']:.1f}), where {int(last['firing_features'])} features fire."
    )
    if len(table) > 1:
        second = table.iloc[1]
        text += (
            f" Mean turnover of top contexts, over features that fire at both ends, is {second['turnover']:.2f} into "
            f"{names[1]} and {last['turnover']:.2f} (95 % interval {last['turnover_low']:.2f} to "
            f"{last['turnover_high']:.2f}) into {names[-1]}; with the same tokens in random contexts it would be "
            f"{last['turnover_same_tokens']:.2f}."
        )
    return text
