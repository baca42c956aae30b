"""Drift: how far each feature's direction moves from snapshot to snapshot, and how far it is from its last one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .base import Analysis, AnalysisResult
from .drift_controls import COVERAGE, Calibration, calibrate
from .drift_figures import (
    CAPTIONS,
    adjacent_figure,
    controls_figure,
    identity_figure,
    ridge_figure,
    to_last_figure,
    trajectory_figure,
)
from .drift_geometry import Plane, principal_plane, row_cosines, unit_rows
from .drift_rows import FROZEN, alive, decoder_rows, encoder_rows, fitted_rotation, flags, frozen, transport_into
from .figures import step_position
from .resampling import bootstrap_means

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from saetrack.track import Snapshot, Track

    Floats = NDArray[np.floating]

PREVIOUS = (
    "decoder_to_previous",
    "decoder_to_previous_without_rotation",
    "encoder_to_previous",
    "encoder_to_previous_without_rotation",
)
LAST = tuple(name.replace("previous", "last") for name in PREVIOUS)
WALKS = tuple(f"{name}_if_random_walk" for name in LAST)
MEASURES = (*PREVIOUS, "functional_correlation", *LAST, *WALKS)

NULLS = (
    "A random direction has cosine 0 with sd 1/sqrt(d_in). If the stages' movements were independent, the cosine to "
    "the last snapshot would still rise to 1: it would be the product of the later adjacent cosines, which is "
    "`..._if_random_walk` gives; only the difference from it says that features head for their end."
)
CONTROLS = (
    "How much of the drift training once more makes, without any change of the LLM, is in the tables `calibration` (by "
    "stage), `excess` (by feature) and `null_chain`. Intervals there are over training runs."
)
NO_CONTROLS = (
    "Not available: how much of the drift training once more makes. Run `saetrack control {path} --kind null`, the "
    "same with `--kind replica` and with `--kind null --chain true`, then this analysis again."
)
ROTATION = {
    "transport": "The orthogonal map between the activations of the two LLM checkpoints, kept in each snapshot.",
    "procrustes": "The orthogonal map that best carries the decoder rows compared onto each other.",
}
TRAJECTORIES = (
    "Principal axes of the chosen features' unit decoder rows at all checkpoints together. The principal axes of a "
    "random walk are smooth arcs too (the first two hold 61 % and 15 % of its variance), so a smooth path from the "
    "first to the last point is no evidence of a direction."
)


class Drift(Analysis):
    """How far each feature's decoder and encoder direction turns, with and without the rotation all have in common.

    For every feature and snapshot: the cosine to the previous and to the last snapshot (same index), of the decoder
    row and of the encoder column, signs kept. ``..._without_rotation`` first applies the rotation that the two
    dictionaries have in common to the earlier one. Where every later snapshot has a ``transport`` map (warm start
    `transported`), that is the rotation: it is measured on activations, so it takes away nothing of a feature's own
    movement. Otherwise it is the orthogonal Procrustes map between the two decoders' compared rows; with F rows it
    also absorbs about d_in / (2 F) of movements that have nothing in common, so it is left out (NaN) when F is below
    2 d_in. The same decoder map is used for the encoder.

    A feature counts toward a cosine to the previous snapshot when it is alive at both ends, was not revived in the
    stage (its index is a new feature from there on), and is not frozen (1 - cosine < 1e-9 to where its stage began:
    it had no gradient, and would be counted as perfectly stable). For the cosine to the last it must be alive at
    both ends and never revived in between. The others are in the table, with their status, and in no mean.
    Intervals of means are a bootstrap over features; they do not cover another seed of the SAE or of the LLM.

    ``functional_correlation`` stands beside the decoder cosine because the two disagree: a decoder row may stay
    while the latent comes to mean something else.

    Nulls: see ``settings["nulls"]`` in the result. Trajectories in the plane of the most variance look like smooth
    arcs for a random walk too.

    Args:
        trajectories: Number of features drawn by the seed for the picture of trajectories.
        features: These features instead of drawn ones.
        replicates: Bootstrap replicates.
        seed: Seed of the draw and of the bootstrap.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        trajectories: int = 8,
        features: Sequence[int] | None = None,
        replicates: int = 500,
        seed: int = 0,
    ) -> None:
        if trajectories < 1 or replicates < 2:
            raise ValueError(
                f"drift needs at least 1 trajectory and 2 replicates, but trajectories is {trajectories} "
                f"and replicates is {replicates}."
            )
        self.trajectories = trajectories
        self.features = None if features is None else list(features)
        self.replicates = replicates
        self.seed = seed

    def run(self, track: Track) -> AnalysisResult:
        """Compare the snapshots of a track.

        Args:
            track: A track of at least two snapshots.

        Raises:
            ValueError: If there are fewer, or a feature asked for is not in the dictionary.
        """
        if len(track) < 2:
            raise ValueError(f"{track.path} has {len(track)} snapshots; drift compares at least two.")
        steps = track.steps
        rng = np.random.default_rng(self.seed)
        cosines, rotation = _compare(track)
        table = _feature_table(track, cosines)
        population = _population(table, steps, rng, self.replicates)
        chosen = self._choose(table, steps, rng)
        plane = principal_plane(np.stack([unit_rows(s) for s in track.decoder(chosen).numpy()]))
        counts = table.groupby(["step", "status"]).size().unstack(fill_value=0).reindex(steps, fill_value=0)
        calibration = calibrate(track)
        scalars = _scalars(population, counts) | _calibrated_scalars(calibration)
        random_sd = 1 / np.sqrt(track.facts["d_in"])
        figures = {
            "adjacent": adjacent_figure(population, steps),
            "to_last": to_last_figure(population, steps, random_sd),
            "identity": identity_figure(population, table, steps),
            "cosine_to_previous": ridge_figure(table, steps),
            "trajectories": trajectory_figure(plane, chosen, steps),
        }
        tables = {
            "drift": table,
            "population": population,
            "status": counts.reset_index().rename_axis(columns=None),
            "trajectories": _trajectory_table(plane, chosen, steps),
        }
        if len(calibration.stages):
            figures["controls"] = controls_figure(calibration.stages, calibration.chain, steps)
            tables |= {"calibration": calibration.stages, "excess": calibration.features}
        if len(calibration.chain):
            tables["null_chain"] = calibration.chain
        settings = {
            "seed": self.seed,
            "replicates": self.replicates,
            "frozen_below": FROZEN,
            "rotation": rotation,
            "rotation_meaning": ROTATION[rotation],
            "random_direction_sd": random_sd,
            "nulls": NULLS,
            "controls": CONTROLS if len(calibration.stages) else NO_CONTROLS.format(path=track.path),
            "coverage": COVERAGE,
            "trajectory_features": chosen,
            "trajectory_features_drawn": self.features is None,
            "trajectory_axes": TRAJECTORIES,
            "trajectory_explained": plane.explained.tolist(),
        }
        return AnalysisResult(tables, figures, scalars, settings, _summary(scalars, steps), CAPTIONS)

    def _choose(self, table: pd.DataFrame, steps: list[int], rng: np.random.Generator) -> list[int]:
        """The features to draw: those asked for, else a seeded draw among those that can be followed throughout."""
        count = int(table["feature"].max()) + 1
        if self.features is not None:
            wrong = [i for i in self.features if not 0 <= i < count]
            if wrong or not self.features:
                raise ValueError(f"drift's features are {self.features}; give indices from 0 to {count - 1}.")
            return self.features
        first, last = table[table["step"] == steps[0]], table[table["step"] == steps[-1]]
        followed = first.loc[~first["revived_later"], "feature"]
        candidates = np.intersect1d(followed, last.loc[last["status"] != "dead", "feature"])
        candidates = candidates if len(candidates) else np.arange(count)
        drawn = rng.choice(candidates, size=min(self.trajectories, len(candidates)), replace=False)
        return sorted(int(i) for i in drawn)


