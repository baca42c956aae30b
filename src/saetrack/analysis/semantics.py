"""What every feature responds to at every LLM checkpoint: its top contexts, its tokens, and how fast they change.

Memory between checkpoints, for T checkpoints, F features, k contexts and windows of w tokens:
``T * F * k * (12 + 4 w)`` bytes. The table of contexts that `finish` builds takes about ``T * F * k * (400 + 12 w)``
bytes more while it is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from . import semantics_figures
from .base import AnalysisResult, Observation, Probe, SweepAnalysis
from .columns import TokenStatistics, token_share, token_statistics, top_positions, values_at
from .resampling import bootstrap_means

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from saetrack.lm.tokens import TokenRows
    from saetrack.track import Snapshot, Track

    from .base import SplitObservation

    Floats = NDArray[np.floating]
    Integers = NDArray[np.integer]

NULL_DRAWS = 10
MIN_FIRINGS = 25  # below this a token distribution says little (METHOD: "insufficient"); only for the examples drawn


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

    Turnover between a checkpoint and the one before it in LLM steps is ``1 - Jaccard`` of a feature's two sets of top
    positions, over features that fire at both; the interval is a bootstrap over features. It has two nulls, each the
    mean over features of 10 seeded draws. *Other feature*: the set after is that of another feature drawn at random
    (what turnover would be if indices had no meaning). *Same tokens*: the set after is drawn at random among positions
    with the same tokens as the set before (a feature that keeps its tokens but has no preference among contexts).

    Args:
        selection_rows: Token rows of the selection split; all there are, if fewer.
        evaluation_rows: Token rows of the evaluation split, for the top token's share.
        contexts: Top contexts kept for each feature and checkpoint.
        left: Tokens shown before the position.
        right: Tokens shown after it.
        examples: Features in the figure of examples, drawn at random among those that fire at 25 positions or more
            at the last snapshot.
        bootstrap: Bootstrap replicates.
        seed: Of the nulls, the bootstrap and the draw of examples.
    """

    def __init__(
        self,
        selection_rows: int = 256,
        evaluation_rows: int = 256,
        contexts: int = 8,
        left: int = 10,
        right: int = 5,
        examples: int = 12,
        bootstrap: int = 500,
        seed: int = 0,
    ) -> None:
        self.settings = {
            "selection_rows": selection_rows,
            "evaluation_rows": evaluation_rows,
            "contexts": contexts,
            "left": left,
            "right": right,
            "examples": examples,
            "bootstrap": bootstrap,
            "seed": seed,
        }
        for name in ("selection_rows", "evaluation_rows", "contexts", "bootstrap"):
            if self.settings[name] < 1:
                raise ValueError(f"{name} is {self.settings[name]}; expected 1 or more.")
        for name in ("left", "right", "examples", "seed"):
            if self.settings[name] < 0:
                raise ValueError(f"{name} is {self.settings[name]}; expected 0 or more.")
        self.selection_rows, self.evaluation_rows = selection_rows, evaluation_rows
        self.contexts, self.left, self.right = contexts, left, right
        self.examples, self.bootstrap, self.seed = examples, bootstrap, seed

    def begin(self, track: Track) -> Probe:
        """Forget what was seen; ask for the rows."""
        self._track = track
        self._seen: dict[int, _Seen] = {}
        self._selection: tuple[TokenRows, Integers] | None = None
        return Probe(self.selection_rows, self.evaluation_rows)

    def observe(self, snapshot: Snapshot, observation: Observation) -> None:
        """Reduce one checkpoint to statistics by feature, top positions and the activations around them."""
        selection, evaluation = observation.selection, observation.evaluation
        assert selection is not None  # begin asked for both; the type checker cannot know
        assert evaluation is not None
        self._selection = (selection.rows, selection.positions)
        self._rows_read = {"selection": len(selection.rows.tokens), "evaluation": len(evaluation.rows.tokens)}
        statistics = token_statistics(selection.latents, selection.tokens)
        shuffled = np.random.default_rng([self.seed, 0]).permutation(selection.tokens)
        top, values = top_positions(selection.latents, selection.documents, self.contexts)
        self._seen[snapshot.step] = _Seen(
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
        steps = sorted(self._seen)
        rows, positions = self._selection
        strings = _token_strings(self._track.tokenizer(), np.unique(rows.tokens))
        features = pd.concat([self._feature_table(step, strings) for step in steps], ignore_index=True)
        contexts = pd.concat([self._context_table(step, strings) for step in steps], ignore_index=True)
        turnover = self._turnovers(steps, rows.tokens[positions[:, 0], positions[:, 1]])
        features["turnover"] = turnover.pop("by_feature")[_index(features, steps)]
        by_step = self._step_table(steps, turnover)
        examples = self._draw_examples(features)
        settings = {
            **self.settings,
            "rows_read": self._rows_read,
            "null_draws": NULL_DRAWS,
            "example_features": examples,
        }
        return AnalysisResult(
            tables={"features": features, "contexts": contexts, "steps": by_step},
            figures={
                "semantics": semantics_figures.curves(by_step),
                "examples": semantics_figures.examples(features, steps, examples, self.seed),
            },
            scalars={
                name: {int(s): float(v) for s, v in zip(steps, by_step[name], strict=True) if np.isfinite(v)}
                for name in ("firing_features", "n_eff_median", "top_token_share_median", "turnover")
            },
            settings=settings,
            summary=_summary(by_step),
        )

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

    def _feature_table(self, step: int, strings: NDArray[np.object_]) -> pd.DataFrame:
        seen, statistics = self._seen[step], self._seen[step].statistics
        feature = np.flatnonzero(statistics.firing_positions)
        return pd.DataFrame(
            {
                "step": step,
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

    def _context_table(self, step: int, strings: NDArray[np.object_]) -> pd.DataFrame:
        assert self._selection is not None
        rows, positions = self._selection
        seen = self._seen[step]
        feature, rank = np.nonzero(seen.top >= 0)
        row, column = positions[seen.top[feature, rank]].T
        columns = column[:, None] + np.arange(-self.left, self.right + 1)
        width = rows.tokens.shape[1]
        tokens = strings[rows.tokens[row[:, None], columns.clip(0, width - 1)]]  # [N, w]
        first = np.maximum(self.left - column, 0)
        end = np.minimum(width - column + self.left, columns.shape[1])
        return pd.DataFrame(
            {
                "step": step,
                "feature": feature,
                "rank": rank,
                "document": rows.documents[row, column],
                "row": row,
                "column": column,
                "token": tokens[:, self.left],
                "activation": seen.values[feature, rank],
                "tokens": [t[a:b] for t, a, b in zip(tokens, first, end, strict=True)],
                "activations": [v[a:b] for v, a, b in zip(seen.windows, first, end, strict=True)],
                "center": self.left - first,
            }
        )

    def _turnovers(self, steps: list[int], tokens: Integers) -> dict[str, Any]:
        """Turnover into each step with its interval and nulls, arrays ``[T]``, and by feature ``[T, F]``."""
        rng = np.random.default_rng([self.seed, 1])
        tops = [self._seen[step].top for step in steps]
        by_feature = np.full((len(steps), len(tops[0])), np.nan)
        nulls = {name: np.full((len(steps), NULL_DRAWS), np.nan) for name in ("other_feature", "same_tokens")}
        for t in range(1, len(steps)):
            by_feature[t] = turnover(tops[t - 1], tops[t])
            both = np.flatnonzero(np.isfinite(by_feature[t]))
            if len(both) < 2:
                continue
            before, after = tops[t - 1][both], tops[t][both]
            for draw in range(NULL_DRAWS):
                shift = rng.integers(1, len(both))
                order = rng.permutation(len(both))
                other = after[order][np.roll(np.arange(len(both)), shift)][
                    np.argsort(order)
                ]  # never the feature itself
                nulls["other_feature"][t, draw] = turnover(before, other).mean()
                nulls["same_tokens"][t, draw] = turnover(before, same_tokens(before, tokens, rng)).mean()
        mean, low, high = bootstrap_means(by_feature, rng, self.bootstrap)
        return {
            "by_feature": by_feature,
            "turnover": mean,
            "turnover_low": low,
            "turnover_high": high,
            "features_compared": np.isfinite(by_feature).sum(axis=1),
            **{f"turnover_{name}": draws.mean(axis=1) for name, draws in nulls.items()},
        }

    def _step_table(self, steps: list[int], turnovers: dict[str, Any]) -> pd.DataFrame:
        seen = [self._seen[step] for step in steps]
        columns: dict[str, Any] = {
            "step": steps,
            "firing_features": [int((s.statistics.firing_positions > 0).sum()) for s in seen],
        }
        series = {
            "n_eff": np.stack([2.0**s.statistics.entropy for s in seen]),
            "n_eff_chao_shen": np.stack([2.0**s.statistics.entropy_chao_shen for s in seen]),
            "n_eff_shuffled": np.stack([2.0**s.shuffled_entropy for s in seen]),
            "top_token_share": np.stack([s.statistics.top_token_share for s in seen]),
            "top_token_share_evaluation": np.stack([s.evaluation_share for s in seen]),
        }
        for name, values in series.items():  # [T, F]
            quartiles = [
                np.quantile(v[np.isfinite(v)], [0.25, 0.5, 0.75]) if np.isfinite(v).any() else np.full(3, np.nan)
                for v in values
            ]
            for place, suffix in enumerate(("low", "median", "high")):
                columns[f"{name}_{suffix}"] = [q[place] for q in quartiles]
        entropy = np.stack([s.statistics.entropy for s in seen])
        rng = np.random.default_rng([self.seed, 2])
        for suffix, values in zip(("", "_low", "_high"), bootstrap_means(entropy, rng, self.bootstrap), strict=True):
            columns[f"entropy_mean{suffix}"] = values
        return pd.DataFrame({**columns, **turnovers})

    def _draw_examples(self, features: pd.DataFrame) -> list[int]:
        last = features[(features["step"] == self._track[-1].step) & (features["firing_positions"] >= MIN_FIRINGS)]
        rng = np.random.default_rng([self.seed, 3])
        drawn = rng.choice(last["feature"].to_numpy(), size=min(self.examples, len(last)), replace=False)
        return [int(feature) for feature in np.sort(drawn)]


def turnover(before: Integers, after: Integers) -> Floats:
    """``1 - Jaccard`` of two sets of positions, for every feature.

    Args:
        before: ``[F, k]``, distinct positions in each row; -1 for none.
        after: ``[F, k]``, likewise.

    Returns:
        ``[F]``; NaN where either set is empty.

    Example:
        >>> turnover(np.array([[3, 5], [4, -1]]), np.array([[5, 9], [-1, -1]])).tolist()
        [0.6666666666666667, nan]
    """
    sizes = [(part >= 0).sum(axis=1) for part in (before, after)]
    merged = np.sort(np.hstack([before, np.where(after >= 0, after, -2)]), axis=1)
    shared = ((merged[:, 1:] == merged[:, :-1]) & (merged[:, 1:] >= 0)).sum(axis=1)
    known = (sizes[0] > 0) & (sizes[1] > 0)
    union = np.where(known, sizes[0] + sizes[1] - shared, 1)
    result: Floats = np.where(known, 1 - shared / union, np.nan)
    return result


def same_tokens(positions: Integers, tokens: Integers, rng: np.random.Generator) -> Integers:
    """Random sets of positions with the same tokens: for each feature, as many positions of each token, all distinct.

    Args:
        positions: ``[F, k]``; -1 for none.
        tokens: Token at every position, ``[P]``.
        rng: Source of the draw.

    Returns:
        ``[F, k]``; -1 for none.
    """
    shuffled = rng.permutation(len(tokens))
    by_token = shuffled[np.argsort(tokens[shuffled], kind="stable")]  # positions by token, in random order within each
    ordered = np.sort(np.where(positions >= 0, tokens[positions], -1), axis=1)  # [F, k]
    starts = np.searchsorted(tokens[by_token], ordered)
    counts = np.searchsorted(tokens[by_token], ordered, side="right") - starts
    place = np.broadcast_to(np.arange(ordered.shape[1]), ordered.shape)
    begins = np.ones(ordered.shape, dtype=bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    rank = place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)  # among equal tokens of the feature
    offset = (rng.random((len(ordered), 1)) * counts).astype(np.int64)
    drawn = by_token[np.minimum(starts + (offset + rank) % np.maximum(counts, 1), len(tokens) - 1)]
    result: Integers = np.where(ordered >= 0, drawn, -1)
    return result


def _token_strings(tokenizer: Any, ids: Integers) -> NDArray[np.object_]:
    """Text of the token ids in ``ids``, at their own index; spaces as spaces, broken UTF-8 as the raw token."""
    strings = np.full(int(ids.max()) + 1, "", dtype=object)
    raws = tokenizer.convert_ids_to_tokens([int(i) for i in ids])
    for i, raw in zip(ids, raws, strict=True):
        text = tokenizer.decode([int(i)], clean_up_tokenization_spaces=False)
        # SentencePiece marks a space with U+2581 and drops it when it decodes a single token
        text = f" {text}" if str(raw).startswith("\u2581") and not text.startswith(" ") else text
        strings[i] = str(raw) if not text or "\ufffd" in text else text
    return strings


def _index(features: pd.DataFrame, steps: list[int]) -> tuple[Integers, Integers]:
    return np.searchsorted(steps, features["step"].to_numpy()), features["feature"].to_numpy()


def _summary(table: pd.DataFrame) -> str:
    first, last = table.iloc[0], table.iloc[-1]
    text = (
        f"The median feature spreads its activation over N_eff {first['n_eff_median']:.1f} tokens at step "
        f"{int(first['step'])} and {last['n_eff_median']:.1f} at step {int(last['step'])} (tokens shuffled: "
        f"{last['n_eff_shuffled_median']:.1f}), where {int(last['firing_features'])} features fire."
    )
    if len(table) > 1:
        second = table.iloc[1]
        text += (
            f" Mean turnover of top contexts is {second['turnover']:.2f} into step {int(second['step'])} and "
            f"{last['turnover']:.2f} (95 % interval {last['turnover_low']:.2f} to {last['turnover_high']:.2f}) into "
            f"step {int(last['step'])}; with the same tokens in random contexts it would be "
            f"{last['turnover_same_tokens']:.2f}."
        )
    return text
