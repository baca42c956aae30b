"""OpenMOSS's llamascopium: a folder with ``config.json`` and ``sae_weights.safetensors``."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from saetrack.sae.base import SAE
from saetrack.sae.batch_selection import BatchSelectionSAE
from saetrack.sae.jumprelu import JumpReLUSAE
from saetrack.sae.saetrack import SAETrackSAE
from saetrack.sae.standard import StandardSAE
from saetrack.sae.topk import TopKSAE
from saetrack.storage import write_json

from .files import ForeignSAE, Origin, TensorFile, build, count_in, factor_in, read_config, read_origin, refuse, require
from .identities import fold_decoder_norms_, read_centred_, read_uncentred_

CONFIG = "config.json"
WEIGHTS = "sae_weights.safetensors"
_LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"
_CLASSES: dict[str, type[SAE]] = {"relu": StandardSAE, "topk": TopKSAE, "jumprelu": JumpReLUSAE}


def write_llamascopium(sae: SAE, folder: Path, origin: Origin) -> None:
    """Write an SAE for ``llamascopium``'s ``SparseAutoEncoder.from_pretrained(str(folder))``.

    It takes no ``b_dec`` from its input, so that is folded into ``b_E``. A threshold is kept as its logarithm; 0
    becomes the smallest normal number.

    Raises:
        ValueError: If the SAE has gates.
    """
    if isinstance(sae, TopKSAE):
        activation = "topk"
    elif isinstance(sae, (JumpReLUSAE, BatchSelectionSAE)):
        activation = "jumprelu"
    elif isinstance(sae, (StandardSAE, SAETrackSAE)):
        activation = "relu"
    else:
        raise refuse(sae, "llamascopium", "its gated encoder multiplies by a sigmoid")
    hookpoint = origin.hookpoint or "unknown"
    config = {
        "sae_type": "sae",
        "d_model": sae.d_in,
        "expansion_factor": float(sae.expansion_factor),
        "use_decoder_bias": True,
        "act_fn": activation,
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": False,
        "hook_point_in": hookpoint,
        "hook_point_out": hookpoint,
        "use_glu_encoder": False,
    }
    if isinstance(sae, TopKSAE):
        config["top_k"] = sae.k
    same = read_uncentred_(sae.folded(1.0))
    tensors: dict[str, Tensor] = {"W_E": same.W_enc, "b_E": same.b_enc, "W_D": same.W_dec, "b_D": same.b_dec}
    if isinstance(same, (JumpReLUSAE, BatchSelectionSAE)):
        tensors[_LOG_THRESHOLD] = same.threshold.clamp_min(torch.finfo(torch.float32).tiny).log()
    save_file({k: v.detach().float().cpu().contiguous() for k, v in tensors.items()}, folder / WEIGHTS)
    write_json(folder / CONFIG, config)


def read_llamascopium(folder: Path) -> ForeignSAE:
    """Read what llamascopium saved.

    A normaliser of the whole data set is folded in such that latents stay as they were in training. With
    ``sparsity_include_decoder_norm``, top-k latents come in units of unit decoder rows.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a setting or a tensor cannot be held; the message names it.
    """
    path = folder / CONFIG
    config = read_config(path)
    require(config, path, "transcoders, crosscoders and attention SAEs are no SAEs of ours", sae_type="sae")
    require(config, path, "its batchtopk has no threshold, so what it infers depends on the batch", act_fn=(*_CLASSES,))
    require(config, path, "a gate that is a sigmoid is in no SAE of ours", use_glu_encoder=False)
    hookpoint = config.get("hook_point_in")
    require(config, path, "an SAE reconstructs what it reads", hook_point_out=hookpoint)
    normalisers = ("dataset-wise", "inference")
    reason = "only a normaliser that multiplies by one number can be folded into the weights"
    require(config, path, reason, norm_activation=normalisers)
    file = TensorFile.safetensors(folder / WEIGHTS)
    sae = _built(config, file, path)
    if config.get("norm_activation", "dataset-wise") == "dataset-wise":
        name = f"dataset_average_activation_norm.{hookpoint}"
        sae = sae.folded(math.sqrt(sae.d_in) / factor_in(file.take(name), name, file.path))
    return ForeignSAE(sae, read_origin(path, hookpoint=hookpoint))


def _built(config: dict[str, Any], file: TensorFile, path: Path) -> SAE:
    activation = config.get("act_fn", "relu")
    d_in = count_in(config, "d_model", path)
    encoder = file.take("W_E", d_in, None)
    d_sae = encoder.shape[1]
    decoder = file.take("W_D", d_sae, d_in)
    bias = file.take("b_D", d_in) if config.get("use_decoder_bias", True) else torch.zeros(d_in)
    state = {"W_enc": encoder, "b_enc": file.take("b_E", d_sae), "W_dec": decoder, "b_dec": bias}
    by_norm = config.get("sparsity_include_decoder_norm", True)
    if activation == "jumprelu":
        threshold = file.take(_LOG_THRESHOLD, d_sae).exp()
        state["threshold"] = threshold / decoder.norm(dim=1) if by_norm else threshold
    arguments = {"k": count_in({"top_k": 50, **config}, "top_k", path)} if activation == "topk" else {}
    sae = read_centred_(build(_CLASSES[activation], state, file.path, **arguments))
    return fold_decoder_norms_(sae) if by_norm and activation == "topk" else sae
