from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from saetrack.lm.forward import (
    activation_widths,
    edit_activations,
    next_token_losses,
    read_activations,
    resolve_hookpoint,
)

SPECIAL = {"bos_token_id": 0, "eos_token_id": 0}


def gpt_neox() -> tuple[PreTrainedModel, str]:
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, **SPECIAL
    )
    return GPTNeoXForCausalLM(config), "gpt_neox.layers"


def gpt2() -> tuple[PreTrainedModel, str]:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2, **SPECIAL)), "transformer.h"


def llama() -> tuple[PreTrainedModel, str]:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, **SPECIAL
    )
    return LlamaForCausalLM(config), "model.layers"


@pytest.fixture(params=[gpt_neox, gpt2, llama], ids=lambda build: build.__name__)
def model_and_layers(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, str]:
    torch.manual_seed(0)
    model, layers = request.param()
    return model.eval().requires_grad_(False), layers


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def count_calls(model: nn.Module, names: list[str]) -> dict[str, int]:
    calls = dict.fromkeys(names, 0)
    for name in names:

        def count(*_: Any, name: str = name) -> None:
            calls[name] += 1

        model.get_submodule(name).register_forward_pre_hook(count)
    return calls


def test_activations_are_the_hidden_states_of_a_full_forward(
    model_and_layers: tuple[PreTrainedModel, str], tokens: Tensor
) -> None:
    model, layers = model_and_layers
    with torch.no_grad():
        hidden = model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    names = [f"{layers}.1", f"{layers}.0"]
    activations = read_activations(model, tokens, names)
    assert list(activations) == names
    assert torch.equal(activations[names[0]], hidden[2])
    assert torch.equal(activations[names[1]], hidden[1])


def test_nothing_after_the_last_hookpoint_is_run(model_and_layers: tuple[PreTrainedModel, str], tokens: Tensor) -> None:
    model, layers = model_and_layers
    head = "embed_out" if hasattr(model, "embed_out") else "lm_head"
    calls = count_calls(model, [f"{layers}.0", f"{layers}.1", f"{layers}.2", head])
    read_activations(model, tokens, [f"{layers}.1", f"{layers}.0"])
    assert list(calls.values()) == [1, 1, 0, 0]


def test_hooks_are_gone_afterwards(model_and_layers: tuple[PreTrainedModel, str], tokens: Tensor) -> None:
    model, layers = model_and_layers
    read_activations(model, tokens, [f"{layers}.0"])
    with pytest.raises(ValueError, match="edit"):
        edit_activations(model, tokens, f"{layers}.0", lambda x: x[:1])
    assert not any(module._forward_hooks for module in model.modules())
    assert model(input_ids=tokens).logits.shape == (2, 12, 64)


def test_an_sae_can_be_trained_on_the_activations(
    model_and_layers: tuple[PreTrainedModel, str], tokens: Tensor
) -> None:
    model, layers = model_and_layers
    x = read_activations(model, tokens, [f"{layers}.1"])[f"{layers}.1"]
    assert not x.is_inference()
    weight = nn.Parameter(torch.eye(16))
    (x @ weight).square().sum().backward()
    assert weight.grad is not None


def test_modules_that_give_tuples_are_read_and_edited(tokens: Tensor) -> None:
    model, _ = gpt_neox()
    name = "gpt_neox.layers.1.attention"
    assert isinstance(tuple_output(model.eval(), name, tokens), tuple)
    assert read_activations(model, tokens, [name])[name].shape == (2, 12, 16)
    edited = edit_activations(model, tokens, name, torch.zeros_like)
    with torch.inference_mode():
        model.get_submodule(name).dense.weight.zero_()
        model.get_submodule(name).dense.bias.zero_()
        expected = model(input_ids=tokens).logits
    torch.testing.assert_close(edited, expected)


