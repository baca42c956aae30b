"""The nulls of identity: what training once more leaves of an index's meaning, where it was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .controls import null_steps, repeated_stages
from .drift_rows import flags
from .identity_matching import latents_of
from .lineage import correlation_between, revived_between
from .resampling import bootstrap_replicates

if TYPE_CHECKING:
    from collections.abc import Callable

    import scipy.sparse
    from numpy.typing import NDArray

    from saetrack.track import Snapshot, Track

    from .base import SplitObservation

    Floats = NDArray[np.floating]
    Correlate = Callable[[scipy.sparse.csr_array, scipy.sparse.csr_array], Floats]

CHANCE_QUANTILE = 0.99
NULL_QUANTILE = 0.05
MEASURED, BETWEEN = "null steps", "interpolated"


def stage_controls(track: Track, kind: str, least: float) -> dict[int, Floats]:
    """Functional correlations over the stage in all controls of a kind that repeat it, by position.

    Args:
        track: The track.
        kind: ``null`` or ``replica``.
        least: Share of positions that a live feature fires on more often.

    Returns:
        ``[controls, d_sae]`` by place of the stage; NaN where a feature was not alive before, minus infinity where it
        was lost: dead afterwards, or revived.
    """
    steps = null_steps(track) if kind == "null" else repeated_stages(track, kind)
    return {at: np.stack([_counted(*step, least) for step in found]) for at, found in steps.items()}


def _counted(track: Track, before: Snapshot, after: Snapshot, least: float) -> Floats:
    frequency = [s.features["firing_frequency"].to_numpy() for s in (before, after)]
    lost = (frequency[1] <= least) | flags(after, "revived")
    found = np.where(lost, -np.inf, correlation_between(track, before, after))
    return np.where(frequency[0] > least, found, np.nan)


def limit_table(steps: list[int], nulls: dict[int, Floats], others: Floats, threshold: float) -> pd.DataFrame:
    """The limit of every stage, and what it is from.

    Args:
        steps: LLM steps, ``[T]``.
        nulls: From `stage_controls`.
        others: Correlations with another feature, ``[T, F]``.
        threshold: What is always enough.

    Returns:
        Columns ``step``, ``threshold``, ``null_from``, ``null_quantile``, ``null_kept`` and ``chance``. Between two
        stages with null steps ``null_quantile`` and ``null_kept`` are interpolated over the places of the snapshots;
        before the first and after the last they are NaN, and ``null_from`` is empty.
    """
    known = {t: arms[np.isfinite(arms)] for t, arms in nulls.items()}
    quantiles = np.full(len(steps), np.nan)
    for t, values in known.items():
        quantiles[t] = np.quantile(values, NULL_QUANTILE) if len(values) else np.nan
    chances = np.array([_quantile(row[np.isfinite(row)]) for row in others])
    chances[0] = np.nan
    measured, quantiles = np.isfinite(quantiles), between(quantiles[None])[0]
    limits = np.fmin(np.where(np.isfinite(quantiles), np.fmax(quantiles, chances), threshold), threshold)
    limits[0] = np.nan
    reached, of = kept_counts(nulls, limits)
    kept = np.divide(reached.sum(axis=1), of.sum(axis=1), out=np.full(len(steps), np.nan), where=measured)
    said = {(True, True): MEASURED, (False, True): BETWEEN}
    sources = [said.get(pair, "") for pair in zip(measured.tolist(), np.isfinite(quantiles).tolist(), strict=True)]
    columns = {"step": steps, "threshold": limits, "null_from": sources, "null_quantile": quantiles}
    return pd.DataFrame(columns | {"null_kept": between(kept[None])[0], "chance": chances})


def kept_counts(nulls: dict[int, Floats], limits: Floats) -> tuple[Floats, Floats]:
    """In how many null steps each feature was alive before, and in how many of these it kept its identity.

    Returns:
        Kept and alive, ``[T, F]`` each; 0 at stages without null steps.
    """
    width = next(iter(nulls.values())).shape[1] if nulls else 0
    reached, of = np.zeros((2, len(limits), width))
    for t, arms in nulls.items():
        reached[t], of[t] = (arms >= limits[t]).sum(axis=0), (~np.isnan(arms)).sum(axis=0)
    return reached, of


def _quantile(values: Floats) -> float:
    return float(np.quantile(values, CHANCE_QUANTILE)) if len(values) else 0.0


def between(values: Floats) -> Floats:
    """Fill what is NaN between two columns that are not, linearly over the columns; never before or beyond them.

    Args:
        values: ``[N, T]``; the same columns are NaN in every row.

    Example:
        >>> between(np.array([[np.nan, 1.0, np.nan, 3.0, np.nan]])).tolist()
        [[nan, 1.0, 2.0, 3.0, nan]]
    """
    known = np.flatnonzero(np.isfinite(values).all(axis=0))
    if not len(known):
        return values
    places = np.arange(values.shape[1])
    edges = {"left": np.nan, "right": np.nan}
    return np.stack([np.interp(places, known, row[known], **edges) for row in values])


def null_survival(
    nulls: dict[int, Floats], limits: pd.DataFrame, rng: np.random.Generator, replicates: int
) -> dict[str, Floats]:
    """Share of features that null steps alone would leave in every stage so far, if stages were independent.

    The product over stages of the share of the features alive before a null step that keep their identity in it (a
    feature that dies or is revived does not), as far as every stage up to there has null steps or lies between two that
    have.

    Args:
        nulls: From `stage_controls`.
        limits: From `limit_table`.
        rng: Of the bootstrap over features, the same in all stages.
        replicates: Bootstrap replicates.

    Returns:
        ``null``, ``null_low``, ``null_high``, each ``[T]``; NaN from the first stage on that has none.
    """
    steps, names = len(limits), ("null", "null_low", "null_high")
    if not nulls:
        return dict.fromkeys(names, np.full(steps, np.nan))
    counts = np.vstack(kept_counts(nulls, limits["threshold"].to_numpy()))
    drawn = np.vstack([counts.mean(axis=1), bootstrap_replicates(counts, rng, replicates)])
    reached, of = drawn[:, :steps], drawn[:, steps:]
    shares = np.divide(reached, of, out=np.full(of.shape, np.nan), where=of > 0)
    shares = between(np.where(np.isnan(shares), shares[0], shares))  # a replicate may have none of few features
    shares[:, 0] = np.where(np.isfinite(shares[:, 1]), 1.0, np.nan) if steps > 1 else np.nan
    left = np.cumprod(shares, axis=1)
    low, high = np.quantile(left[1:], [0.025, 0.975], axis=0)
    return dict(zip(names, (left[0], low, high), strict=True))


def chain_correlations(
    chain: Track, split: SplitObservation, least: float, correlate: Correlate
) -> tuple[Floats, Floats]:
    """Functional correlation of a null chain's snapshots with its first and with its last.

    Args:
        chain: The chain; all its snapshots are of the LLM checkpoint that is observed.
        split: That LLM checkpoint's activations.
        least: Share of positions that a live feature fires on more often.
        correlate: Pearson's of latents of the same index.

    Returns:
        Two of ``[len(chain), d_sae]``; NaN where a feature is not alive at both ends or was revived in between.
    """
    first, last = (latents_of(chain[place], split) for place in (0, -1))
    found = []
    for place, snapshot in enumerate(chain):
        here = {0: first, len(chain) - 1: last}.get(place)
        here = latents_of(snapshot, split) if here is None else here
        row = []
        for end, latents in ((chain[0], first), (chain[-1], last)):
            use = _alive(here, least) & _alive(latents, least) & ~revived_between(chain, *_ordered(end, snapshot))
            row.append(np.where(use, correlate(latents, here), np.nan))
        found.append(row)
    to_first, to_last = (np.stack(part) for part in zip(*found, strict=True))
    return to_first, to_last


def _ordered(a: Snapshot, b: Snapshot) -> tuple[Snapshot, Snapshot]:
    return (a, b) if a.number < b.number else (b, a)


def _alive(latents: scipy.sparse.csr_array, least: float) -> NDArray[np.bool_]:
    alive: NDArray[np.bool_] = np.bincount(latents.indices, minlength=latents.shape[1]) > least * latents.shape[0]
    return alive


def chain_ceiling(chains: list[tuple[Floats, Floats]], snapshots: int, width: int) -> dict[str, Floats]:
    """What null chains reach at as many stages from the first, and to the last, mean over chains ``[T, F]`` each.

    Args:
        chains: From `chain_correlations`.
        snapshots: Of the track, T.
        width: Features, F.
    """
    ceiling = {}
    for name, which in (("to_first", 0), ("to_last", 1)):
        values = np.full((len(chains), snapshots, width), np.nan)
        for row, found in enumerate(chains):
            n = min(snapshots, len(found[which]))
            here, there = (slice(n), slice(n)) if name == "to_first" else (slice(-n, None), slice(-n, None))
            values[row, here] = found[which][there]
        count = np.isfinite(values).sum(axis=0)
        ceiling[name] = np.where(count, np.nansum(values, axis=0) / np.maximum(count, 1), np.nan)
    return ceiling


def controls_said(track: Track, nulls: dict[str, dict[int, Floats]], chains: int) -> dict[str, Any]:
    """Which controls there were, by LLM step of the stage, or what to run for them; for the settings of the result."""
    command = f"not available: run `saetrack control {track.path} --kind"
    said: dict[str, Any] = {
        kind: {track.steps[p]: len(found) for p, found in by.items()} or f"{command} {kind}`"
        for kind, by in nulls.items()
    }
    return {**said, "null_chains": chains or f"{command} null --chain true`"}
