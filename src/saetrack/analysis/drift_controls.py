"""Drift beside its controls: how much of it does training once more make, and how much the LLM?

At a stage of the track the arms all begin with the same snapshot. The real ones, the track itself and its ``replica``
controls, were trained on the next LLM checkpoint, the ``null`` ones again on the snapshot's own, each with another
order of the data. A feature's displacement in an arm is what its unit decoder row moved while it was trained, in the
frame of the snapshot: the rotation that all compared rows have in common is taken out. Fitted to F rows, it also takes
``d_in / (2 F)`` of what rows move on their own (``d_in (d_in - 1) / 2`` free numbers of ``F (d_in - 1)``), so lengths
are scaled up by that, as a variance is by its degrees of freedom. With fewer than ``2 d_in`` rows it is the rotation
that a `transported` stage begins with, of which it is not known what it takes, or none. A feature's drift is half the
square of its displacement's length, which is 1 - cosine.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.stats

from .controls import null_chains, one_step_controls, stage_place
from .drift_rows import alive, decoder_rows, fitted_rotation, flags, frozen, transport_into

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from saetrack.track import Snapshot, Track

    from .identity_stretches import Kept

    Floats = NDArray[np.floating]

COVERAGE = 0.95


@dataclass(frozen=True)
class Calibration:
    """What the controls of a track say of its drift. A table is empty where the track has no control of its kind.

    Args:
        stages: One row for each stage with null controls; see :func:`calibrate`.
        features: One row for each of its features that counts: ``feature``, ``step``, ``drift`` (mean of the real
            arms), ``drift_null``, their difference ``excess``, and ``energy`` (NaN with fewer than two arms of a kind).
        chain: One row for each snapshot of the null chain: ``remaining`` stages to its end, the mean cosine to its
            last snapshot ``null`` and its lower 5 % ``null_low`` over features, the track's own at as many remaining
            stages ``real``, and the share of its features below ``null_low``; ``drift``, adjacent, of the chain.
    """

    stages: pd.DataFrame
    features: pd.DataFrame
    chain: pd.DataFrame


def calibrate(track: Track, kept: Kept | None = None) -> Calibration:
    """Compare a track with its null and replica controls; holds one dictionary for each arm of a stage.

    The columns of ``stages``, by ``step``:

    * ``arms_real``, ``arms_null``, ``features``: how many were compared. A feature counts that is alive in the
      snapshot before and in every arm, was revived in none and is frozen in none.
    * ``drift_real``, ``drift_null``: means over arms and features. ``null_share`` is their ratio, ``excess`` their
      difference, each with an interval ``_low``, ``_high``: Student's over arms, for arms are what was drawn. The
      variance between arms is pooled over both kinds, and is that of the null arms where there is one real arm.
    * ``systematic_real``, ``systematic_null``: half the mean inner product of the displacements of two arms of a kind.
      What the order of the data alone does is independent between arms and cancels, so this is unbiased for the drift
      that all arms of the kind have in common, and can be negative. ``energy`` is the difference: movement that the
      LLM's change made. Its interval is the jackknife's over arms (three of each kind are needed).
    * ``separation``: mean cosine of displacement fields within a kind minus that between kinds, and ``separation_p``,
      from all ways to deal the labels to the arms.
    * ``correlation_real``, ``correlation_null``: median functional correlation with the snapshot before, of the track
      and of the null arms: its ceiling.
    * ``fvu_before_null``, ``fvu_null``: FVU of the snapshot and, on the same LLM checkpoint, of the null arms. Where
      they fell, the snapshot had not converged, and the null holds learning that goes on.

    Args:
        track: The track.
        kept: If given, only features count that kept their identity in the stage, and there is no chain.

    Raises:
        ValueError: If a control begins with another snapshot than the track's, or was made by another recipe.
    """
    nulls, replicas = one_step_controls(track, "null"), one_step_controls(track, "replica")
    stages, features = [], []
    for position in sorted(nulls):
        place = stage_place(track, position)
        if kept is not None and place is None:
            continue  # it is not known which features kept their identity over more than a stage
        counts = None if kept is None else kept.into[place]
        found = _calibrate_stage(track, position, replicas.get(position, []), nulls[position], counts)
        if found is not None:  # else no feature counts in it
            stages.append(found[0])
            features.append(found[1])
    chains = null_chains(track) if kept is None else []  # which of a chain's features to compare is not known
    return Calibration(
        pd.DataFrame(stages),
        pd.concat(features, ignore_index=True) if features else pd.DataFrame(),
        _chain_table(track, chains) if chains else pd.DataFrame(),
    )


def _calibrate_stage(
    track: Track, position: int, replicas: list[Track], nulls: list[Track], counts: NDArray[np.bool_] | None
) -> tuple[dict[str, float], pd.DataFrame] | None:
    before = track.began_from(track[position])
    assert before is not None  # one_step_controls has compared it with the control's first
    ends = [track[position], *(c[1] for c in replicas), *(c[1] for c in nulls)]
    start = decoder_rows(before)
    n_real = 1 + len(replicas)
    moved, use = _displacements(before, start, ends)
    use = use if counts is None else use & counts
    if not use.any():
        return None
    gram = _gram(moved, use)  # [F, A, A]
    real, null = slice(0, n_real), slice(n_real, None)
    drift = 0.5 * np.einsum("faa->fa", gram)
    step = track[position].step
    feature_energy = 0.5 * (_mean_pair(gram[:, real, real]) - _mean_pair(gram[:, null, null]))
    table = pd.DataFrame(
        {
            "feature": np.flatnonzero(use),
            "step": step,
            "drift": drift[:, real].mean(axis=1),
            "drift_null": drift[:, null].mean(axis=1),
            "excess": drift[:, real].mean(axis=1) - drift[:, null].mean(axis=1),
            "energy": feature_energy,
        }
    )
    field = gram.sum(axis=0)  # [A, A]
    alike = slice(None) if counts is None else use  # restricted, of the features compared alone
    correlations = [float(s.features["functional_correlation"][alike].median()) for s in (ends[0], *ends[n_real:])]
    stage = {
        "step": step,
        "arms_real": n_real,
        "arms_null": len(nulls),
        "features": int(use.sum()),
        **_compare_means(drift[:, real].mean(axis=0), drift[:, null].mean(axis=0)),
        **_compare_pairs(field[real, real] / use.sum(), field[null, null] / use.sum()),
        **_separation(field, n_real),
        "correlation_real": correlations[0],
        "correlation_null": float(np.mean(correlations[1:])),
    }
    if counts is None:  # an FVU is of all features
        stage |= {
            "fvu_before_null": float(before.metadata["fvu"]),
            "fvu_null": float(np.mean([c[1].metadata["fvu"] for c in nulls])),
        }
    return stage, table


def _displacements(before: Snapshot, start: Floats, ends: list[Snapshot]) -> tuple[list[Floats], NDArray[np.bool_]]:
    """What every row moved in each arm, in the frame of ``start``, ``[F, d_in]`` each, and which features count."""
    rows = [decoder_rows(end) for end in ends]
    maps = [transport_into(end) for end in ends]
    use = alive(before)
    for end, row, rotation in zip(ends, rows, maps, strict=True):
        use &= alive(end) & ~flags(end, "revived") & ~frozen(start, row, rotation)
    moved: list[Floats] = []
    for row, known in zip(rows, maps, strict=True):
        fitted = fitted_rotation(start, row, use)
        rotation = known if fitted is None else fitted
        left = 1.0 if fitted is None else 1 - start.shape[1] / (2 * use.sum())
        moved.append(((row if rotation is None else row @ rotation.T) - start) / np.sqrt(left))
    return moved, use


def _gram(moved: list[Floats], use: NDArray[np.bool_]) -> Floats:
    """Inner products of the arms' displacements of each feature that counts, ``[F, A, A]``."""
    gram = np.empty((int(use.sum()), len(moved), len(moved)))
    for a, left in enumerate(moved):
        for b, right in enumerate(moved[: a + 1]):
            gram[:, a, b] = gram[:, b, a] = np.einsum("fd,fd->f", left[use], right[use], dtype=np.float64)
    return gram


