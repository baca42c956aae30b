"""One training step of each peer, by its own classes, as its own loop takes it; no logging, no files."""

import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LR = 2e-4
Step = Callable[[Tensor], None]


def sparsify(d_in: int, d_sae: int, k: int, device: str = "cpu") -> Step:
    """eai-sparsify's SparseCoder with Adam, and the lines of its Trainer.fit that touch one SAE.

    Its AuxK is off, as it is by default.
    """
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k), device, dtype=torch.float32)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR)
    since_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
    did_fire = torch.zeros(d_sae, dtype=torch.bool, device=device)

    def step(x: Tensor) -> None:
        torch.set_float32_matmul_precision("high")  # as its Trainer does
        sae.set_decoder_norm_to_unit_norm()
        variance = (x - x.mean(0)).pow(2).sum()
        out = sae(x=x, y=x, dead_mask=None, total_variance=variance)
        did_fire[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        (out.fvu + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            since_fired.add_(len(x))
            since_fired[did_fire] = 0
            did_fire.zero_()
        torch.set_float32_matmul_precision("highest")

    return step


def sae_lens(kind: str, d_in: int, d_sae: int, k: int, batch: int, autocast: bool, device: str = "cpu") -> Step:
    """SAELens's SAETrainer.step with its TopK (``topk``) or ReLU and L1 (``standard``) class."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import (
            StandardTrainingSAE,
            StandardTrainingSAEConfig,
            TopKTrainingSAE,
            TopKTrainingSAEConfig,
        )
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer
    sae: Any
    if kind == "topk":
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k, device=device))
    else:
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=d_in, d_sae=d_sae, l1_coefficient=0.1, device=device))
    config = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=batch,
        lr=LR,
        lr_end=LR,
        autocast=autocast,
        device=device,
    )
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter(()))

    def step(x: Tensor) -> None:
        trainer.step(x)

    return step


def patched_top_k() -> Any:
    """dictionary_learning's TopKTrainer, with one of the functions that it uses rewritten.

    Its `remove_gradient_parallel_to_decoder_directions` is an einsum that becomes a strided batched product and takes
    a minute at 4,096 latents. Nobody would wait for that, so it is compared with the same sums written elementwise.
    """
    # its activation buffer imports this, which pins old releases of much else
    stub = types.ModuleType("nnsight")
    stub.LanguageModel = object  # type: ignore[attr-defined]
    sys.modules.setdefault("nnsight", stub)
    from dictionary_learning.trainers import top_k

    def without_parallel(weight: Tensor, grad: Tensor, d_in: int, d_sae: int) -> Tensor:
        normed = weight / (weight.norm(dim=0, keepdim=True) + 1e-6)
        return grad - (grad * normed).sum(dim=0) * normed

    top_k.remove_gradient_parallel_to_decoder_directions = without_parallel
    return top_k.TopKTrainer


def dictionary_learning(d_in: int, d_sae: int, k: int, device: str = "cpu") -> Step:
    """dictionary_learning's TopKTrainer.update, patched as above."""
    trainer = patched_top_k()(
        steps=10**6, activation_dim=d_in, dict_size=d_sae, k=k, layer=0, lm_name="none", lr=LR, seed=0, device=device
    )
    count = iter(range(1, 10**6))  # not 0, where it looks for the median of the first batch

    def step(x: Tensor) -> None:
        trainer.update(next(count), x)

    return step
