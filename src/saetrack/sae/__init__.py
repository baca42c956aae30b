"""Sparse autoencoders: torch only, each class with its own loss."""

from .base import SAE, LossTerms
from .geometric_median import geometric_median
from .native import Kernels, use_kernels
from .precision import Precision, resolve_precision
from .saelens import save_saelens
from .saetrack import SAETrackSAE
from .standard import StandardSAE
from .topk import TopKSAE

__all__ = [
    "SAE",
    "Kernels",
    "LossTerms",
    "Precision",
    "SAETrackSAE",
    "StandardSAE",
    "TopKSAE",
    "geometric_median",
    "resolve_precision",
    "save_saelens",
    "use_kernels",
]
