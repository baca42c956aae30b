"""A snapshot: the SAE at the end of a stage, with what was measured of it, in one directory."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from torch import Tensor

from saetrack.hub import HubFolder
from saetrack.lm.checkpoints import LLMCheckpoint
from saetrack.lm.local.recognise import format_from_record
from saetrack.sae import SAE, sae_from_record
from saetrack.tensor_files import RESTORE, damage, read_tensor, read_tensors

SNAPSHOT_NAME = re.compile(r"^(?P<number>\d{4,})-step(?P<step>\d+)$")
SNAPSHOTS = "snapshots"
WEIGHTS = "sae_weights.safetensors"
STATISTICS = "statistics.safetensors"
FEATURES = "features.parquet"
METADATA = "metadata.json"


class Snapshot:
    """The SAE at the end of a stage, with its statistics.

    Args:
        path: The snapshot's directory, ``runs/NAME/HOOKPOINT/snapshots/0007-step64``: ``number`` 7 in the order of
            training, LLM ``step`` 64. ``position`` is its place in the track.
        hub: Where the track comes from when it is on the Hub: files that are not here are then downloaded.
    """

    def __init__(self, path: Path, hub: HubFolder | None = None) -> None:
        match = SNAPSHOT_NAME.match(path.name)
        if match is None:
            raise ValueError(f"{path} is not a snapshot's directory; expected a name like 0007-step64.")
        self.path = path
        self._hub = hub
        self.number = self.position = int(match["number"])
        self.step = int(match["step"])

    def __repr__(self) -> str:
        return f"Snapshot({str(self.path)!r})"

    def file(self, name: str) -> Path:
        """A file of the snapshot, e.g. ``sae_weights.safetensors``; from the Hub, it is downloaded when asked for."""
        path = self.path / name
        if self._hub is not None and not path.exists():
            return self._hub.fetch(f"{SNAPSHOTS}/{self.path.name}/{name}")
        return path

    def check_weights(self) -> None:
        """Raise ValueError if its weights are truncated or are no safetensors file."""
        error = damage(self.path / WEIGHTS)
        if error is not None:
            raise ValueError(f"{self.path} is damaged: {WEIGHTS} cannot be read ({error}). {RESTORE}")

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The facts of ``metadata.json``: the LLM checkpoint, the SAE's class, and the quality of the snapshot."""
        return read_json(self.file(METADATA))

    @property
    def norm_limit(self) -> float:
        """Norm over which activations of its LLM checkpoint are left out, in the LLM's own units; may be infinite."""
        limit = self.metadata.get("norm_limit")
        return math.inf if limit is None else float(limit)

    @property
    def llm(self) -> LLMCheckpoint:
        """The LLM checkpoint this snapshot was trained on."""
        facts = self.metadata["llm"]
        return LLMCheckpoint(
            facts["model"],
            facts["revision"],
            facts["step"],
            facts["tokens"],
            facts.get("cache_dir"),
            format_from_record(facts.get("format")),
        )

    def sae(self) -> SAE:
        """The SAE, in the LLM's own units (the activation scale is folded into its weights)."""
        sae = sae_from_record(self.metadata["sae"])
        sae.load_state_dict(read_tensors(self.file(WEIGHTS)))
        return sae.eval().requires_grad_(False)

    def tensor(self, name: str) -> Tensor:
        """One tensor of the SAE, e.g. ``W_dec`` ``[d_sae, d_in]``; only that tensor is read.

        Raises:
            ValueError: If there is no tensor of that name; the message lists the names.
        """
        return read_tensor(self.file(WEIGHTS), name)

    def statistics(self, name: str) -> Tensor:
        """One array of ``statistics.safetensors``.

        Args:
            name: ``mean`` ``[d_in]``, ``covariance`` ``[d_in, d_in]`` (both of the LLM's activations, in its
                units), ``scale`` ``[1]``, or ``transport`` ``[d_in, d_in]`` when the stage began with it.

        Raises:
            ValueError: If there is no array of that name; the message lists the names.
        """
        return read_tensor(self.file(STATISTICS), name)

    @cached_property
    def features(self) -> pd.DataFrame:
        """One row per feature: firing statistics on the evaluation split, revivals, identity.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged.
        """
        path = self.file(FEATURES)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there, and every snapshot has one. {RESTORE}")
        try:
            return pd.read_parquet(path)
        except pa.ArrowException as error:
            raise ValueError(f"{path} is damaged ({error}). {RESTORE}") from error


def feature_indices(features: Iterable[int], d_sae: int, path: Path) -> list[int]:
    """Indices of features of a track as plain numbers.

    Raises:
        ValueError: If one is no whole number from 0 to d_sae - 1.
    """
    found = []
    for feature in features:
        try:
            found.append(index(feature))
        except TypeError:  # a fraction
            found.append(-1)
        if not 0 <= found[-1] < d_sae:
            raise ValueError(
                f"There is no feature {feature}: {path} has {d_sae}; give whole numbers from 0 to {d_sae - 1}."
            )
    return found


def read_json(path: Path) -> dict[str, Any]:
    """What a json file of a track holds.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). {RESTORE}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{path} is damaged (it holds a {type(facts).__name__}, no facts). {RESTORE}")
    return facts
