"""Everything Lightning: the activation stream, the module, the stages of a series, and what runs beside them."""

from saetrack.training.callbacks import AnalyzeTrack, ResumeFile
from saetrack.training.datamodule import ActivationDataModule, TokenSettings
from saetrack.training.module import OptimizerSettings, SAEModule
from saetrack.training.progress import TrackProgressBar
from saetrack.training.saes import SAEsByHookpoint
from saetrack.training.scheduler import CheckpointScheduler, SnapshotCallback
from saetrack.training.track_logger import TrackLogger

__all__ = [
    "ActivationDataModule",
    "AnalyzeTrack",
    "CheckpointScheduler",
    "OptimizerSettings",
    "ResumeFile",
    "SAEModule",
    "SAEsByHookpoint",
    "SnapshotCallback",
    "TokenSettings",
    "TrackLogger",
    "TrackProgressBar",
]
