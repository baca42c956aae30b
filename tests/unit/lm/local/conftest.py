"""Local checkpoints as their own tools write them, of LLMs written here a second time."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "vocab_size": 64}


class NanoGPT(nn.Module):
    """A decoder with nanoGPT's names: Linear layers, pre-norm, exact GELU, one matrix for both ends."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        n, width = SIZES["n_layer"], SIZES["n_embd"]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(SIZES["vocab_size"], width),
                "wpe": nn.Embedding(SIZES["block_size"], width),
                "h": nn.ModuleList([_NanoBlock(width, bias) for _ in range(n)]),
                "ln_f": nn.LayerNorm(width, bias=bias),
            }
        )
        self.lm_head = nn.Linear(width, SIZES["vocab_size"], bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transformer["wte"](ids) + self.transformer["wpe"](torch.arange(ids.shape[1]))
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


class _NanoBlock(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.attn.c_proj = nn.Linear(width, width, bias=bias)
        self.mlp.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.mlp.c_proj = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(self.ln_1(x))
        hidden = self.mlp.c_fc(self.ln_2(x))
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        return x + self.mlp.c_proj(hidden)

    def _attend(self, x: Tensor) -> Tensor:
        """One head after the other, with the softmax over the past written out."""
        heads, length = SIZES["n_head"], x.shape[1]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = []
        for q, k, v in zip(*(part.chunk(heads, dim=-1) for part in self.attn.c_attn(x).chunk(3, dim=-1)), strict=True):
            scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -torch.inf)
            mixed.append(scores.softmax(dim=-1) @ v)
        return self.attn.c_proj(torch.cat(mixed, dim=-1))


def seeded(module: nn.Module, seed: int) -> nn.Module:
    """The module with every weight drawn anew, so that no norm is 1 and no bias 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


def build_nanogpt(seed: int = 0, bias: bool = True) -> NanoGPT:
    module = seeded(NanoGPT(bias), seed)
    assert isinstance(module, NanoGPT)
    return module


def write_nanogpt(path: Path, step: int, seed: int = 0, bias: bool = True, **changes: Any) -> NanoGPT:
    """A file as nanoGPT's train.py writes it; a change to None leaves a key out."""
    module = build_nanogpt(seed, bias)
    content = {
        "model": module.state_dict(),
        "optimizer": {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": [{"lr": 6e-4}]},
        "model_args": {**SIZES, "bias": bias, "dropout": 0.0},
        "iter_num": step,
        "best_val_loss": torch.tensor(3.5),
        "config": {"batch_size": 3, "block_size": 32, "gradient_accumulation_steps": 5, "dataset": "openwebtext"},
        **changes,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    return module


class Llama(nn.Module):
    """A decoder with torchtitan's names, with rotations as complex numbers on neighbouring pairs."""

    def __init__(self, heads: int = 4, kv_heads: int = 2, width: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(64, width)
        self.layers = nn.ModuleDict({str(i): _LlamaBlock(heads, kv_heads, width, hidden) for i in range(2)})
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.output = nn.Linear(width, 64, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok_embeddings(ids)
        for block in self.layers.values():
            x = block(x)
        return self.output(self.norm(x))


class _LlamaBlock(nn.Module):
    def __init__(self, heads: int, kv_heads: int, width: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.d_head = heads, kv_heads, width // heads
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.attention, self.feed_forward = nn.Module(), nn.Module()
        for name, out in (("wq", width), ("wk", kv_heads * self.d_head), ("wv", kv_heads * self.d_head), ("wo", width)):
            setattr(self.attention, name, nn.Linear(width, out, bias=False))
        self.feed_forward.w1 = nn.Linear(width, hidden, bias=False)
        self.feed_forward.w3 = nn.Linear(width, hidden, bias=False)
        self.feed_forward.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(self.attention_norm(x))
        ff, normed = self.feed_forward, self.ffn_norm(x)
        return x + ff.w2(functional.silu(ff.w1(normed)) * ff.w3(normed))

    def _attend(self, x: Tensor) -> Tensor:
        a, length = self.attention, x.shape[1]
        queries = self._turned(a.wq(x).split(self.d_head, dim=-1))
        keys = self._turned(a.wk(x).split(self.d_head, dim=-1))
        values = a.wv(x).split(self.d_head, dim=-1)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = []
        for h, q in enumerate(queries):
            shared = h * self.kv_heads // self.heads
            scores = (q @ keys[shared].mT / math.sqrt(self.d_head)).masked_fill(future, -torch.inf)
            mixed.append(scores.softmax(dim=-1) @ values[shared])
        return a.wo(torch.cat(mixed, dim=-1))

    def _turned(self, heads: tuple[Tensor, ...]) -> list[Tensor]:
        """Pair ``j`` of position ``p`` turned by ``p * 10000^(-2j / d_head)``."""
        turned = []
        for x in heads:
            pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
            speed = 10_000.0 ** (-torch.arange(0, self.d_head, 2) / self.d_head)
            angle = torch.outer(torch.arange(x.shape[1]), speed)
            turned.append(torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2))
        return turned


def build_llama(seed: int = 0) -> Llama:
    module = seeded(Llama(), seed)
    assert isinstance(module, Llama)
    return module


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 64, (3, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def nanogpt() -> Callable[..., NanoGPT]:
    """Write a checkpoint of nanoGPT: ``nanogpt(path, step, seed=0, bias=True, **changed_keys)``."""
    return write_nanogpt


@pytest.fixture
def llama() -> Callable[[int], Llama]:
    """A random Llama with torchtitan's names, by its seed."""
    return build_llama
