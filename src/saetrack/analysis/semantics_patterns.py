"""How features change class: transition matrices, and the patterns of change to the end of the series."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse

from .controls import controls_of, null_chains
from .resampling import share_interval
from .semantics_classes import CLASSES, CONCEPT, INSUFFICIENT, SILENT, TOKEN, UNRESOLVED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from saetrack.track import Track

    Floats = NDArray[np.floating]
    Integers = NDArray[np.integer]
    Bools = NDArray[np.bool_]

PATTERNS = ("maintaining", "shifting", "grouping", "splitting", "death", "other")
NULL_SHARE = ("null_share", "null_low", "null_high")
SAME, OTHER = 0.5, 0.2  # overlap of families: from here it keeps its meaning, below there it has another
SPLIT_TAKEN, SPLIT_NEW, SPLIT_DENSE = 0.25, 0.1, 0.05


def overlap(families: Integers, shares: Floats, families_after: Integers, shares_after: Floats) -> Floats:
    """Weighted Jaccard of a feature's top families at two checkpoints, ``sum_v min(p, q) / sum_v max(p, q)``.

    Args:
        families: ``[F, k]``, distinct in a row, -1 for none.
        shares: ``[F, k]``, 0 for none.
        families_after: ``[F, k]``.
        shares_after: ``[F, k]``.

    Returns:
        ``[F]``; 0 for a feature that is silent at either.
    """
    equal = (families[:, :, None] == families_after[:, None, :]) & (families >= 0)[:, :, None]
    least = (np.minimum(shares[:, :, None], shares_after[:, None, :]) * equal).sum(axis=(1, 2))
    most = shares.sum(axis=1) + shares_after.sum(axis=1) - least
    shared: Floats = np.divide(least, most, out=np.zeros(len(least)), where=most > 0)
    return shared


def splits(members: Integers, before: scipy.sparse.csr_array, after: scipy.sparse.csr_array) -> Bools:
    """Whether a feature has handed a part of its positions to another feature.

    It still fires at a quarter to three quarters of them, and another feature, which fired at less than a tenth of them
    before and is not dense (5 % of all positions), now fires at a quarter or more of those that it left.

    Args:
        members: ``[F, n]``, positions at which the feature fires before, -1 for unused places.
        before: Latents ``[P, F]`` before.
        after: Latents on the same positions after.

    Returns:
        ``[F]``.
    """
    used = members >= 0
    which, place = np.nonzero(used)
    position = members[which, place]
    features = len(members)
    n = used.sum(axis=1)
    fired_before, fires = (_ones(latents) for latents in (before, after))
    keeps = np.zeros(members.shape, dtype=bool)
    if len(position):
        keeps[which, place] = np.asarray(fires[position, which]).ravel() > 0
    left = used & ~keeps
    kept = keeps.sum(axis=1) / np.maximum(n, 1)
    of_left = _incidence(left, members, fires.shape[0]) @ fires  # [F, F] sparse
    had = _incidence(used, members, fires.shape[0]) @ fired_before
    dense = np.asarray(fires.sum(axis=0)).ravel() > SPLIT_DENSE * fires.shape[0]
    taken = of_left.tocoo()
    earlier = np.asarray(had.tocsr()[taken.row, taken.col]).ravel() if taken.nnz else np.zeros(0)
    is_new = (
        (taken.data >= SPLIT_TAKEN * np.maximum(left.sum(axis=1), 1)[taken.row])
        & (earlier < SPLIT_NEW * np.maximum(n, 1)[taken.row])
        & ~dense[taken.col]
        & (taken.row != taken.col)
    )
    taker = np.bincount(taken.row[is_new], minlength=features) > 0
    split: Bools = taker & (kept >= SPLIT_TAKEN) & (kept <= 1 - SPLIT_TAKEN)
    return split


def _ones(latents: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    return scipy.sparse.csr_array((np.ones(latents.nnz), latents.indices, latents.indptr), shape=latents.shape)


def _incidence(chosen: Bools, members: Integers, positions: int) -> scipy.sparse.csr_array:
    which, place = np.nonzero(chosen)
    shape = (len(members), positions)
    return scipy.sparse.csr_array((np.ones(len(which)), (which, members[which, place])), shape=shape)


def patterns(before: NDArray[np.str_], after: NDArray[np.str_], kept: Floats, split: Bools) -> NDArray[np.str_]:
    """How each feature that has a class comes to the end of the series, the first that holds.

    ``death``: too few firings in the end. ``splitting``: see `splits`. ``maintaining``: the same class, and overlap of
    families of 0.5. ``shifting``: a token feature with another token (overlap below 0.2), or one that is a concept.
    ``grouping``: unresolved before, and not in the end. Else ``other``.

    Args:
        before: ``[F]`` classes.
        after: ``[F]`` classes at the last checkpoint.
        kept: ``[F]``, from `overlap`.
        split: ``[F]``, from `splits`.

    Returns:
        ``[F]``, one of `PATTERNS`; "" for a feature without a class before.
    """
    absent = (SILENT, INSUFFICIENT)
    rules = [
        (np.isin(before, absent), ""),
        (np.isin(after, absent), "death"),
        (split, "splitting"),
        ((before == after) & (kept >= SAME), "maintaining"),
        ((before == TOKEN) & (((after == TOKEN) & (kept < OTHER)) | (after == CONCEPT)), "shifting"),
        ((before == UNRESOLVED) & (after != UNRESOLVED), "grouping"),
    ]
    return np.select([condition for condition, _ in rules], [name for _, name in rules], "other")


def transition_table(
    steps: list[int], classes: NDArray[np.str_], null: pd.DataFrame | None = None, counts: Bools | None = None
) -> pd.DataFrame:
    """Features of each class that have each class at the next LLM checkpoint, with Wilson's 95 % interval of the share.

    Args:
        steps: LLM steps.
        classes: ``[T, F]``.
        null: The same tables of null chains, where there are some.
        counts: ``[T, F]``, which features count on entering a checkpoint; all, if not given.

    Returns:
        Columns ``step``, ``next_step``, ``from``, ``to``, ``features``, ``of``, ``share``, ``low``, ``high``, and
        ``null_share``, ``null_low``, ``null_high``: of the null chains in the stage of the same place, from the same
        class, with Wilson's interval over their features; NaN where not known.
    """
    tables = []
    for t in range(len(steps) - 1):
        use = np.ones(classes.shape[1], dtype=bool) if counts is None else counts[t + 1]
        table = pd.crosstab(classes[t, use], classes[t + 1, use])
        matrix = table.reindex(index=CLASSES, columns=CLASSES, fill_value=0).to_numpy()
        of = np.broadcast_to(matrix.sum(axis=1, keepdims=True), matrix.shape)
        share, low, high = share_interval(matrix.ravel(), of.ravel())
        names = {"from": np.repeat(CLASSES, len(CLASSES)), "to": np.tile(CLASSES, len(CLASSES))}
        cells = {"step": steps[t], "next_step": steps[t + 1], "place": t, **names, "features": matrix.ravel()}
        tables.append(pd.DataFrame(cells).assign(of=of.ravel(), share=share, low=low, high=high))
    columns = ["step", "next_step", "place", "from", "to", "features", "of", "share", "low", "high"]
    found = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)
    if null is None or found.empty:
        return found.drop(columns="place").assign(**dict.fromkeys(NULL_SHARE, np.nan))
    by = ["place", "from", "to"]
    return found.merge(_null_shares(null, by), on=by, how="left").drop(columns="place")


def _null_shares(null: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Shares in all null chains together, with Wilson's interval, by some columns."""
    sums = null.groupby(by, as_index=False)[["features", "of"]].sum()
    shares = share_interval(sums["features"].to_numpy(), sums["of"].to_numpy())
    return sums[by].assign(**dict(zip(NULL_SHARE, shares, strict=True)))


