"""What runs beside training: the resume file, TensorBoard, the progress bar, and the analyses at the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

from saetrack.analysis import Analysis, AnalysisResult, SweepAnalysis
from saetrack.analysis.plugins import name_analyses
from saetrack.analysis.sweep import run_analyses
from saetrack.track import Snapshot, Track
from saetrack.training.module import SAEModule
from saetrack.training.scheduler import CheckpointScheduler, SnapshotCallback

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)


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
        """Write it after a stage. Lightning runs this callback after the scheduler, which has moved on by then."""
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = self.path(_scheduler(trainer).track_dir)
        # Lightning writes into the system's temporary folder, and from another disk a move is no rename
        unfinished = path.with_name(f".{path.name}")
        trainer.save_checkpoint(unfinished)
        if trainer.is_global_zero:
            unfinished.replace(path)


class TrackProgressBar(TQDMProgressBar):
    """Lightning's progress bar, saying which LLM checkpoint of how many, and tokens per second."""

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Begin a bar here too; a stage that is resumed in its middle has no epoch start."""
        super().on_train_start(trainer)
        self.train_progress_bar.reset(trainer.num_training_batches)
        self._describe_stage(trainer)

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Begin a bar for the stage."""
        super().on_train_epoch_start(trainer)
        self._describe_stage(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Count the batch, then refresh as Lightning does."""
        self._batches += 1
        super().on_train_batch_end(trainer, pl_module, *args)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """The loss, and tokens per second of this stage so far over all processes."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        tokens = self._batches * trainer.datamodule.batch_size  # type: ignore[attr-defined]
        speed = tokens / max(time.monotonic() - self._began, 1e-9)
        return {**metrics, "loss": f"{pl_module.latest_loss:.3g}", "tokens/s": f"{speed:,.0f}"}

    def _describe_stage(self, trainer: Trainer) -> None:
        stage, n = _scheduler(trainer).stage, len(_scheduler(trainer).checkpoints)
        self.train_progress_bar.set_description(f"LLM step {stage.checkpoint.step} ({stage.position + 1} of {n})")
        self._began, self._batches = time.monotonic(), 0


class TrackLogger(SnapshotCallback):
    """Logs the track against the LLM step, where Lightning logs training against the optimizer step.

    Numbers go to every logger of the trainer; histograms, figures and the projector to TensorBoard.
    """

    def on_snapshot(self, trainer: Trainer, module: SAEModule, track: Track, snapshot: Snapshot) -> None:
        """Log the snapshot's numbers and the distributions over its features."""
        prefix = _prefix(trainer, track)
        facts = snapshot.metadata
        numbers = {name: facts[name] for name in _SNAPSHOT_SCALARS if facts[name] is not None}
        for log in trainer.loggers:
            log.log_metrics({f"{prefix}/{name}": value for name, value in numbers.items()}, step=snapshot.step)
        features = snapshot.features
        frequency = features["firing_frequency"].to_numpy()
        for board in _boards(trainer.loggers):
            if (frequency > 0).any():
                alive = np.log10(frequency[frequency > 0])
                board.add_histogram(f"{prefix}/log10_firing_frequency_of_alive_features", alive, snapshot.step)
            cosine = features["decoder_cosine_previous"].dropna().to_numpy()
            if len(cosine):
                board.add_histogram(f"{prefix}/decoder_cosine_to_previous_snapshot", cosine, snapshot.step)

    def log_results(self, trainer: Trainer, track: Track, results: Mapping[str, AnalysisResult]) -> None:
        """Log what the analyses found: their scalars by LLM step, and their figures."""
        prefix = _prefix(trainer, track)
        for name, result in results.items():
            for scalar, by_step in result.scalars.items():
                for step, value in by_step.items():
                    for log in trainer.loggers:
                        log.log_metrics({f"{prefix}/{name}/{scalar}": value}, step=step)
            for board in _boards(trainer.loggers):
                for title, figure in result.figures.items():
                    board.add_figure(f"{prefix}/{name}/{title}", figure, track.steps[-1], close=False)
        for board in _boards(trainer.loggers):
            _add_projector(board, prefix, track, results.get("semantics"))


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
        analyses: list[Analysis | SweepAnalysis] | None = None,
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
        if not trainer.is_global_zero or not self.analyses or not _scheduler(trainer).finished:
            return
        for track in _scheduler(trainer).tracks.values():
            results = run_analyses(track, self.analyses, device=pl_module.device)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, TrackLogger):
                    callback.log_results(trainer, track, results)


_SNAPSHOT_SCALARS = (
    "fvu",
    "fvu_before",
    "fvu_shift",
    "explained_variance",
    "l0",
    "dead_share",
    "dense_share",
    "functional_correlation_median",
    "ce_recovered_zero",
    "ce_recovered_mean",
)


def _add_projector(board: SummaryWriter, prefix: str, track: Track, semantics: AnalysisResult | None) -> None:
    """The decoder of the last snapshot in the projector, each feature labelled by its top token."""
    last = track[-1]
    features = last.features
    alive = features.index[~features["dead"]].to_numpy()
    if not len(alive):
        return
    labels = [str(feature) for feature in alive]
    if semantics is not None:
        table = semantics.tables["features"]
        top = table[table["step"] == last.step].set_index("feature")["top_token"].to_dict()
        labels = [f"{feature} {top[feature]!r}" if feature in top else str(feature) for feature in alive]
    directions = torch.nn.functional.normalize(last.tensor("W_dec")[torch.tensor(alive)], dim=1)
    board.add_embedding(directions, metadata=labels, global_step=last.step, tag=f"{prefix}/decoder".replace("/", "_"))


def _scheduler(trainer: Trainer) -> CheckpointScheduler:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, CheckpointScheduler):
            return callback
    raise RuntimeError("This callback needs a CheckpointScheduler beside it in the trainer's callbacks.")


def _prefix(trainer: Trainer, track: Track) -> str:
    """``track``, or ``track/HOOKPOINT`` when the run has several."""
    return "track" if len(_scheduler(trainer).tracks) == 1 else f"track/{track.facts['hookpoint']}"


def _boards(loggers: list[Logger]) -> list[SummaryWriter]:
    return [log.experiment for log in loggers if isinstance(log, TensorBoardLogger)]
