"""Logs the track: numbers to every logger of the trainer, and what only TensorBoard can show to TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

from saetrack.analysis import AnalysisResult
from saetrack.track import Snapshot, Track
from saetrack.training import panels
from saetrack.training.module import SAEModule
from saetrack.training.scheduler import SnapshotCallback, scheduler_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

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


class TrackLogger(SnapshotCallback):
    """Logs the track against the LLM step, where Lightning logs training against the optimizer step.

    Tags begin with ``track`` for a snapshot's numbers, ``track_features`` for distributions over its features,
    ``track_ANALYSIS`` for what an analysis found, and ``train`` for the training. Numbers and the recipe go to every
    logger of the trainer.
    """

    def __init__(self) -> None:
        self._held: list[Logger] = []
        self._laid_out = False

    def hold_loggers(self, trainer: Trainer) -> None:
        """Take the loggers from the trainer until training begins.

        Lightning opens their files before it sets anything up, and a run that is refused then would leave a folder.
        """
        self._held, trainer.loggers = list(trainer.loggers), []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give them back. Lightning runs this callback after the scheduler, which refuses what it must."""
        if self._held:
            trainer.loggers, self._held = self._held, []

    def on_snapshot(self, trainer: Trainer, module: SAEModule, track: Track, snapshot: Snapshot) -> None:
        """Log the snapshot's numbers and the distributions over its features."""
        hookpoint = _hookpoint(trainer, track)
        for log in trainer.loggers:
            log.log_metrics(_named("track", hookpoint, _numbers(snapshot)), step=snapshot.step)
        features = snapshot.features
        frequency = features["firing_frequency"]
        distributions = {
            "firing_frequency_log10": np.log10(frequency[frequency > 0]),
            "functional_correlation_with_previous": features["functional_correlation"].dropna(),
            "decoder_cosine_to_previous": features["decoder_cosine_previous"].dropna(),
        }
        for board in _boards(trainer):
            for name, values in distributions.items():
                if len(values):
                    board.add_histogram(panels.tag("track_features", hookpoint, name), values.to_numpy(), snapshot.step)
            if not self._laid_out:
                scheduler = scheduler_of(trainer)
                panels.add_layout(board, _hookpoints(trainer))
                panels.add_about(board, list(scheduler.tracks.values()), [c.step for c in scheduler.checkpoints])
        self._laid_out = True

    def log_results(self, trainer: Trainer, track: Track, results: Mapping[str, AnalysisResult]) -> None:
        """Log what the analyses found: their scalars by LLM step, their figures, the contexts, the projector."""
        hookpoint = _hookpoint(trainer, track)
        for name, result in results.items():
            for scalar, by_step in result.scalars.items():
                if all(_is_logged(track, step, scalar, value) for step, value in by_step.items()):
                    continue  # by the snapshots; a curve of only the points that differ would be none
                for step, value in by_step.items():
                    for log in trainer.loggers:
                        log.log_metrics(_named(f"track_{name}", hookpoint, {scalar: value}), step=step)
        for board in _boards(trainer):
            for name, result in results.items():
                for title, figure in result.figures.items():
                    caption = " ".join(filter(None, (result.captions.get(title, ""), result.summary)))
                    place = panels.tag(f"track_{name}", hookpoint, title)
                    panels.add_figure(board, place, figure, caption, track.steps[-1])
            if "semantics" in results:
                panels.add_contexts(board, hookpoint, results["semantics"])
            panels.add_projector(board, hookpoint, track, results.get("semantics"))
            panels.add_layout(board, _hookpoints(trainer), list(results))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the recipe, and beside it the numbers of the last snapshot, so that runs can be compared."""
        scheduler = scheduler_of(trainer)
        if not trainer.is_global_zero or not scheduler.tracks or not scheduler.finished:
            return
        recipe: dict[str, Any] = dict(scheduler.recipe)
        final: dict[str, float] = {}
        for track in scheduler.tracks.values():
            hookpoint = _hookpoint(trainer, track)
            facts = {name: track.facts[name] for name in ("model", "hookpoint", "sae", "seed", "corpus_hash")}
            recipe |= {f"{hookpoint}/{name}" if hookpoint else name: fact for name, fact in facts.items()}
            final |= _named("track_final", hookpoint, _numbers(track[-1]))
        for log in trainer.loggers:
            if isinstance(log, TensorBoardLogger):
                log.log_hyperparams(recipe, final, step=track[-1].step)
            else:
                log.log_hyperparams(recipe)


def _numbers(snapshot: Snapshot) -> dict[str, float]:
    """The snapshot's numbers that are defined."""
    facts = snapshot.metadata
    return {name: facts[name] for name in _SNAPSHOT_SCALARS if facts[name] is not None}


def _is_logged(track: Track, step: int, name: str, value: float) -> bool:
    """Whether the snapshot of the step has the number under the same name, or there is none."""
    return math.isnan(value) or math.isclose(_numbers(track.at(step)).get(name, math.nan), value, rel_tol=1e-6)


def _named(group: str, hookpoint: str, numbers: Mapping[str, float]) -> dict[str, float]:
    return {panels.tag(group, hookpoint, name): number for name, number in numbers.items()}


def _hookpoint(trainer: Trainer, track: Track) -> str:
    """The track's hookpoint as it stands in tags: empty when the run has only one."""
    return track.facts["hookpoint"] if len(scheduler_of(trainer).tracks) > 1 else ""


def _hookpoints(trainer: Trainer) -> list[str]:
    return [_hookpoint(trainer, track) for track in scheduler_of(trainer).tracks.values()]


def _boards(trainer: Trainer) -> list[SummaryWriter]:
    return [log.experiment for log in trainer.loggers if isinstance(log, TensorBoardLogger)]
