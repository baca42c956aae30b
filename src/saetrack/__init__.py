"""Follow the features of a language model through its training.

The reading half (``Track``, the autoencoders, the analyses) loads at once; the names of the training half are
loaded when they are first asked for, so that reading a track never imports Lightning.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("saetrack")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_HOME = {
    "Track": "saetrack.track",
    "Snapshot": "saetrack.track",
    "SAE": "saetrack.sae",
    "StandardSAE": "saetrack.sae",
    "TopKSAE": "saetrack.sae",
    "BatchTopKSAE": "saetrack.sae",
    "JumpReLUSAE": "saetrack.sae",
    "GatedSAE": "saetrack.sae",
    "MatryoshkaSAE": "saetrack.sae",
    "SAETrackSAE": "saetrack.sae",
    "LLMCheckpoint": "saetrack.lm",
    "FolderSource": "saetrack.lm",
    "HubSource": "saetrack.lm",
    "LightningSource": "saetrack.lm",
    "ListSource": "saetrack.lm",
    "NanoGPTSource": "saetrack.lm",
    "PretrainSource": "saetrack.lm",
    "TorchtitanSource": "saetrack.lm",
    "Analysis": "saetrack.analysis",
    "AnalysisResult": "saetrack.analysis",
    "SweepAnalysis": "saetrack.analysis",
    "Probe": "saetrack.analysis",
    "Observation": "saetrack.analysis",
    "SplitObservation": "saetrack.analysis",
    "ActivationDataModule": "saetrack.training",
    "CheckpointScheduler": "saetrack.training",
    "SAEModule": "saetrack.training",
    "SAEsByHookpoint": "saetrack.training",
    "SnapshotCallback": "saetrack.training",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'saetrack' has no attribute {name!r}; it has {', '.join(_HOME)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
