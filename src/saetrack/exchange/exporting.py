"""Write a track for another library, a folder for each LLM checkpoint, or as one folder to share."""

from __future__ import annotations

import shutil
from pathlib import Path

from saetrack.exchange.card import model_card
from saetrack.sae.formats import WRITERS, Origin
from saetrack.storage import whole_folder, write_text
from saetrack.track import Snapshot, Track

OWN = "saetrack"
EXPORT_FORMATS = (OWN, *WRITERS)
_SNAPSHOT_FILES = (
    "cfg.json",
    "sae_weights.safetensors",
    "statistics.safetensors",
    "features.parquet",
    "metadata.json",
)


def export_track(track: Track, library: str, step: str, to: Path, repo: str | None = None) -> list[Path]:
    """Export snapshots.

    Args:
        track: The track.
        library: One of :data:`EXPORT_FORMATS`. ``saetrack`` writes a track with a model card into ``to``; any other
            writes ``to/step64/HOOKPOINT`` for each snapshot, which that library's own loader opens.
        step: ``all``, or the LLM step of one snapshot.
        to: Where to write.
        repo: The repository that the model card says it is in.

    Returns:
        The folders that were written.

    Raises:
        ValueError: If the library is unknown or cannot hold the SAE, or there is no such step. Nothing of the
            snapshot is written then.
        FileExistsError: If a folder to write is there already.
    """
    if library not in EXPORT_FORMATS:
        raise ValueError(f"--format is {library!r}; expected one of {', '.join(EXPORT_FORMATS)}.")
    chosen = _chosen(track, step)
    hookpoint = track.facts["hookpoint"]
    folders = [to] if library == OWN else [to / f"step{snapshot.step}" / hookpoint for snapshot in chosen]
    for folder in folders:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} is there already; choose another folder with `--to`, or remove it.")
    if library == OWN:
        with whole_folder(to) as new:
            _copy_track(track, chosen, new)
            write_text(new / "README.md", model_card(track, chosen, repo))
        return folders
    for snapshot, folder in zip(chosen, folders, strict=True):
        with whole_folder(folder) as new:
            WRITERS[library](snapshot.sae(), new, _origin(track, snapshot))
    return folders


def _chosen(track: Track, step: str) -> list[Snapshot]:
    if not len(track):
        raise ValueError(f"{track.path} holds no snapshots yet, so there is nothing to export.")
    if step == "all":
        return list(track)
    if not step.isdecimal():
        raise ValueError(f"--step is {step!r}; expected all, or the LLM step of a snapshot, one of {track.steps}.")
    return [track.at(int(step))]


def _origin(track: Track, snapshot: Snapshot) -> Origin:
    bos = track.facts["bos_token_id"] is not None
    llm = snapshot.llm
    return Origin(llm.model, llm.revision, track.facts["hookpoint"], track.facts["context_size"], bos)


def _copy_track(track: Track, snapshots: list[Snapshot], to: Path) -> None:
    for name in ("track.json", "tokens.safetensors"):
        shutil.copyfile(track.file(name), to / name)
    for snapshot in snapshots:
        folder = to / "snapshots" / snapshot.path.name
        folder.mkdir(parents=True)
        for name in _SNAPSHOT_FILES:
            shutil.copyfile(snapshot.file(name), folder / name)