def _mean_pair(gram: Floats) -> Floats:
    """Mean over pairs of two different arms, ``[..., A, A]`` to ``[...]``; NaN for one arm."""
    arms = gram.shape[-1]
    if arms < 2:
        return np.full(gram.shape[:-2], np.nan)
    different: Floats = gram.sum(axis=(-2, -1)) - np.trace(gram, axis1=-2, axis2=-1)
    mean: Floats = different / (arms * (arms - 1))
    return mean


def _compare_means(real: Floats, null: Floats) -> dict[str, float]:
    """Difference and ratio of the arms' mean drifts, with Student intervals over arms."""
    groups = [real, null] if len(real) > 1 else [null]
    freedom = sum(len(group) - 1 for group in groups)
    mean_real, mean_null = float(real.mean()), float(null.mean())
    excess, share = mean_real - mean_null, mean_null / mean_real if mean_real > 0 else np.nan
    margin = factor = np.nan
    if freedom > 0 and mean_real > 0 and mean_null > 0:
        variance = sum(float(((group - group.mean()) ** 2).sum()) for group in groups) / freedom
        t = float(scipy.stats.t.ppf((1 + COVERAGE) / 2, freedom))
        margin = t * np.sqrt(variance * (1 / len(real) + 1 / len(null)))
        factor = np.exp(t * np.sqrt(variance * (1 / (len(real) * mean_real**2) + 1 / (len(null) * mean_null**2))))
    return {
        "drift_real": mean_real,
        "drift_null": mean_null,
        "null_share": share,
        "null_share_low": share / factor,
        "null_share_high": share * factor,
        "excess": excess,
        "excess_low": excess - margin,
        "excess_high": excess + margin,
    }


