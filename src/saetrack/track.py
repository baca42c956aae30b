"""The track: what training writes and analyses read, one directory per hookpoint and run.

A snapshot is written into a directory whose name begins with a dot and then renamed, so a directory
without the dot is complete and the listing is the list: there is no index that could disagree with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from torch import Tensor

from saetrack.hub import HubFolder, is_hub_address
from saetrack.lm.checkpoints import LLMCheckpoint
from saetrack.lm.tokens import TokenRows
from saetrack.sae import SAE, sae_from_record, save_saelens
from saetrack.storage import make_readable, whole_folder, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from saetrack.report import Plots

SCHEMA = 1
"""Version of the layout on disk; a reader refuses a track whose schema is newer than this."""

_SNAPSHOT = re.compile(r"^(?P<position>\d{4,})-step(?P<step>\d+)$")
_TRACK_FILE = "track.json"
_TOKENS = "tokens.safetensors"
_SNAPSHOTS = "snapshots"
_WEIGHTS = "sae_weights.safetensors"
_STATISTICS = "statistics.safetensors"
_FEATURES = "features.parquet"
_METADATA = "metadata.json"


class Snapshot:
    """The SAE at the end of a stage, with its statistics.

    Args:
        path: The snapshot's directory, e.g. ``runs/NAME/HOOKPOINT/snapshots/0007-step64``.
        hub: Where the track comes from when it is on the Hub: files that are not here are then downloaded.
    """

    def __init__(self, path: Path, hub: HubFolder | None = None) -> None:
        match = _SNAPSHOT.match(path.name)
        if match is None:
            raise ValueError(f"{path} is not a snapshot's directory; expected a name like 0007-step64.")
        self.path = path
        self._hub = hub
        self.position = int(match["position"])
        self.step = int(match["step"])

    def __repr__(self) -> str:
        return f"Snapshot({str(self.path)!r})"

    def file(self, name: str) -> Path:
        """A file of the snapshot, e.g. ``sae_weights.safetensors``; from the Hub, it is downloaded when asked for."""
        path = self.path / name
        if self._hub is not None and not path.exists():
            return self._hub.fetch(f"{_SNAPSHOTS}/{self.path.name}/{name}")
        return path

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The facts of ``metadata.json``: the LLM checkpoint, the SAE's class, and the quality of the snapshot."""
        facts: dict[str, Any] = json.loads(self.file(_METADATA).read_text(encoding="utf-8"))
        return facts

    @property
    def llm(self) -> LLMCheckpoint:
        """The LLM checkpoint this snapshot was trained on."""
        facts = self.metadata["llm"]
        return LLMCheckpoint(facts["model"], facts["revision"], facts["step"], facts["tokens"], facts.get("cache_dir"))

    def sae(self) -> SAE:
        """The SAE, in the LLM's own units (the activation scale is folded into its weights)."""
        sae = sae_from_record(self.metadata["sae"])
        with safe_open(self.file(_WEIGHTS), framework="pt") as weights:
            sae.load_state_dict({name: weights.get_tensor(name) for name in weights.keys()})  # noqa: SIM118
        return sae.eval().requires_grad_(False)

    def tensor(self, name: str) -> Tensor:
        """One tensor of the SAE, e.g. ``W_dec`` ``[d_sae, d_in]``; only that tensor is read.

        Raises:
            ValueError: If there is no tensor of that name; the message lists the names.
        """
        return _read_tensor(self.file(_WEIGHTS), name)

    def statistics(self, name: str) -> Tensor:
        """One array of ``statistics.safetensors``.

        Args:
            name: ``mean`` ``[d_in]``, ``covariance`` ``[d_in, d_in]`` (both of the LLM's activations, in its
                units), ``scale`` ``[1]``, or ``transport`` ``[d_in, d_in]`` when the stage began with it.

        Raises:
            ValueError: If there is no array of that name; the message lists the names.
        """
        return _read_tensor(self.file(_STATISTICS), name)

    @cached_property
    def features(self) -> pd.DataFrame:
        """One row per feature: firing statistics on the evaluation split, revivals, identity."""
        return pd.read_parquet(self.file(_FEATURES))


def _read_tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        names = sorted(file.keys())
        if name not in names:
            raise ValueError(f"{path} holds no tensor {name!r}; it holds {', '.join(names)}.")
        tensor: Tensor = file.get_tensor(name)
        return tensor


