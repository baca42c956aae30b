"""The track: what training writes and analyses read, one directory per hookpoint and run.

A snapshot is written into a directory whose name begins with a dot and then renamed, so a directory
without the dot is complete and the listing is the list: there is no index that could disagree with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from torch import Tensor

from saetrack.hub import HubFolder, is_hub_address
from saetrack.lm.tokens import TokenRows
from saetrack.sae import SAE, save_saelens
from saetrack.snapshot import (
    FEATURES,
    METADATA,
    SNAPSHOT_NAME,
    SNAPSHOTS,
    STATISTICS,
    WEIGHTS,
    Snapshot,
    feature_indices,
    read_json,
)
from saetrack.storage import make_readable, whole_folder, write_json
from saetrack.tensor_files import RESTORE, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from saetrack.report import Plots

__all__ = ["SCHEMA", "Snapshot", "Track", "tracks_in"]

SCHEMA = 1
"""Version of the layout on disk; a reader refuses a track whose schema is newer than this."""

_TRACK_FILE = "track.json"
_TOKENS = "tokens.safetensors"


class Track(Sequence[Snapshot]):
    """The snapshots of one hookpoint in one run, by increasing LLM step; those of a control as they were trained.

    ``Track.open`` is the way in. It is cheap: it reads ``track.json``, lists a directory and checks the
    headers of the weight files.

    Args:
        path: The track's directory, ``runs/NAME/HOOKPOINT``.
        facts: The content of its ``track.json``.
        hub: Where it comes from when it is on the Hub; ``path`` is then its place in the Hub's cache.
    """

    def __init__(self, path: Path, facts: dict[str, Any], hub: HubFolder | None = None) -> None:
        self.path = path
        self._hub = hub
        self.facts = facts
        self.whole = self
        self.refresh()

    @classmethod
    def open(cls, path: str | Path) -> Track:
        """Open a track, or a run's folder that holds exactly one.

        Args:
            path: ``runs/NAME/HOOKPOINT`` or ``runs/NAME``; or ``hf://owner/name``, with ``@revision`` if need be, of
                which only the facts are downloaded, and each snapshot when its tensors are asked for.

        Raises:
            FileNotFoundError: If there is no track.
            ValueError: If a run holds several hookpoints, the schema is newer than this version reads, or
                ``track.json`` or a snapshot's weights are damaged.
        """
        hub: HubFolder | None = None
        if is_hub_address(path):
            hub = HubFolder.open(str(path), [_TRACK_FILE, f"{SNAPSHOTS}/*/{METADATA}"])
            path = hub.path
        path = Path(path)
        if not (path / _TRACK_FILE).is_file():
            path = _only_track_in(path)
        facts = read_json(path / _TRACK_FILE)
        if not isinstance(facts.get("schema"), int):
            raise ValueError(f"{path / _TRACK_FILE} is damaged (it names no schema). {RESTORE}")
        if facts["schema"] > SCHEMA:
            raise ValueError(
                f"{path} was written with track schema {facts['schema']}, but this saetrack reads schemas up to "
                f"{SCHEMA}; install saetrack {facts['saetrack']} or newer."
            )
        return cls(path, facts, hub)

    @classmethod
    def create(cls, path: str | Path, facts: Mapping[str, Any], tokens: Mapping[str, TokenRows]) -> Track:
        """Begin a track: its directory, ``track.json``, and the rows that its measures are taken on.

        Args:
            path: The directory to make, ``runs/NAME/HOOKPOINT``.
            facts: What ``track.json`` records beside the schema.
            tokens: The rows of the ``selection`` and ``evaluation`` splits. They are stored in the track, so
                an analysis needs no corpus.

        Raises:
            FileExistsError: If a track is there already.
        """
        path = Path(path)
        if (path / _TRACK_FILE).exists():
            raise FileExistsError(f"{path} already holds a track; choose another `scheduler.track_dir`.")
        (path / SNAPSHOTS).mkdir(parents=True, exist_ok=True)
        arrays = {}
        for split, rows in tokens.items():
            arrays[f"{split}.tokens"] = np.ascontiguousarray(rows.tokens, dtype=np.int32)
            arrays[f"{split}.documents"] = np.ascontiguousarray(rows.documents, dtype=np.int32)
        save_arrays(arrays, path / f".{_TOKENS}")
        make_readable(path / f".{_TOKENS}")
        (path / f".{_TOKENS}").replace(path / _TOKENS)
        write_json(path / _TRACK_FILE, {"schema": SCHEMA, **facts})
        return cls.open(path)

    def refresh(self) -> None:
        """List all snapshots again, as after one was written.

        Raises:
            ValueError: If the weights of a snapshot are truncated or are no safetensors file.
        """
        folder = self.path / SNAPSHOTS
        paths = [p for p in folder.iterdir() if SNAPSHOT_NAME.match(p.name)] if folder.is_dir() else []
        by_step = "control" not in self.facts  # a null control has one LLM step all through
        listed = (Snapshot(path, self._hub) for path in paths)
        self._snapshots = sorted(listed, key=lambda s: (s.step if by_step else 0, s.number))
        self._stands_for: dict[int, Snapshot] = {}  # by number of those that are left out
        self._left_out: list[Snapshot] = []
        for position, snapshot in enumerate(self._snapshots):
            snapshot.position = position
        if self._hub is None:
            for snapshot in self._snapshots:
                snapshot.check_weights()

    def __repr__(self) -> str:
        return f"Track({str(self.path)!r}, {len(self)} snapshot{'s' if len(self) != 1 else ''})"

    def __len__(self) -> int:
        return len(self._snapshots)

    def __getitem__(self, index: Any) -> Any:
        return self._snapshots[index]

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self._snapshots)

    def file(self, name: str) -> Path:
        """A file of the track, e.g. ``track.json``; from the Hub, it is downloaded when asked for."""
        return self.path / name if self._hub is None else self._hub.fetch(name)

    @property
    def steps(self) -> list[int]:
        """LLM step of every snapshot, in the order of the track: increasing, but in a control."""
        return [snapshot.step for snapshot in self]

    @property
    def analyses_dir(self) -> Path:
        """Where the results of analyses lie, a directory for each."""
        return self.path / "analyses"

    @property
    def plot(self) -> Plots:
        """The report's figures in matplotlib: ``plot.quality()``, ``.formation()``, ``.drift()``, ``.feature(17)``."""
        from saetrack.report import Plots  # the one import upwards, and only of who draws

        return Plots(self)

    @property
    def training_recipe(self) -> dict[str, Any]:
        """How a stage of it is trained, which its controls share; empty where the track was written by 0.1.0."""
        return {key: v for key, v in self.facts.get("recipe", {}).items() if not key.startswith("scheduler.")}

    @property
    def is_complete_control(self) -> bool:
        """Whether this is a control, and has all its snapshots."""
        return "control" in self.facts and len(self) == self.facts["control"]["stages"]

    def controls(self, kind: str | None = None) -> list[Track]:
        """The complete controls of this track, by name; ``track.facts["control"]`` says what each is.

        Args:
            kind: Only those that are ``null``, ``replica``, ``scratch``, ``thinned`` or ``random``.
        """
        found = (Track.open(path) for path in tracks_in(self.path / "controls"))
        return [t for t in found if t.is_complete_control and kind in (None, t.facts["control"]["kind"])]

    def at(self, step: int) -> Snapshot:
        """The snapshot of one LLM step.

        Raises:
            ValueError: If the track has none; the message names the nearest steps it has.
        """
        for snapshot in self:
            if snapshot.step == step:
                return snapshot
        nearest = sorted(self.steps, key=lambda s: abs(s - step))[:3]
        raise ValueError(f"{self.path} has no snapshot of LLM step {step}; the nearest are {sorted(nearest)}.")

    def numbered(self, number: int) -> Snapshot:
        """The snapshot of a number, which is its place in the order of training.

        Raises:
            ValueError: If the track has none.
        """
        for snapshot in self:
            if snapshot.number == number:
                return snapshot
        raise ValueError(f"{self.path} has no snapshot {number}; it has {sorted(s.number for s in self)}.")

    def before(self, snapshot: Snapshot) -> Snapshot | None:
        """The snapshot that a stage began from, and that its ``fvu_shift`` and correlations are against.

        In a track that was trained forward in one go this is the neighbour of the next lower LLM step. None for the
        first that was trained, and where that snapshot is not here.
        """
        there = [*self, *self._left_out]
        if "compared_with" in snapshot.metadata:  # the tracks of 0.1.0 are chains, and do not say so
            of = snapshot.metadata["compared_with"]
            found = (s for s in there if s.path.name == of and s.number < snapshot.number)
        else:
            found = (s for s in there if s.number == snapshot.number - 1)
        before = next(found, None)
        before = before if before is None else self._stands_for.get(before.number, before)
        return None if before is snapshot else before

    def began_from(self, snapshot: Snapshot) -> Snapshot | None:
        """The snapshot whose weights the stage of ``snapshot`` began with.

        It is that of :meth:`before`; where that one stands for LLM checkpoints of equal weights (:meth:`distinct`), the
        last that was trained on them.
        """
        return None if self.before(snapshot) is None else self.whole.before(self.whole.numbered(snapshot.number))

    def distinct(self) -> Track:
        """The same track with neighbouring LLM checkpoints of equal weights as one, and all of it as ``whole``.

        Of those that the series begins with, the snapshot that was trained last stands for all, for the next stage
        began from it; of later ones the one that was trained first. A control is as it is: it repeats LLM checkpoints.
        """
        groups = self.equal_weights
        if not groups:
            return self
        track = Track(self.path, self.facts, self._hub)
        track.whole = self
        for steps in groups:
            group = sorted((s for s in track if s.step in steps), key=lambda s: s.number)
            stands = group[-1] if group[0].number == 0 else group[0]
            rest = [s for s in group if s is not stands]
            track._stands_for |= {s.number: stands for s in rest}
            track._left_out += rest
        track._snapshots = [s for s in track if s not in track._left_out]
        for position, snapshot in enumerate(track):
            snapshot.position = position
        return track

    @property
    def equal_weights(self) -> list[list[int]]:
        """LLM steps of neighbouring LLM checkpoints with equal weights, as far as hashes are known."""
        if "control" in self.facts:
            return []
        by_hash = groupby(self, key=lambda s: s.metadata["llm"].get("weight_hash") or s.path)
        found = ([s.step for s in group] for _, group in by_hash)
        return [steps for steps in found if len(steps) > 1]

    @property
    def is_forward_chain(self) -> bool:
        """Whether every stage began from the snapshot of the next lower LLM step, in that order."""
        return all(a.number < b.number and self.before(b) is a for a, b in pairwise(self))

    def metrics(self) -> pd.DataFrame:
        """One row per snapshot: its place, LLM step and tokens, and every number of its metadata.

        ``from_step`` is the LLM step of the snapshot that :meth:`before` gives, NaN where there is none.
        """
        rows = []
        for snapshot in self:
            facts, before = snapshot.metadata, self.before(snapshot)
            left_out = ("position", "warm_started_from", "compared_with")
            numbers = {k: v for k, v in facts.items() if not isinstance(v, (dict, list, str)) and k not in left_out}
            row = {"position": snapshot.position, "step": snapshot.step, "tokens": snapshot.llm.tokens} | numbers
            rows.append(row | {"warm_start": facts["warm_start"], "from_step": before.step if before else np.nan})
        return pd.DataFrame(rows)

    def decoder(self, features: Sequence[int] | None = None) -> Tensor:
        """Decoder rows through the track.

        Args:
            features: Indices of the features, or None for all.

        Returns:
            Shape ``[len(track), n, d_in]``; row norms are 1 / scale of the snapshot.

        Raises:
            ValueError: If the SAEs have not got one of the features.
        """
        rows = None if features is None else self.indices(features)
        return torch.stack([read_rows(s.file(WEIGHTS), "W_dec", rows) for s in self])

    def encoder(self, features: Sequence[int] | None = None) -> Tensor:
        """Encoder directions, columns of ``W_enc`` as rows, shape ``[len(track), n, d_in]``; otherwise as `decoder`."""
        columns = slice(None) if features is None else self.indices(features)
        return torch.stack([s.tensor("W_enc")[:, columns].T.contiguous() for s in self])

    def indices(self, features: Iterable[int]) -> list[int]:
        """Indices of features as plain numbers.

        Raises:
            ValueError: If one is no whole number, or the SAEs of the track have no feature of it.
        """
        return feature_indices(features, self.facts["d_sae"], self.path)

    def tokens(self, split: str) -> TokenRows:
        """The token rows of one split, as stored in the track.

        Args:
            split: ``selection`` (choose on it) or ``evaluation`` (measure on it).

        Raises:
            ValueError: For another name.
        """
        if split not in ("selection", "evaluation"):
            raise ValueError(f"A track holds the splits 'selection' and 'evaluation', not {split!r}.")
        arrays = self._token_arrays
        if f"{split}.tokens" not in arrays:
            raise ValueError(
                f"{self.path} holds no token rows, for it was imported. Analyses that read text need a track that "
                "`saetrack fit` wrote."
            )
        rows = (arrays[f"{split}.tokens"], arrays[f"{split}.documents"], self.facts["bos_token_id"])
        return TokenRows(*rows, tuple(self.facts.get("left_out_ids", ())), self.facts.get("layout", "packed"))

    @cached_property
    def _token_arrays(self) -> dict[str, np.ndarray]:
        path = self.file(_TOKENS)
        try:
            arrays: dict[str, np.ndarray] = load_arrays(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}). {RESTORE}") from error
        return arrays

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The one tokenizer of the series."""
        from transformers import AutoTokenizer

        name, revision = self.facts["tokenizer"]
        return AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=False)

    def write(
        self,
        number: int,
        sae: SAE,
        metadata: Mapping[str, Any],
        statistics: Mapping[str, Tensor],
        features: pd.DataFrame,
    ) -> Snapshot:
        """Write a snapshot, all of it or nothing.

        Args:
            number: Its place in the order of training, from 0.
            sae: The SAE in the LLM's own units, i.e. ``sae.folded(scale)``.
            metadata: Facts for ``metadata.json``; ``llm.step`` names the directory.
            statistics: Arrays for ``statistics.safetensors``.
            features: One row per feature.

        Returns:
            The snapshot. One that was already of this number and step is replaced: it is there only when a
            run was killed between writing it and writing its resume file, and the two are then equal.
        """
        step = metadata["llm"]["step"]
        final = self.path / SNAPSHOTS / f"{number:04d}-step{step}"
        try:
            with whole_folder(final) as folder:
                save_saelens(sae, folder, self._saelens_metadata(metadata))
                save_file({k: v.contiguous().cpu() for k, v in statistics.items()}, folder / STATISTICS)
                features.to_parquet(folder / FEATURES, index=False)
                write_json(folder / METADATA, metadata)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"Snapshot {final} could not be written: {error}. The snapshots before it are whole. Make room, "
                "then run `saetrack fit` again with `--ckpt_path last`."
            ) from error
        self.refresh()
        return self.numbered(number)

    def _saelens_metadata(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        revision = metadata["llm"]["revision"]
        return {
            "model_name": metadata["llm"]["model"],
            "hook_name": self.facts["hookpoint"],
            "context_size": self.facts["context_size"],
            "prepend_bos": self.facts["bos_token_id"] is not None,
            "model_from_pretrained_kwargs": {} if revision is None else {"revision": revision},
        }


def tracks_in(run: str | Path) -> list[Path]:
    """The directories of a run's tracks, one per hookpoint, sorted by name."""
    run = Path(run)
    return sorted(p.parent for p in run.glob(f"*/{_TRACK_FILE}"))


def _only_track_in(path: Path) -> Path:
    tracks = tracks_in(path)
    if not tracks:
        raise FileNotFoundError(
            f"{path} holds no track: there is no {_TRACK_FILE} in it or in a folder of it. "
            "Give the folder that `saetrack fit` wrote, runs/NAME or runs/NAME/HOOKPOINT."
        )
    if len(tracks) > 1:
        names = ", ".join(str(t) for t in tracks)
        raise ValueError(f"{path} holds {len(tracks)} tracks; open one of {names}.")
    return tracks[0]
