"""A run folder that holds something already: a complete track, or a resume file to go on from."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from saetrack.lm.checkpoints import LLMCheckpoint, weight_hash
from saetrack.pickles import DAMAGED, reason
from saetrack.track import Track, tracks_in

_SERIES = ("data", "model", "scheduler")
"""The sections of a configuration that say what the track is; the others say how it is made."""

_NO_PART_OF_A_TRACK = ("track_dir", "cache_dir", "watch", "steps")
"""Keys that do not make another track: where it and its caches lie, who waits, and how its steps are spelt, for the
steps themselves are compared."""


def complete_tracks(
    track_dir: Path, hookpoints: Sequence[str], wanted: Sequence[LLMCheckpoint], may_skip: bool
) -> dict[str, Track]:
    """The tracks of a run, by hookpoint, if all of them are there and complete; else none.

    Args:
        track_dir: The run's folder.
        hookpoints: Those of the run.
        wanted: The LLM checkpoints of a complete track.
        may_skip: Whether the track chose among them.
    """
    paths = {hookpoint: track_dir / hookpoint for hookpoint in hookpoints}
    if not set(paths.values()) <= set(tracks_in(track_dir)):
        return {}
    tracks = {hookpoint: Track.open(path) for hookpoint, path in paths.items()}
    steps = [checkpoint.step for checkpoint in wanted]
    return tracks if all(_covers(track.steps, steps, may_skip) for track in tracks.values()) else {}


def _covers(have: list[int], wanted: list[int], may_skip: bool) -> bool:
    """Whether a track has all the LLM steps that are wanted, or all that its grid has chosen of them."""
    if not may_skip:
        return have == wanted
    return (have[:1], have[-1:]) == (wanted[:1], wanted[-1:]) and set(have) <= set(wanted)


def refuse_another_configuration(
    track_dir: Path,
    tracks: Collection[Track],
    wanted: Sequence[LLMCheckpoint],
    now: Mapping[str, Any],
    default: Mapping[str, Any],
) -> None:
    """Refuse a configuration that would have made another track than the complete one that is there.

    The LLM may have moved, or be spelt otherwise: it is known by its weights.

    Args:
        track_dir: The run's folder.
        tracks: What it holds.
        wanted: The LLM checkpoints by the configuration.
        now: The configuration.
        default: The defaults of its keys.

    Raises:
        FileExistsError: If there is a difference; both values are named.
        ValueError: If the configuration that is kept with the track is damaged.
    """
    path = track_dir / "config.yaml"
    try:
        saved = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({reason(error)}), so nothing says how the complete track in {track_dir} was made. "
            "Restore it, or choose another `scheduler.track_dir`; `saetrack analyze` reads the track without it."
        ) from error
    for section in _SERIES:
        found = _difference(section, now[section], saved.get(section, {}), default.get(section, {}))
        if found and not (found.startswith("data.source") and _have_the_weights(tracks, wanted)):
            raise FileExistsError(
                f"{track_dir} holds a complete track made with {found}. Choose another `scheduler.track_dir`."
            )


def _have_the_weights(tracks: Collection[Track], checkpoints: Sequence[LLMCheckpoint]) -> bool:
    """Whether LLM checkpoints have the weights that the tracks were trained on, as far as anything is known."""
    now = {checkpoint.step: weight_hash(checkpoint) for checkpoint in checkpoints}
    pairs = [(snapshot.metadata["llm"]["weight_hash"], now[snapshot.step]) for track in tracks for snapshot in track]
    return all(was is not None and was == is_now for was, is_now in pairs)


def _difference(name: str, now: Any, saved: Any, default: Any) -> str | None:
    """What of two configurations makes another track, in words; None where nothing does.

    What the saved one does not name is newer than the track, which is as the default says.

    Example:
        >>> defaults, saved = {"k": 32, "layout": "packed"}, {"k": 24, "cache_dir": "here"}
        >>> _difference("sae", {"k": 24, "layout": "packed", "cache_dir": "there"}, saved, defaults)
        >>> _difference("sae", {"k": 24, "layout": "masked"}, saved, defaults)
        'sae.layout packed, not masked'
    """
    if not (isinstance(now, dict) and isinstance(saved, dict)):
        return None if now == saved else f"{name} {saved}, not {now}"
    default = default if isinstance(default, dict) else {}
    # the source last: a difference there may be none
    for key in sorted(now.keys() - set(_NO_PART_OF_A_TRACK), key=lambda key: (key == "source", key)):
        before = saved.get(key, default.get(key))
        if found := _difference(f"{name}.{key}", now[key], before, default.get(key)):
            return found
    return None


def refuse_damage(path: Path, track_dir: Path) -> None:
    """Refuse a resume file that cannot be read, before anything is built; one that is not there is none.

    Raises:
        ValueError: If it is damaged, or no resume file of saetrack's.
    """
    if not path.is_file():
        return
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is cut off, or was never a resume file")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged ({reason(error)}). {how_to_go_on_without(track_dir)}") from error
    if not (isinstance(content, dict) and {"saes", "state_dict", "callbacks"} <= content.keys()):
        raise ValueError(f"{path} is no resume file of saetrack. {how_to_go_on_without(track_dir)}")


def how_to_go_on_without(track_dir: Path) -> str:
    """What to do when the resume file of a run is lost: its snapshots are not."""
    whole = [track for track in map(Track.open, tracks_in(track_dir)) if len(track)]
    if not whole:
        return "Nothing is trained yet; leave `--ckpt_path` out."
    return (
        f"Restore the file; or begin with `--model.start {track_dir}@{whole[0].steps[-1]}` and another "
        f"`scheduler.track_dir`, for the snapshots in {track_dir} are whole."
    )
