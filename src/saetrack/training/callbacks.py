"""What runs beside training: the resume file, and the analyses at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from saetrack.analysis import Analysis, AnyAnalysis
from saetrack.analysis.plugins import name_analyses
from saetrack.analysis.sweep import run_analyses
from saetrack.terminal import shown
from saetrack.track import Snapshot, Track
from saetrack.training.module import SAEModule
from saetrack.training.scheduler import SnapshotCallback, scheduler_of
from saetrack.training.track_logger import TrackLogger


class ResumeFile(Checkpoint):
    """Writes ``resume/last.ckpt`` in the run's folder, from which ``--ckpt_path last`` goes on.

    It is written after every stage and, within a stage, after every ``every_tokens``; what was trained since
    is trained again, to the same bytes.

    Args:
        every_tokens: Tokens between two writings within a stage, over all processes.
    """

    def __init__(self, every_tokens: int = 5_000_000) -> None:
        super().__init__()
        if every_tokens < 1:
            raise ValueError(f"ResumeFile.every_tokens is {every_tokens}; it must be at least 1.")
        self.every_tokens = every_tokens

    @staticmethod
    def path(track_dir: Path) -> Path:
        """The resume file of the run in ``track_dir``."""
        return track_dir / "resume" / "last.ckpt"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write it when enough tokens have passed."""
        batch_size = trainer.datamodule.batch_size  # type: ignore[attr-defined]
        if (batch_idx + 1) % max(1, self.every_tokens // batch_size) == 0:
            self._write(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it after a stage. Lightning runs this callback after the scheduler, which has moved on by then.

        Then let the scheduler wait for what is still being written: from here on there is something to go on from.
        """
        self._write(trainer)
        assert isinstance(pl_module, SAEModule)
        scheduler_of(trainer).follow_series(trainer, pl_module)

    def _write(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = self.path(scheduler_of(trainer).track_dir)
        # Lightning writes into the system's temporary folder, and from another disk a move is no rename
        unfinished = path.with_name(f".{path.name}")
        try:
            trainer.save_checkpoint(unfinished)
        except OSError:  # a full disk needs its room
            unfinished.unlink(missing_ok=True)
            raise
        if trainer.is_global_zero:
            unfinished.replace(path)


class AnalyzeTrack(SnapshotCallback):
    """Runs analyses when the last snapshot is written, on rank zero.

    Args:
        analyses: Which, by class name: the built-in ``Quality``, ``Semantics``, ``Formation`` and ``Drift``, those
            of installed plugins, and ``file.Class`` for a file in ``plugins/``. ``saetrack analyses`` lists them.
        after_each_snapshot: Cheap analyses to run on the track so far after every snapshot as well. Only ones
            that need no LLM.
    """

    def __init__(
        self,
        analyses: list[AnyAnalysis] | None = None,
        after_each_snapshot: list[Analysis] | None = None,
    ) -> None:
        self.analyses = name_analyses(analyses or [])
        self.after_each_snapshot = name_analyses(after_each_snapshot or [])

    def on_snapshot(self, trainer: Trainer, module: SAEModule, track: Track, snapshot: Snapshot) -> None:
        """Run the cheap ones."""
        if self.after_each_snapshot:
            run_analyses(track, self.after_each_snapshot)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run all of them, each LLM checkpoint loaded once for each track."""
        if not trainer.is_global_zero or not self.analyses or not scheduler_of(trainer).finished:
            return
        for track in scheduler_of(trainer).tracks.values():
            with shown(f"Analysing {track.facts['hookpoint']}", "analyses and LLM checkpoints to do") as progress:
                results = run_analyses(track, self.analyses, device=pl_module.device, progress=progress)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, TrackLogger):
                    callback.log_results(trainer, track, results)
