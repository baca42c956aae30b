"""Write an SAE in the format of SAELens 6."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from .base import SAE

# The version of the *format*: below 6.0.0-rc.0 (or without one) SAELens rewrites the configuration while loading.
_FORMAT_VERSION = "6.0.0"


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
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
