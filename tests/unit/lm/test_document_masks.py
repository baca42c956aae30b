"""Documents that share a row and no context: what the LLM does there is what it does to each alone."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
)

from saetrack.lm.forward import edit_activations, next_token_losses, read_activations, refuse_leaking_documents

CONTEXT = 16
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.3,  # enough for attention to matter
    "pad_token_id": None,
}
OWN = {k: SIZES[k] for k in ("vocab_size", "initializer_range")}
# Numbers of the documents in three rows: they change within a row, also by one token, and go on in the next row
DOCUMENTS = np.array([[0] * 5 + [1] * 11, [1] * 3 + [2] + [5] * 12, [5] * 16], dtype=np.int32)

MODELS: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "gpt_neox": (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)), "gpt_neox.layers.1"),
    "gpt_neox, eager": (
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, attn_implementation="eager")),
        "gpt_neox.layers.1",
    ),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(**OWN, n_embd=16, n_layer=2, n_head=2)), "transformer.h.1"),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), "model.layers.1"),
    "olmo2": (lambda: Olmo2ForCausalLM(Olmo2Config(**SIZES)), "model.layers.1"),
}


def made(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval().requires_grad_(False)


def pieces() -> Iterator[tuple[int, int, int]]:
    """(row, first, end) of what each document has of a row."""
    for row, numbers in enumerate(DOCUMENTS):
        cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), CONTEXT]
        yield from ((row, first, end) for first, end in itertools.pairwise(cuts))


@pytest.mark.parametrize("name", MODELS)
def test_a_document_in_a_row_is_as_if_alone(name: str) -> None:
    build, hookpoint = MODELS[name]
    model = made(build)
    tokens = torch.randint(0, 64, DOCUMENTS.shape, generator=torch.Generator().manual_seed(1))
    apart = read_activations(model, tokens, [hookpoint], DOCUMENTS)[hookpoint]
    losses = next_token_losses(edit_activations(model, tokens, hookpoint, lambda x: x, DOCUMENTS), tokens)
    leaking = read_activations(model, tokens, [hookpoint])[hookpoint]
    for row, first, end in pieces():
        alone = tokens[row : row + 1, first:end]
        expected = model(alone, output_hidden_states=True)
        x = read_activations(model, alone, [hookpoint])[hookpoint]
        torch.testing.assert_close(apart[row, first:end], x[0], rtol=1e-5, atol=1e-5)
        by_hand = next_token_losses(expected.logits, alone)[0]
        torch.testing.assert_close(losses[row, first : end - 1], by_hand, rtol=1e-5, atol=1e-5)
        if first:
            assert (leaking[row, first:end] - x[0]).abs().max() > 1e-3  # else there is nothing to keep apart
    refuse_leaking_documents(model, CONTEXT)


def test_half_precision_is_held_to_what_it_can(make_llm: Callable[..., GPTNeoXForCausalLM]) -> None:
    refuse_leaking_documents(make_llm(0).to(torch.bfloat16), CONTEXT)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: BloomForCausalLM(BloomConfig(**OWN, hidden_size=16, n_layer=2, n_head=2)), "BloomForCausalLM"),
        (
            lambda: MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)),
            "MistralForCausalLM",
        ),
    ],
    ids=["no positions", "sliding window"],
)
def test_an_llm_that_cannot_keep_documents_apart_is_refused(build: Callable[[], PreTrainedModel], name: str) -> None:
    with pytest.raises(ValueError, match=rf"layout is masked, but {name} .*Use `separate`") as raised:
        refuse_leaking_documents(made(build), CONTEXT)
    assert "\n" not in str(raised.value)


def test_a_window_wider_than_a_row_does_not_matter() -> None:
    config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=CONTEXT)
    refuse_leaking_documents(made(lambda: MistralForCausalLM(config)), CONTEXT)
