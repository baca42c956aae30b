"""The sparse primitives against dense autograd, one entry at a time where that is possible."""

import copy

import pytest
import torch
from torch import Tensor

from saetrack.sae import dense, sparse
from saetrack.sae.select import select_positive, select_topk
from saetrack.sae.sparse import Selection, activation_sums, decode_at, encode_at, latent_sums, row_dots
from saetrack.sae.workspace import Workspace

D_IN, D_SAE, BATCH = 6, 12, 7


def unequal(seed: int = 0) -> Selection:
    """Between none and six latents for each activation; latent 0 is used by none."""
    draw = torch.Generator().manual_seed(seed)
    counts = [3, 0, 6, 1, 0, 2, 4]
    columns = [torch.randperm(D_SAE - 1, generator=draw)[:count] + 1 for count in counts]
    return Selection(torch.cat(columns), torch.tensor([0, *counts]).cumsum(0), D_SAE)


def of_nothing() -> Selection:
    return Selection(torch.zeros(0, dtype=torch.int64), torch.zeros(BATCH + 1, dtype=torch.int64), D_SAE)


def equal() -> Selection:
    draw = torch.Generator().manual_seed(0)
    return Selection.of_equal_counts(torch.stack([torch.randperm(D_SAE, generator=draw)[:4] for _ in range(BATCH)]), 12)


SELECTIONS = {"equal counts": equal, "unequal counts": unequal, "nothing": of_nothing}
each_selection = pytest.mark.parametrize("make", SELECTIONS.values(), ids=SELECTIONS.keys())


def pairs(selection: Selection) -> list[tuple[int, int]]:
    """(activation, latent) of every entry."""
    bounds, columns = selection.offsets.tolist(), selection.columns.tolist()
    return [(n, columns[i]) for n in range(selection.batch) for i in range(bounds[n], bounds[n + 1])]


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@each_selection
def test_the_transpose_lists_every_entry_once_by_latent_then_by_activation(make: type[Selection]) -> None:
    selection = make()
    entries = pairs(selection)
    assert selection.rows.tolist() == [n for n, _ in entries]
    expected = sorted(range(len(entries)), key=lambda i: (entries[i][1], i))
    assert selection.order.tolist() == expected
    assert selection.rows_by_latent.tolist() == [entries[i][0] for i in expected]
    starts = [sum(latent < j for _, latent in entries) for j in range(D_SAE + 1)]
    assert selection.latent_offsets.tolist() == starts


@pytest.mark.parametrize("d_sae", [2**15 - 1, 2**15, 2**15 + 1])
def test_the_transpose_is_right_where_latents_no_longer_fit_into_two_bytes(d_sae: int) -> None:
    columns = torch.randint(d_sae, (4000,), generator=torch.Generator().manual_seed(0))
    columns[[5, 700]], columns[[6, 701]] = d_sae - 1, 0
    selection = Selection(columns, torch.arange(0, 4001, 8), d_sae)
    assert torch.equal(selection.order, columns.argsort(stable=True))
    assert torch.equal(selection.latent_offsets, torch.bincount(columns + 1, minlength=d_sae + 1).cumsum(0))


@each_selection
@pytest.mark.parametrize("private", [True, False], ids=["private op", "public ops"])
def test_row_dots_are_the_dot_products(make: type[Selection], private: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not private:
        monkeypatch.setattr(sparse, "_ROW_DOTS", None)
        monkeypatch.setattr(sparse, "_FALLBACK_NUMBERS", 4 * D_IN)  # several parts
    selection, left, right = make(), numbers(BATCH, D_IN), numbers(D_IN, D_SAE, seed=1).T
    expected = [sum(float(a) * float(b) for a, b in zip(left[n], right[j], strict=True)) for n, j in pairs(selection)]
    got = row_dots(left, right, selection)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32))


def test_pytorch_still_has_the_private_op() -> None:
    """Where it goes the package stays right, but a step becomes slower: this says so."""
    assert sparse._ROW_DOTS is not None


@each_selection
def test_sums_over_latents_and_over_activations(make: type[Selection]) -> None:
    selection = make()
    values, left, right = numbers(len(selection.columns)), numbers(BATCH, D_IN, seed=1), numbers(D_SAE, D_IN, seed=2)
    by_activation, by_latent, alone = torch.zeros(BATCH, D_IN), torch.zeros(D_SAE, D_IN), torch.zeros(D_SAE)
    for value, (n, j) in zip(values, pairs(selection), strict=True):
        by_activation[n] += value * right[j]
        by_latent[j] += value * left[n]
        alone[j] += value
    torch.testing.assert_close(activation_sums(values, right, selection), by_activation)
    torch.testing.assert_close(latent_sums(values, left, selection), by_latent)
    torch.testing.assert_close(latent_sums(values, None, selection), alone)


