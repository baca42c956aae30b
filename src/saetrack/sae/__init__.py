"""Sparse autoencoders: torch only, each class with its own loss."""

from .base import SAE, LossTerms
from .batchtopk import BatchTopKSAE
from .formats.saelens import save_saelens
from .gated import GatedSAE
from .geometric_median import geometric_median
from .jumprelu import JumpReLUSAE
from .matryoshka import MatryoshkaSAE
from .native import Kernels, use_kernels
from .precision import Precision, resolve_precision
from .ranks import Exchange, use_exchange
from .record import sae_from_record, sae_record
from .saetrack import SAETrackSAE
from .standard import StandardSAE
from .topk import TopKSAE

__all__ = [
    "SAE",
    "BatchTopKSAE",
    "Exchange",
    "GatedSAE",
    "JumpReLUSAE",
    "Kernels",
    "LossTerms",
    "MatryoshkaSAE",
    "Precision",
    "SAETrackSAE",
    "StandardSAE",
    "TopKSAE",
    "geometric_median",
    "resolve_precision",
    "sae_from_record",
    "sae_record",
    "save_saelens",
    "use_exchange",
    "use_kernels",
]
