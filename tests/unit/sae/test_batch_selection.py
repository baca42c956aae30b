"""BatchTopKSAE and MatryoshkaSAE: selection over the batch, and the threshold that stands in for it in inference."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from saetrack.sae import SAE, BatchTopKSAE, MatryoshkaSAE
from saetrack.sae.batch_selection import BatchSelectionSAE
from saetrack.sae.matryoshka import default_prefixes
from saetrack.sae.select import select_batch_topk
from saetrack.sae.sparse import Latents, Selection
from saetrack.sae.workspace import Workspace

MAKE: dict[str, Callable[[], BatchSelectionSAE]] = {
    "batchtopk": lambda: BatchTopKSAE(8, 4, k=3),
    "matryoshka": lambda: MatryoshkaSAE(8, 4, k=3, prefixes=[4, 12, 32]),
}
each_class = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())


def activations(n: int = 64, seed: int = 0) -> Tensor:
    """Some activations much longer than others, so that a fair share for each would be a bad one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=generator) * torch.linspace(0.2, 2.0, n)[:, None]
    return x * 8**0.5 / x.norm(dim=1).mean()


def started(make: Callable[[], BatchSelectionSAE]) -> BatchSelectionSAE:
    sae = make()
    sae.initialise(activations(), torch.Generator().manual_seed(1))
    return sae


@each_class
def test_a_training_batch_keeps_k_times_its_size_shared_out_by_need(make: Callable[[], BatchSelectionSAE]) -> None:
    sae, x = started(make), activations(seed=3)
    latents = sae.activate_batch(sae.preactivations(x))
    counts = (latents > 0).sum(dim=1)
    assert counts.sum() == 3 * 64
    assert counts[:16].sum() < counts[-16:].sum() / 4
    out = sae.loss(x)
    assert out.l0 == 3
    assert out.smallest_kept is not None
    torch.testing.assert_close(out.smallest_kept, latents[latents > 0].min())


@each_class
def test_a_batch_with_few_positive_latents_keeps_those_and_no_more(make: Callable[[], BatchSelectionSAE]) -> None:
    sae, x = started(make), activations(seed=3)
    with torch.no_grad():
        sae.b_enc.fill_(-sae.preactivations(x).quantile(0.97).item())
    positive = int((sae.preactivations(x) > 0).sum())
    assert 0 < positive < 3 * 64
    assert sae.loss(x).l0.item() == pytest.approx(positive / 64)
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    out = sae.loss(x)
    assert out.l0 == 0
    assert out.smallest_kept is not None
    assert out.smallest_kept.isnan()


@each_class
@pytest.mark.parametrize("training", [True, False], ids=["train()", "eval()"])
def test_inference_does_not_depend_on_the_rest_of_the_batch(
    make: Callable[[], BatchSelectionSAE], training: bool
) -> None:
    sae, x = started(make).train(training), activations(seed=4)
    whole = sae.encode(x)
    for i in (0, 20, 63):
        torch.testing.assert_close(sae.encode(x[i : i + 1])[0], whole[i], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sae.encode(x.view(4, 16, 8)).view(64, 32), whole)
    pre = sae.preactivations(x)
    assert torch.equal(whole > 0, pre > sae.threshold)
    assert torch.equal(whole[whole > 0], pre[whole > 0])


@each_class
def test_the_first_threshold_is_the_smallest_latent_that_the_data_keep(make: Callable[[], BatchSelectionSAE]) -> None:
    sae, x = started(make), activations()
    latents = sae.activate_batch(sae.preactivations(x))
    assert sae.threshold.dtype == torch.float32
    assert sae.threshold.unique().tolist() == [latents[latents > 0].min().item()]


@each_class
def test_the_threshold_is_a_running_mean_that_a_batch_without_latents_leaves_alone(
    make: Callable[[], BatchSelectionSAE],
) -> None:
    sae = started(make)
    expected = sae.threshold[0].item()
    with torch.no_grad():
        sae.W_dec.mul_(2.0)
    for smallest in (0.5, float("nan"), 0.25):
        sae.after_step_(torch.tensor(smallest))
        if smallest == smallest:
            expected += 0.1 * (smallest - expected)
        torch.testing.assert_close(sae.threshold, torch.full((32,), expected))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))


@each_class
def test_after_training_inference_keeps_about_k_on_other_activations(make: Callable[[], BatchSelectionSAE]) -> None:
    sae = started(make)
    optimizer = torch.optim.Adam(sae.parameters(), lr=5e-3)
    for step in range(300):
        out = sae.loss(activations(256, seed=step))
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (300 - step) / 100)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        sae.after_step_(out.smallest_kept)
    x = activations(2048, seed=1000)
    with torch.no_grad():
        assert (sae.encode(x) > 0).sum(dim=1).double().mean().item() == pytest.approx(3.0, rel=0.1)
        missed = (x - sae(x)).square().sum().item()
        # inference by the threshold is as good as choosing over the batch
        assert missed == pytest.approx((x - sae.loss(x).x_hat).square().sum().item(), rel=0.1)


