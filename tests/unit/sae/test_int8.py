"""The choice of latents by 8-bit numbers, in PyTorch and in the native kernels, and when it is made."""

import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from saetrack.sae import TopKSAE, int8, native, use_kernels
from saetrack.sae.select import select_topk
from saetrack.sae.workspace import Workspace

from .test_native import numbers


@pytest.fixture(params=["pytorch", "native"])
def by_8_bits(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """8-bit numbers choose at any size, by either kind of kernel."""
    monkeypatch.setenv("SAETRACK_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))
    if request.param == "native" and shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    if not int8.has_product():
        pytest.skip("this CPU has no VNNI, or has AMX")
    monkeypatch.setattr(int8, "is_faster", lambda *sizes: True)
    monkeypatch.setattr(int8, "_CHUNK_NUMBERS", 20_000)  # several chunks
    use_kernels(request.param)
    yield
    use_kernels("pytorch")


def choose(x: Tensor, weights: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Latents and values, ``[batch, k]`` each."""
    selection, values = select_topk(x, weights.T, bias, k, torch.bfloat16, Workspace())
    assert values is not None, "bfloat16 has chosen"
    return selection.columns.view(-1, k), values.view(-1, k)


def share_of_best(pre: Tensor, taken: Tensor) -> float:
    """How many of float32's k largest that are above zero were taken."""
    best = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, pre.topk(taken.shape[1], dim=1).indices, True)
    best &= pre > 0
    return (best.gather(1, taken).sum() / best.sum()).item()


@pytest.mark.parametrize(
    ("outlier", "weight"),
    [(1.0, 1.0), (100.0, 1.0), (100.0, 0.01)],
    ids=["even directions", "one that is a hundred times the others", "and that is read as much as the others"],
)
@pytest.mark.parametrize("shape", [(500, 64, 1024, 16), (13, 7, 45, 45), (100, 130, 515, 1)], ids=str)
def test_the_choice_is_nearer_to_float32s_than_bfloat16s_is(
    shape: tuple[int, int, int, int], outlier: float, weight: float, by_8_bits: None
) -> None:
    batch, d, d_sae, k = shape
    x, weights, bias = numbers(batch, d), numbers(d_sae, d, seed=1), numbers(d_sae, seed=2)
    x[:, 3] *= outlier
    weights[:, 3] *= weight
    columns, values = choose(x, weights, bias, k)
    pre = x @ weights.T + bias
    assert all(len(set(row)) == k for row in columns.tolist())
    torch.testing.assert_close(values, pre.gather(1, columns), rtol=1e-4, atol=1e-4 * outlier)
    low = x.bfloat16() @ weights.bfloat16().T + bias.bfloat16()
    by_bfloat16 = share_of_best(pre, low.float().topk(k, dim=1).indices)
    assert share_of_best(pre, columns) >= max(0.995, by_bfloat16)


def test_small_activations_are_told_apart_beside_large_ones(by_8_bits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale for all of them would round the small ones to zero, and the bias would not fit the scale of any."""
    monkeypatch.setattr(int8, "_CHUNK_NUMBERS", 10**9)
    x, weights = numbers(300, 64), numbers(512, 64, seed=1)
    x *= 10.0 ** torch.linspace(-5, 5, 300)[torch.randperm(300, generator=torch.Generator().manual_seed(3))][:, None]
    x[7] = 0.0
    weights[::2] *= 1e-3
    bias = 0.1 * numbers(512, seed=2)
    columns, _ = choose(x, weights, bias, 16)
    pre = x @ weights.T + bias
    assert share_of_best(pre, columns) >= 0.995
    assert set(columns[7].tolist()) == set(bias.topk(16).indices.tolist())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_weight_shows_in_the_loss(bad: float, by_8_bits: None) -> None:
    sae, x = TopKSAE(32, 16, k=8), numbers(64, 32)
    sae.initialise(x, torch.Generator().manual_seed(0))
    sae.precision = torch.bfloat16
    assert torch.isfinite(sae.loss(x).loss)
    with torch.no_grad():
        sae.W_enc[5, 17] = bad
    assert not torch.isfinite(sae.loss(x).loss)


def test_a_step_repeats_to_the_bit(by_8_bits: None) -> None:
    sae, x = TopKSAE(64, 16, k=8), numbers(512, 64)
    sae.initialise(x, torch.Generator().manual_seed(0))
    sae.precision = torch.bfloat16

    def gradients() -> list[Tensor]:
        sae.zero_grad()
        sae.loss(x).loss.backward()
        return [p.grad.clone() for p in sae.parameters() if p.grad is not None]

    for first, again in zip(gradients(), gradients(), strict=True):
        assert torch.equal(first, again)


def test_pytorch_leaves_small_sizes_and_missing_hardware_to_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would be chosen where it is slower, or fail where PyTorch has lost its private product."""
    monkeypatch.setattr(int8, "has_product", lambda: True)
    assert int8.is_faster(4096, 512, 16384, 32)
    assert not int8.is_faster(512, 512, 16384, 32)
    assert not int8.is_faster(4096, 512, 16384, 256)
    assert not int8.is_faster(4096, 128, 2048, 24)
    monkeypatch.setattr(int8, "has_product", lambda: False)
    assert not int8.is_faster(4096, 512, 16384, 32)
    x, weights = numbers(2048, 256), numbers(8192, 256, seed=1)
    _, values = select_topk(x, weights.T, numbers(8192, seed=2), 8, torch.bfloat16, Workspace())
    assert values is None
    assert native.candidates(x, weights, numbers(8192, seed=2), 8, Workspace()) is None


def test_without_the_private_product_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    int8.has_product.cache_clear()
    monkeypatch.setattr(torch.ops, "onednn", object())
    assert not int8.has_product()
    int8.has_product.cache_clear()


def test_parts_of_similar_size_cover_all_once() -> None:
    sizes = sorted([0.0, 0.0, *numbers(500).exp().tolist(), 1e30])
    parts = list(int8.similar(sizes, most=40))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(sizes)))
    assert all(0 < part.stop - part.start <= 40 for part in parts)
    assert all(sizes[part.stop - 1] <= 2 * sizes[part.start] for part in parts)