class Track(Sequence[Snapshot]):
    """The ordered snapshots of one hookpoint in one run.

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
        self.refresh()

    @classmethod
    def open(cls, path: str | Path) -> Track:
        """Open a track, or a run's folder that holds exactly one.

        Args:
            path: ``runs/NAME/HOOKPOINT`` or ``runs/NAME``; or ``hf://owner/name``, with ``@revision`` if need be, of
                which only the facts are downloaded, and each snapshot when its tensors are asked for.

        Raises:
            FileNotFoundError: If there is no track.
            ValueError: If a run holds several hookpoints, the schema is newer than this version reads, or a
                snapshot's weights are damaged.
        """
        hub: HubFolder | None = None
        if is_hub_address(path):
            hub = HubFolder.open(str(path), [_TRACK_FILE, f"{_SNAPSHOTS}/*/{_METADATA}"])
            path = hub.path
        path = Path(path)
        if not (path / _TRACK_FILE).is_file():
            path = _only_track_in(path)
        facts = json.loads((path / _TRACK_FILE).read_text(encoding="utf-8"))
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
        (path / _SNAPSHOTS).mkdir(parents=True, exist_ok=True)
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
        """List the snapshots again, as after one was written.

        Raises:
            ValueError: If the weights of a snapshot are truncated or are no safetensors file.
        """
        folder = self.path / _SNAPSHOTS
        paths = [p for p in folder.iterdir() if _SNAPSHOT.match(p.name)] if folder.is_dir() else []
        self._snapshots = sorted((Snapshot(p, self._hub) for p in paths), key=lambda s: s.position)
        if self._hub is None:
            for snapshot in self._snapshots:
                _check_weights(snapshot.path)

    def __repr__(self) -> str:
        return f"Track({str(self.path)!r}, {len(self)} snapshots)"

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
        """LLM step of every snapshot, in the order of the track."""
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
            kind: Only those that are ``null``, ``replica`` or ``scratch``.
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

    def metrics(self) -> pd.DataFrame:
        """One row per snapshot: ``position``, ``step``, ``tokens`` of the LLM, and every number of its metadata."""
        rows = []
        for snapshot in self:
            numbers = {k: v for k, v in snapshot.metadata.items() if not isinstance(v, (dict, list, str))}
            row = {"position": snapshot.position, "step": snapshot.step, "tokens": snapshot.llm.tokens} | numbers
            rows.append(row | {"warm_start": snapshot.metadata["warm_start"]})
        return pd.DataFrame(rows)

    def decoder(self, features: Sequence[int] | None = None) -> Tensor:
        """Decoder rows through the track.

        Args:
            features: Indices of the features, or None for all.

        Returns:
            Shape ``[len(track), n, d_in]``; row norms are 1 / scale of the snapshot.
        """
        return torch.stack([_rows(s.file(_WEIGHTS), "W_dec", features) for s in self])

    def encoder(self, features: Sequence[int] | None = None) -> Tensor:
        """Encoder directions through the track: the columns of ``W_enc`` as rows, shape ``[len(track), n, d_in]``."""
        columns = slice(None) if features is None else list(features)
        return torch.stack([s.tensor("W_enc")[:, columns].T.contiguous() for s in self])

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
        return TokenRows(arrays[f"{split}.tokens"], arrays[f"{split}.documents"], self.facts["bos_token_id"])

    @cached_property
    def _token_arrays(self) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = load_arrays(self.file(_TOKENS))
        return arrays

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The one tokenizer of the series."""
        from transformers import AutoTokenizer

        name, revision = self.facts["tokenizer"]
        return AutoTokenizer.from_pretrained(name, revision=revision or "main")

    def write(
        self,
        position: int,
        sae: SAE,
        metadata: Mapping[str, Any],
        statistics: Mapping[str, Tensor],
        features: pd.DataFrame,
    ) -> Snapshot:
        """Write a snapshot, all of it or nothing.

        Args:
            position: Its place in the track, from 0.
            sae: The SAE in the LLM's own units, i.e. ``sae.folded(scale)``.
            metadata: Facts for ``metadata.json``; ``llm.step`` names the directory.
            statistics: Arrays for ``statistics.safetensors``.
            features: One row per feature.

        Returns:
            The snapshot. One that was already at this position and step is replaced: it is there only when a
            run was killed between writing it and writing its resume file, and the two are then equal.
        """
        step = metadata["llm"]["step"]
        final = self.path / _SNAPSHOTS / f"{position:04d}-step{step}"
        try:
            with whole_folder(final) as folder:
                save_saelens(sae, folder, self._saelens_metadata(metadata))
                save_file({k: v.contiguous().cpu() for k, v in statistics.items()}, folder / _STATISTICS)
                features.to_parquet(folder / _FEATURES, index=False)
                write_json(folder / _METADATA, {"position": position, **metadata})
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"Snapshot {final} could not be written: {error}. The snapshots before it are whole. Make room, "
                "then run `saetrack fit` again with `--ckpt_path last`."
            ) from error
        self.refresh()
        return Snapshot(final)

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


def _check_weights(path: Path) -> None:
    try:
        with safe_open(path / _WEIGHTS, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged: {_WEIGHTS} cannot be read ({error}). Restore it from a "
            "copy, or begin again in another `scheduler.track_dir`."
        ) from error


def _rows(path: Path, name: str, features: Sequence[int] | None) -> Tensor:
    """Rows of a matrix on disk; with ``features``, only those rows are read."""
    with safe_open(path, framework="pt") as file:
        matrix = file.get_slice(name)
        if features is None:
            whole: Tensor = matrix[:]
            return whole
        return torch.cat([matrix[int(i) : int(i) + 1] for i in features])