@pytest.mark.parametrize("spread", [1.0, 30.0], ids=["even", "one activation takes nearly all"])
@pytest.mark.parametrize("d_sae", [48, 600])
def test_the_selection_is_that_of_a_dense_topk_over_the_batch(spread: float, d_sae: int) -> None:
    generator = torch.Generator().manual_seed(0)
    centred = torch.randn(40, 8, generator=generator)
    centred[7] *= spread
    W_enc, b_enc = torch.randn(8, d_sae, generator=generator), torch.randn(d_sae, generator=generator)
    chosen = select_batch_topk(centred, W_enc, b_enc, 3, torch.float32, Workspace())
    pre = (centred @ W_enc + b_enc).relu()
    expected = torch.zeros_like(pre, dtype=torch.bool).flatten()
    expected[pre.flatten().topk(3 * 40).indices] = True
    found = torch.zeros_like(pre, dtype=torch.bool)
    found[chosen.rows, chosen.columns] = True
    assert torch.equal(found & (pre > 0), expected.view_as(pre) & (pre > 0))
    assert len(chosen.columns) == 3 * 40
    if spread > 1:
        assert found[7].sum() > 4 * 3


def test_a_single_prefix_is_batchtopk() -> None:
    plain, nested, x = started(MAKE["batchtopk"]), MatryoshkaSAE(8, 4, k=3, prefixes=[32]), activations(seed=5)
    nested.load_state_dict(plain.state_dict())
    dead = torch.arange(32) < 5
    torch.testing.assert_close(nested.loss(x, dead).loss, plain.loss(x, dead).loss)
    assert nested.loss(x).terms.keys() == {"mse", "auxk"}


def test_each_prefix_reconstructs_with_its_own_latents_only() -> None:
    sae, x = started(MAKE["matryoshka"]), activations(seed=6)
    latents = sae.activate_batch(sae.preactivations(x)).detach()
    rows, columns = latents.nonzero(as_tuple=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (latents > 0).sum(dim=1).cumsum(0)])
    chosen = Latents(Selection(columns, offsets, 32), latents[rows, columns])
    for end, x_hat in zip((4, 12, 32), sae.reconstructions(chosen), strict=True):
        torch.testing.assert_close(x_hat, sae.decode(torch.where(torch.arange(32) < end, latents, 0.0)))


def test_training_a_matryoshka_puts_more_into_its_first_latents() -> None:
    missed = {}
    for name in MAKE:
        sae = started(MAKE[name])
        optimizer = torch.optim.Adam(sae.parameters(), lr=5e-3)
        for step in range(150):
            out = sae.loss(activations(128, seed=step))
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            sae.after_step_(out.smallest_kept)
        x = activations(512, seed=1000)
        with torch.no_grad():
            latents = sae.activate_batch(sae.preactivations(x))
            missed[name] = (x - sae.decode(torch.where(torch.arange(32) < 4, latents, 0.0))).square().sum().item()
    assert missed["matryoshka"] < 0.9 * missed["batchtopk"]


@pytest.mark.parametrize(
    ("d_sae", "prefixes"),
    [(65536, [2048, 6144, 14336, 30720, 65536]), (32, [1, 3, 7, 15, 32]), (8, [1, 3, 8]), (1, [1])],
)
def test_the_default_prefixes_increase_and_end_at_d_sae(d_sae: int, prefixes: list[int]) -> None:
    assert default_prefixes(d_sae) == prefixes
    assert MatryoshkaSAE(1, d_sae, k=1).arguments["prefixes"] == prefixes


@each_class
def test_the_state_holds_the_threshold_and_refuses_a_negative_one(make: Callable[[], BatchSelectionSAE]) -> None:
    sae, twin = started(make), make()
    twin.load_state_dict(sae.state_dict())
    assert torch.equal(twin.threshold, sae.threshold)
    for bad in (-0.1, float("nan")):
        state = {**sae.state_dict(), "threshold": torch.full((32,), bad)}
        with pytest.raises(ValueError, match=r"32 thresholds to be loaded into the .*SAE are negative or NaN"):
            twin.load_state_dict(state)
    assert torch.equal(twin.threshold, sae.threshold)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchTopKSAE(8, 4, k=33), r"sae.k must be from 1 to d_sae = 8 \* 4 = 32, but is 33; lower `sae.k`"),
        (lambda: MatryoshkaSAE(8, 4, k=0), "sae.k must be .* but is 0"),
        (lambda: MatryoshkaSAE(8, 4, k=3, prefixes=[8, 8, 32]), "increase strictly, but 8 follows 8 at position 1"),
        (lambda: MatryoshkaSAE(8, 4, k=3, prefixes=[0, 32]), "must be positive .* but 0 follows 0 at position 0"),
        (
            lambda: MatryoshkaSAE(8, 4, k=3, prefixes=[8, 16]),
            r"must end at d_sae = 32, but ends at 16; add 32, or leave",
        ),
        (lambda: MatryoshkaSAE(8, 4, k=3, prefixes=[8, 64]), r"must end at d_sae = 32, but ends at 64"),
        (lambda: MatryoshkaSAE(8, 4, k=3, prefixes=[]), r"must end at d_sae = 32, but ends at nothing"),
    ],
)
def test_bad_input_says_what_was_wrong(make: Callable[[], SAE], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
