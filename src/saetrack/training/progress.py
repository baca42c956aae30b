"""What the terminal says while a series is trained: a bar where a person looks on, plain lines in a log file."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console

from saetrack.terminal import Display, duration, plain_console, show_on
from saetrack.track import Snapshot, Track
from saetrack.training.module import SAEModule
from saetrack.training.scheduler import SnapshotCallback, scheduler_of


@dataclass(frozen=True)
class Standing:
    """Where the current stage stands, and the series with it.

    Args:
        tokens: Trained in this stage, over all processes.
        budget: Of this stage, in tokens.
        speed: Tokens per second of this stage's training, or None before the first batch is done.
        fvu: Latest FVU on the held-out activations, the worst of the hookpoints; None before the first look.
        dead: Share of dead features, the worst of the hookpoints.
        seconds_left: Until the series is trained, or None while that cannot be said.
    """

    tokens: int
    budget: int
    speed: float | None
    fvu: float | None
    dead: float
    seconds_left: float | None

    def __str__(self) -> str:
        parts = [f"{self.tokens:,} of {self.budget:,} tokens"]
        parts += [] if self.speed is None else [f"{self.speed:,.0f} tokens/s"]
        parts += [] if self.fvu is None else [f"FVU {self.fvu:.3f}"]
        parts += [f"dead {self.dead:.1%}"]
        parts += [] if self.seconds_left is None else [f"{duration(self.seconds_left)} left"]
        return ", ".join(parts)


def snapshot_line(snapshot: Snapshot, hookpoint: str = "") -> str:
    """A finished snapshot in one line.

    Args:
        snapshot: The snapshot.
        hookpoint: Named when the run has several tracks.
    """
    facts = snapshot.metadata
    parts = [f"FVU {facts['fvu_before']:.3f} -> {facts['fvu']:.3f}", f"L0 {facts['l0']:.1f}"]
    parts += [f"dead {facts['dead_share']:.1%}"]
    if (correlation := facts["functional_correlation_median"]) is not None:
        parts += [f"functional correlation {correlation:.2f}"]
    return f"Snapshot of step {snapshot.step}{f' ({hookpoint})' if hookpoint else ''}: {', '.join(parts)}"


class TrackProgressBar(ProgressBar, SnapshotCallback):
    """Says which LLM checkpoint of how many, how fast and how well it goes, and how long the series still takes.

    Where there is a terminal, a bar shows it and every finished snapshot leaves one line. Elsewhere, as in a log
    file, there is a line at the start and the end of every stage and one every so many seconds between.

    Args:
        every_seconds: Seconds between two lines where there is no terminal.
        console: Where to write; by default the standard error.
    """

    def __init__(self, every_seconds: float = 30.0, console: Console | None = None) -> None:
        super().__init__()
        self.console = console or plain_console()
        self.every_seconds = every_seconds
        self._enabled = True
        self._display: Display | None = None
        self._entered: int | None = None
        self._first_batch: int | None = None
        self._said = 0.0
        self._passed = 0
        """Tokens of the stages that this process has finished; one that converged early counts as its whole budget."""
        self._passed_seconds = 0.0
        """What their batches took, without loading and measuring."""
        self._stages = 0
        """How many stages this process has entered."""

    def enable(self) -> None:
        """Speak; Lightning asks for it."""
        self._enabled = True

    def disable(self) -> None:
        """Be silent, as on every rank but the first."""
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the bar; a stage that is resumed in its middle has no epoch start."""
        self._series_began = time.monotonic()
        if self._enabled:
            self._display = show_on(self.console, self.every_seconds)
        self._enter_stage(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name the stage."""
        self._enter_stage(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the stage's clock at its first batch: loading the LLM is not training."""
        if self._first_batch is None:
            self._first_batch, self._stage_began = batch_idx, time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say how it goes, when it is time."""
        now = time.monotonic()
        if self._display is not None and now - self._said >= self._display.between:
            assert isinstance(pl_module, SAEModule)
            self._said = now
            standing = self._standing(trainer, pl_module, batch_idx + 1)
            self._display.show(standing.tokens, str(standing))

    def on_snapshot(self, trainer: Trainer, module: SAEModule, track: Track, snapshot: Snapshot) -> None:
        """Leave a line that stays."""
        if self._display is not None:
            several = len(scheduler_of(trainer).tracks) > 1
            self.console.print(snapshot_line(snapshot, track.path.name if several else ""), markup=False)
            self._display.wait("loading the next LLM checkpoint")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the stage as passed."""
        self._passed += self._stage_budget - (self._first_batch or 0) * _batch_size(trainer)
        if self._first_batch is not None:
            self._passed_seconds += time.monotonic() - self._stage_began

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the bar away."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the bar away, so that the error stands alone."""
        self._stop()

    def _enter_stage(self, trainer: Trainer) -> None:
        scheduler = scheduler_of(trainer)
        if scheduler.position == self._entered:
            return
        self._entered, self._first_batch = scheduler.position, None
        self._stages += 1
        self._said = time.monotonic()
        self._stage_budget = int(trainer.num_training_batches) * _batch_size(trainer)
        place = f"{scheduler.position + 1} of {len(scheduler.checkpoints)}"
        heading = f"LLM checkpoint {place} (step {scheduler.stage.checkpoint.step})"
        if self._display is not None:
            self._display.begin(heading, self._stage_budget, "tokens")

    def _standing(self, trainer: Trainer, module: SAEModule, batches: int) -> Standing:
        scheduler, batch_size, now = scheduler_of(trainer), _batch_size(trainer), time.monotonic()
        assert self._first_batch is not None
        here = (batches - self._first_batch) * batch_size  # by this process: a stage may be resumed in its middle
        seconds = now - self._stage_began
        stages_left = len(scheduler.checkpoints) - scheduler.position - 1
        tokens_left = self._stage_budget - batches * batch_size + stages_left * scheduler.tokens_next
        pace = (self._passed_seconds + seconds) / (self._passed + here)
        beside = (now - self._series_began - self._passed_seconds - seconds) / self._stages  # loading and measuring
        curves = [curve[-1][1] for curve in module.curves.values() if curve]
        states = [module.feature_state(hookpoint) for hookpoint in module.hookpoints]
        return Standing(
            tokens=batches * batch_size,
            budget=self._stage_budget,
            speed=here / max(seconds, 1e-9),
            fvu=max(curves, default=None),
            dead=max(float(state.dead(module.dead_after_tokens).float().mean()) for state in states),
            seconds_left=tokens_left * pace + stages_left * beside,
        )

    def _stop(self) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None


def _batch_size(trainer: Trainer) -> int:
    size: int = trainer.datamodule.batch_size  # type: ignore[attr-defined]
    return size
