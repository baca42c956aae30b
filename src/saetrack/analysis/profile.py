"""What a feature looks like at every LLM checkpoint: its activations, the tokens it writes, and the features beside it.

Memory between checkpoints, for T checkpoints, F features, n tokens at either end and m neighbours:
``T * F * (4 * BINS + 16 * n + 8 * m)`` bytes. While one checkpoint is read, ``256 * vocabulary`` logits and
``1024 * F`` cosines are held beside its observation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import normalize

from .base import AnalysisResult, Observation, Probe, SweepAnalysis
from .token_text import token_strings

if TYPE_CHECKING:
    import scipy.sparse
    from numpy.typing import NDArray

    from saetrack.track import Snapshot, Track

    Floats = NDArray[np.floating]
    Integers = NDArray[np.integer]

BIN_EDGES: Floats = 2.0 ** (np.arange(-24, 25) / 4)
"""Edges of the histogram's bins, four to an octave, in units in which the activations' mean norm is sqrt(d_in)."""


@dataclass(frozen=True)
class _Seen:
    """What is kept of one checkpoint; tokens and effects are None where there is no logit effect."""

    counts: Integers  # [F, bins]
    nearest: Integers  # [F, m]
    cosines: Floats  # [F, m]
    tokens: Integers | None  # [F, 2 n]: raised most, then lowered most
    effects: Floats | None  # [F, 2 n]


class Profile(SweepAnalysis):
    """What a feature looks like: histogram of activations, tokens it raises and lowers, nearest features.

    * Histogram: positions of the selection rows by activation, in quarter octaves. Activations are multiplied by the
      snapshot's scale, so that one axis serves all checkpoints.
    * Logit effect: decoder row through the unembedding (with the final norm's gain), minus its mean over the
      vocabulary; up to the division by the residual stream's size. It is the direct path only: what later layers do
      with the feature is not in it. Where the hookpoint is not as wide as the unembedding there is none.
    * Nearest features: largest cosines between decoder rows of the same snapshot.

    Args:
        selection_rows: Token rows of the selection split; all there are, if fewer.
        tokens: Tokens kept at either end of the logit effect.
        neighbours: Nearest features kept.
    """

    def __init__(self, selection_rows: int = 256, tokens: int = 8, neighbours: int = 6) -> None:
        for name, value in (("selection_rows", selection_rows), ("tokens", tokens), ("neighbours", neighbours)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected 1 or more.")
        self.selection_rows, self.tokens, self.neighbours = selection_rows, tokens, neighbours

    def begin(self, track: Track) -> Probe:
        """Forget what was seen; ask for the rows and the unembedding."""
        self._track = track
        self._seen: dict[int, _Seen] = {}
        self._rows_read = 0
        return Probe(selection_rows=self.selection_rows, unembedding=True)

    def observe(self, snapshot: Snapshot, observation: Observation) -> None:
        """Reduce one checkpoint to counts, extreme tokens and neighbours."""
        selection, unembedding = observation.selection, observation.unembedding
        assert selection is not None  # begin asked for both; the type checker cannot know
        assert unembedding is not None
        self._rows_read = len(selection.rows.tokens)
        decoder = snapshot.tensor("W_dec").float()  # [F, d_in]
        tokens, effects = None, None
        if decoder.shape[1] == unembedding.shape[1]:
            tokens, effects = logit_effects(decoder, unembedding, self.tokens)
        nearest, cosines = nearest_rows(decoder, self.neighbours)
        scale = float(snapshot.statistics("scale"))
        self._seen[snapshot.step] = _Seen(histogram(selection.latents, scale), nearest, cosines, tokens, effects)

    def finish(self) -> AnalysisResult:
        """Three tables, one row for each feature and checkpoint."""
        if not self._seen:
            raise RuntimeError("Profile.finish was called before observe: nothing was seen yet.")
        seen = sorted(self._seen.items())
        tables = {
            "activations": _table([(step, {"counts": s.counts}) for step, s in seen]),
            "nearest": _table([(step, {"nearest": s.nearest, "cosines": s.cosines}) for step, s in seen]),
        }
        with_logits = all(s.tokens is not None for _, s in seen)
        if with_logits:
            tables["logits"] = _table([(step, self._logit_columns(s)) for step, s in seen])
        settings: dict[str, Any] = {
            "selection_rows": self.selection_rows,
            "rows_read": self._rows_read,
            "tokens": self.tokens,
            "neighbours": self.neighbours,
            "bin_edges": BIN_EDGES.tolist(),
            "activations_are_multiplied_by": "scale of the snapshot",
            "logit_effect": with_logits,
        }
        return AnalysisResult(tables=tables, settings=settings, summary=self._summary(seen[-1], with_logits))

    def _logit_columns(self, seen: _Seen) -> dict[str, Any]:
        assert seen.tokens is not None
        assert seen.effects is not None
        strings = token_strings(self._track.tokenizer(), np.unique(seen.tokens))
        n = seen.tokens.shape[1] // 2
        return {
            "raised": strings[seen.tokens[:, :n]],
            "raised_by": seen.effects[:, :n],
            "lowered": strings[seen.tokens[:, n:]],
            "lowered_by": seen.effects[:, n:],
        }

    def _summary(self, last: tuple[int, _Seen], with_logits: bool) -> str:
        step, seen = last
        without = "" if with_logits else " The hookpoint is not as wide as the unembedding: there is no logit effect."
        return (
            f"{len(seen.counts)} features at {len(self._seen)} LLM checkpoints; at step {step} the median cosine of a "
            f"decoder row with its nearest is {np.nanmedian(seen.cosines[:, 0]):.2f}.{without}"
        )


def histogram(latents: scipy.sparse.csr_array, scale: float) -> Integers:
    """Number of positions in each bin of activation, for every feature.

    Args:
        latents: ``[P, d_sae]``, entries positive.
        scale: What brings them to the units of ``BIN_EDGES``.

    Returns:
        ``[d_sae, bins]`` int32. What lies beyond the first or last edge is in the first or last bin.
    """
    bins = len(BIN_EDGES) - 1
    place = np.clip(np.searchsorted(BIN_EDGES, latents.data * scale, side="right") - 1, 0, bins - 1)
    flat = np.bincount(latents.indices.astype(np.int64) * bins + place, minlength=latents.shape[1] * bins)
    return flat.reshape(latents.shape[1], bins).astype(np.int32)


@torch.inference_mode()
def logit_effects(decoder: torch.Tensor, unembedding: torch.Tensor, count: int) -> tuple[Integers, Floats]:
    """The tokens whose logits each decoder row raises and lowers most.

    Args:
        decoder: ``[F, d_model]``.
        unembedding: ``[vocabulary, d_model]``.
        count: Tokens wanted at either end; all of the vocabulary, if it has fewer.

    Returns:
        Token ids ``[F, 2 * count]``, raised most first, then lowered most, and their effects, minus the mean over
        the vocabulary.
    """
    count = min(count, len(unembedding))
    tokens, effects = [], []
    for start in range(0, len(decoder), 256):
        logits = decoder[start : start + 256].to(unembedding.device) @ unembedding.T  # [256, V]
        logits -= logits.mean(dim=1, keepdim=True)
        raised, lowered = logits.topk(count), logits.topk(count, largest=False)
        tokens.append(torch.cat([raised.indices, lowered.indices], dim=1).cpu())
        effects.append(torch.cat([raised.values, lowered.values], dim=1).cpu())
    return torch.cat(tokens).numpy(), torch.cat(effects).numpy()


@torch.inference_mode()
def nearest_rows(matrix: torch.Tensor, count: int) -> tuple[Integers, Floats]:
    """For every row the others with the largest cosine.

    Args:
        matrix: ``[F, d]``.
        count: Neighbours wanted; all others, if there are fewer.

    Returns:
        Indices ``[F, count]`` and cosines, in descending order.

    Example:
        >>> nearest_rows(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.1]]), 1)[0].tolist()
        [[2], [2], [1]]
    """
    unit = normalize(matrix, dim=1)
    count = min(count, len(matrix) - 1)
    indices, cosines = [], []
    for start in range(0, len(unit), 1024):
        product = unit[start : start + 1024] @ unit.T
        rows = torch.arange(len(product))
        product[rows, start + rows] = -torch.inf
        best = product.topk(count)
        indices.append(best.indices)
        cosines.append(best.values)
    return torch.cat(indices).numpy(), torch.cat(cosines).numpy()


def _table(parts: list[tuple[int, dict[str, Any]]]) -> pd.DataFrame:
    """One row per (step, feature) from arrays ``[F, n]`` by column, each row of an array becoming a list."""
    frames = []
    for step, columns in parts:
        lists = {name: list(values) for name, values in columns.items()}
        features = len(next(iter(lists.values())))
        frames.append(pd.DataFrame({"step": step, "feature": np.arange(features), **lists}))
    return pd.concat(frames, ignore_index=True)