def _compare_pairs(real: Floats, null: Floats) -> dict[str, float]:
    """The drift that arms of a kind have in common, from the Gram matrix ``[A, A]`` of each kind per feature."""
    common = {kind: 0.5 * float(_mean_pair(gram)) for kind, gram in (("real", real), ("null", null))}
    energy, margin = common["real"] - common["null"], np.nan
    arms = min(len(real), len(null))
    if arms > 2:
        variance = sum(_jackknife_variance(gram) for gram in (real, null))
        margin = float(scipy.stats.t.ppf((1 + COVERAGE) / 2, arms - 1)) * np.sqrt(variance)
    return {
        "systematic_real": common["real"],
        "systematic_null": common["null"],
        "energy": energy,
        "energy_low": energy - margin,
        "energy_high": energy + margin,
    }


def _jackknife_variance(gram: Floats) -> float:
    """Variance of half the mean inner product of two arms, leaving each arm out in turn."""
    arms = len(gram)
    left_out = [0.5 * float(_mean_pair(np.delete(np.delete(gram, a, 0), a, 1))) for a in range(arms)]
    return (arms - 1) / arms * float(((np.array(left_out) - np.mean(left_out)) ** 2).sum())


def _separation(field: Floats, n_real: int) -> dict[str, float]:
    """Mean cosine of displacement fields within a kind minus between, and its exact permutation p."""
    norms = np.sqrt(np.diag(field))
    cosines = field / np.outer(norms, norms)
    arms = len(field)
    observed = _contrast(cosines, range(n_real))
    if not np.isfinite(observed):
        return {"separation": np.nan, "separation_p": np.nan}
    dealt = [_contrast(cosines, chosen) for chosen in combinations(range(arms), n_real)]
    return {"separation": observed, "separation_p": float(np.mean(np.array(dealt) >= observed - 1e-12))}


