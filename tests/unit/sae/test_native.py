"""The native kernels against the PyTorch path, and what happens without a compiler."""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saetrack.sae import Kernels, TopKSAE, native, use_kernels
from saetrack.sae.select import largest
from saetrack.sae.sparse import Selection, decode_at, latent_sums, row_dots
from saetrack.sae.workspace import Workspace

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")


@pytest.fixture
def kernels(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The native kernels, built into a folder of the tests, for as long as a test runs."""
    monkeypatch.setenv("SAETRACK_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))
    use_kernels("native")
    yield
    use_kernels("pytorch")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def selection(batch: int, d_sae: int, seed: int = 0) -> Selection:
    """Unequal counts; some activations use nothing, some latents are used by none."""
    draw = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 9, (batch,), generator=draw)
    columns = torch.cat([torch.randperm(d_sae, generator=draw)[:n] for n in counts.tolist()])
    return Selection(columns, torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]), d_sae)


@needs_compiler
@pytest.mark.parametrize("d", [1, 7, 64, 515], ids=lambda d: f"width {d}")
def test_dots_are_those_of_pytorch(d: int, kernels: None) -> None:
    chosen, left, right = selection(50, 300), numbers(50, d), numbers(300, d, seed=1)
    assert native.in_use(left, right)
    mine = row_dots(left, right, chosen)
    use_kernels("pytorch")
    torch.testing.assert_close(mine, row_dots(left, right, chosen), rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize(("d", "k"), [(16, 16), (300, 5), (1024, 32), (1000, 100), (4100, 64)], ids=lambda n: str(n))
def test_the_largest_are_found(d: int, k: int, kernels: None) -> None:
    pre = numbers(40, d).bfloat16()
    pre[1] = -1.0  # nothing above zero
    pre[2] = 2.0  # all equal
    pre[3, : d // 2] = -3.0
    taken = largest(pre, k)
    assert all(len(set(row)) == k for row in taken.tolist())
    best = pre.float().topk(k, dim=1).values.relu().sort(dim=1).values
    torch.testing.assert_close(pre.float().gather(1, taken).relu().sort(dim=1).values, best, rtol=0, atol=0)


@needs_compiler
def test_a_step_is_that_of_pytorch_and_repeats_to_the_bit(kernels: None) -> None:
    sae, x, dead = TopKSAE(32, 16, k=8, aux_k=12), numbers(256, 32), torch.arange(512) % 7 == 0
    sae.initialise(x, torch.Generator().manual_seed(0))

    def gradients(sae: TopKSAE) -> list[Tensor]:
        sae.zero_grad()
        sae.loss(x, dead).loss.backward()
        return [p.grad.clone() for p in sae.parameters() if p.grad is not None]

    first, again = gradients(sae), gradients(copy.deepcopy(sae))
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    with_three = gradients(sae)
    torch.set_num_threads(threads)
    use_kernels("pytorch")
    for mine, second, third, reference in zip(first, again, with_three, gradients(sae), strict=True):
        assert torch.equal(mine, second)
        torch.testing.assert_close(mine, third, rtol=1e-6, atol=1e-7)  # AuxK's dense products may differ in a bit
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("d", [7, 64, 515], ids=lambda d: f"width {d}")
@pytest.mark.parametrize("own", [False, True], ids=["by the reconstruction", "and a gradient of their own"])
def test_the_backward_pass_is_that_of_pytorch(d: int, own: bool, kernels: None) -> None:
    chosen, x, grad, W_dec = selection(50, 300), numbers(50, d), numbers(50, d, seed=1), numbers(300, d, seed=2)
    values, into_values = numbers(len(chosen.columns), seed=3).relu(), numbers(len(chosen.columns), seed=4)
    found = native.backward(x, grad, W_dec, values, into_values if own else None, chosen, Workspace())
    x_hat = native.decode(values, W_dec, numbers(d, seed=5), chosen.columns, chosen.offsets)
    use_kernels("pytorch")
    into_pre = (row_dots(grad, W_dec, chosen) + (into_values if own else 0)) * (values > 0)
    expected = [
        latent_sums(into_pre, x, chosen), latent_sums(into_pre, None, chosen), latent_sums(values, grad, chosen)
    ]  # fmt: skip
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x_hat, decode_at(values, chosen, W_dec) + numbers(d, seed=5), rtol=1e-5, atol=1e-5)


@needs_compiler
def test_decoder_rows_and_their_gradient_are_put_in_order_as_by_pytorch(kernels: None) -> None:
    sae = TopKSAE(70, 2)
    with torch.no_grad():
        sae.W_dec.copy_(numbers(140, 70))
        sae.W_dec[3] = 0
    sae.W_dec.grad = numbers(140, 70, seed=1)
    twin = copy.deepcopy(sae)
    twin.W_dec.grad = sae.W_dec.grad.clone()
    for each, kind in ((sae, "native"), (twin, "pytorch")):
        use_kernels(kind)  # type: ignore[arg-type]
        each.remove_parallel_gradient_()
        each.normalise_decoder_()
    torch.testing.assert_close(sae.W_dec.grad, twin.W_dec.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.W_dec, twin.W_dec, rtol=1e-6, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_activation_shows_in_the_loss(bad: float, kernels: None) -> None:
    sae, x = TopKSAE(32, 16, k=8), numbers(64, 32)
    sae.initialise(x, torch.Generator().manual_seed(0))
    x[3, 2] = bad
    for precision in (torch.float32, torch.bfloat16):
        sae.precision = precision
        assert not torch.isfinite(sae.loss(x).loss)


@needs_compiler
@pytest.mark.parametrize("kind", ["pytorch", "native"])
def test_gradients_kept_from_a_step_before_are_left_alone(kind: Kernels, kernels: None) -> None:
    """Their memory is lent again, but only once nobody holds it."""
    use_kernels(kind)
    sae, x = TopKSAE(32, 16, k=8), numbers(256, 32)
    sae.initialise(x, torch.Generator().manual_seed(0))
    sae.loss(x).loss.backward()
    assert sae.W_dec.grad is not None
    memory, part, kept = sae.W_dec.grad.data_ptr(), sae.W_dec.grad[5:], sae.W_dec.grad[5:].clone()
    sae.zero_grad()
    sae.loss(numbers(256, 32, seed=1)).loss.backward()
    assert sae.W_dec.grad.data_ptr() != memory
    assert torch.equal(part, kept)
    sae.loss(numbers(256, 32, seed=1)).loss.backward()  # a second gradient is added to the first
    twice = sae.W_dec.grad.clone()
    del part
    sae.zero_grad()
    sae.loss(numbers(256, 32, seed=1)).loss.backward()
    memory = sae.W_dec.grad.data_ptr()
    torch.testing.assert_close(twice, 2 * sae.W_dec.grad)
    sae.zero_grad()
    sae.loss(x).loss.backward()
    assert sae.W_dec.grad.data_ptr() == memory
    torch.testing.assert_close(sae.W_dec.grad[5:], kept)


@needs_compiler
def test_they_leave_float64_to_pytorch(kernels: None) -> None:
    assert not native.in_use(numbers(3).double())
    assert native.largest(numbers(3, 8), 2) is None


def test_without_a_compiler_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAETRACK_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    native._library.cache_clear()
    with pytest.raises(RuntimeError, match=r"^model.kernels is native, but there is no C\+\+ compiler .* pytorch`\.$"):
        use_kernels("native")
    assert not native.in_use()
    assert not list(tmp_path.iterdir())


@needs_compiler
def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "native.cpp"
    broken.write_text("int f() { return nonsense; }\n")
    monkeypatch.setenv("SAETRACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_SOURCE", broken)
    native._library.cache_clear()
    with pytest.raises(RuntimeError, match=r"could not build the native kernels: .*nonsense.*Set `model.kernels: pyt"):
        use_kernels("native")
    assert not list((tmp_path / "cache").glob("*.so"))
    native._library.cache_clear()


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.kernels is 'cuda'; it must be one of pytorch, native"):
        use_kernels("cuda")  # type: ignore[arg-type]
