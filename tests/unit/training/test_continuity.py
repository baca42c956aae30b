from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback

from saetrack.metrics import fraction_variance_unexplained
from saetrack.sae import (
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    SAETrackSAE,
    StandardSAE,
    TopKSAE,
)
from saetrack.sae.sparse import Latents, Selection
from saetrack.training import OptimizerSettings, SAEModule
from saetrack.training.module import reconstruct
from saetrack.training.warm_start import Calibration, own_error


def filled(sae: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    sae.initialise(torch.randn(200, sae.d_in, generator=generator), generator)
    return sae


SAES = {
    "TopK": lambda: TopKSAE(8, 4, k=3),
    "Standard": lambda: StandardSAE(8, 4),
    "SAETrack": lambda: SAETrackSAE(8, 4),
    "BatchTopK": lambda: BatchTopKSAE(8, 4, k=3),
    "Matryoshka": lambda: MatryoshkaSAE(8, 4, k=3),
    "JumpReLU": lambda: JumpReLUSAE(8, 4),
    "Gated": lambda: GatedSAE(8, 4),
}


def dense(latents: Latents, batch: int) -> torch.Tensor:
    z = torch.zeros(batch, latents.selection.d_sae)
    z[latents.selection.rows, latents.selection.columns] = latents.values
    return z


@pytest.mark.parametrize("name", SAES)
def test_sparse_latents_are_the_positive_ones_of_encode(name: str) -> None:
    sae = filled(SAES[name]())
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    found = sae.sparse_latents(x)
    assert (found.values > 0).all()
    torch.testing.assert_close(dense(found, 20), sae.encode(x))


@pytest.mark.parametrize("name", SAES)
def test_what_moved_is_counted_at_every_entry_that_is_or_was_active(name: str) -> None:
    sae = filled(SAES[name]())
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    before = filled(SAES[name](), seed=1).sparse_latents(x)
    pre, z = sae.preactivations(x).detach(), dense(before, 20)
    now = sae.activate_batch(pre).detach()
    entries = [(b, i) for b in range(20) for i in range(32)]
    by_hand = sum(float(pre[b, i] - z[b, i]) ** 2 for b, i in entries if z[b, i] > 0)
    by_hand += sum(float(now[b, i]) ** 2 for b, i in entries if z[b, i] == 0)
    moved = sae.loss(x, before=before).moved
    assert moved.item() == pytest.approx(by_hand / float(z.square().sum()), rel=1e-4)
    assert sae.loss(x).moved is None
    new = torch.arange(32) % 3 == 0
    free = sum(float(now[b, i]) ** 2 for b, i in entries if new[i] and z[b, i] == 0)
    assert free > 0
    moved = sae.loss(x, before=before, new=new).moved
    assert moved.item() == pytest.approx((by_hand - free) / float(z.square().sum()), rel=1e-4)


@pytest.mark.parametrize("name", ["TopK", "Standard", "SAETrack", "JumpReLU", "Gated"])
def test_latents_that_stayed_have_not_moved(name: str) -> None:
    sae = filled(SAES[name]())  # whose magnitudes are those of its gates at first
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    assert sae.loss(x, before=sae.sparse_latents(x)).moved.item() == pytest.approx(0, abs=1e-6)


def test_a_snapshot_without_latents_holds_nothing_and_one_with_hardly_any_no_more_than_one_per_cent_of_x() -> None:
    sae = filled(TopKSAE(8, 4, k=3))
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    none = Selection(torch.zeros(0, dtype=torch.int64), torch.zeros(21, dtype=torch.int64), 32)
    loss = sae.loss(x, before=Latents(none, torch.zeros(0)))
    assert loss.moved == 0
    loss.moved.backward()
    assert not any(p.grad.any() for p in sae.parameters() if p.grad is not None)
    one = Selection(torch.tensor([5]), torch.ones(21, dtype=torch.int64).index_fill(0, torch.tensor([0]), 0), 32)
    moved = sae.loss(x, before=Latents(one, torch.tensor([1e-4]))).moved
    now = sae.encode(x)
    total = now.square().sum() - now[0, 5].square() + (sae.preactivations(x)[0, 5] - 1e-4).square()
    assert moved.item() == pytest.approx((total / (0.01 * (x - sae.b_dec).square().sum())).item(), rel=1e-4)


@pytest.mark.parametrize("name", SAES)
def test_it_reaches_a_latent_that_fell_below_the_threshold(name: str) -> None:
    sae = filled(SAES[name]())
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    lost = int((sae.encode(x) > 0).sum(dim=0).argmin())
    at = torch.full((20,), lost)
    sae.loss(x, before=Latents(Selection(at, torch.arange(21), 32), torch.ones(20))).moved.backward()
    assert sae.W_enc.grad[:, lost].abs().sum() > 0


class Llms(Callback):
    """Notes how many LLMs are in memory, and whether batches hold the activations from before."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, bool]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((len(trainer.datamodule._llms), bool(batch.before)))


def test_features_keep_their_latents_with_two_llms_in_memory_and_no_more(
    tiny_fit: Callable[..., Any], tmp_path: Path
) -> None:
    correlation = {}
    for weight in (0.0, 1.0):
        llms = Llms()
        settings = {"optimizer": OptimizerSettings(lr=0.01, warmup_tokens=256, tolerance=None), "continuity": weight}
        run = tmp_path / str(weight)
        fitted = tiny_fit(run, [llms], module=settings, steps=[0, 4, 10], tokens_first=5120, tokens_next=5120)
        correlation[weight] = [snapshot.metadata["functional_correlation_median"] for snapshot in fitted.track][1:]
        assert set(llms.seen[:40]) == {(1, False)}
        assert set(llms.seen[40:]) == ({(2, True)} if weight else {(1, False)})
    assert all(held > free + 0.05 for held, free in zip(correlation[1.0], correlation[0.0], strict=True))


@pytest.mark.parametrize("name", SAES)
def test_latents_that_are_free_do_not_count_where_they_alone_fire_in_any_precision(name: str) -> None:
    sae = filled(SAES[name]()).double()
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # one latent was there before, and is as it was
    there = int(sae.encode(x)[0].argmax())
    at = Selection(torch.tensor([there]), torch.ones(21, dtype=torch.int64).index_fill(0, torch.tensor([0]), 0), 32)
    before = Latents(at, sae.encode(x)[0, there][None].detach())
    assert sae.loss(x, before=before).moved > 0.1
    free = sae.loss(x, before=before, new=torch.ones(32, dtype=torch.bool)).moved
    assert free.item() == pytest.approx(0, abs=1e-12)


class Errors(Callback):
    """Notes in what units continuity counts."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.seen.append(module.previous_error)
        assert all(sae.precision == module.sae(h).precision for h, sae in module.previous.items())


def test_its_unit_is_the_error_of_the_snapshot_before_on_its_own_llm_checkpoint(
    tiny_fit: Callable[..., Any], tmp_path: Path
) -> None:
    errors = Errors()
    fitted = tiny_fit(tmp_path, [errors])
    first, second, _ = fitted.track
    data = fitted.data
    assert errors.seen[0] == {}  # the first stage has none before
    for snapshot, found in ((first, errors.seen[20]), (second, errors.seen[-1])):
        x = data.held_out_activations(next(c for c in data.checkpoints if c.step == snapshot.step))[data.hookpoints[0]]
        # TopK's error is divided by the variance: the FVU of the snapshot as it is
        fvu = fraction_variance_unexplained(x, reconstruct(snapshot.sae(), x))
        assert found == {data.hookpoints[0]: pytest.approx(float(fvu), rel=0.02)}
    assert errors.seen[20] != errors.seen[-1]


def test_the_error_of_a_snapshot_is_in_the_units_of_its_loss(tiny_fit: Callable[..., Any], tmp_path: Path) -> None:
    fitted = tiny_fit(tmp_path, steps=[0, 10], module={"continuity": 0.0})
    snapshot, x = fitted.track[1], 50 * torch.randn(500, 16)
    dense = StandardSAE(16, 4)
    dense.load_state_dict(snapshot.sae().state_dict())
    scale = snapshot.statistics("scale").item()
    by_hand = ((reconstruct(dense, x) - x) * scale).square().mean()
    assert own_error(dense, Calibration.of(snapshot), x) == pytest.approx(float(by_hand), rel=1e-4)


@pytest.mark.parametrize(
    ("make", "errors"),
    [
        (lambda: MatryoshkaSAE(8, 4, k=3, prefixes=[4, 16, 32]), ["mse", "prefix_mse"]),
        (lambda: GatedSAE(8, 4), ["mse"]),
        (lambda: JumpReLUSAE(8, 4), ["mse"]),
    ],
    ids=["Matryoshka", "Gated", "JumpReLU"],
)
def test_the_error_is_all_reconstructions_in_the_loss_without_outliers(make: Any, errors: list[str]) -> None:
    sae, x = filled(make()), 1 + torch.randn(600, 8, generator=torch.Generator().manual_seed(1))
    calibration = Calibration.measure(x, 20.0)
    trained = sae.folded(1 / calibration.scale)
    terms = trained.loss(x * calibration.scale).terms
    sinks = torch.cat([x[:300], 1e3 * x[:200], x[300:]])
    expected = sum(terms[name].item() for name in errors)
    assert own_error(sae, calibration, x) == pytest.approx(expected, rel=1e-5)
    assert own_error(sae, calibration, sinks) == pytest.approx(expected, rel=1e-5)


class Norms(Callback):
    """Notes the largest norm from before."""

    def __init__(self) -> None:
        self.largest = 0.0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        for x in batch.before.values():
            self.largest = max(self.largest, x.norm(dim=1).max().item())


def test_outliers_at_the_llm_checkpoint_before_are_left_out_too(tiny_fit: Callable[..., Any], tmp_path: Path) -> None:
    largest = {}
    for name, multiple in (("all", None), ("some", 1.1)):
        norms = Norms()
        fitted = tiny_fit(tmp_path / name, [norms], tokens={"outlier_norm": multiple}, steps=[0, 10])
        largest[name], limit = norms.largest, fitted.track[0].norm_limit
    assert 0 < largest["some"] <= limit < largest["all"]


def test_a_scratch_start_is_held_to_nothing(tiny_fit: Callable[..., Any], tmp_path: Path) -> None:
    llms = Llms()
    tiny_fit(tmp_path, [llms], steps=[0, 10], warm_start="scratch")
    assert set(llms.seen) == {(1, False)}


@pytest.mark.parametrize("weight", [-1.0, float("inf")])
def test_a_weight_that_makes_no_sense_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=r"model\.continuity is"):
        SAEModule(continuity=weight)
