"""Text for the report: the rows that contexts point into, and for every feature the contexts, tokens and neighbours.

A context is a place in a row; the rows travel once. The activations around it are bytes, 254 for the strongest of the
feature at that checkpoint, 255 where there is no position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saetrack.analysis.token_text import token_strings

from .data import Results
from .pack import smallest_unsigned

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from saetrack.track import Track

    Floats = NDArray[np.floating]
    Integers = NDArray[np.integer]

NONE = np.uint16(0xFFFF)
"""No context at this rank."""


_CONTEXT = ["step", "feature", "rank", "row", "column", "center", "activation"]


class Vocabulary:
    """Texts by number, each once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def numbers(self, texts: NDArray[Any]) -> Integers:
        """A number for each text, of the same shape."""
        codes, unique = pd.factorize(texts.ravel())
        numbers = np.array(
            [self._numbers.setdefault(str(text), len(self._numbers)) for text in unique], dtype=np.uint32
        )
        return numbers[codes].reshape(texts.shape)

    @property
    def texts(self) -> list[str]:
        """All texts, in the order of their numbers."""
        return list(self._numbers)


@dataclass
class Text:
    """What the page needs to show text.

    Args:
        rows: ``[R, T]`` numbers of the vocabulary.
        documents: ``[R, T]``, numbered from 0.
        contexts: Arrays ``[d_sae, steps, ...]`` by name; empty where semantics has not been run.
        left: Tokens that a context holds before its position.
        words: For every feature the distinct tokens of its contexts: ``[d_sae + 1]`` offsets into ...
        word_numbers: ... these numbers of the vocabulary.
        labels: ``[d_sae, 3]`` the commonest tokens of its contexts at the last step at which it fires; plus 1, so that
            0 is none.
    """

    rows: Integers
    documents: Integers
    contexts: dict[str, NDArray[Any]]
    left: int
    words: Integers
    word_numbers: Integers
    labels: Integers


def read_text(results: Results, vocabulary: Vocabulary) -> Text | None:
    """Rows, contexts, search words and labels, or None when semantics has not been run.

    Args:
        results: The track's analyses.
        vocabulary: Takes in every token.
    """
    path = results.track.analyses_dir / "semantics" / "contexts.parquet"
    # as Arrow: as Python objects the lists of a million contexts would take gigabytes
    lists = pq.read_table(path, columns=["activations"])["activations"].combine_chunks() if path.is_file() else ()
    if not len(lists):
        return None
    table = pq.read_table(path, columns=_CONTEXT).to_pandas()
    rows = results.track.tokens("selection")
    used = int(table["row"].max()) + 1
    ids = np.asarray(rows.tokens[:used], dtype=np.int64)
    strings = token_strings(_tokenizer(results.track), np.unique(ids))
    numbers = vocabulary.numbers(strings[ids])
    documents = np.unique(rows.documents[:used], return_inverse=True)[1].reshape(ids.shape)
    contexts, left = _contexts(results, table, lists)
    centres = _centres(contexts, numbers)
    words, word_numbers = _words(centres)
    return Text(
        smallest_unsigned(numbers), smallest_unsigned(documents), contexts, left, words, word_numbers, _labels(centres)
    )


def _tokenizer(track: Track) -> Any:
    try:
        return track.tokenizer()
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"The tokenizer of {track.path} is not at {track.facts['tokenizer'][0]}, but the report needs it. "
            "Run the command from the folder in which the track was made, or correct `tokenizer` in its track.json."
        ) from error


def _contexts(results: Results, table: pd.DataFrame, lists: Any) -> tuple[dict[str, NDArray[Any]], int]:
    place, known = results.places(table["step"].to_numpy())
    table, place = table[known], place[known]
    lists = lists.filter(pa.array(known))
    feature, rank = table["feature"].to_numpy(), table["rank"].to_numpy()
    lengths = pc.list_value_length(lists).to_numpy()
    centre = table["center"].to_numpy()
    left = int(centre.max())
    width = left + int((lengths - centre).max())
    shape = (results.d_sae, len(results.steps), int(rank.max()) + 1)
    row, column = np.full(shape, NONE), np.full(shape, NONE)
    activation = np.zeros(shape, dtype=np.float32)
    row[feature, place, rank], column[feature, place, rank] = table["row"], table["column"]
    activation[feature, place, rank] = table["activation"]
    strongest = activation.max(axis=2)[feature, place]
    values = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    which = np.repeat(np.arange(len(table)), lengths)
    within = np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    shade = np.full((len(table), width), 255, dtype=np.uint8)
    level = np.ceil(254 * values / strongest[which])  # up, so that a weak activation is not nothing
    shade[which, within + (left - centre)[which]] = np.where(np.isfinite(level), level.clip(0, 254), 255)
    shades = np.full((*shape, width), 255, dtype=np.uint8)
    shades[feature, place, rank] = shade
    return {
        "context.row": row,
        "context.column": column,
        "context.activation": activation,
        "context.shades": shades,
    }, left


def _centres(contexts: dict[str, NDArray[Any]], numbers: Integers) -> NDArray[np.int64]:
    """Token at the position of every context ``[d_sae, steps, ranks]``; -1 where there is none."""
    row, column = contexts["context.row"], contexts["context.column"]
    there = row != NONE
    return np.where(there, numbers[np.where(there, row, 0), np.where(there, column, 0)].astype(np.int64), -1)


def _words(centres: NDArray[np.int64]) -> tuple[Integers, Integers]:
    flat = centres.reshape(len(centres), -1)
    feature = np.repeat(np.arange(len(flat)), flat.shape[1])
    pairs = np.unique(np.stack([feature, flat.ravel()], axis=1)[flat.ravel() >= 0], axis=0)
    offsets = np.searchsorted(pairs[:, 0], np.arange(len(flat) + 1))
    return offsets.astype(np.uint32), pairs[:, 1].astype(np.uint32)


def _labels(centres: NDArray[np.int64], count: int = 3) -> Integers:
    labels = np.zeros((len(centres), count), dtype=np.uint32)
    for feature, by_step in enumerate(centres):
        fires = np.flatnonzero((by_step >= 0).any(axis=1))
        if len(fires):
            last = by_step[fires[-1]]
            tokens, first, times = np.unique(last[last >= 0], return_index=True, return_counts=True)
            best = np.lexsort((first, -times))[:count]
            labels[feature, : len(best)] = tokens[best] + 1
    return labels


def looks(results: Results, vocabulary: Vocabulary) -> dict[str, NDArray[Any]]:
    """Histogram, logit effect and nearest features, arrays ``[d_sae, steps, n]`` by name, those that are there.

    Args:
        results: The track's analyses.
        vocabulary: Takes in the tokens of the logit effect.
    """
    found: dict[str, NDArray[Any]] = {}
    counts = results.arrays("profile", "activations", "counts")
    if counts is not None:
        found["histogram"] = smallest_unsigned(counts)
    for side in ("raised", "lowered"):
        tokens, effects = (results.arrays("profile", "logits", name) for name in (side, f"{side}_by"))
        if tokens is not None and effects is not None:
            found[f"logits.{side}"] = smallest_unsigned(vocabulary.numbers(tokens))
            found[f"logits.{side}_by"] = effects.astype(np.float32)
    nearest, cosines = (results.arrays("profile", "nearest", name) for name in ("nearest", "cosines"))
    if nearest is not None and cosines is not None:
        found["nearest"] = nearest.astype(np.int32)
        found["nearest.cosines"] = cosines.astype(np.float32)
    return found