@each_selection
@pytest.mark.parametrize("latents", [1, 3, 1000], ids=lambda n: f"{n} at a time")
def test_sums_in_given_memory_are_the_same_bits(
    make: type[Selection], latents: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "_PART_NUMBERS", latents * D_IN)
    selection = make()
    values, left = numbers(len(selection.columns)), numbers(BATCH, D_IN, seed=1)
    out = torch.full((D_SAE, D_IN), torch.nan)
    assert latent_sums(values, left, selection, out) is out
    assert torch.equal(out, latent_sums(values, left, selection))


@each_selection
def test_gradients_are_those_of_the_dense_products(make: type[Selection]) -> None:
    """In float64, where nothing hides behind rounding."""
    selection = make()
    x, target = numbers(BATCH, D_IN, dtype=torch.float64), numbers(BATCH, D_IN, seed=9, dtype=torch.float64)
    shapes = [(D_IN, D_SAE), (D_SAE,), (D_SAE, D_IN), (D_IN,)]

    def leaves() -> list[Tensor]:
        return [numbers(*s, seed=i, dtype=torch.float64).requires_grad_() for i, s in enumerate(shapes)]

    W_enc, b_enc, W_dec, b_dec = ours = leaves()
    values = encode_at(x - b_dec, W_enc, b_enc, b_dec, selection)
    missed = decode_at(values.relu(), selection, W_dec) + b_dec - target
    (missed.square().sum() + values.square().sum()).backward()

    mask = torch.zeros(BATCH, D_SAE, dtype=torch.float64)
    for n, j in pairs(selection):
        mask[n, j] = 1
    W_enc, b_enc, W_dec, b_dec = dense = leaves()
    pre = ((x - b_dec) @ W_enc + b_enc) * mask
    missed = pre.relu() @ W_dec + b_dec - target
    (missed.square().sum() + pre.square().sum()).backward()
    torch.testing.assert_close(
        values, torch.stack([pre[n, j] for n, j in pairs(selection)] or [pre.new_zeros(())])[: len(values)]
    )
    for mine, reference in zip(ours, dense, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-12, atol=1e-12)


def test_gradients_have_the_layout_of_the_parameter_and_are_not_copied() -> None:
    """AccumulateGrad takes a gradient as it is only then; DDP and the fused Adam rely on the layout."""
    W_enc = torch.nn.Parameter(numbers(D_SAE, D_IN).T)
    W_dec = torch.nn.Parameter(numbers(D_SAE, D_IN))
    b_enc, b_dec = torch.nn.Parameter(torch.zeros(D_SAE)), torch.nn.Parameter(torch.zeros(D_IN))
    selection, made = unequal(), {}
    values = encode_at(numbers(BATCH, D_IN), W_enc, b_enc, b_dec, selection)
    for name, parameter in (("W_enc", W_enc), ("W_dec", W_dec)):
        parameter.register_hook(lambda grad, name=name: made.setdefault(name, grad.data_ptr()) and None)
    decode_at(values, selection, W_dec).sum().backward()
    for name, parameter in (("W_enc", W_enc), ("W_dec", W_dec)):
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride()
        assert parameter.grad.data_ptr() == made[name]