def _compare(track: Track) -> tuple[list[dict[str, Floats]], str]:
    """Cosines of every snapshot to the one before and to the last; at most three dictionaries are held at once."""
    snapshots = list(track)
    transports = [transport_into(snapshot) for snapshot in snapshots]
    known = [transport for transport in transports[1:] if transport is not None]
    to_last = _maps_to_last(known) if len(known) == len(snapshots) - 1 else None
    last = _directions(snapshots[-1])
    previous: dict[str, Floats] | None = None
    found = []
    for t, snapshot in enumerate(snapshots):
        here = _directions(snapshot)
        cosines: dict[str, Floats] = {}
        if previous is not None:
            still = frozen(previous["decoder"], here["decoder"], transports[t])
            use = alive(snapshots[t - 1]) & alive(snapshot) & ~flags(snapshot, "revived") & ~still
            rotation = (
                transports[t] if to_last is not None else fitted_rotation(previous["decoder"], here["decoder"], use)
            )
            cosines |= _cosines(previous, here, rotation, "previous")
            cosines["frozen"] = still.astype(np.float64)
        if t < len(snapshots) - 1:
            use = alive(snapshot) & alive(snapshots[-1]) & ~_revived_after(snapshots, t)
            rotation = to_last[t] if to_last is not None else fitted_rotation(here["decoder"], last["decoder"], use)
            cosines |= _cosines(here, last, rotation, "last")
        else:
            cosines |= {name: np.ones(len(here["decoder"])) for name in LAST}
        found.append(cosines)
        previous = here
    return found, "procrustes" if to_last is None else "transport"


def _directions(snapshot: Snapshot) -> dict[str, Floats]:
    return {"decoder": decoder_rows(snapshot), "encoder": encoder_rows(snapshot)}


def _cosines(
    source: dict[str, Floats], target: dict[str, Floats], rotation: Floats | None, to: str
) -> dict[str, Floats]:
    cosines = {}
    for part in ("decoder", "encoder"):
        cosines[f"{part}_to_{to}"] = row_cosines(source[part], target[part])
        cosines[f"{part}_to_{to}_without_rotation"] = (
            np.full(len(source[part]), np.nan)
            if rotation is None
            else row_cosines(source[part] @ rotation, target[part])
        )
    return cosines


