"""The tracks of a run: what is written when one is begun, and what must still hold when it is continued."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import Trainer

import saetrack
from saetrack.lm.checkpoints import LLMCheckpoint
from saetrack.lm.forward import module_name
from saetrack.sae import sae_record
from saetrack.storage import link_or_copy, whole_folder
from saetrack.track import Snapshot, Track, tracks_in
from saetrack.training.datamodule import ActivationDataModule
from saetrack.training.module import SAEModule, refuse_changes

_BEFORE: dict[str, Any] = {"left_out_ids": [], "layout": "packed", "outlier_norm": None}
"""What held for the tracks of 0.1.0, which do not say it."""


def track_facts(module: SAEModule, data: ActivationDataModule, hookpoint: str) -> dict[str, Any]:
    """What makes a track this one and no other: the part of ``track.json`` that may not change."""
    sae = module.sae(hookpoint)
    return {
        "model": _series_name(data),
        "hookpoint": module_name(hookpoint),
        "tokenizer": list(data.source.tokenizer_name),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "sae": sae_record(sae),
        "seed": data.seed,
        "corpus_hash": data.corpus_rows.hash,
        "context_size": data.tokens.context_size,
        "bos_token_id": data.corpus_rows.train.bos_token_id,
        "left_out_ids": list(data.corpus_rows.train.left_out),
        "layout": data.tokens.layout,
        "outlier_norm": data.tokens.outlier_norm,
        "llm_dtype": data.llm_dtype,
    }


def begin(path: Path, facts: Mapping[str, Any], recipe: Mapping[str, Any], data: ActivationDataModule) -> Track:
    """Create a track with the rows that its measures are taken on, and the recipe that its controls must share."""
    rows = {split: data.measuring_rows(split) for split in ("selection", "evaluation")}
    return Track.create(path, {"saetrack": saetrack.__version__, **facts, "recipe": dict(recipe)}, rows)


def adopt(track: Track, snapshot: Snapshot) -> None:
    """Begin a track with a snapshot of another: the same files on the disk, which no snapshot's are ever changed."""
    with whole_folder(track.path / "snapshots" / f"0000-step{snapshot.step}") as folder:
        for file in snapshot.path.iterdir():
            link_or_copy(file, folder / file.name)


def trained(track: Track) -> list[Snapshot]:
    """The snapshots that training was spent on: all but one that was adopted unchanged to begin with."""
    return [snapshot for snapshot in track if snapshot.metadata.get("tokens_trained") != 0]


def refuse_another(track: Track, facts: Mapping[str, Any]) -> None:
    """Refuse a track that was begun with other facts."""
    # the tokenizer by what it does, which is in the corpus hash: in a growing folder its name changes; and the LLM by
    # its weights (`refuse_other_weights`): its folder may have moved, or be spelt otherwise
    same = {name: fact for name, fact in facts.items() if name not in ("tokenizer", "model")}
    refuse_changes({**_BEFORE, **track.facts}, same, str(track.path / "track.json"))


def refuse_other_hookpoints(track_dir: Path, hookpoints: Sequence[str]) -> None:
    """Refuse a run folder with other hookpoints: there is one resume file, and it would be lost."""
    others = [path.name for path in tracks_in(track_dir) if path.name not in hookpoints]
    if others:
        raise FileExistsError(
            f"{track_dir} holds the track of {', '.join(others)}, which is not in data.hookpoints {list(hookpoints)}. "
            "A run's hookpoints are trained together; choose another `scheduler.track_dir`."
        )


def refuse_other_weights(done: Sequence[Snapshot], weight_hashes: Mapping[int, str | None]) -> None:
    """Refuse to go on when an LLM checkpoint that is done has other weights now."""
    for snapshot in done:
        was, now = snapshot.metadata["llm"]["weight_hash"], weight_hashes.get(snapshot.step)
        if was is not None and now is not None and was != now:
            raise ValueError(
                f"The LLM checkpoint of step {snapshot.step} has other weights now ({now[:19]}...) than when "
                f"{snapshot.path} was trained on it ({was[:19]}...). Restore them, or begin another track with "
                "another `scheduler.track_dir`."
            )


def refuse_weights_changed_in(
    checkpoint: LLMCheckpoint, was: str | None, weight_hashes: Mapping[int, str | None]
) -> None:
    """Refuse to go on in the middle of a stage whose LLM checkpoint had other weights when it began, if it is known."""
    if was is not None and weight_hashes.get(checkpoint.step) not in (None, was):
        raise ValueError(
            f"The LLM checkpoint of step {checkpoint.step} has other weights now than when its stage began. Restore "
            "them, or begin another track with another `scheduler.track_dir`."
        )


def refuse_gaps(track: Track, steps: Sequence[int], done: int) -> None:
    """Refuse to go on when a snapshot of a number below ``done`` is not there, or one is that would be lost.

    Args:
        track: The track.
        steps: LLM steps in the order of training.
        done: How many stages the resume file has.
    """
    have = {snapshot.number for snapshot in track}
    missing = [i for i in range(done) if i not in have]
    if missing:
        raise FileNotFoundError(
            f"{track.path} should hold the snapshots 0 to {done - 1}, but {missing} are not there. Restore them "
            "from a copy, or start again in another `scheduler.track_dir`."
        )
    planned = dict(enumerate(steps))
    for snapshot in track:  # one that was written after the last resume file is trained again, to the same bytes
        if planned.get(snapshot.number) != snapshot.step:
            raise ValueError(
                f"{snapshot.path} is finished, but with these `scheduler.steps` stage {snapshot.number} would be of "
                f"LLM step {planned.get(snapshot.number)}. Finish the run with the steps that it had, then add others."
            )


def _series_name(data: ActivationDataModule) -> str:
    """The repository, or the folder that holds all the checkpoints' folders."""
    models = {checkpoint.model for checkpoint in data.checkpoints}
    if data.source.watcher is not None:  # the first of a folder may be there alone
        return data.source.watcher.where
    return models.pop() if len(models) == 1 else os.path.commonpath(models) or ", ".join(sorted(models))


def open_or_begin(
    trainer: Trainer,
    path: Path,
    facts: Mapping[str, Any],
    recipe: Mapping[str, Any],
    data: ActivationDataModule,
    steps: Sequence[int],
) -> Track:
    """Open the track that a run continues, or begin it.

    Args:
        trainer: The trainer; its rank zero writes.
        path: The track's folder.
        facts: As :func:`track_facts` gives them.
        recipe: How the track is trained.
        data: Gives the rows that it is measured on.
        steps: LLM steps of all its snapshots, those to come among them.

    Raises:
        FileExistsError: If snapshots are there and the run does not continue them.
        ValueError: If the track is another one.
    """
    exists = (path / "track.json").is_file()
    snapshots = len(trained(Track.open(path))) if exists else 0
    trainer.strategy.barrier()  # every rank has looked before rank zero creates anything
    if snapshots and trainer.ckpt_path is None:
        go_on = "Continue it with `--ckpt_path last`, or choose" if snapshots <= len(steps) else "Choose"
        raise FileExistsError(
            f"{path} already holds {snapshots} of {len(steps)} snapshots. {go_on} another `scheduler.track_dir`."
        )
    if trainer.is_global_zero and (not exists or trainer.ckpt_path is None):
        # killed before its first resume file, a run leaves a track on which nothing was trained: begin it again
        (path / "track.json").unlink(missing_ok=True)
        shutil.rmtree(path / "snapshots", ignore_errors=True)
        begin(path, facts, recipe, data)
    trainer.strategy.barrier()
    track = Track.open(path)
    refuse_another(track, facts)
    return track
