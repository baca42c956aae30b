"""saprmarks/dictionary_learning: a folder with ``config.json`` and ``ae.pt``, a dictionary of tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saetrack.sae.base import SAE
from saetrack.sae.batch_selection import BatchSelectionSAE
from saetrack.sae.batchtopk import BatchTopKSAE
from saetrack.sae.gated import GatedSAE
from saetrack.sae.jumprelu import JumpReLUSAE
from saetrack.sae.matryoshka import MatryoshkaSAE
from saetrack.sae.saetrack import SAETrackSAE
from saetrack.sae.standard import StandardSAE
from saetrack.sae.topk import TopKSAE
from saetrack.storage import write_json

from .files import (
    ForeignSAE,
    Origin,
    TensorFile,
    build,
    choice_in,
    factor_in,
    read_config,
    read_origin,
    refuse,
    section,
)
from .identities import fold_decoder_norms_, read_centred_, read_uncentred_

CONFIG = "config.json"
WEIGHTS = "ae.pt"
_UNSET = -1.0
"""A threshold that was never measured, as dictionary_learning writes it."""

Tensors = dict[str, Tensor]


def write_dictionary_learning(sae: SAE, folder: Path, origin: Origin) -> None:
    """Write an SAE for ``dictionary_learning.utils.load_dictionary(folder, device)``.

    A ReLU SAE gets unit decoder rows, since its loader makes them so; its latents are then n times as large, n the
    row's norm. All others keep their latents. A JumpReLU there does not take ``b_dec`` from its input, so it is
    folded into ``b_enc``.

    Raises:
        ValueError: If its class there cannot hold the SAE.
    """
    dict_class, state = _exported(sae)
    trainer = {
        "trainer_class": None,
        "dict_class": dict_class,
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "lm_name": origin.model,
        "submodule_name": origin.hookpoint,
    }
    if isinstance(sae, (TopKSAE, BatchSelectionSAE)):
        trainer["k"] = sae.k
    write_json(folder / CONFIG, {"trainer": trainer, "buffer": {"ctx_len": origin.context_size}})
    torch.save({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / WEIGHTS)


def _exported(sae: SAE) -> tuple[str, Tensors]:
    if isinstance(sae, (StandardSAE, SAETrackSAE)):
        sae = fold_decoder_norms_(sae.folded(1.0))
        decoder = sae.W_dec.detach().clone()
        decoder[decoder.norm(dim=1) == 0, 0] = 1.0  # any unit row: the fold made its latent 0
        return "AutoEncoder", {**_linear(sae.W_enc, decoder), "encoder.bias": sae.b_enc, "bias": sae.b_dec}
    if isinstance(sae, GatedSAE):
        biases = {"decoder_bias": sae.b_dec, "gate_bias": sae.b_gate, "mag_bias": sae.b_mag, "r_mag": sae.r_mag}
        return "GatedAutoEncoder", {**_linear(sae.W_enc, sae.W_dec), **biases}
    if isinstance(sae, JumpReLUSAE):
        names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
        state = read_uncentred_(sae.folded(1.0)).state_dict()
        return "JumpReluAutoEncoder", {name: state[name] for name in names}
    threshold = torch.tensor(_UNSET)
    if isinstance(sae, BatchSelectionSAE):
        threshold = sae.threshold[0].clone()
        if not (sae.threshold == threshold).all():
            raise refuse(sae, "dictionary_learning", "it has one threshold for all latents, and these differ")
    if isinstance(sae, MatryoshkaSAE):
        sizes = torch.tensor(sae.prefixes).diff(prepend=torch.tensor([0]))
        weights = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        return "MatryoshkaBatchTopKSAE", {**weights, **_choice(sae.k, threshold), "group_sizes": sizes}
    if isinstance(sae, (TopKSAE, BatchTopKSAE)):
        name = "AutoEncoderTopK" if isinstance(sae, TopKSAE) else "BatchTopKSAE"
        biases = {"encoder.bias": sae.b_enc, "b_dec": sae.b_dec}
        return name, {**_linear(sae.W_enc, sae.W_dec), **biases, **_choice(sae.k, threshold)}
    raise refuse(sae, "dictionary_learning", "it has no class that computes the same")


def _linear(encoder: Tensor, decoder: Tensor) -> Tensors:
    """Weights ``[d_in, d_sae]`` and ``[d_sae, d_in]`` as torch.nn.Linear keeps them."""
    return {"encoder.weight": encoder.T, "decoder.weight": decoder.T}


def _choice(k: int, threshold: Tensor) -> Tensors:
    return {"k": torch.tensor(k, dtype=torch.int), "threshold": threshold}


def read_dictionary_learning(path: Path) -> ForeignSAE:
    """Read what dictionary_learning saved.

    A run that was killed leaves a *backup* under the name ``ae.pt``, in units in which the activations were divided
    by its ``norm_factor``; that is folded in. Finished ones have it folded already.

    Args:
        path: The folder of a trainer, or one ``checkpoints/ae_{step}.pt`` in it.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the class or a tensor cannot be held; the message names it.
    """
    weights = path / WEIGHTS if path.is_dir() else path
    folder = weights.parent.parent if weights.parent.name == "checkpoints" else weights.parent
    config = read_config(folder / CONFIG)
    trainer = section(config, "trainer", folder / CONFIG)
    dict_class = choice_in(trainer, "dict_class", folder / CONFIG, _READERS)
    file = TensorFile.torch_save(weights)
    factor = 1.0
    if "ae" in file.tensors:
        norm, inner = file.tensors.get("norm_factor"), file.tensors["ae"]
        if not isinstance(inner, dict):
            raise ValueError(f"{weights}: ae is a {type(inner).__name__}; expected a dictionary of tensors.")
        factor = 1.0 if norm is None else factor_in(norm, "norm_factor", weights)
        file = TensorFile(weights, inner)
    sae = _READERS[dict_class](file)
    if factor != 1.0:
        _scale_biases_(sae, factor)
    facts = {"model": trainer.get("lm_name"), "hookpoint": _hookpoint(trainer)}
    context_size = section(config, "buffer", folder / CONFIG).get("ctx_len")
    return ForeignSAE(sae, read_origin(folder / CONFIG, context_size=context_size, **facts))


def _hookpoint(trainer: dict[str, Any]) -> str | None:
    name = trainer.get("submodule_name")
    return name if isinstance(name, str) else None


@torch.no_grad()
def _scale_biases_(sae: SAE, factor: float) -> None:
    """Fold a normaliser as dictionary_learning does: biases and thresholds grow, and so do the latents."""
    for name in ("b_enc", "b_gate", "b_mag", "b_dec", "threshold"):
        values = getattr(sae, name, None)
        if isinstance(values, Tensor):
            values.mul_(factor)


def _weights(file: TensorFile) -> Tensors:
    """The two matrices and the encoder's bias, whichever of its two ways of naming them the class has."""
    if "W_enc" in file.tensors:
        encoder = file.take("W_enc", None, None)  # [d_in, d_sae]
        d_in, d_sae = encoder.shape
        return {"W_enc": encoder, "W_dec": file.take("W_dec", d_sae, d_in), "b_enc": file.take("b_enc", d_sae)}
    encoder = file.take("encoder.weight", None, None).T
    d_in, d_sae = encoder.shape
    state = {"W_enc": encoder, "W_dec": file.take("decoder.weight", d_in, d_sae).T}
    return state if "r_mag" in file.tensors else {**state, "b_enc": file.take("encoder.bias", d_sae)}


