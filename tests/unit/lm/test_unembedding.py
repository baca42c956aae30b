from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from saetrack.lm import read_unembedding


def stirred(model: nn.Module) -> nn.Module:
    """Norms with gains and offsets that are not one and zero."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if "Norm" in type(module).__name__:
            for parameter in module.parameters():
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["layer norm", "rms norm"])
def test_logits_are_affine_in_the_normalised_stream_with_this_matrix(
    kind: str, make_llm: Callable[..., GPTNeoXForCausalLM]
) -> None:
    model = stirred(make_llm(seed=0) if kind == "layer norm" else llama())
    norm = model.gpt_neox.final_layer_norm if kind == "layer norm" else model.model.norm
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    # the real path, norm and head, against the matrix
    logits = model.get_output_embeddings()(norm(x)) - model.get_output_embeddings()(norm(torch.zeros(16)))
    size = x.std(dim=1, unbiased=False) if kind == "layer norm" else x.square().mean(dim=1).sqrt()
    torch.testing.assert_close((x / size[:, None]) @ read_unembedding(model).T, logits, rtol=1e-3, atol=1e-4)
