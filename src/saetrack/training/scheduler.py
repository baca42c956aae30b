"""The callback that leads an SAE through the checkpoints of an LLM: the only code that knows their order."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from saetrack.lm.checkpoints import LLMCheckpoint, Watcher
from saetrack.lm.selection import Selection
from saetrack.track import Snapshot, Track
from saetrack.training import tracks
from saetrack.training.checks import audited, refuse_what_cuts_stages
from saetrack.training.datamodule import ActivationDataModule
from saetrack.training.following import follow, refuse_what_needs_the_end
from saetrack.training.grid import Choice, farthest_within, rise_from, select_checkpoints
from saetrack.training.module import SAEModule, refuse_changes
from saetrack.training.order import Direction, branch_ahead, reachable, source_of, training_order
from saetrack.training.stage import Stage, StageStart, StageWork, source_snapshots
from saetrack.training.start import Start, read_start
from saetrack.training.warm_start import WarmStart

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
    measures its activations, starts the SAE from a snapshot, and gives it a fresh optimizer. A track grows outward:
    later LLM steps begin from its last snapshot, earlier ones from its first, and those that are added in between
    from the nearest earlier one.

    Args:
        track_dir: The run's folder; each hookpoint's track is a folder in it.
        steps: LLM steps to visit, increasing, or a text such as ``every:10``, ``log:20``, ``dense:512+every:10``,
            ``tokens:1B-10B`` or ``paper:pythia-410m-deduped``. By default every checkpoint of the source.
        direction: ``forward`` through the LLM's training, or ``backward`` from its end. With ``model.start``, which
            side of it is visited; ``both`` goes forward first, then back from the start.
        warm_start: How a stage's SAE begins. ``prior`` copies the weights of the SAE before (SAE-Track,
            arXiv 2412.17626); ``recentred`` also moves ``b_dec`` by the change of the mean activation;
            ``transported`` turns the whole dictionary by the rotation that best carries the activations of the
            previous LLM checkpoint onto those of this one; ``scratch`` starts anew.
        tokens_first: Tokens of the first stage, over all processes; with ``model.start`` there is none.
        tokens_next: Tokens of every later stage.
        allow_duplicates: Go on although two LLM checkpoints have equal weights. Without it the run stops before
            any training and names them: published series often serve one checkpoint under several names.
        max_rise: A grid that follows the LLM: from each stage go to the farthest LLM checkpoint on which the FVU of
            the SAE, as it is, has risen by no more than this share (0.5 is half as much again), at least to the
            next one. It looks ahead by doubling its stride and then bisecting, one forward a look. The last is always
            visited, and each snapshot says why it is there. Null visits all.
    """

    def __init__(
        self,
        track_dir: Path,
        steps: list[int] | str | None = None,
        direction: Direction = "forward",
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
        for i, (before, after) in enumerate(pairwise(steps if isinstance(steps, list) else []), start=1):
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
        """Those visited and those ahead, in the order of training; with ``max_rise``, the skipped are taken out, and
        those that come to a series that is watched are added."""
        self._wanted: list[LLMCheckpoint] = []
        """The same by increasing step, the skipped among them."""
        self._from: Start | None = None
        """The snapshots of other tracks that this one begins with."""
        self._adopted = False
        """Whether this process has adopted them, and the other callbacks do not know yet."""
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
        return self._stage_at(min(self.position, len(self.checkpoints) - 1))

    def _stage_at(self, position: int) -> Stage:
        source = self.source_of(position)
        previous = None if source is None else self.checkpoints[source]
        return Stage(position, self.checkpoints[position], source, previous, self.warm_start)

    @property
    def n_stages(self) -> int:
        """How many stages are trained in all, each a Lightning epoch; what is adopted is none."""
        return len(self.checkpoints) - (self._from is not None)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the LLM checkpoints and audit them."""
        data = _data(trainer)
        module, watcher = _module(pl_module), self.watcher(data)
        if watcher is None:
            self.checkpoints = self.choose_checkpoints(data, module)
        else:
            refuse_what_needs_the_end(self.steps, self.direction, self.max_rise, module.start)
            assert not isinstance(self.steps, list)
            self.checkpoints = self._wanted = follow(trainer, watcher, self.steps, [], wait=True)
        self._weight_hashes = audited(trainer, self.checkpoints, self.allow_duplicates, {})
        data.read_widths(self.checkpoints[0])
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        refuse_what_cuts_stages(trainer)
        for name in ("tokens_first", "tokens_next"):
            if getattr(self, name) < data.batch_size:
                raise ValueError(
                    f"scheduler.{name} is {getattr(self, name)}, less than one batch of {data.batch_size}; raise it, "
                    "or lower `data.batch_size`."
                )
        trainer.fit_loop.max_epochs = self.n_stages
        self.recipe = self._make_recipe(trainer, module, data)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open or create the tracks, and point the data at the current stage."""
        module, data = _module(pl_module), _data(trainer)
        self._work = StageWork(trainer, module, data)
        trainer.fit_loop.max_epochs = self.n_stages  # less those that a resumed run had skipped
        if self._from is None:
            self._enter_stage(module, data)  # refuses a corpus that is too short, before anything is written
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.open_tracks(trainer, module, data)
            if self._from is not None and self.position == 0:
                self._adopt(trainer, data, self._from)
        self._enter_stage(module, data)
        self.follow_series(trainer, module)
        if not self.finished:
            data.fetch(self.stage.previous, self.stage.checkpoint)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the callbacks of what was adopted, now that the loggers are open."""
        if self._adopted:
            self._tell(trainer, _module(pl_module), 0)
            self._adopted = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a stage. Lightning does not call this when a stage is resumed in its middle, and rightly so."""
        module, data = _module(pl_module), _data(trainer)
        data.fetch(self.stage.previous, self.stage.checkpoint)
        self.start = self._work.begin(self.stage, self.tracks)
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
        facts = {**self._facts(data), "tokens_trained": module.stream.end * data.batch_size}
        module.forget_graphs()  # their memory is for the measurements
        self._work.finish(self.stage, self.start, self.tracks, facts)
        self._tell(trainer, module, self.position)
        self._move_on(trainer)
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
        self.checkpoints = self._wanted = follow(trainer, watcher, self.steps, known, wait=waiting)
        if len(self.checkpoints) == len(known):
            return
        audits = audited(trainer, self.checkpoints[len(known) :], self.allow_duplicates, self._weight_hashes)
        self._weight_hashes |= audits
        self.recipe[_STEPS] = [checkpoint.step for checkpoint in self.checkpoints]
        trainer.fit_loop.max_epochs = self.n_stages
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
        where = {"position": self.position, "begun": self._begun, "skipped": skipped}
        where["weight_hash"] = self._weight_hashes.get(self.stage.checkpoint.step) if self._begun else None
        return {**where, "choice": self._choice and self._choice.facts, "start": start, "recipe": self.recipe}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the resume file was written.

        Raises:
            ValueError: If a setting has changed that would make the rest of the series another one. Steps may be
                added anywhere.
        """
        saved, now = state_dict["recipe"], self.recipe
        skipped = set(state_dict.get("skipped", ()))
        self.position, self._begun = state_dict["position"], state_dict.get("begun", True)
        visited = [step for step in saved[_STEPS] if step not in skipped][: self.position + self._begun]
        wanted = {checkpoint.step for checkpoint in self._wanted}
        if lost := [step for step in visited if step not in wanted]:
            raise ValueError(
                f"scheduler.steps lacks LLM step {lost[0]}, on which this track is trained. Add it, or begin another "
                "track with another `scheduler.track_dir`."
            )
        refuse_changes({**saved, _STEPS: visited}, {**now, _STEPS: visited}, "the resume file")
        order = training_order(self._wanted, [*visited, *(skipped & wanted)])
        self.recipe = {**now, _STEPS: [checkpoint.step for checkpoint in order]}
        self.checkpoints = [checkpoint for checkpoint in order if checkpoint.step not in skipped]
        tracks.refuse_weights_changed_in(self.stage.checkpoint, state_dict.get("weight_hash"), self._weight_hashes)
        between = [c.step for c in self.checkpoints[len(visited) :] if min(visited) < c.step < max(visited)]
        if between and self.max_rise is not None:
            raise ValueError(
                f"scheduler.steps adds LLM step {between[0]} between snapshots that are there, but a track with "
                "`scheduler.max_rise` chooses its own gaps. Take it out; later and earlier steps can be added."
            )
        self._choice = None if state_dict["choice"] is None else Choice(**state_dict["choice"])
        self.start = {h: StageStart.from_state_dict(state) for h, state in state_dict["start"].items()}

    def wanted(self, available: list[LLMCheckpoint], start: Start | None) -> list[LLMCheckpoint]:
        """The LLM checkpoints that the track shall have, by increasing step.

        Args:
            available: What the source has.
            start: What ``model.start`` names.

        Raises:
            ValueError: If a step is not there, or on the wrong side of the start.
        """
        chosen = select_checkpoints(available, self.steps)
        step = None if start is None else start.step
        return reachable(chosen, available, step, self.direction, isinstance(self.steps, list))

    def choose_checkpoints(self, data: ActivationDataModule, module: SAEModule) -> list[LLMCheckpoint]:
        """The LLM checkpoints to visit, in the order of training, as far as nothing is visited yet."""
        self._from = read_start(module.start, data.hookpoints)
        self._wanted = self.wanted(data.checkpoints, self._from)
        first = self._wanted[-1 if self.direction == "backward" else 0].step
        return training_order(self._wanted, [first if self._from is None else self._from.step])

    def source_of(self, position: int) -> int | None:
        """Position of the stage whose snapshot the stage at a position begins from; None for the first."""
        return source_of([checkpoint.step for checkpoint in self.checkpoints], position)

    def watcher(self, data: ActivationDataModule) -> Watcher | None:
        """What looks for further LLM checkpoints; None when all are there."""
        return data.source.watcher

    def _make_recipe(self, trainer: Trainer, module: SAEModule, data: ActivationDataModule) -> dict[str, Any]:
        """What a resumed run must share with the one it continues, beside the facts of the track."""
        return {
            _STEPS: [checkpoint.step for checkpoint in self.checkpoints],
            **{f"scheduler.{n}": getattr(self, n) for n in ("warm_start", "tokens_first", "tokens_next", "max_rise")},
            "data.batch_size": data.batch_size,
            "data.chunk_tokens": data.chunk_tokens,
            "data.tokens.calibration_tokens": data.tokens.calibration_tokens,
            "data.tokens.held_out_tokens": data.tokens.held_out_tokens,
            "number of processes": trainer.world_size,
            "trainer.gradient_clip_val": trainer.gradient_clip_val,
            **module.recipe(),
        }

    def _facts(self, data: ActivationDataModule) -> dict[str, Any]:
        """What a snapshot says of the current stage beside its measures."""
        return {
            "llm": {"weight_hash": self._weight_hashes[self.stage.checkpoint.step]},
            **({} if self._choice is None else {"choice": self._choice.facts}),
            "seed": data.seed,
        }

    def _tell(self, trainer: Trainer, module: SAEModule, number: int) -> None:
        if trainer.is_global_zero:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, SnapshotCallback):
                    for track in self.tracks.values():
                        callback.on_snapshot(trainer, module, track, track.numbered(number))

    def _move_on(self, trainer: Trainer) -> None:
        """Go to the next stage, which with ``max_rise`` is chosen now."""
        if self.max_rise is not None:
            self._skip_ahead(trainer, self.max_rise)
        self.position += 1
        self._begun = False

    def _adopt(self, trainer: Trainer, data: ActivationDataModule, start: Start) -> None:
        """Write the snapshots of another track as the first ones of this, and go to the first stage that is trained."""
        self._work.adopt(self.stage, start, self.tracks, self._facts(data))
        self._adopted = True
        self._move_on(trainer)

    def _skip_ahead(self, trainer: Trainer, max_rise: float) -> None:
        """Take out of the series the LLM checkpoints that the SAE, as it is, still describes well enough."""
        ahead = branch_ahead(self.checkpoints, self.position + 1)
        if not ahead:
            return
        source = self._stage_at(self.position + 1).source
        assert source is not None
        snapshots = {hookpoint: track.numbered(source) for hookpoint, track in self.tracks.items()}
        rise_on = rise_from(self.checkpoints[source], partial(self._work.held_out_fvu, snapshots=snapshots))
        # the ranks' last bits may differ, their series may not
        self._choice = trainer.strategy.broadcast(
            farthest_within(ahead, rise_on, max_rise) if trainer.is_global_zero else None
        )
        assert self._choice is not None
        del self.checkpoints[self.position + 1 : self.position + 1 + self._choice.index]
        trainer.fit_loop.max_epochs = self.n_stages

    def open_tracks(self, trainer: Trainer, module: SAEModule, data: ActivationDataModule) -> None:
        """Open or create the track of every hookpoint."""
        tracks.refuse_other_hookpoints(self.track_dir, data.hookpoints)
        for hookpoint in data.hookpoints:
            facts = tracks.track_facts(module, data, hookpoint)
            steps = [checkpoint.step for checkpoint in self.checkpoints]
            track = tracks.open_or_begin(trainer, self.track_dir / hookpoint, facts, self.recipe, data, steps)
            tracks.refuse_other_weights([s for s in track if s.number < self.position], self._weight_hashes)
            tracks.refuse_gaps(track, steps, self.position)
            self.tracks[hookpoint] = track

    def _enter_stage(self, module: SAEModule, data: ActivationDataModule) -> None:
        stage = self.stage
        module.first_stage = self.is_first(stage)
        data.calibrate({hookpoint: start.calibration for hookpoint, start in self.start.items()})
        tokens = self.tokens_first if module.first_stage else self.tokens_next
        before = stage.previous if module.continuity and stage.warm_start != "scratch" else None
        limits = {} if before is None else {h: s.norm_limit for h, s in source_snapshots(stage, self.tracks).items()}
        data.begin_stage(stage.checkpoint, tokens, before, self.arm(stage), limits)

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


def _module(pl_module: LightningModule) -> SAEModule:
    if not isinstance(pl_module, SAEModule):
        raise ValueError(f"CheckpointScheduler trains a SAEModule, not a {type(pl_module).__name__}.")
    return pl_module


def _data(trainer: Trainer) -> ActivationDataModule:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, ActivationDataModule):
        raise ValueError(f"CheckpointScheduler needs an ActivationDataModule, but the trainer has {data!r}.")
    return data