def _contrast(cosines: Floats, chosen: range | tuple[int, ...]) -> float:
    """Mean within the chosen arms and within the others, minus mean between; NaN where no pair is within."""
    member = np.isin(np.arange(len(cosines)), list(chosen))
    same = (member[:, None] == member) & ~np.eye(len(cosines), dtype=bool)
    between = member[:, None] != member
    return float(cosines[same].mean() - cosines[between].mean()) if same.any() and between.any() else np.nan


def _chain_table(track: Track, chains: list[Track]) -> pd.DataFrame:
    """Cosine to the last snapshot of null chains and of the track, by the number of stages that remain."""
    own = _cosines_to_last(track)
    made = [_cosines_to_last(chain) for chain in chains]
    drifts = np.mean([_adjacent(chain) for chain in chains], axis=0)
    rows = []
    for remaining in range(min(len(own), *(len(cosines) for cosines in made))):
        null = np.concatenate([cosines[-1 - remaining] for cosines in made])
        real = own[-1 - remaining]
        low = float(np.quantile(null, 0.05)) if len(null) else np.nan
        known = remaining and len(real) and len(null)  # at the last both are 1, and which is below is rounding
        rows.append(
            {
                "step": track.steps[-1 - remaining],
                "remaining": remaining,
                "real": float(real.mean()) if len(real) else np.nan,
                "null": float(null.mean()) if len(null) else np.nan,
                "null_low": low,
                "below_null": float((real < low).mean()) if known else np.nan,
                "drift": float(drifts[-1 - remaining]),
            }
        )
    return pd.DataFrame(rows[::-1])


def free_null(track: Track) -> pd.DataFrame:
    """What stages between LLM checkpoints of equal weights make: null steps that the series holds by itself.

    Returns:
        Columns ``from_step``, ``step``, ``features``, ``drift`` (mean of 1 - cosine, as in :func:`calibrate`),
        ``correlation`` (median functional correlation), ``fvu_before`` and ``fvu``; empty without such checkpoints.
    """
    rows = []
    for steps in track.equal_weights:
        for after in (track.at(step) for step in steps):
            before = track.before(after)
            if before is None or before.step not in steps:
                continue
            moved, use = _displacements(before, decoder_rows(before), [after])
            facts: dict[str, Any] = {"from_step": before.step, "step": after.step, "features": int(use.sum())}
            facts |= {"drift": 0.5 * float(np.mean(_gram(moved, use)))}
            facts |= {"correlation": float(after.features["functional_correlation"].median())}
            rows.append({**facts, "fvu_before": before.metadata["fvu"], "fvu": after.metadata["fvu"]})
    return pd.DataFrame(rows)


def _cosines_to_last(track: Track) -> list[Floats]:
    """For every snapshot, the cosines to the last of the features alive in both and not revived in between."""
    last, found = decoder_rows(track[-1]), []
    follow = alive(track[-1])
    to_last: Floats = np.eye(last.shape[1], dtype=last.dtype)
    for t in reversed(range(len(track))):
        cosines = np.einsum("fd,fd->f", decoder_rows(track[t]) @ to_last, last, dtype=np.float64)
        found.append(cosines[follow & alive(track[t])])
        follow = follow & ~flags(track[t], "revived")
        transport = transport_into(track[t]) if t else None
        to_last = to_last if transport is None else transport @ to_last
    return found[::-1]


def _adjacent(chain: Track) -> list[float]:
    """Mean drift of every stage of a null chain; NaN for its first snapshot."""
    drifts = [np.nan]
    for before, after in zip(list(chain), list(chain)[1:], strict=False):
        moved, use = _displacements(before, decoder_rows(before), [after])
        drifts.append(0.5 * float(np.mean(_gram(moved, use))))
    return drifts
