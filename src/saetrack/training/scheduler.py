"""The callback that leads an SAE through the checkpoints of an LLM: the only code that knows their order."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer

from saetrack.lm.audit import audit, problems
from saetrack.lm.checkpoints import LLMCheckpoint, Watcher
from saetrack.lm.selection import Selection
from saetrack.track import Snapshot, Track
from saetrack.training import tracks
from saetrack.training.datamodule import ActivationDataModule
from saetrack.training.following import follow, refuse_what_needs_the_end
from saetrack.training.grid import Choice, farthest_within, select_checkpoints
from saetrack.training.module import SAEModule, refuse_changes
from saetrack.training.stage import Stage, StageStart, StageWork
from saetrack.training.warm_start import WarmStart

logger = logging.getLogger(__name__)

_STEPS = "scheduler.steps"
"""Key of the LLM steps in a recipe; the others too are named as a configuration names them."""


class SnapshotCallback(Callback):
    """A callback that is told of every snapshot.

    Lightning calls a user's callbacks before the scheduler at the end of an epoch, when the snapshot is not
    there yet; so what needs the snapshot hangs on this hook and not on Lightning's.
    """

    def on_snapshot(self, trainer: Trainer, module: SAEModule, track: Track, snapshot: Snapshot) -> None:
        """Called on rank zero when ``snapshot`` is complete on disk, once for each hookpoint."""


class CheckpointScheduler(Callback):
    """Trains the SAE on one LLM checkpoint after another; one checkpoint is one stage, and one Lightning epoch.

    At the end of a stage it writes the snapshot; at the beginning of the next it loads the LLM checkpoint,
    measures its activations, starts the SAE from the one before, and gives it a fresh optimizer.

    Args:
        track_dir: The run's folder; each hookpoint's track is a folder in it.
        steps: LLM steps to visit, increasing, or a text such as ``every:10``, ``log:20``, ``dense:512+every:10``,
            ``tokens:1B-10B`` or ``paper:pythia-410m-deduped``. By default every checkpoint of the source.
        direction: ``forward`` through the LLM's training, or ``backward`` from its end.
        warm_start: How a stage's SAE begins. ``prior`` copies the weights of the SAE before (SAE-Track,
            arXiv 2412.17626); ``recentred`` also moves ``b_dec`` by the change of the mean activation;
            ``transported`` turns the whole dictionary by the rotation that best carries the activations of the
            previous LLM checkpoint onto those of this one; ``scratch`` starts anew.
        tokens_first: Tokens of the first stage, over all processes.
        tokens_next: Tokens of every later stage.
        allow_duplicates: Go on although two LLM checkpoints have equal weights. Without it the run stops before
            any training and names them: published series often serve one checkpoint under several names.
        max_rise: A grid that follows the LLM: from each stage go to the farthest LLM checkpoint on which the FVU of
            the SAE, as it is, has risen by no more than this share (0.5 is half as much again), at least to the
            next one. The last is always visited, and each snapshot says why it is there. Null visits all.
    """

    def __init__(
        self,
        track_dir: Path,
        steps: list[int] | str | None = None,
        direction: Literal["forward", "backward"] = "forward",
        warm_start: WarmStart = "transported",
        tokens_first: int = 10_000_000,
        tokens_next: int = 2_000_000,
        allow_duplicates: bool = False,
        max_rise: float | None = None,
    ) -> None:
        super().__init__()
        if max_rise is not None and max_rise <= 0:
            raise ValueError(
                f"scheduler.max_rise is {max_rise}; it must be above 0, or null to visit every checkpoint."
            )
        if steps is not None and not steps:
            raise ValueError("scheduler.steps is empty; name the LLM steps to visit, or leave it out for all.")
        if isinstance(steps, str):
            Selection(steps)  # refuses what is none before anything is pretrained or loaded
        listed = steps if isinstance(steps, list) else []
        for i, (before, after) in enumerate(pairwise(listed), start=1):
            if after <= before:
                raise ValueError(
                    f"scheduler.steps must increase strictly, but {after} follows {before} at position {i}. "
                    "To go from the last to the first, set `scheduler.direction: backward`."
                )
        self.track_dir = Path(track_dir)
        self.steps = steps
        self.direction = direction
        self.warm_start = warm_start
        self.tokens_first = tokens_first
        self.tokens_next = tokens_next
        self.allow_duplicates = allow_duplicates
        self.max_rise = max_rise
        self.position = 0
        """Index of the current stage. Saved in the resume file, for Lightning's epoch counter is stale there."""
        self.checkpoints: list[LLMCheckpoint] = []
        """Those visited and those ahead, in the order of the track; with ``max_rise``, the skipped are taken out, and
        those that come to a series that is watched are added."""
        self._choice: Choice | None = None
        self.tracks: dict[str, Track] = {}
        self.start: dict[str, StageStart] = {}
        """What was measured when the current stage began; before that, of the stage before it."""
        self._begun = False
        """Whether the current stage has: until then another LLM checkpoint may take its place."""
        self._equipped: int | None = None
        self._weight_hashes: dict[int, str | None] = {}
        self.recipe: dict[str, Any] = {}

    @property
    def finished(self) -> bool:
        """Whether every stage is done."""
        return self.position >= len(self.checkpoints)

    @property
    def stage(self) -> Stage:
        """The current stage; when every stage is done, the last one."""
        position = min(self.position, len(self.checkpoints) - 1)
        previous = self.checkpoints[position - 1] if position else None
        return Stage(position, self.checkpoints[position], previous, self.warm_start)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the LLM checkpoints and audit them."""
        data = _data(trainer)
        watcher = self.watcher(data)
        if watcher is None:
            self.checkpoints = self.choose_checkpoints(data)
        else:
            refuse_what_needs_the_end(self.steps, self.direction, self.max_rise)
            assert not isinstance(self.steps, list)
            self.checkpoints = follow(trainer, watcher, self.steps, [], wait=True)
        self._audit(trainer, self.checkpoints)
        data.read_widths(self.checkpoints[0])
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if trainer.reload_dataloaders_every_n_epochs != 1:  # type: ignore[attr-defined]
            raise ValueError(
                "Every stage has its own activations, so the trainer must ask for a new loader in every epoch; "
                "give Trainer(reload_dataloaders_every_n_epochs=1)."
            )
        _refuse_what_cuts_stages(trainer)
        for name in ("tokens_first", "tokens_next"):
            if getattr(self, name) < data.batch_size:
                raise ValueError(
                    f"scheduler.{name} is {getattr(self, name)}, less than one batch of {data.batch_size}; raise it, "
                    "or lower `data.batch_size`."
                )
        trainer.fit_loop.max_epochs = len(self.checkpoints)
        self.recipe = self._make_recipe(trainer, _module(pl_module), data)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open or create the tracks, and point the data at the current stage."""
        module, data = _module(pl_module), _data(trainer)
        self._work = StageWork(trainer, module, data)
        trainer.fit_loop.max_epochs = len(self.checkpoints)  # less those that a resumed run had skipped
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.open_tracks(trainer, module, data)
        self._enter_stage(module, data)
        self.follow_series(trainer, module)
        if not self.finished:
            data.fetch(self.stage.previous, self.stage.checkpoint)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a stage. Lightning does not call this when a stage is resumed in its middle, and rightly so."""
        module, data = _module(pl_module), _data(trainer)
        data.fetch(self.stage.previous, self.stage.checkpoint)
        self.start = self._work.begin(self.stage, self.start)
        self._begun = True
        data.calibrate({hookpoint: start.calibration for hookpoint, start in self.start.items()})
        module.curves = {}
        trainer.strategy.setup_optimizers(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Give the module what it needs beside the batches, once a stage; here, for a stage may begin in its middle."""
        if self._equipped != self.position:
            self._work.equip(self.stage, self.tracks)
            self._equipped = self.position

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a stage: write the snapshots, tell the callbacks, move to the next LLM checkpoint."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        module, data = _module(pl_module), _data(trainer)
        if not module.stream.is_done:
            raise RuntimeError(
                f"Something stopped the stage of LLM step {self.stage.checkpoint.step} before its end, so no snapshot "
                "was written. Run the same command again with `--ckpt_path last`."
            )
        facts = {
            "llm": {"weight_hash": self._weight_hashes[self.stage.checkpoint.step]},
            **({} if self._choice is None else {"choice": self._choice.facts}),
            "seed": data.seed,
            "tokens_trained": module.stream.end * data.batch_size,
        }
        self._work.finish(self.stage, self.start, self.tracks, facts)
        if trainer.is_global_zero:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, SnapshotCallback):
                    for track in self.tracks.values():
                        callback.on_snapshot(trainer, module, track, track[self.position])
        if self.max_rise is not None:
            self._skip_ahead(trainer, module)
        self.position += 1
        self._begun = False
        self._enter_stage(module, data)

    def follow_series(self, trainer: Trainer, module: SAEModule) -> None:
        """Take in what has come to a series that is watched, and wait for it when every stage is done.

        Called when the resume file of the last stage is written, so nothing is lost when the waiting is broken off.
        """
        data = _data(trainer)
        watcher = self.watcher(data)
        if watcher is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert not isinstance(self.steps, list)
        known, waiting = self.checkpoints, self.finished
        self.checkpoints = follow(trainer, watcher, self.steps, known, wait=waiting)
        if len(self.checkpoints) == len(known):
            return
        self._audit(trainer, self.checkpoints[len(known) :])
        self.recipe[_STEPS] = [checkpoint.step for checkpoint in self.checkpoints]
        trainer.fit_loop.max_epochs = len(self.checkpoints)
        if waiting:
            self._enter_stage(module, data)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Free the LLM: what comes after training loads its own."""
        _data(trainer).release_llms()

    def state_dict(self) -> dict[str, Any]:
        """Position, what the current stage began with, what was skipped, and the recipe: for the resume file."""
        start = {hookpoint: start.state_dict() for hookpoint, start in self.start.items()}
        left = {checkpoint.step for checkpoint in self.checkpoints}
        skipped = [step for step in self.recipe.get(_STEPS, []) if step not in left]
        choice = None if self._choice is None else self._choice.facts
        where = {"position": self.position, "begun": self._begun, "skipped": skipped, "choice": choice}
        return {**where, "start": start, "recipe": self.recipe}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the resume file was written.

        Raises:
            ValueError: If a setting has changed that would make the rest of the series another one. Steps may be
                added after those that are done.
        """
        saved, now = state_dict["recipe"], self.recipe
        skipped = set(state_dict.get("skipped", ()))
        begun = state_dict.get("begun", True)
        done = min(state_dict["position"] + len(skipped) + begun, len(saved[_STEPS]))
        refuse_changes({**saved, _STEPS: saved[_STEPS][:done]}, {**now, _STEPS: now[_STEPS][:done]}, "the resume file")
        self.position, self._begun = state_dict["position"], begun
        self.checkpoints = [checkpoint for checkpoint in self.checkpoints if checkpoint.step not in skipped]
        self._choice = None if state_dict["choice"] is None else Choice(**state_dict["choice"])
        self.start = {h: StageStart.from_state_dict(state) for h, state in state_dict["start"].items()}

    def choose_checkpoints(self, data: ActivationDataModule) -> list[LLMCheckpoint]:
        """The LLM checkpoints to visit, in order."""
        return select_checkpoints(data.checkpoints, self.steps, self.direction)

    def watcher(self, data: ActivationDataModule) -> Watcher | None:
        """What looks for further LLM checkpoints; None when all are there."""
        return data.source.watcher

    def _make_recipe(self, trainer: Trainer, module: SAEModule, data: ActivationDataModule) -> dict[str, Any]:
        """What a resumed run must share with the one it continues, beside the facts of the track."""
        return {
            _STEPS: [checkpoint.step for checkpoint in self.checkpoints],
            "scheduler.warm_start": self.warm_start,
            "scheduler.tokens_first": self.tokens_first,
            "scheduler.tokens_next": self.tokens_next,
            "scheduler.max_rise": self.max_rise,
            "data.batch_size": data.batch_size,
            "data.chunk_tokens": data.chunk_tokens,
            "data.tokens.calibration_tokens": data.tokens.calibration_tokens,
            "data.tokens.held_out_tokens": data.tokens.held_out_tokens,
            "number of processes": trainer.world_size,
            "trainer.gradient_clip_val": trainer.gradient_clip_val,
            **module.recipe(),
        }

    def _audit(self, trainer: Trainer, checkpoints: list[LLMCheckpoint]) -> None:
        known = {digest: step for step, digest in reversed(self._weight_hashes.items()) if digest is not None}
        # one rank reads the weights of the whole series for all
        rows = trainer.strategy.broadcast(
            audit(list(dict.fromkeys(checkpoints)), known) if trainer.is_global_zero else []
        )
        self._weight_hashes |= {row.checkpoint.step: row.weight_hash for row in rows}
        found = problems(rows)
        faulty = any(row.fault for row in rows)
        if found and (faulty or not self.allow_duplicates):
            more = f" ({len(found) - 1} more; `saetrack checkpoints SOURCE --audit` lists them.)" if found[1:] else ""
            remedy = "" if faulty else ", or go on all the same with `scheduler.allow_duplicates: true`"
            raise ValueError(f"{found[0]}{more} Choose the others with `scheduler.steps`{remedy}.")
        for line in found:
            logger.warning(line)

    def _skip_ahead(self, trainer: Trainer, module: SAEModule) -> None:
        """Take out of the series the LLM checkpoints that the SAE, as it is, still describes well enough."""
        ahead = self.checkpoints[self.position + 1 :]
        if not ahead:
            return
        assert self.max_rise is not None
        max_rise, fvu_here = self.max_rise, self._work.held_out_fvu(self.stage.checkpoint, self.tracks)

        def rise_on(checkpoint: LLMCheckpoint) -> float:
            there = self._work.held_out_fvu(checkpoint, self.tracks)
            return max(there[hookpoint] / fvu_here[hookpoint] - 1 for hookpoint in there)

        # the ranks' last bits may differ, their series may not
        self._choice = trainer.strategy.broadcast(
            farthest_within(ahead, rise_on, max_rise) if trainer.is_global_zero else None
        )
        assert self._choice is not None
        taken = self._choice.index
        self.checkpoints = self.checkpoints[: self.position + 1] + ahead[taken:]
        trainer.fit_loop.max_epochs = len(self.checkpoints)

    def open_tracks(self, trainer: Trainer, module: SAEModule, data: ActivationDataModule) -> None:
        """Open or create the track of every hookpoint."""
        tracks.refuse_other_hookpoints(self.track_dir, data.hookpoints)
        for hookpoint in data.hookpoints:
            self.tracks[hookpoint] = self._open_track(trainer, module, data, hookpoint)

    def _open_track(self, trainer: Trainer, module: SAEModule, data: ActivationDataModule, hookpoint: str) -> Track:
        path = self.track_dir / hookpoint
        facts = tracks.track_facts(module, data, hookpoint)
        exists = (path / "track.json").is_file()
        snapshots = len(Track.open(path)) if exists else 0
        trainer.strategy.barrier()  # every rank has looked before rank zero creates anything
        if snapshots and trainer.ckpt_path is None:
            go_on = "Continue it with `--ckpt_path last`, or choose" if snapshots <= len(self.checkpoints) else "Choose"
            raise FileExistsError(
                f"{path} already holds {snapshots} of {len(self.checkpoints)} snapshots. {go_on} another "
                "`scheduler.track_dir`."
            )
        if trainer.is_global_zero and (not exists or trainer.ckpt_path is None):
            # killed before its first resume file, a run leaves a track without snapshots: begin it again
            (path / "track.json").unlink(missing_ok=True)
            tracks.begin(path, facts, self.recipe, data)
        trainer.strategy.barrier()
        track = Track.open(path)
        tracks.refuse_another(track, facts)
        tracks.refuse_other_weights(track[: self.position], self._weight_hashes)
        tracks.refuse_gaps(track, self.position)
        return track

    def _enter_stage(self, module: SAEModule, data: ActivationDataModule) -> None:
        stage = self.stage
        module.first_stage = self.is_first(stage)
        data.calibrate({hookpoint: start.calibration for hookpoint, start in self.start.items()})
        tokens = self.tokens_first if module.first_stage else self.tokens_next
        before = stage.previous if module.continuity and stage.warm_start != "scratch" else None
        data.begin_stage(stage.checkpoint, tokens, before, self.arm(stage))

    def is_first(self, stage: Stage) -> bool:
        """Whether a stage has the budget and the learning rate of the first."""
        return stage.position == 0

    def arm(self, stage: Stage) -> int:
        """Which repetition of the stage it is; a control's are not 0."""
        return 0


