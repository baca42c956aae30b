import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from saetrack.sae import (
    SAE,
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    SAETrackSAE,
    StandardSAE,
    TopKSAE,
    save_saelens,
)

SAES = [
    StandardSAE(16, 4),
    TopKSAE(16, 4, k=5),
    SAETrackSAE(16, 4),
    BatchTopKSAE(16, 4, k=5),
    MatryoshkaSAE(16, 4, k=5),
    JumpReLUSAE(16, 4),
    GatedSAE(16, 4),
]


def started(sae: SAE) -> SAE:
    generator = torch.Generator().manual_seed(3)
    sae.initialise(torch.randn(100, 16, generator=generator) + 1, generator)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name != "W_dec":
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.abs() if name == "threshold" else noise)
    return sae


@pytest.mark.parametrize("scale", [1.0, 0.25, 7.0], ids=["not folded", "small", "large"])
@pytest.mark.parametrize("sae", SAES, ids=lambda s: type(s).__name__)
def test_saelens_loads_what_is_saved_and_computes_the_same(sae: SAE, scale: float, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports (transformer_lens, ...) warn of deprecations of their own
        import sae_lens

        sae = started(sae).folded(scale)
        save_saelens(sae, tmp_path / "new" / "snapshot", {"model_name": "m", "hook_name": "gpt_neox.layers.1"})
        lens = sae_lens.SAE.load_from_disk(tmp_path / "new" / "snapshot")
    x = (torch.randn(50, 16, generator=torch.Generator().manual_seed(4)) + 1) / scale
    with torch.no_grad():
        torch.testing.assert_close(lens.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lens(x) * scale, sae(x) * scale, rtol=1e-5, atol=1e-5)
    assert lens.cfg.metadata.hook_name == "gpt_neox.layers.1"
    assert (lens.cfg.d_in, lens.cfg.d_sae) == (16, 64)


@pytest.mark.parametrize("sae", SAES, ids=lambda s: type(s).__name__)
def test_the_files_are_ours_to_read_again_and_equal_saes_give_equal_bytes(sae: SAE, tmp_path: Path) -> None:
    started(sae)
    for name in ("a", "b"):
        save_saelens(sae, tmp_path / name, {"model_from_pretrained_kwargs": {"revision": "step64"}})
    for file in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    twin = type(sae)(**sae.arguments)
    twin.load_state_dict(load_file(tmp_path / "a" / "sae_weights.safetensors"))
    assert all(torch.equal(value, sae.state_dict()[name]) for name, value in twin.state_dict().items())
    config = json.loads((tmp_path / "a" / "cfg.json").read_text())
    assert config["architecture"] == sae.saelens_config()["architecture"]
    assert config["metadata"] == {
        "sae_lens_version": "6.0.0",
        "model_from_pretrained_kwargs": {"revision": "step64"},
    }
