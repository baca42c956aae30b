"""Controls: short tracks made only to calibrate another, by the code that trained it.

A drift, a correlation or a curve says little until it is known what training once more would have done. A control
repeats a stage with another order of the same data: on the same LLM checkpoint again (``null``), on the one that the
stage was on (``replica``), or from a fresh SAE (``scratch``); or the series with fewer of its LLM checkpoints
(``thinned``); or it is a fresh SAE on an LLM that was never trained (``random``). Every stage of a control starts from
a snapshot on disk, so a control that was killed goes on after its last whole snapshot.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from lightning import Callback, LightningModule, Trainer

from saetrack.lm.checkpoints import LLMCheckpoint, PretrainSource, save_random_llm
from saetrack.storage import claimed
from saetrack.track import Track
from saetrack.training import tracks
from saetrack.training.cli import FitCLI
from saetrack.training.control_plan import Control, ControlSettings, plan_controls
from saetrack.training.datamodule import ActivationDataModule
from saetrack.training.module import SAEModule, refuse_changes
from saetrack.training.progress import TrackProgressBar
from saetrack.training.saes import configured
from saetrack.training.scheduler import CheckpointScheduler
from saetrack.training.stage import Stage

_RANDOM_LLMS = 1_000_003  # small seeds are those of pretraining, and would give the series' own first checkpoint
_ARMS = 1009  # more than a chain has stages: every replica has orders of rows that no other has


def run_controls(track: Track, settings: ControlSettings) -> None:
    """Train the controls that are asked for and not there yet.

    The replicas of ``scratch`` are trained side by side, on one forward of the LLM. Those of other kinds are not: on
    one forward they would share the order of the chunks, and be more alike than runs are (on the quickstart their
    displacements had cosine 0.976 with each other and 0.958 with the track's).

    Args:
        track: The track that they calibrate.
        settings: What is asked for.

    Raises:
        FileNotFoundError: If the run's configuration is not beside the track, or the LLM is not where it says.
        ValueError: If it is no longer that of the track, or a thinned series would be none.
    """
    stages = len(track.distinct()) - 1
    if settings.kind == "thinned" and settings.thin > stages > 0:
        raise ValueError(
            f"--thin is {settings.thin}, but {track.path} has {stages + 1} snapshots: more than {stages} leaves the "
            f"first and the last as {stages} does. Give at most {stages}."
        )
    for control in plan_controls(track, settings):
        missing = [i for i in range(settings.replicas) if not _is_complete(track, f"{control.name}-{i}")]
        for together in [missing] if control.kind == "scratch" and missing else [[i] for i in missing]:
            its = _on_random_llm(track, control, together[0]) if control.kind == "random" else control
            cli = _ControlCLI(track, its, together)
            with claimed(track.path / "controls") if cli.trainer.is_global_zero else nullcontext():
                cli.trainer.fit(cli.model, cli.datamodule)


def _on_random_llm(track: Track, control: Control, replica: int) -> Control:
    """The control on its replica's own LLM, which lies in the control's folder."""
    seed = _RANDOM_LLMS + _ARMS * track.facts["seed"] + replica
    folder = track.path / "controls" / f"{control.name}-{replica}" / "llm"
    llm = save_random_llm(control.checkpoints[0], folder, seed, track.facts["llm_dtype"])
    return replace(control, checkpoints=(llm,), llm_seed=seed)


def control_table(track: Track) -> str:
    """The complete controls of a track as a plain text table, one line for each."""
    rows = []
    for control in track.controls():
        last = control[-1].metadata
        kind = control.facts["control"]["kind"]
        steps = ", ".join(map(str, control.steps)) if len(set(control.steps)) < 7 else "all"
        correlation = "-" if kind in ("scratch", "random") else f"{last['functional_correlation_median']:.2f}"
        rows.append(
            {
                "control": control.path.name,
                "kind": kind,
                "LLM steps": "untrained" if kind == "random" else steps,
                "FVU": f"{last['fvu']:.3f}",
                "dead": f"{last['dead_share']:.1%}",
                "correlation": correlation,
            }
        )
    return pd.DataFrame(rows).to_string(index=False) if rows else "No controls yet."


class ControlScheduler(CheckpointScheduler):
    """Leads the replicas of a control through its LLM checkpoints, each stage from a snapshot on disk.

    Args:
        of: The track that is calibrated.
        control: What is repeated.
        replicas: Their numbers.
    """

    def __init__(self, of: Track, control: Control, replicas: Sequence[int]) -> None:
        recipe = of.facts.get("recipe") or _missing_recipe(of)
        super().__init__(
            of.path / "controls",
            warm_start=control.warm_start or recipe["scheduler.warm_start"],
            tokens_first=recipe["scheduler.tokens_first"] * control.factor,
            tokens_next=recipe["scheduler.tokens_next"] * control.factor,
            allow_duplicates=True,
        )
        self.of = of
        self.control = control
        self.replicas = list(replicas)

    def choose_checkpoints(self, data: ActivationDataModule, module: SAEModule) -> list[LLMCheckpoint]:
        """Those of the control."""
        return list(self.control.checkpoints)

    def watcher(self, data: ActivationDataModule) -> None:
        """None: what a control visits, its track has visited."""

    def source_of(self, position: int) -> int | None:
        """A stage of a control begins from the one before, whatever their LLM steps."""
        return position - 1 if position else None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for any track, but Lightning counts from the snapshots that are there."""
        super().on_fit_start(trainer, pl_module)
        trainer.fit_loop.max_epochs = len(self.checkpoints) - self.position

    def open_tracks(self, trainer: Trainer, module: SAEModule, data: ActivationDataModule) -> None:
        """Begin the replicas' tracks where they are not there, and go on after the last snapshot that all have."""
        for replica, hookpoint in zip(self.replicas, data.hookpoints, strict=True):
            if trainer.is_global_zero:
                self._begin_track(module, data, hookpoint, replica)
            trainer.strategy.barrier()
            self.tracks[hookpoint] = Track.open(self._path(replica))
        self.position = min(len(track) for track in self.tracks.values())

    def is_first(self, stage: Stage) -> bool:
        """Whether the stage has the budget of the track's first one."""
        return self.control.first_budget

    def arm(self, stage: Stage) -> int:
        """Every stage has an order of rows that neither the track nor an earlier stage had."""
        return 1 + stage.position + _ARMS * self.replicas[0]

    def _path(self, replica: int) -> Path:
        return self.track_dir / f"{self.control.name}-{replica}"

    def _begin_track(self, module: SAEModule, data: ActivationDataModule, hookpoint: str, replica: int) -> None:
        facts = tracks.track_facts(module, data, hookpoint)
        tracks.refuse_another(self.of, facts)
        if self.control.llm_seed is None:
            tracks.refuse_other_weights(self.of, self._weight_hashes)
        was = self.of.training_recipe
        refuse_changes(was, {key: self.recipe[key] for key in was}, str(self.of.path / "track.json"))
        path = self._path(replica)
        if not (path / "track.json").is_file():
            control = {
                "kind": self.control.kind,
                "position": self.control.position,
                "stages": len(self.control.checkpoints),
                "first_budget": self.control.first_budget,
                "thin": self.control.thin,
                "factor": self.control.factor,
                "replica": replica,
                **({} if self.control.llm_seed is None else {"llm_seed": self.control.llm_seed}),
            }
            tracks.begin(path, {**facts, "control": control}, self.recipe, data)
        if self.control.start is not None and not len(Track.open(path)):
            tracks.adopt(Track.open(path), self.control.start)


class _ControlCLI(FitCLI):
    """The parts of the track's own run, from its configuration, with the control's scheduler in place of its own."""

    def __init__(self, track: Track, control: Control, replicas: Sequence[int]) -> None:
        path = track.path.parent / "config.yaml"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is not there, and a control is trained by the configuration of its track. Restore the file."
            )
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
        lanes = [f"{track.facts['hookpoint']}@{control.name}-{i}" for i in replicas]
        options = {name: saved[name] for name in ("seed_everything", "trainer", "model", "data", "scheduler")}
        options["trainer"] = {**options["trainer"], "logger": False, "callbacks": None}
        options["data"] = {**options["data"], "hookpoints": lanes, "source": _source(options["data"]["source"], path)}
        own = configured(options["model"]["sae"], track.path.name)  # the folder is named by hookpoint and lane
        options["model"] = {**options["model"], "sae": own}
        self._control_scheduler = ControlScheduler(track, control, replicas)
        super().__init__({"subcommand": "fit", "fit": options})

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer of the run without what writes its resume file, its logs and its analyses."""
        config = {**self._get(self.config_init, "trainer"), **kwargs}
        callbacks: list[Callback] = [self._control_scheduler]
        if config["enable_progress_bar"] is not False:
            callbacks.append(TrackProgressBar())
        return Trainer(**{**config, "callbacks": callbacks, "enable_checkpointing": False})

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing: who made this object calls ``fit``."""


def _source(source: dict[str, Any], config: Path) -> dict[str, Any]:
    """A configuration's ``data.source``; of an LLM that is pretrained where it is missing, the folder as it is."""
    if source["class_path"].rpartition(".")[2] != PretrainSource.__name__:
        return source
    folder = source["init_args"]["folder"]
    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"{folder}, with the LLM checkpoints of this track, is not there (from {Path.cwd()}). Run from the folder "
            f"that the path starts in, put it back, or pretrain it again with `saetrack fit --config {config}`."
        )
    return {"class_path": "saetrack.FolderSource", "init_args": {"path": folder}}


def _is_complete(track: Track, name: str) -> bool:
    path = track.path / "controls" / name
    return (path / "track.json").is_file() and Track.open(path).is_complete_control


def _missing_recipe(track: Track) -> dict[str, Any]:
    raise ValueError(
        f"{track.path} was written by saetrack {track.facts['saetrack']}, which recorded no recipe, so it cannot have "
        "controls. Train it again."
    )