def scheduler_of(trainer: Trainer) -> CheckpointScheduler:
    """The scheduler among a trainer's callbacks.

    Raises:
        RuntimeError: If there is none.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, CheckpointScheduler):
            return callback
    raise RuntimeError("This callback needs a CheckpointScheduler beside it in the trainer's callbacks.")


def _refuse_what_cuts_stages(trainer: Trainer) -> None:
    """Refuse options of Lightning's that would end a stage before its budget, or change what a step is."""
    options = {
        "max_steps": (trainer.max_steps, -1),
        "limit_train_batches": (trainer.limit_train_batches, 1.0),
        "accumulate_grad_batches": (trainer.accumulate_grad_batches, 1),
    }
    changed = [f"trainer.{name} is {value}" for name, (value, default) in options.items() if value != default]
    if any(isinstance(callback, Timer) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        changed.append("trainer.max_time is set")
    if changed:
        raise ValueError(
            f"{changed[0]}, which would cut every stage short or change its steps. Leave it out; a stage is as long as "
            "`scheduler.tokens_first` and `scheduler.tokens_next`, and a run can be killed and continued at any moment."
        )


def _module(pl_module: LightningModule) -> SAEModule:
    if not isinstance(pl_module, SAEModule):
        raise ValueError(f"CheckpointScheduler trains a SAEModule, not a {type(pl_module).__name__}.")
    return pl_module


def _data(trainer: Trainer) -> ActivationDataModule:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, ActivationDataModule):
        raise ValueError(f"CheckpointScheduler needs an ActivationDataModule, but the trainer has {data!r}.")
    return data
