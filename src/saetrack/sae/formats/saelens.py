"""SAELens: a folder with ``cfg.json`` and ``sae_weights.safetensors``."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from saetrack.sae.base import SAE
from saetrack.sae.batch_selection import BatchSelectionSAE
from saetrack.sae.batchtopk import BatchTopKSAE
from saetrack.sae.gated import GatedSAE
from saetrack.sae.jumprelu import JumpReLUSAE
from saetrack.sae.matryoshka import MatryoshkaSAE
from saetrack.sae.standard import StandardSAE
from saetrack.sae.topk import TopKSAE

from .files import (
    ForeignSAE,
    Origin,
    TensorFile,
    build,
    choice_in,
    count_in,
    factor_in,
    read_config,
    read_origin,
    require,
    section,
)
from .identities import fold_decoder_norms_, read_centred_

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SCALER = "activation_scaler.json"

# The version of the *format*: below 6.0.0-rc.0 (or without one) SAELens rewrites the configuration while loading.
_FORMAT_VERSION = "6.0.0"

_CLASSES: dict[str, type[SAE]] = {
    "standard": StandardSAE,
    "topk": TopKSAE,
    "jumprelu": JumpReLUSAE,
    "gated": GatedSAE,
    "batchtopk": BatchTopKSAE,
    "matryoshka_batchtopk": MatryoshkaSAE,
}


def save_saelens(sae: SAE, folder: Path | str, metadata: dict[str, Any]) -> None:
    """Write ``cfg.json`` and ``sae_weights.safetensors`` such that ``sae_lens.SAE.load_from_disk(folder)`` opens them.

    The tensors are named as the SAE's parameters, so ``type(sae)(**sae.arguments).load_state_dict`` reads them
    too. Nothing is normalised on loading: pass ``sae.folded(scale)`` to get a snapshot in the LLM's own units.

    Args:
        sae: What to write, in the units in which it shall be used.
        folder: Where to; made if it is missing.
        metadata: json-able facts that SAELens keeps beside the SAE: ``model_name``, ``hook_name``,
            ``context_size``, ``prepend_bos``, ``model_from_pretrained_kwargs`` (``{"revision": "step1000"}``), ...
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **sae.saelens_config(),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": _FORMAT_VERSION, **metadata},
    }
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in sae.state_dict().items()}
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_saelens(sae: SAE, folder: Path, origin: Origin) -> None:
    """Write an SAE for SAELens; every class of ours has its place there.

    The batch-top-k classes become ``jumprelu``, as SAELens's own do: their inference is a threshold.
    """
    metadata = {
        "model_name": origin.model,
        "hook_name": origin.hookpoint,
        "context_size": origin.context_size,
        "prepend_bos": origin.prepend_bos,
        "model_from_pretrained_kwargs": {} if origin.revision is None else {"revision": origin.revision},
    }
    save_saelens(sae, folder, metadata)


def read_saelens(folder: Path) -> ForeignSAE:
    """Read what SAELens saved, for inference or as a training checkpoint.

    A normaliser that multiplies by one number is folded in, as is a decoder norm that top-k is rescaled by; latents
    are then in units of unit decoder rows. Batch-top-k that was saved for inference is a ``jumprelu`` there, and
    becomes one here.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the architecture, a setting or a tensor cannot be held; the message names it.
    """
    path = folder / CONFIG
    config = _as_version_6(read_config(path), path)
    architecture = choice_in(config, "architecture", path, _CLASSES)
    require(config, path, "an SAE of ours reads one vector", reshape_activations="none")
    require(
        config,
        path,
        "only a normaliser that multiplies by one number can be folded into the weights",
        normalize_activations=("none", "expected_average_only_in"),
    )
    file = TensorFile.safetensors(folder / WEIGHTS)
    cls = _CLASSES[architecture]
    sae = build(cls, _state(file, config, path), file.path, **_arguments(cls, config, path))
    if config.get("rescale_acts_by_decoder_norm"):
        fold_decoder_norms_(sae)
        if isinstance(sae, BatchSelectionSAE):
            sae.threshold.fill_(file.take("topk_threshold").relu().item())  # it was measured on the rescaled latents
    if not config.get("apply_b_dec_to_input", True):
        read_centred_(sae)
    if config.get("normalize_activations") == "expected_average_only_in":
        sae = sae.folded(_scale(folder))
    return ForeignSAE(sae, _origin(config, path))


def _as_version_6(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The configuration in the words of version 6, which keeps the LLM's facts in ``metadata``."""
    if "metadata" in config:
        return config
    kwargs = section(config, "activation_fn_kwargs", path)
    activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    architecture = "topk" if activation == "topk" else config.get("architecture", "standard")
    normaliser = config.get("normalize_activations") or "none"
    return {
        **config,
        "architecture": architecture,
        "k": config.get("k", kwargs.get("k")),
        "normalize_activations": "expected_average_only_in" if normaliser is True else normaliser,
        "metadata": {**config, "hook_name": config.get("hook_name", config.get("hook_point"))},
    }


def _state(file: TensorFile, config: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    d_in, d_sae = count_in(config, "d_in", path), count_in(config, "d_sae", path)
    architecture = config["architecture"]
    state = {"W_enc": file.take("W_enc", d_in, d_sae), "W_dec": file.take("W_dec", d_sae, d_in)}
    state["b_dec"] = file.take("b_dec", d_in)
    for name in ("b_gate", "b_mag", "r_mag") if architecture == "gated" else ("b_enc",):
        state[name] = file.take(name, d_sae)
    if architecture == "jumprelu":
        # Training checkpoints from before 6.48 keep the logarithm.
        logarithm = "log_threshold" in file.tensors and "threshold" not in file.tensors
        threshold = file.take("log_threshold", d_sae).exp() if logarithm else file.take("threshold", d_sae)
        state["threshold"] = threshold.relu()
    elif "batchtopk" in architecture:
        state["threshold"] = file.take("topk_threshold").relu().expand(d_sae)
    return state


def _arguments(cls: type[SAE], config: dict[str, Any], path: Path) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if cls in (TopKSAE, BatchTopKSAE, MatryoshkaSAE):
        k = config.get("k")
        # SAELens lets the k of batch-top-k be a fraction; here it is what training aims at, and inference needs none.
        rounded = max(1, round(k)) if isinstance(k, float) and cls is not TopKSAE else k
        arguments["k"] = count_in({"k": rounded}, "k", path)
    if cls is MatryoshkaSAE:
        widths = config.get("matryoshka_widths")
        arguments["prefixes"] = sorted({*widths, config["d_sae"]}) if widths else None
    return arguments


def _scale(folder: Path) -> float:
    """What SAELens multiplied the activations by in training, which it keeps beside the weights."""
    path = folder / SCALER
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder / CONFIG}: normalize_activations is 'expected_average_only_in', but {path} does not exist; "
            "expected the factor in it. Take a training checkpoint of SAELens, which has it."
        )
    return factor_in(read_config(path).get("scaling_factor"), "scaling_factor", path)


def _origin(config: dict[str, Any], path: Path) -> Origin:
    metadata = section(config, "metadata", path)
    return read_origin(
        path,
        model=metadata.get("model_name"),
        revision=section(metadata, "model_from_pretrained_kwargs", path).get("revision"),
        hookpoint=metadata.get("hook_name"),
        context_size=metadata.get("context_size"),
        prepend_bos=metadata.get("prepend_bos"),
    )
