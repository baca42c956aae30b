from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saetrack.sae import TopKSAE, native, use_kernels
from saetrack.training import OptimizerSettings
from saetrack.training.divergence import refuse_divergence


@pytest.fixture
def batch() -> Iterator[tuple[TopKSAE, Tensor, Tensor]]:
    sae, x = TopKSAE(8, 4, k=3), torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    sae.initialise(x, torch.Generator().manual_seed(0))
    sae.precision = torch.bfloat16
    yield sae, x, torch.zeros(32, dtype=torch.bool)
    use_kernels("pytorch")


def test_a_number_is_none_of_its_business(batch: tuple[TopKSAE, Tensor, Tensor]) -> None:
    sae, x, dead = batch
    refuse_divergence("layers.1", sae, 0.3, "pytorch", x, dead)


def test_a_loss_that_only_the_fast_step_loses_names_its_settings(batch: tuple[TopKSAE, Tensor, Tensor]) -> None:
    sae, x, dead = batch
    message = (
        r"^The loss of layers\.1 is nan with model\.precision bfloat16 and model\.kernels pytorch, but 0\.\d+ in "
        r"float32 with PyTorch's kernels\. Set `model\.precision: float32` and `model\.kernels: pytorch`, and report"
    )
    with pytest.raises(ValueError, match=message):
        refuse_divergence("layers.1", sae, float("nan"), "pytorch", x, dead)
    assert sae.precision == torch.bfloat16
    assert not native.in_use()


def test_a_loss_that_is_lost_everywhere_asks_for_a_smaller_step(batch: tuple[TopKSAE, Tensor, Tensor]) -> None:
    sae, x, dead = batch
    with torch.no_grad():
        sae.W_dec[3] = torch.nan
        sae.b_enc[3] = 9.0
    message = (
        r"^The SAE of layers\.1 has diverged: its loss is inf\. .* Lower `model\.optimizer\.lr`, or set `trainer\.gr"
    )
    with pytest.raises(ValueError, match=message):
        refuse_divergence("layers.1", sae, float("inf"), "pytorch", x, dead)


def test_a_stage_that_ends_worse_than_the_mean_activation_writes_no_snapshot(
    tiny_fit: Callable[..., Any], tmp_path: Path
) -> None:
    settings = {"optimizer": OptimizerSettings(lr=1e6, warmup_tokens=0)}
    with pytest.raises(ValueError, match=r"^The SAE of .* has diverged on LLM step 0: FVU [0-9.e+]+, from 0\."):
        tiny_fit(tmp_path, module=settings)
    assert not list(tmp_path.rglob("sae_weights.safetensors"))