def pattern_table(steps: list[int], found: list[NDArray[np.str_]], null: pd.DataFrame | None) -> pd.DataFrame:
    """Share of each pattern from every checkpoint to the last, with Wilson's 95 % interval, and the null chain's.

    Args:
        steps: LLM steps.
        found: For every checkpoint but the last, ``[F]`` from `patterns`.
        null: The same table of a null chain, where there is one.

    Returns:
        Columns ``step``, ``remaining`` (stages to the end), ``pattern``, ``features``, ``of``, ``share``, ``low``,
        ``high``, and ``null_share``, ``null_low``, ``null_high``: of the null chains with as many stages remaining,
        with Wilson's interval over their features; NaN where it is not known.
    """
    rows = []
    for t, names in enumerate(found):
        of = int((names != "").sum())
        for name in PATTERNS:
            rows.append((steps[t], len(found) - t, name, int((names == name).sum()), of))  # noqa: PERF401
    table = pd.DataFrame(rows, columns=["step", "remaining", "pattern", "features", "of"])
    table["share"], table["low"], table["high"] = share_interval(table["features"].to_numpy(), table["of"].to_numpy())
    if null is None:
        return table.assign(**dict.fromkeys(NULL_SHARE, np.nan))
    by = ["remaining", "pattern"]
    return table.merge(_null_shares(null, by), on=by, how="left")


def random_classes(track: Track) -> pd.Series | None:
    """Share of each class in a track's random controls, mean over those that semantics was run on; None without any."""
    paths = [control.analyses_dir / "semantics" / "classes.parquet" for control in controls_of(track, "random")]
    found = [path for path in paths if path.is_file()]
    if not found:
        return None
    return pd.concat([pd.read_parquet(path) for path in found]).groupby("class")["share"].mean()


@dataclass(frozen=True)
class NullChain:
    """The tables of a track's null chains, those that semantics was run on; None where there is none."""

    patterns: pd.DataFrame | None
    transitions: pd.DataFrame | None

    @classmethod
    def of(cls, track: Track) -> NullChain:
        """Those of a track."""
        folders = [chain.analyses_dir / "semantics" for chain in null_chains(track)]
        folders = [folder for folder in folders if (folder / "result.json").is_file()]
        if not folders:
            return cls(None, None)
        transitions = [pd.read_parquet(folder / "transitions.parquet") for folder in folders]
        for table in transitions:  # all of one LLM step: the stages are told apart by their place
            table["place"] = np.arange(len(table)) // len(CLASSES) ** 2
        patterns = [pd.read_parquet(folder / "patterns.parquet") for folder in folders]
        return cls(pd.concat(patterns), pd.concat(transitions))
