"""The kernels for a GPU against PyTorch's on the same device."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from saetrack.sae import native, select, use_kernels
from saetrack.sae.select import largest
from saetrack.sae.sparse import Selection, latent_sums, row_dots
from saetrack.sae.workspace import Workspace

from .test_native import numbers, selection
from .test_step import CLASSES, activations, gradients, started

pytestmark = pytest.mark.gpu
widths = pytest.mark.parametrize("d", [1, 7, 64, 515, 2048], ids=lambda d: f"width {d}")


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    use_kernels("native", "cuda")
    yield
    use_kernels("pytorch")


def there(chosen: Selection) -> Selection:
    return Selection(chosen.columns.cuda(), chosen.offsets.cuda(), chosen.d_sae)


def with_one_dense_latent(batch: int, d_sae: int) -> Selection:
    """Latent 3 is used by all activations, and some latents by none."""
    others = torch.stack(
        [torch.randperm(d_sae - 4, generator=torch.Generator().manual_seed(n))[:5] for n in range(batch)]
    )
    return Selection.of_equal_counts(torch.cat([torch.full((batch, 1), 3), others + 4], dim=1), d_sae)


@widths
def test_dots_are_those_of_pytorch(d: int) -> None:
    chosen, left, right = there(selection(50, 300)), numbers(50, d).cuda(), numbers(300, d, seed=1).cuda()
    assert native.in_use(left, right)
    mine = row_dots(left, right, chosen)
    use_kernels("pytorch")
    torch.testing.assert_close(mine, row_dots(left, right, chosen), rtol=1e-4, atol=1e-4)


@widths
def test_reconstructions_are_those_of_pytorch(d: int) -> None:
    chosen, table, bias = there(selection(50, 300)), numbers(300, d).cuda(), numbers(d, seed=1).cuda()
    values = numbers(len(chosen.columns), seed=2).cuda()
    dense = torch.zeros(50, 300, device="cuda").index_put_((chosen.rows, chosen.columns), values)
    mine = native.decode(values, table, bias, chosen.columns, chosen.offsets)
    torch.testing.assert_close(mine, dense @ table + bias, rtol=1e-4, atol=1e-4)


@widths
@pytest.mark.parametrize("own", [False, True], ids=["through the reconstruction", "and of their own"])
def test_gradients_are_those_of_pytorch_and_equal_each_time(d: int, own: bool) -> None:
    chosen = there(with_one_dense_latent(200, 300))
    centred, grad, W_dec = numbers(200, d).cuda(), numbers(200, d, seed=1).cuda(), numbers(300, d, seed=2).cuda()
    values = numbers(len(chosen.columns), seed=3).relu().cuda()
    into_values = numbers(len(values), seed=4).cuda() if own else None
    mine = native.backward(centred, grad, W_dec, values, into_values, chosen, Workspace())
    again = native.backward(centred, grad, W_dec, values, into_values, chosen, Workspace())
    assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True))
    use_kernels("pytorch")
    into_pre = row_dots(grad, W_dec, chosen)
    into_pre = (into_pre if into_values is None else into_pre + into_values) * (values > 0)
    expected = (
        latent_sums(into_pre, centred, chosen),
        latent_sums(into_pre, None, chosen),
        latent_sums(values, grad, chosen),
    )
    for a, b in zip(mine, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize(
    ("d", "k"),
    [(16, 16), (300, 5), (1024, 32), (1000, 100), (4100, 64), (16384, 32), (65536, 128), (8192, 600), (33, 1)],
)
def test_the_largest_are_found(d: int, k: int) -> None:
    pre = numbers(40, d).cuda().bfloat16()
    pre[1] = -1.0  # nothing above zero
    pre[2] = 2.0  # all equal
    pre[3, : d // 2] = -3.0
    pre[4] = pre[4].abs().neg()
    pre[4, 0] = 1.0  # one alone above zero
    pre[5, d // 2] = torch.inf
    taken = largest(pre, k)
    assert all(len(set(row)) == k for row in taken.tolist())
    best = pre.float().topk(k, dim=1).values.relu().sort(dim=1).values
    assert torch.equal(pre.float().gather(1, taken).relu().sort(dim=1).values, best)


def test_rows_get_unit_norm_and_lose_what_lies_along_them() -> None:
    table, grad = numbers(70, 515).cuda(), numbers(70, 515, seed=1).cuda()
    table[5] = 0.0
    along = (table * grad).sum(dim=1) / table.square().sum(dim=1).clamp_min(1e-30)
    expected = grad - along[:, None] * table
    native.remove_parallel_(table, grad)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)
    native.normalise_(table)
    norms = torch.ones(70, device="cuda")
    norms[5] = 0.0
    torch.testing.assert_close(table.norm(dim=1), norms)


def test_a_batch_without_latents_has_gradients_of_zero() -> None:
    chosen = Selection(
        torch.zeros(0, dtype=torch.int64, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda"), 9
    )
    x, W_dec, none = numbers(3, 5).cuda(), numbers(9, 5).cuda(), torch.zeros(0, device="cuda")
    assert len(row_dots(x, W_dec, chosen)) == 0
    assert torch.equal(native.decode(none, W_dec, x[0], chosen.columns, chosen.offsets), x[:1].expand(3, 5))
    assert not any(gradient.any() for gradient in native.backward(x, x, W_dec, none, None, chosen, Workspace()))


def test_activations_that_do_not_lie_in_rows_give_the_same_step() -> None:
    sae = started(CLASSES["topk"]).cuda()
    x = activations(13).cuda()
    expected = gradients(sae, sae.loss(x).loss)
    strided = gradients(sae, sae.loss(x.T.contiguous().T).loss)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in strided.items())


def test_the_size_of_a_chunk_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = started(CLASSES["topk"]).cuda(), activations(13).cuda()
    sae.precision = torch.bfloat16
    expected = gradients(sae, sae.loss(x).loss)
    monkeypatch.setattr(select, "_CHUNK_NUMBERS_GPU", 100 * 256)
    in_chunks = gradients(sae, sae.loss(x).loss)
    for name, gradient in in_chunks.items():
        # another shape of the product may round another way, and choose another latent
        assert (gradient - expected[name]).norm() < 0.05 * expected[name].norm()


def test_a_cpu_is_left_to_pytorch() -> None:
    assert not native.in_use(torch.ones(2))
    values: Tensor = largest(numbers(3, 64).bfloat16(), 2)
    assert values.shape == (3, 2)
