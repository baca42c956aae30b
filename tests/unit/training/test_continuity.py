from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback

from saetrack.sae import StandardSAE, TopKSAE
from saetrack.training import Continuity, OptimizerSettings


def filled(sae: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    sae.initialise(torch.randn(200, sae.d_in, generator=generator), generator)
    return sae


@pytest.mark.parametrize("make", [lambda: TopKSAE(8, 4, k=3), lambda: StandardSAE(8, 4)], ids=["TopK", "Standard"])
def test_the_term_is_zero_for_latents_that_stayed_and_counts_every_entry_that_moved(make: Callable[[], Any]) -> None:
    sae = filled(make())
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    z = sae.encode(x).detach()
    assert sae.continuity(x, z).item() == pytest.approx(0, abs=1e-10)
    pre = sae.preactivations(x).detach()
    before = z.roll(1, dims=1)
    by_hand = sum(
        float((pre[b, i] - before[b, i]) ** 2) for b in range(20) for i in range(32) if z[b, i] > 0 or before[b, i] > 0
    )
    assert sae.continuity(x, before).item() == pytest.approx(by_hand / float(before.square().sum()), rel=1e-5)
    assert sae.continuity(x, torch.zeros_like(z)).isfinite()


def test_it_reaches_a_latent_that_fell_below_the_threshold() -> None:
    sae = filled(TopKSAE(8, 4, k=3))
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    before = torch.zeros(20, 32)
    lost = int((sae.encode(x) > 0).sum(dim=0).argmin())
    before[:, lost] = 1.0
    sae.continuity(x, before).backward()
    assert sae.W_enc.grad is not None
    assert sae.W_enc.grad[:, lost].abs().sum() > 0


class Llms(Callback):
    """Notes how many LLMs are in memory, and whether batches hold the activations from before."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, bool]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((len(trainer.datamodule._llms), bool(batch.before)))


def test_features_keep_their_latents_and_the_second_llm_goes_when_it_is_over(
    tiny_fit: Callable[..., Any], tmp_path: Path
) -> None:
    correlation = {}
    for weight in (0.0, 1.0):
        llms = Llms()
        settings = {
            "optimizer": OptimizerSettings(lr=0.01, warmup_tokens=256, tolerance=None),
            "continuity": Continuity(weight, hold=0.4, end=0.4),
        }
        fitted = tiny_fit(
            tmp_path / str(weight), [llms], module=settings, steps=[0, 10], tokens_first=5120, tokens_next=5120
        )
        correlation[weight] = fitted.track[1].metadata["functional_correlation_median"]
        first, second = llms.seen[:40], llms.seen[40:]
        assert set(first) == {(1, False)}
        if weight:
            # chunks of 8 batches: the third holds the last of the 16 that want both
            assert second == [(2, True)] * 16 + [(1, False)] * 24
        else:
            assert set(second) == {(1, False)}
    assert correlation[1.0] > correlation[0.0] + 0.05


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"weight": -1.0}, "weight is -1.0"),
        ({"hold": 0.6, "end": 0.5}, r"hold \(0.6\)"),
        ({"end": 1.5}, r"end \(1.5\)"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Continuity(**arguments)
