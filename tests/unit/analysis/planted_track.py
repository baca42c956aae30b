"""Tracks on disk whose dictionaries, tables and controls are planted, for analyses that need only the track."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from saetrack.analysis.drift_geometry import unit_rows
from saetrack.lm.tokens import TokenRows
from saetrack.sae import TopKSAE
from saetrack.track import Track


def begin(path: Path, d_in: int, d_sae: int, **facts: Any) -> Track:
    """An empty track; ``d_sae`` is a multiple of ``d_in``."""
    rows = TokenRows(np.zeros((1, 4), dtype=np.int32), np.zeros((1, 4), dtype=np.int32), 0)
    given = {"hookpoint": "h", "context_size": 4, "bos_token_id": 0, "d_in": d_in, "d_sae": d_sae}
    return Track.create(path, {**given, **facts}, {"selection": rows, "evaluation": rows})


def snapshot(
    track: Track,
    step: int,
    decoder: np.ndarray,
    transport: np.ndarray | None = None,
    features: Mapping[str, Any] | None = None,
    scale: float = 1.0,
    **facts: Any,
) -> None:
    """Write a track's next snapshot; the encoder is the decoder.

    Args:
        track: The track.
        step: Of the LLM.
        decoder: ``[d_sae, d_in]``.
        transport: The map that the stage began with, of a `transported` one.
        features: Columns of the feature table beside the index, or other than alive and never revived.
        scale: Of the activations, folded into the weights.
        facts: Of the metadata.
    """
    d_in, d_sae = track.facts["d_in"], track.facts["d_sae"]
    sae = TopKSAE(d_in, d_sae // d_in, k=4)
    sae.W_dec.data = torch.from_numpy(decoder).float() / scale
    sae.W_enc.data = torch.from_numpy(decoder.T).float().contiguous() * scale
    metadata = {
        "llm": {"model": "m", "revision": None, "commit": None, "weight_hash": None, "step": step, "tokens": None},
        "sae": {"class": "saetrack.sae.TopKSAE", "arguments": sae.arguments},
        "warm_start": "prior" if transport is None else "transported",
        "fvu": 0.1,
    }
    statistics = {"mean": torch.zeros(d_in)}
    if transport is not None:
        statistics["transport"] = torch.from_numpy(transport).float()
    table = {"feature": np.arange(d_sae), "dead": False, "revived": False, "functional_correlation": 0.5}
    track.write(len(track), sae, {**metadata, **facts}, statistics, pd.DataFrame({**table, **(features or {})}))


def write_track(path: Path, decoders: Sequence[np.ndarray], steps: Sequence[int], **facts: Any) -> Track:
    """A track of these decoders."""
    d_sae, d_in = decoders[0].shape
    track = begin(path, d_in, d_sae, **facts)
    for step, decoder in zip(steps, decoders, strict=True):
        snapshot(track, step, decoder)
    return track


def random_rows(rng: np.random.Generator, d_sae: int, d_in: int) -> np.ndarray:
    """Independent unit rows."""
    return unit_rows(rng.normal(size=(d_sae, d_in)))


def tangent(rng: np.random.Generator, rows: np.ndarray, drift: float) -> np.ndarray:
    """For every unit row a random vector at a right angle to it, of length sqrt(2 drift)."""
    noise = rng.normal(size=rows.shape)
    noise -= (noise * rows).sum(axis=1, keepdims=True) * rows
    moved: np.ndarray = np.sqrt(2 * drift) * unit_rows(noise)
    return moved


@dataclass(frozen=True)
class Displacements:
    """What moves the rows of a stage's arms, each as 1 - cosine: orthogonal to the row and to each other.

    Args:
        llm: What the change of the LLM does, in all real arms alike.
        noise: What the order of the data does, in every arm its own.
        learning: What training once more does, in all arms alike.
    """

    llm: float = 0.06
    noise: float = 0.04
    learning: float = 0.0


RECIPE = {
    "model.continuity": 0.1,
    "scheduler.steps": [0, 8],
    "scheduler.warm_start": "transported",
    "scheduler.tokens_next": 1000,
}


def planted_stage(
    path: Path,
    rng: np.random.Generator,
    arms: tuple[int, int],
    moves: Displacements = Displacements(),
    shape: tuple[int, int] = (256, 32),
    rotation: np.ndarray | None = None,
) -> Track:
    """A track of two snapshots with its controls.

    Args:
        path: Where to write it.
        rng: Source of the draws.
        arms: Replica controls, and null controls.
        moves: What moves the rows.
        shape: d_sae and d_in.
        rotation: That of the whole space by the change of the LLM ``[d_in, d_in]``, which the stage begins with.
    """
    d_sae, d_in = shape
    start = random_rows(rng, d_sae, d_in)
    still, turn = np.eye(d_in), np.eye(d_in) if rotation is None else rotation
    learnt = tangent(rng, start, moves.learning)
    changed = learnt + tangent(rng, start, moves.llm)

    def arm(common: np.ndarray, frame: np.ndarray) -> np.ndarray:
        # scaled by the tangent of the angle, so that the unit row's 1 - cosine is near the planted one
        ends: np.ndarray = unit_rows(start + common + tangent(rng, start, moves.noise)) @ frame
        return ends

    track = begin(path, d_in, d_sae, recipe=RECIPE)
    snapshot(track, 0, start)
    snapshot(track, 8, arm(changed, turn), turn, {"functional_correlation": 0.3})
    kinds = [("replica", changed, turn, 8)] * arms[0] + [("null", learnt, still, 0)] * arms[1]
    for i, (kind, common, frame, step) in enumerate(kinds):
        control = {"kind": kind, "position": 1, "stages": 2, "replica": i}
        made = begin(path / "controls" / f"{kind}-0001-{i}", d_in, d_sae, recipe=RECIPE, control=control)
        snapshot(made, 0, start)
        snapshot(made, step, arm(common, frame), frame, {"functional_correlation": 0.9})
    return Track.open(path)