def _bias(file: TensorFile, state: Tensors, name: str) -> Tensors:
    return {**state, "b_dec": file.take(name, state["W_dec"].shape[1])}


def _read_standard(file: TensorFile) -> SAE:
    return build(StandardSAE, _bias(file, _weights(file), "bias"), file.path)


def _read_new(file: TensorFile) -> SAE:
    return read_centred_(build(StandardSAE, _bias(file, _weights(file), "decoder.bias"), file.path))


def _read_gated(file: TensorFile) -> SAE:
    state = _bias(file, _weights(file), "decoder_bias")
    d_sae = len(state["W_dec"])
    names = {"b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}
    return build(GatedSAE, {**state, **{ours: file.take(name, d_sae) for ours, name in names.items()}}, file.path)


def _read_topk(file: TensorFile) -> SAE:
    return build(TopKSAE, _bias(file, _weights(file), "b_dec"), file.path, k=file.take_count("k"))


def _read_batchtopk(file: TensorFile) -> SAE:
    return build(BatchTopKSAE, _with_threshold(file), file.path, k=file.take_count("k"))


def _read_matryoshka(file: TensorFile) -> SAE:
    sizes = file.tensors.get("group_sizes")
    if not isinstance(sizes, Tensor):
        raise ValueError(f"{file.path}: tensor group_sizes is missing; expected the sizes of the nested groups.")
    prefixes = sizes.cumsum(0).tolist()
    return build(MatryoshkaSAE, _with_threshold(file), file.path, k=file.take_count("k"), prefixes=prefixes)


def _with_threshold(file: TensorFile) -> Tensors:
    state = _bias(file, _weights(file), "b_dec")
    # Unset, it is below every latent, as 0 is.
    return {**state, "threshold": file.take("threshold").relu().expand(len(state["W_dec"]))}


def _read_jumprelu(file: TensorFile) -> SAE:
    state = _bias(file, _weights(file), "b_dec")
    threshold = file.take("threshold", len(state["W_dec"])).relu()
    # Whether it takes b_dec from its input is not saved; its own loader and trainer do not.
    return read_centred_(build(JumpReLUSAE, {**state, "threshold": threshold}, file.path))


_READERS: dict[str, Callable[[TensorFile], SAE]] = {
    "AutoEncoder": _read_standard,
    "AutoEncoderNew": _read_new,
    "GatedAutoEncoder": _read_gated,
    "AutoEncoderTopK": _read_topk,
    "BatchTopKSAE": _read_batchtopk,
    "MatryoshkaBatchTopKSAE": _read_matryoshka,
    "JumpReluAutoEncoder": _read_jumprelu,
}
