"""EleutherAI's sparsify: a folder with ``cfg.json`` and ``sae.safetensors``."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from saetrack.sae.base import SAE
from saetrack.sae.saetrack import SAETrackSAE
from saetrack.sae.standard import StandardSAE
from saetrack.sae.topk import TopKSAE
from saetrack.storage import write_json

from .files import ForeignSAE, Origin, TensorFile, build, count_in, read_config, read_origin, refuse, require

CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"


def write_sparsify(sae: SAE, folder: Path, origin: Origin) -> None:
    """Write an SAE for ``sparsify.SparseCoder.load_from_disk``.

    It knows top-k only. A ReLU SAE is one that keeps all its latents, so it is written with k = d_sae.

    Raises:
        ValueError: If the SAE has thresholds or gates.
    """
    if isinstance(sae, TopKSAE):
        k = sae.k
    elif isinstance(sae, (StandardSAE, SAETrackSAE)):
        k = sae.d_sae
    else:
        raise refuse(sae, "sparsify", "it keeps a fixed number of latents, and has no thresholds and no gates")
    norms = torch.linalg.vector_norm(sae.W_dec, dim=1)
    config = {
        "activation": "topk",
        "expansion_factor": sae.expansion_factor,
        # It says how sparsify trains on, not how the weights are.
        "normalize_decoder": bool(torch.allclose(norms, torch.ones_like(norms), atol=1e-4)),
        "num_latents": sae.d_sae,
        "k": k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_in,
    }
    tensors = {"encoder.weight": sae.W_enc.T, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    save_file({k: v.detach().float().cpu().contiguous() for k, v in tensors.items()}, folder / WEIGHTS)
    write_json(folder / CONFIG, config)
    # Its runs keep the LLM's name in the folder above; one hookpoint's folder says nothing about it.
    write_json(folder / "config.json", {"model": origin.model, "revision": origin.revision})


def read_sparsify(folder: Path) -> ForeignSAE:
    """Read one hookpoint's folder of a run of sparsify.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If it is no top-k autoencoder, or a tensor cannot be held; the message names it.
    """
    path = folder / CONFIG
    config = read_config(path)
    require(config, path, "a TopKSAE chooses among all latents", activation="topk")
    reason = "an SAE reconstructs what it reads, and a transcoder something else"
    require(config, path, reason, transcode=False, skip_connection=False)
    file = TensorFile.safetensors(folder / WEIGHTS)
    d_in = count_in(config, "d_in", path)
    d_sae = config.get("num_latents") or d_in * count_in(config, "expansion_factor", path)
    state = {
        "W_enc": file.take("encoder.weight", d_sae, d_in).T,
        "b_enc": file.take("encoder.bias", d_sae),
        # Already [latents, d_in]: only the encoder is a torch.nn.Linear.
        "W_dec": file.take("W_dec", d_sae, d_in),
        "b_dec": file.take("b_dec", d_in),
    }
    sae = build(TopKSAE, state, file.path, k=count_in(config, "k", path))
    return ForeignSAE(sae, _origin(folder))


def _origin(folder: Path) -> Origin:
    for path in (folder / "config.json", folder.parent / "config.json"):
        if path.is_file():
            run = read_config(path)
            facts = {"model": run.get("model"), "revision": run.get("revision"), "context_size": run.get("ctx_len")}
            return read_origin(path, hookpoint=folder.name, **facts)
    return Origin(hookpoint=folder.name)
