"""``saetrack fit`` and ``analyze`` over checkpoints that are no Hugging Face folders."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from saetrack import Track
from saetrack.cli import main
from saetrack.lm import load_llm, trust

FACTORY = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(64, width), nn.Linear(width, width), nn.Linear(width, 64)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embed(input_ids)).tanh())
"""


def nanogpt_weights(seed: int) -> dict[str, Tensor]:
    """Random weights by nanoGPT's names: one layer, 16 wide, without biases."""
    shapes = {
        "wte": (64, 16),
        "wpe": (32, 16),
        "h.0.attn.c_attn": (48, 16),
        "h.0.attn.c_proj": (16, 16),
        "h.0.mlp.c_fc": (64, 16),
        "h.0.mlp.c_proj": (16, 64),
    }
    generator = torch.Generator().manual_seed(seed)
    matrices = {f"transformer.{n}.weight": torch.randn(*shape, generator=generator) for n, shape in shapes.items()}
    norms = {f"transformer.{n}.weight": torch.ones(16) for n in ("h.0.ln_1", "h.0.ln_2", "ln_f")}
    return {**matrices, **norms, "lm_head.weight": matrices["transformer.wte.weight"]}


@pytest.mark.slow
def test_a_nanogpt_run_becomes_a_track_that_analyses_read(
    config: dict[str, Any], fit_here: Callable[..., Any], tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    arguments = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32, "vocab_size": 64, "bias": False}
    folder = tmp_path / "out"
    tiny_tokenizer.save_pretrained(folder)
    for step in (0, 2, 10):
        content = {"model": nanogpt_weights(step), "model_args": arguments, "iter_num": step}
        torch.save(content, folder / f"ckpt_{step}.pt")
    config["data"]["source"] = {"class_path": "NanoGPTSource", "init_args": {"path": str(folder)}}
    config["data"]["hookpoints"] = ["transformer.h.0"]
    done = fit_here(config)
    assert done.returncode == 0, done.stderr
    track = Track.open(config["scheduler"]["track_dir"])
    assert track.steps == [0, 2, 10]
    assert {s.metadata["llm"]["weight_hash"].split(":")[0] for s in track} == {"sha256-of-tensors"}
    assert torch.equal(load_llm(track[1].llm).lm_head.weight, nanogpt_weights(2)["lm_head.weight"])
    main(["analyze", str(track.path), "--analyses+=Quality", "--analyses+=Semantics"])
    assert {path.name for path in track.analyses_dir.iterdir()} == {"quality", "semantics"}


@pytest.mark.slow
def test_a_lightning_run_becomes_a_track_that_names_its_factory(
    config: dict[str, Any],
    fit_here: Callable[..., Any],
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "my_llm.py").write_text(textwrap.dedent(FACTORY))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trust, "_given", set())
    from my_llm import Tiny

    folder = tmp_path / "checkpoints"
    tiny_tokenizer.save_pretrained(folder)
    for step in (0, 2, 10):
        torch.manual_seed(step)
        state = {f"model.{name}": tensor for name, tensor in Tiny(16).state_dict().items()}
        torch.save({"state_dict": state, "global_step": step}, folder / f"epoch=0-step={step}.ckpt")
    arguments = {"path": str(folder), "factory": "my_llm.Tiny", "init_args": {"width": 16}}
    config["data"]["source"] = {"class_path": "LightningSource", "init_args": arguments}
    config["data"]["hookpoints"] = ["layer"]
    done = fit_here(config)
    assert done.returncode == 0, done.stderr
    track = Track.open(config["scheduler"]["track_dir"])
    assert track.steps == [0, 2, 10]
    assert load_llm(track[0].llm).embed.weight.shape == (64, 16), "fit was given the name"

    trust._given.clear()  # as in another process
    with pytest.raises(ValueError, match=r"The track says that my_llm\.Tiny builds its LLM"):
        load_llm(track[0].llm)
    monkeypatch.setenv(trust.VARIABLE, "my_llm.Tiny")
    main(["analyze", str(track.path), "--analyses+=Semantics"])
    assert (track.analyses_dir / "semantics").is_dir()
