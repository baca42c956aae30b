"""Drift: how far each feature's direction moves from snapshot to snapshot, and how far it is from its last one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from .base import Analysis, AnalysisResult
from .controls import null_chains
from .drift_controls import COVERAGE, calibrate, free_null
from .drift_figures import (
    CAPTIONS,
    adjacent_figure,
    controls_figure,
    identity_figure,
    ridge_figure,
    to_last_figure,
    trajectory_figure,
)
from .drift_geometry import principal_plane, row_cosines, unit_rows
from .drift_kept import restrict_rows
from .drift_rows import FROZEN, alive, decoder_rows, encoder_rows, fitted_rotation, flags, frozen
from .drift_tables import (
    LAST,
    PREVIOUS,
    WALKS,
    calibrated_scalars,
    drift_population,
    drift_scalars,
    drift_summary,
    length_table,
    path_table,
    trajectory_table,
)
from .figures import label_places
from .lineage import correlation_between, ends_of_stage, revived_between, rotation_between
from .places import place_names, share_a_step

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from saetrack.track import Snapshot, Track

    Floats = NDArray[np.floating]

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
    "transport": "The orthogonal map between the activations of the two LLM checkpoints, kept in each snapshot. It "
    "also takes away about d_in / (2 F) of what F features of like weight move on their own.",
    "procrustes": "The orthogonal map that best carries the decoder rows compared onto each other.",
}
TRAJECTORIES = (
    "Principal axes of the chosen features' unit decoder rows at all checkpoints together. The principal axes of a "
    "random walk are smooth arcs too (the first two hold 61 % and 15 % of its variance), so a smooth path from the "
    "first to the last point is no evidence of a direction."
)


class Drift(Analysis):
    """How far each feature's decoder and encoder direction turns, with and without the rotation all have in common.

    For every feature and snapshot: the cosine to the previous and to the last snapshot (same index), in the order of
    LLM steps, of the decoder row and of the encoder column, signs kept. ``..._without_rotation`` first applies the
    rotation that the two dictionaries have in common to the earlier one. Where every later snapshot has a ``transport``
    map (warm start `transported`), that is the rotation; otherwise it is the orthogonal Procrustes map between the two
    decoders' compared rows. Either map also takes away part of what features move on their own: ``d_in / (2 F)`` of
    movements that have nothing in common, for F features of like weight (in the activations, or F rows), and
    ``1 - F / (2 d_in)``, more than half, where F is below d_in (docs/validation.md). The second is left out (NaN)
    when F is below 2 d_in; of the first F is not known, so it is not. The same map is used for the encoder.

    A feature counts toward a cosine to the previous snapshot when it is alive at both ends, was not revived in the
    stage (its index is a new feature from there on), and is not frozen (1 - cosine < 1e-9 to where its stage began:
    it had no gradient, and would be counted as perfectly stable). For the cosine to the last it must be alive at
    both ends and never revived in between. The others are in the table, with their status, and in no mean.
    Intervals of means are a bootstrap over features; they do not cover another seed of the SAE or of the LLM.

    ``functional_correlation`` stands beside the decoder cosine because the two disagree: a decoder row may stay
    while the latent comes to mean something else.

    The tables ``paths`` and ``lengths`` hold how far features went over the series and how far they came, of the track
    and of its null chains; ``free_null`` the stages between LLM checkpoints of equal weights, which count as one.

    Restricted (``--only_kept``), every number is of features that kept their identity: over the stage, to the last
    snapshot, or throughout. What cannot be told for them is left out: FVU, ``free_null`` and ``null_chain``.

    On a null chain, whose snapshots share one LLM step, curves are over the place in the chain (``position``).

    Nulls: see ``settings["nulls"]`` in the result. Trajectories in the plane of the most variance look like smooth
    arcs for a random walk too.

    Args:
        trajectories: Number of features drawn by the seed for the picture of trajectories.
        features: These features instead of drawn ones; an empty list draws.
        replicates: Bootstrap replicates.
        seed: Seed of the draw and of the bootstrap.

    Raises:
        ValueError: If a number is out of range.
    """

    min_snapshots: ClassVar[int] = 2
    restrictable: ClassVar[bool] = True

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
        self.features = list(features) if features else None
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
            raise ValueError(f"{track.path} holds {len(track)} of the at least 2 snapshots that drift compares.")
        asked = track.indices(self.features or ())
        chain = share_a_step(track.steps)
        steps = list(range(len(track))) if chain else track.steps
        rng = np.random.default_rng(self.seed)
        cosines, rotation = _compare(track)
        table = _feature_table(track, cosines, steps)
        if self.kept is not None:
            table = restrict_rows(table, self.kept)
        population = drift_population(table, steps, rng, self.replicates)
        paths = self._paths(track, table)
        chosen = asked or self._choose(table, steps, rng)
        counts = table.groupby(["step", "status"]).size().unstack(fill_value=0).reindex(steps, fill_value=0)
        lengths = length_table(paths, rng, self.replicates)
        calibration = calibrate(track, self.kept)
        scalars = drift_scalars(population, counts) | calibrated_scalars(calibration)
        figures = {
            "adjacent": adjacent_figure(population, steps),
            "to_last": to_last_figure(population, steps, 1 / np.sqrt(track.facts["d_in"])),
            "identity": identity_figure(population, table, steps),
            "cosine_to_previous": ridge_figure(table, steps),
        }
        tables = {
            "drift": table,
            "population": population,
            "status": counts.reset_index().rename_axis(columns=None),
            "paths": paths,
            "lengths": lengths,
        }
        explained: list[float] = []
        if chosen:
            plane = principal_plane(np.stack([unit_rows(s) for s in track.decoder(chosen).numpy()]))
            figures["trajectories"] = trajectory_figure(plane, chosen, steps)
            tables["trajectories"] = trajectory_table(plane, chosen, steps)
            explained = plane.explained.tolist()
        if len(calibration.stages):
            figures["controls"] = controls_figure(calibration.stages, calibration.chain, steps)
            tables |= {"calibration": calibration.stages, "excess": calibration.features}
        if len(calibration.chain):
            tables["null_chain"] = calibration.chain
        if self.kept is None and len(free := free_null(track.whole)):
            tables["free_null"] = free
        settings = {
            "seed": self.seed,
            "replicates": self.replicates,
            "frozen_below": FROZEN,
            "rotation": rotation,
            "rotation_meaning": ROTATION[rotation],
            "random_direction_sd": 1 / np.sqrt(track.facts["d_in"]),
            "nulls": NULLS,
            "controls": CONTROLS if len(calibration.stages) else NO_CONTROLS.format(path=track.path),
            "coverage": COVERAGE,
            "trajectory_features": chosen,
            "trajectory_features_drawn": self.features is None,
            "trajectory_axes": TRAJECTORIES,
            "trajectory_explained": explained,
        }
        names = dict(zip(steps, place_names(track.steps), strict=True))
        summary = drift_summary(population, lengths, calibration.stages, names)
        if not len(calibration.stages) and "control" not in track.facts:
            summary += f" {settings['controls']}"
        result = AnalysisResult(tables, figures, scalars, settings, summary, {name: CAPTIONS[name] for name in figures})
        return _by_place(result, track.steps) if chain else result

    def _paths(self, track: Track, table: pd.DataFrame) -> pd.DataFrame:
        """Lengths of the track's features' paths and, unless restricted, of those of its null chains."""
        found = {"track": path_table(table, len(track))}
        for chain in null_chains(track) if self.kept is None else ():
            places = list(range(len(chain)))
            found[chain.path.name] = path_table(_feature_table(chain, _compare(chain)[0], places), len(chain))
        return pd.concat([part.assign(series=name) for name, part in found.items()], ignore_index=True)

    def _choose(self, table: pd.DataFrame, steps: list[int], rng: np.random.Generator) -> list[int]:
        """A seeded draw of the features for the picture, among those that can be followed throughout.

        Restricted, among those that kept their identity throughout, and none if none did.
        """
        count = int(table["feature"].max()) + 1
        first, last = table[table["step"] == steps[0]], table[table["step"] == steps[-1]]
        followed = first.loc[~first["revived_later"], "feature"]
        candidates = np.intersect1d(followed, last.loc[last["status"] != "dead", "feature"])
        if self.kept is not None:
            candidates = np.intersect1d(candidates, np.flatnonzero(self.kept.throughout))
        if self.kept is None and not len(candidates):
            candidates = np.arange(count)
        drawn = rng.choice(candidates, size=min(self.trajectories, len(candidates)), replace=False)
        return sorted(int(i) for i in drawn)


def _compare(track: Track) -> tuple[list[dict[str, Floats]], str]:
    """Cosines of every snapshot to the one before and to the last; at most four dictionaries are held at once."""
    snapshots = list(track)
    transports = [None, *(rotation_between(track, *pair) for pair in pairwise(snapshots))]
    known = [transport for transport in transports[1:] if transport is not None]
    to_last = _maps_to_last(known) if len(known) == len(snapshots) - 1 else None
    last = _directions(snapshots[-1])
    previous: dict[str, Floats] | None = None
    found = []
    for t, snapshot in enumerate(snapshots):
        here = _directions(snapshot)
        cosines: dict[str, Floats] = {}
        if previous is not None:
            ends = ends_of_stage(track, snapshots[t - 1], snapshot)
            began = previous if ends[0] is snapshots[t - 1] else _directions(ends[0])
            ended = here if ends[1] is snapshot else _directions(ends[1])
            still = frozen(began["decoder"], ended["decoder"], transports[t])
            revived = revived_between(track, snapshots[t - 1], snapshot)
            use = alive(ends[0]) & alive(ends[1]) & ~revived & ~still
            rotation = (
                transports[t] if to_last is not None else fitted_rotation(began["decoder"], ended["decoder"], use)
            )
            cosines |= _cosines(began, ended, rotation, "previous")
            cosines["frozen"] = still.astype(np.float64)
        if t < len(snapshots) - 1:
            use = alive(snapshot) & alive(snapshots[-1]) & ~revived_between(track, snapshot, snapshots[-1])
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


def _by_place(result: AnalysisResult, steps: list[int]) -> AnalysisResult:
    """A result of snapshots that share LLM steps, made by their place: with both, and with no scalars over steps."""
    tables = {}
    for name, table in result.tables.items():
        if "step" not in table:  # of whole paths
            tables[name] = table
            continue
        place = table["step"].to_numpy()
        tables[name] = table.assign(step=np.asarray(steps)[place], position=place)
    tables["population"]["gap_decades"] = tables["population"]["gap_decades"] * 0.0
    for figure in result.figures.values():
        label_places(figure)
    settings = {**result.settings, "axis": "place in the chain: its snapshots share LLM steps"}
    return AnalysisResult(tables, result.figures, {}, settings, result.summary, result.captions)


def _feature_table(track: Track, cosines: list[dict[str, Floats]], steps: list[int]) -> pd.DataFrame:
    """One row per feature and snapshot: every cosine, the functional correlation, and what the row may be used for."""
    snapshots = list(track)
    tables, walks = [], dict.fromkeys(PREVIOUS, np.ones(len(cosines[0][LAST[0]])))
    for t in reversed(range(len(snapshots))):
        snapshot, found = snapshots[t], cosines[t]
        count = len(found[LAST[0]])
        missing = np.full(count, np.nan)
        before = snapshots[t - 1] if t else None
        revived = flags(snapshot, "revived") if before is None else revived_between(track, before, snapshot)
        living = alive(snapshot)
        still = found.get("frozen", np.zeros(count)) > 0
        later = revived_between(track, snapshot, snapshots[-1])
        from_alive = np.ones(count, dtype=bool) if before is None else alive(ends_of_stage(track, before, snapshot)[0])
        columns: dict[str, Any] = {
            "feature": np.arange(count),
            "step": steps[t],
            "status": np.select([~living, revived, still], ["dead", "revived", "frozen"], "alive"),
            "alive_before": from_alive,
            "revived_later": later,
            "followed_to_last": living & alive(snapshots[-1]) & ~later,
        }
        columns |= {name: found.get(name, missing) for name in PREVIOUS}
        columns["functional_correlation"] = missing if before is None else correlation_between(track, before, snapshot)
        columns |= {name: found[name] for name in LAST}
        columns |= dict(zip(WALKS, walks.values(), strict=True))
        walks = {name: walk * found.get(name, missing) for name, walk in walks.items()}
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables[::-1], ignore_index=True)
