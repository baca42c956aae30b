"""What a user has: modules of their own, and functions that make them."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM


@dataclass
class Sizes:
    width: int = 8
    vocabulary: int = 64


class Plain(nn.Module):
    """Takes ids and returns ``form``; its positions are complex, as rotary tables are, and its head is tied."""

    def __init__(self, sizes: Sizes, form: str = "logits") -> None:
        super().__init__()
        self.embed = nn.Embedding(sizes.vocabulary, sizes.width)
        self.layers = nn.ModuleList([nn.Linear(sizes.width, sizes.width) for _ in range(2)])
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("turns", torch.polar(torch.ones(4), torch.arange(4.0)), persistent=False)
        self.form = form

    def forward(self, ids: Tensor) -> object:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x).tanh() * self.turns.imag[1].to(x.dtype)
        logits = self.head(x)
        last_only = logits[:, -1:]
        return {"logits": logits, "tuple": (logits, None), "object": SimpleNamespace(logits=logits), "last": last_only}[
            self.form
        ]


def build_plain(width: int, form: str = "logits") -> Plain:
    return Plain(Sizes(width), form)


def build_neox(layers: int = 2) -> GPTNeoXForCausalLM:
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32
    )
    return GPTNeoXForCausalLM(config)


def build_nothing() -> str:
    return "no module"


def refuse() -> nn.Module:
    raise AssertionError("called without the user's word")
