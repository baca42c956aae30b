"""Everything Lightning: the activation stream, the module, the stages of a series, and what runs beside them."""

from saetrack.training.callbacks import AnalyzeTrack, ResumeFile, TrackLogger, TrackProgressBar
from saetrack.training.datamodule import ActivationDataModule, TokenSettings
from saetrack.training.module import OptimizerSettings, SAEModule
from saetrack.training.scheduler import CheckpointScheduler, SnapshotCallback

__all__ = [
    "ActivationDataModule",
    "AnalyzeTrack",
    "CheckpointScheduler",
    "OptimizerSettings",
    "ResumeFile",
    "SAEModule",
    "SnapshotCallback",
    "TokenSettings",
    "TrackLogger",
    "TrackProgressBar",
]
