"""Tables of drift over features: means with their intervals, lengths of paths, and what is said of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .drift_geometry import Plane
from .figures import step_position
from .resampling import bootstrap_means

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .drift_controls import Calibration

    Floats = NDArray[np.floating]
    Bools = NDArray[np.bool_]

PREVIOUS = (
    "decoder_to_previous",
    "decoder_to_previous_without_rotation",
    "encoder_to_previous",
    "encoder_to_previous_without_rotation",
)
LAST = tuple(name.replace("previous", "last") for name in PREVIOUS)
WALKS = tuple(f"{name}_if_random_walk" for name in LAST)
NOT_KEPT = "not kept"
"""Status of a feature that a restricted result does not count in the stage."""
MEASURES = (*PREVIOUS, "functional_correlation", *LAST, *WALKS)


def drift_population(table: pd.DataFrame, steps: list[int], rng: np.random.Generator, replicates: int) -> pd.DataFrame:
    """Mean over features with its interval, and quartiles, by step and measure, over the features that count."""
    count = len(table) // len(steps)
    moved = _moved(table).reshape(len(steps), count)
    followed = table["followed_to_last"].to_numpy().reshape(len(steps), count)
    values = []
    for name in MEASURES:
        use = followed if "last" in name else moved
        values.append(np.where(use, table[name].to_numpy().reshape(len(steps), count), np.nan))
    mean, low, high = bootstrap_means(np.concatenate(values), rng, replicates)
    gaps = np.diff(step_position(steps), prepend=np.nan)
    rows = []
    for m, name in enumerate(MEASURES):
        for t, step in enumerate(steps):
            known = values[m][t][np.isfinite(values[m][t])]
            q25, median, q75 = np.quantile(known, [0.25, 0.5, 0.75]) if len(known) else [np.nan] * 3
            row = m * len(steps) + t
            rows.append(
                {
                    "step": step,
                    "measure": name,
                    "mean": mean[row],
                    "low": low[row],
                    "high": high[row],
                    "q25": q25,
                    "median": median,
                    "q75": q75,
                    "n_features": len(known),
                    "gap_decades": gaps[t],
                }
            )
    return pd.DataFrame(rows)


def _moved(table: pd.DataFrame) -> Bools:
    """Which rows of the table count toward a cosine to the previous snapshot."""
    counts: Bools = ((table["status"] == "alive") & table["alive_before"]).to_numpy(dtype=bool)
    return counts


def path_table(table: pd.DataFrame, snapshots: int) -> pd.DataFrame:
    """How far each feature went and how far it came, in radians: the sum of its turns, and the turn from first to last.

    Of independent turns of the same size the second would be ``net_if_random_walk``; a feature that heads for its end
    comes farther than that, and one that turns back less far. The rotation that all have in common is taken out where
    it is known in every stage.

    Args:
        table: One row by snapshot and feature, as `Drift` makes it.
        snapshots: Their number.

    Returns:
        Columns ``feature``, ``path``, ``net``, ``net_if_random_walk``, of the features that count in every stage.
    """
    for suffix in ("_without_rotation", ""):
        names = [f"decoder_to_previous{suffix}", f"decoder_to_last{suffix}", f"decoder_to_last{suffix}_if_random_walk"]
        previous, last, walk = (table[name].to_numpy().reshape(snapshots, -1) for name in names)
        if np.isfinite(previous[1:]).any(axis=1).all() and np.isfinite(last[0]).any():
            break
    whole = _moved(table).reshape(snapshots, -1)[1:].all(axis=0)
    whole &= table["followed_to_last"].to_numpy().reshape(snapshots, -1)[0]
    angles = (np.arccos(np.clip(cosines[..., whole], -1, 1)) for cosines in (previous[1:], last[0], walk[0]))
    turns, net, net_walk = angles
    columns = {"feature": np.flatnonzero(whole), "path": turns.sum(axis=0), "net": net, "net_if_random_walk": net_walk}
    return pd.DataFrame(columns)


def length_table(paths: pd.DataFrame, rng: np.random.Generator, replicates: int) -> pd.DataFrame:
    """Mean lengths of the track and of each null chain, with intervals from a bootstrap over features.

    Args:
        paths: From `path_table`, with a column ``series``.
        rng: Source of the draws.
        replicates: Bootstrap replicates.
    """
    rows = []
    for series, part in paths.groupby("series", sort=False):
        row: dict[str, object] = {"series": series, "n_features": len(part)}
        names = ("path", "net", "net_if_random_walk")
        means = bootstrap_means(part[[*names]].to_numpy().T, rng, replicates)
        for name, values in zip(names, zip(*means, strict=True), strict=True):
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), map(float, values), strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def drift_scalars(population: pd.DataFrame, counts: pd.DataFrame) -> dict[str, dict[int, float]]:
    """The curves for TensorBoard that need no controls."""

    def curve(measure: str, column: str = "mean", drift: bool = False) -> dict[int, float]:
        rows = population[(population["measure"] == measure) & population[column].notna()]
        values = 1 - rows[column] if drift else rows[column]
        return {int(step): float(value) for step, value in zip(rows["step"], values, strict=True)}

    scalars = {
        "drift": curve("decoder_to_previous", drift=True),
        "drift_without_rotation": curve("decoder_to_previous_without_rotation", drift=True),
        "drift_encoder": curve("encoder_to_previous", drift=True),
        "cosine_to_last": curve("decoder_to_last"),
        "functional_correlation_median": curve("functional_correlation", "median"),
    }
    total = counts.drop(columns=NOT_KEPT, errors="ignore").sum(axis=1)
    for status in ("frozen", "revived"):
        share = counts[status] / total if status in counts else 0 * total
        scalars[f"share_{status}"] = dict(zip(share.index.tolist(), share.tolist(), strict=True))
    return scalars


def calibrated_scalars(calibration: Calibration) -> dict[str, dict[int, float]]:
    """The curves that need controls, at the stages that have them."""
    stages = calibration.stages
    names = ("null_share", "excess", "energy", "correlation_null")
    return {
        name: {int(step): float(v) for step, v in zip(stages["step"], stages[name], strict=True) if np.isfinite(v)}
        for name in names
        if len(stages)
    }


def trajectory_table(plane: Plane, chosen: list[int], steps: list[int]) -> pd.DataFrame:
    """Where the chosen features lie in the plane, by step."""
    return pd.DataFrame(
        {
            "feature": np.tile(chosen, len(steps)),
            "step": np.repeat(steps, len(chosen)),
            "x": plane.coordinates[:, :, 0].ravel(),
            "y": plane.coordinates[:, :, 1].ravel(),
        }
    )


def drift_summary(population: pd.DataFrame, lengths: pd.DataFrame, stages: pd.DataFrame, names: dict[int, str]) -> str:
    """What the result says in words; each number stands in one of the tables.

    Args:
        population: From `drift_population`.
        lengths: From `length_table`.
        stages: The table ``calibration``, empty without null controls.
        names: What to call each step.
    """
    of = {str(name): part for name, part in population.groupby("measure")}
    raw, turned = of["decoder_to_previous"], of["decoder_to_previous_without_rotation"]
    if raw["mean"].isna().all():
        return "No feature is alive in two neighbouring snapshots without having been revived, so there is no drift."
    place = int(raw["mean"].argmin())
    most, without = raw.iloc[place], turned["mean"].iloc[place]
    text = (
        f"Decoder rows turn most on entering {names[int(most['step'])]}: the mean 1 - cosine to the snapshot before, "
        f"over the {int(most['n_features'])} features that count, is {1 - most['mean']:.3g} as they are"
    )
    if np.isfinite(without):
        text += f" and {1 - without:.3g} without the rotation that all have in common"
    to_last = of["decoder_to_last"].iloc[0]
    text += (
        f". The first snapshot's cosine to the last, as the rows are, is {to_last['mean']:.2f} on average over "
        f"{int(to_last['n_features'])} features."
    )
    correlation = of["functional_correlation"]
    if correlation["median"].notna().any():
        lowest = correlation.iloc[int(correlation["median"].argmin())]
        text += (
            f" The functional correlation with the snapshot before has its lowest median at "
            f"{names[int(lowest['step'])]} ({lowest['median']:.2f} over {int(lowest['n_features'])} features)."
        )
    if len(lengths):
        own = lengths.iloc[0]
        text += (
            f" Features that can be followed throughout turn {own['path']:.2f} rad and end {own['net']:.2f} rad from "
            f"where they began (independent turns: {own['net_if_random_walk']:.2f})."
        )
    if len(stages):
        columns = ["step", "null_share", "drift_null", "drift_real", "features"]
        found = ", ".join(
            f"{share:.0%} at {names[int(step)]} ({null:.3g} of {real:.3g}, over {int(features)} features)"
            for step, share, null, real, features in stages[columns].to_numpy(dtype=float)
        )
        text += (
            f" Of the drift without the common rotation, training once more without a change of the LLM makes {found}."
        )
    return text