def tuple_output(model: nn.Module, name: str, tokens: Tensor) -> Any:
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    model(input_ids=tokens)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("layer", [0, 1])
def test_an_edit_reaches_the_logits(model_and_layers: tuple[PreTrainedModel, str], tokens: Tensor, layer: int) -> None:
    model, layers = model_and_layers
    name = f"{layers}.{layer}"
    with torch.no_grad():
        clean = model(input_ids=tokens).logits
    assert torch.equal(edit_activations(model, tokens, name, lambda x: x), clean)

    other = tokens.flip(1)
    patch = read_activations(model, other, [name])[name]
    with torch.no_grad():
        expected = model(input_ids=other).logits
    assert not torch.allclose(expected, clean)
    assert torch.equal(edit_activations(model, tokens, name, lambda _: patch), expected)


def test_an_edit_in_float32_of_a_bfloat16_llm_is_cast_back(tokens: Tensor) -> None:
    model = gpt_neox()[0].eval().to(torch.bfloat16)
    logits = edit_activations(model, tokens, "gpt_neox.layers.1", lambda x: x.float() * 2)
    assert logits.dtype == torch.bfloat16


def test_the_output_of_the_whole_body_can_be_edited(tokens: Tensor) -> None:
    model = gpt_neox()[0].eval()
    logits = edit_activations(model, tokens, "gpt_neox", torch.zeros_like)
    assert torch.equal(logits, torch.zeros(2, 12, 64))


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("gpt_neox.layers.7", r"is no module of GPTNeoXForCausalLM.*gpt_neox\.layers\.\d"),
        ("layers.1", r"gpt_neox\.layers\.1"),
        ("gpt_neox.layer.1.mpl", r"gpt_neox\.layers\.1\.mlp"),
        ("gpt_neox.layers", r"is a list of modules.*gpt_neox\.layers\.0"),
        ("", r"closest names are gpt_neox"),
        ("zzz", r"closest names are gpt_neox"),
    ],
)
def test_a_wrong_name_lists_the_closest(name: str, close: str) -> None:
    with pytest.raises(ValueError, match=close):
        resolve_hookpoint(gpt_neox()[0], name)


def test_hookpoints_without_one_vector_per_token_are_refused(tokens: Tensor) -> None:
    model = gpt_neox()[0].eval()
    with pytest.raises(ValueError, match=r"gpt_neox\.rotary_emb gives shape .* expected \[batch, context, d_in\]"):
        read_activations(model, tokens, ["gpt_neox.rotary_emb"])
    model.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="unused is a module of the LLM, but its forward pass does not call it"):
        read_activations(model, tokens, ["gpt_neox.layers.0", "unused"])
    with pytest.raises(ValueError, match="unused is a module of the LLM, but"):
        edit_activations(model, tokens, "unused", lambda x: x)
    with pytest.raises(ValueError, match="No hookpoint was given"):
        read_activations(model, tokens, [])


def test_losses_are_those_of_transformers(model_and_layers: tuple[PreTrainedModel, str], tokens: Tensor) -> None:
    model, _ = model_and_layers
    with torch.no_grad():
        output = model(input_ids=tokens, labels=tokens)
    losses = next_token_losses(output.logits, tokens.to(torch.int32))
    assert losses.shape == (2, 11)
    torch.testing.assert_close(losses.mean(), output.loss)
    by_hand = -output.logits[1, 4].log_softmax(-1)[tokens[1, 5]]
    torch.testing.assert_close(losses[1, 4], by_hand)
    with pytest.raises(ValueError, match=r"logits have shape \(2, 12, 64\) but tokens \(2, 5\)"):
        next_token_losses(output.logits, tokens[:, :5])


def test_widths_are_read_from_the_llm(make_llm: Callable[..., GPTNeoXForCausalLM]) -> None:
    names = ["gpt_neox.layers.1.mlp.dense_h_to_4h", "gpt_neox.layers.0"]
    assert activation_widths(make_llm(seed=0), names) == {names[0]: 32, names[1]: 16}