def _maps_to_last(transports: list[Floats]) -> list[Floats]:
    """The composition of all later maps, for each snapshot; ``transports`` begins with the map into the second."""
    maps: list[Floats] = [np.eye(len(transports[0]), dtype=np.float32)]
    for transport in reversed(transports):
        maps.append(transport @ maps[-1])
    return maps[::-1]


def _revived_after(snapshots: list[Snapshot], t: int) -> NDArray[np.bool_]:
    revived: NDArray[np.bool_] = np.logical_or.reduce([flags(s, "revived") for s in snapshots[t + 1 :]])
    return revived


def _feature_table(track: Track, cosines: list[dict[str, Floats]]) -> pd.DataFrame:
    """One row per feature and snapshot: every cosine, the functional correlation, and what the row may be used for."""
    snapshots = list(track)
    tables, walks = [], dict.fromkeys(PREVIOUS, np.ones(len(cosines[0][LAST[0]])))
    for t in reversed(range(len(snapshots))):
        snapshot, found = snapshots[t], cosines[t]
        count = len(found[LAST[0]])
        missing = np.full(count, np.nan)
        revived, living = flags(snapshot, "revived"), alive(snapshot)
        still = found.get("frozen", np.zeros(count)) > 0
        later = _revived_after(snapshots, t) if t < len(snapshots) - 1 else np.zeros(count, dtype=bool)
        from_alive = alive(snapshots[t - 1]) if t else np.ones(count, dtype=bool)
        columns: dict[str, Any] = {
            "feature": np.arange(count),
            "step": snapshot.step,
            "status": np.select([~living, revived, still], ["dead", "revived", "frozen"], "alive"),
            "alive_before": from_alive,
            "revived_later": later,
            "followed_to_last": living & alive(snapshots[-1]) & ~later,
        }
        columns |= {name: found.get(name, missing) for name in PREVIOUS}
        columns["functional_correlation"] = snapshot.features["functional_correlation"].to_numpy(dtype=np.float64)
        columns |= {name: found[name] for name in LAST}
        columns |= dict(zip(WALKS, walks.values(), strict=True))
        walks = {name: walk * found.get(name, missing) for name, walk in walks.items()}
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables[::-1], ignore_index=True)


def _population(table: pd.DataFrame, steps: list[int], rng: np.random.Generator, replicates: int) -> pd.DataFrame:
    """Mean over features with its interval, and quartiles, by step and measure, over the features that count."""
    count = len(table) // len(steps)
    moved = ((table["status"] == "alive") & table["alive_before"]).to_numpy().reshape(len(steps), count)
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


def _scalars(population: pd.DataFrame, counts: pd.DataFrame) -> dict[str, dict[int, float]]:
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
    total = counts.sum(axis=1)
    for status in ("frozen", "revived"):
        share = counts[status] / total if status in counts else 0 * total
        scalars[f"share_{status}"] = dict(zip(share.index.tolist(), share.tolist(), strict=True))
    return scalars


def _calibrated_scalars(calibration: Calibration) -> dict[str, dict[int, float]]:
    """The curves that need controls, at the stages that have them."""
    stages = calibration.stages
    names = ("null_share", "excess", "energy", "correlation_null")
    return {
        name: {int(step): float(v) for step, v in zip(stages["step"], stages[name], strict=True) if np.isfinite(v)}
        for name in names
        if len(stages)
    }


def _trajectory_table(plane: Plane, chosen: list[int], steps: list[int]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "feature": np.tile(chosen, len(steps)),
            "step": np.repeat(steps, len(chosen)),
            "x": plane.coordinates[:, :, 0].ravel(),
            "y": plane.coordinates[:, :, 1].ravel(),
        }
    )


def _summary(scalars: dict[str, dict[int, float]], steps: list[int]) -> str:
    drift, correlation = scalars["drift"], scalars["functional_correlation_median"]
    if not drift:
        return "No feature is alive in two neighbouring snapshots without having been revived, so there is no drift."
    largest = max(drift, key=lambda step: drift[step])
    text = (
        "Between neighbouring snapshots decoder rows turn by a mean 1 - cosine of "
        f"{np.mean(list(drift.values())):.3g}, "
        f"most on entering LLM step {largest} ({drift[largest]:.3g}); "
        f"the first snapshot's cosine to the last is {scalars['cosine_to_last'].get(steps[0], np.nan):.2f} on average."
    )
    if correlation:
        lowest = min(correlation, key=lambda step: correlation[step])
        text += f" The median functional correlation is lowest at step {lowest} ({correlation[lowest]:.2f})."
    if shares := scalars.get("null_share"):
        found = ", ".join(f"{share:.0%} at step {step}" for step, share in shares.items())
        text += f" Training once more without a change of the LLM makes this share of the drift: {found}."
    return text