@pytest.mark.parametrize("d_sae", [40, 512, 1024], ids=["no groups", "groups", "groups of groups"])
@pytest.mark.parametrize("k", [1, 4, 40], ids=["one", "some", "many"])
@pytest.mark.parametrize("chunk", [64, 10**9], ids=["in chunks", "at once"])
def test_selection_takes_the_k_largest(d_sae: int, k: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saetrack.sae.select._CHUNK_NUMBERS", chunk)
    x, W_enc, b_enc = numbers(9, D_IN), numbers(d_sae, D_IN, seed=1).T, numbers(d_sae, seed=2)
    selection, _ = select_topk(x, W_enc, b_enc, k, torch.float32, Workspace())
    assert selection.offsets.tolist() == list(range(0, 9 * k + 1, k))
    for row, taken in zip((x @ W_enc + b_enc).tolist(), selection.columns.view(9, k).tolist(), strict=True):
        assert len(set(taken)) == k
        best = sorted(range(d_sae), key=lambda j: -row[j])[:k]
        assert {j for j in taken if row[j] > 0} == {j for j in best if row[j] > 0}


def test_among_negative_pre_activations_the_positive_ones_are_found() -> None:
    x, W_enc = torch.ones(3, 1), torch.full((512, 1), -1.0).T.clone()
    W_enc[0, [7, 300, 511]] = torch.tensor([1e-30, 2.0, 0.5])
    taken = select_topk(x, W_enc, torch.zeros(512), 4, torch.float32, Workspace())[0].columns.view(3, 4)
    assert all({7, 300, 511} <= set(row) for row in taken.tolist())


def test_selection_in_bfloat16_misses_only_near_ties() -> None:
    x, W_enc, b_enc = numbers(500, 64), numbers(256, 64, seed=1).T, numbers(256, seed=2)
    selection, _ = select_topk(x, W_enc, b_enc, 16, torch.bfloat16, Workspace())
    pre = x @ W_enc + b_enc
    taken = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, selection.columns.view(500, 16), True)
    best = torch.zeros_like(taken).scatter_(1, pre.topk(16, dim=1).indices, True)
    assert (taken.sum(1) == 16).all()
    share = (taken & best).sum() / best.sum()
    assert 0.95 < share < 1.0  # below one, or the test would not be of bfloat16
    least_taken = pre.masked_fill(~taken, torch.inf).amin(1)
    best_missed = pre.masked_fill(taken, -torch.inf).amax(1)
    assert (best_missed - least_taken).max() < 0.03 * pre.abs().max()


def test_a_workspace_gives_the_same_memory_again_and_is_not_copied() -> None:
    workspace, cpu = Workspace(), torch.device("cpu")
    large = workspace.buffer("pre", (8, 16), torch.float32, cpu)
    small = workspace.buffer("pre", (4, 16), torch.float32, cpu)
    assert small.shape == (4, 16)
    assert small.data_ptr() == large.data_ptr()
    assert workspace.buffer("pre", (8, 16), torch.bfloat16, cpu).dtype == torch.bfloat16
    assert workspace.buffer("pre", (9, 16), torch.bfloat16, cpu).shape == (9, 16)
    assert copy.deepcopy(workspace)._buffers == {}


def test_lent_memory_is_lent_again_only_when_nobody_holds_it() -> None:
    workspace, cpu = Workspace(), torch.device("cpu")

    def lend() -> Tensor:
        return workspace.lend("grad", (4, 16), torch.float32, cpu)

    first = lend()
    memory, row = first.data_ptr(), first[2:].T
    assert lend().data_ptr() != memory
    first = lend()
    memory, row = first.data_ptr(), first[2:].T
    del first
    assert lend().data_ptr() != memory  # a view of it lives
    first = lend()
    memory = first.data_ptr()
    del first, row
    again = lend()
    assert again.data_ptr() == memory
    assert (again.shape, again.dtype) == ((4, 16), torch.float32)


@pytest.mark.parametrize("d_sae", [512, 515], ids=["eight at a time", "one by one"])
@pytest.mark.parametrize("chunk", [1500, 10**9], ids=["in chunks", "at once"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positive_latents_are_found_if_they_are_few(
    d_sae: int, chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saetrack.sae.select._CHUNK_NUMBERS", chunk)
    x, W_enc = numbers(50, 64), numbers(d_sae, 64, seed=1).T
    bias = numbers(d_sae, seed=2) - 20.0
    pre = x @ W_enc + bias
    found = select_positive(x, W_enc, bias, dtype, Workspace())
    assert found is not None
    taken = torch.zeros_like(pre, dtype=torch.bool)
    taken[found.rows, found.columns] = True
    assert 0 < (pre > 0).sum() <= taken.sum() == len(found.columns)
    assert taken[pre > 0].all()
    assert pre[taken].min() > (0.0 if dtype == torch.float32 else -0.5)
    assert select_positive(x, W_enc, bias + 20.0, dtype, Workspace()) is None  # half of all are positive


def test_without_pytorchs_kernel_inactive_latents_get_no_gradient_either(monkeypatch: pytest.MonkeyPatch) -> None:
    gradient, latents = numbers(5, 7), numbers(5, 7, seed=1).relu()
    expected = gradient * (latents > 0)
    other = gradient.clone()
    dense._zero_where_inactive_(gradient, latents)
    monkeypatch.setattr(dense, "_RELU_BACKWARD", None)
    dense._zero_where_inactive_(other, latents)
    assert torch.equal(gradient, expected)
    assert torch.equal(other, expected)
