"""A whole training step: against dense float32 autograd, against SAELens, and for equal bits."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from saetrack.sae import (
    SAE,
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    Kernels,
    MatryoshkaSAE,
    SAETrackSAE,
    StandardSAE,
    TopKSAE,
    use_kernels,
)
from saetrack.sae.auxk import DeadLatents, auxiliary_loss
from saetrack.sae.precision import has_bfloat16

D_IN, BATCH = 32, 256
CLASSES: dict[str, Callable[[], SAE]] = {
    "topk": lambda: TopKSAE(D_IN, 8, k=8, aux_k=12, aux_coefficient=0.5),
    "standard": lambda: StandardSAE(D_IN, 8, aux_k=12, aux_coefficient=0.5),
    "saetrack": lambda: SAETrackSAE(D_IN, 8, l1_coefficient=0.01, aux_k=12, aux_coefficient=0.5),
    "batchtopk": lambda: BatchTopKSAE(D_IN, 8, k=8, aux_k=12, aux_coefficient=0.5),
    "matryoshka": lambda: MatryoshkaSAE(D_IN, 8, k=8, aux_k=12, aux_coefficient=0.5),
    "jumprelu": lambda: JumpReLUSAE(D_IN, 8, bandwidth=0.5, aux_k=12, aux_coefficient=0.5),
    "gated": lambda: GatedSAE(D_IN, 8, aux_k=12, aux_coefficient=0.5),
}
each_class = pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES.keys())
needs_bfloat16 = pytest.mark.skipif(not has_bfloat16(torch.device("cpu")), reason="this CPU has no bfloat16")


def activations(seed: int, n: int = BATCH) -> Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)) + 0.3


def started(make: Callable[[], SAE]) -> SAE:
    sae, generator = make(), torch.Generator().manual_seed(1)
    sae.initialise(activations(0), generator)
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.encoder_bias, sae.b_dec):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return sae


def dense_topk_loss(sae: SAE, x: Tensor, dead: Tensor | None) -> Tensor:
    """The loss in TopKSAE's docstring, with every latent in memory and nothing but autograd."""
    assert isinstance(sae, TopKSAE)
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    kept = torch.zeros_like(pre).scatter(1, pre.topk(sae.k, dim=1).indices, 1.0)
    x_hat = (pre * kept).relu() @ sae.W_dec + sae.b_dec
    loss = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    if dead is not None and dead.any():
        error = (x - x_hat).detach()
        n = min(sae.aux_k, int(dead.sum()))
        best = pre.masked_fill(~dead, -torch.inf).topk(n, dim=1).indices
        z = pre * torch.zeros_like(pre).scatter(1, best, 1.0)
        missed = (error - z @ sae.W_dec).square().sum() / (error - error.mean(0)).square().sum()
        loss = loss + sae.aux_coefficient * min(1.0, int(dead.sum()) / sae.aux_k) * missed
    return loss


def gradients(sae: SAE, loss: Tensor) -> dict[str, Tensor]:
    sae.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("n_dead", [0, 5, 100], ids=["none dead", "fewer than aux_k", "more than aux_k"])
@pytest.mark.parametrize("chunk", [300, 10**9], ids=["in chunks", "at once"])
def test_a_topk_step_is_that_of_dense_autograd(n_dead: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saetrack.sae.auxk._CHUNK_NUMBERS", chunk)
    sae, x = started(CLASSES["topk"]), activations(7)
    dead = torch.arange(sae.d_sae) % 2 == 0
    dead &= dead.cumsum(0) <= n_dead
    assert dead.sum() == n_dead
    reference = dense_topk_loss(sae, x, dead)
    expected = gradients(sae, reference)
    got = sae.loss(x, dead)
    assert got.loss.item() == pytest.approx(reference.item(), rel=1e-6)
    for name, gradient in gradients(sae, got.loss).items():
        torch.testing.assert_close(gradient, expected.pop(name), rtol=1e-5, atol=1e-5)
    assert not expected


@pytest.mark.parametrize("places", [0, 64, 128, 256])
@pytest.mark.parametrize("n_dead", [0, 1, 12, 40, 64, 100])
@pytest.mark.parametrize("chunk", [300, 10**9], ids=["in chunks", "at once"])
def test_places_that_no_dead_latent_takes_change_nothing(
    n_dead: int, places: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if n_dead > places:
        pytest.skip("places are for all dead latents")
    monkeypatch.setattr("saetrack.sae.auxk._CHUNK_NUMBERS", chunk)
    for aux_k in (12, 90):  # with 90 fewer may be dead than are to be chosen, of more places than that
        sae, x = TopKSAE(D_IN, 8, k=8, aux_k=aux_k, aux_coefficient=0.5), activations(7)
        sae.load_state_dict(started(CLASSES["topk"]).state_dict())
        dead = torch.arange(sae.d_sae) % 2 == 1
        dead &= dead.cumsum(0) <= n_dead
        just = sae.loss(x, dead)
        expected = gradients(sae, just.loss)
        sae.dead_places = places
        padded = sae.loss(x, dead)
        assert padded.loss.item() == pytest.approx(just.loss.item(), rel=1e-6)
        assert padded.terms["auxk"].item() == pytest.approx(just.terms["auxk"].item(), rel=1e-5)
        for name, gradient in gradients(sae, padded.loss).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def test_an_error_that_is_the_same_everywhere_is_nothing_to_revive_for() -> None:
    x, revived = torch.full((8, D_IN), 0.5), activations(1, n=8).requires_grad_()
    loss = auxiliary_loss(x, torch.zeros_like(x), revived, DeadLatents(torch.arange(3), 12, torch.float32))
    loss.backward()
    assert loss == 0
    assert revived.grad is not None
    assert not revived.grad.any()


@pytest.mark.parametrize(("n_dead", "least", "most"), [(5, 1e-4, 0.01), (100, 1e-4, 0.1)], ids=["all", "some chosen"])
def test_dead_latents_in_bfloat16_get_nearly_the_gradients_of_float32(n_dead: int, least: float, most: float) -> None:
    sae, centred, grad = started(CLASSES["topk"]), activations(7), activations(8) / BATCH
    latents = torch.arange(n_dead) * 2

    def reconstruct(dtype: torch.dtype) -> list[Tensor]:
        dead = DeadLatents(latents, 12, dtype)
        into = torch.zeros(sae.d_sae, D_IN), torch.zeros(sae.d_sae), torch.zeros(sae.d_sae, D_IN)
        with torch.no_grad():
            reconstruction = dead.reconstruct(centred, sae.W_enc, sae.b_enc, sae.W_dec)
            dead.add_gradients_(centred, grad, *into)
        return [reconstruction, *into]

    for low, full in zip(reconstruct(torch.bfloat16), reconstruct(torch.float32), strict=True):
        assert low.dtype == torch.float32
        assert least < ((low - full).norm() / full.norm()).item() < most


def test_products_of_dead_latents_are_in_lower_precision_only_where_these_are_many() -> None:
    table = torch.zeros(600, 512)
    many, few = torch.arange(600) < 257, torch.arange(600) < 256

    def dtype(dead: Tensor, precision: torch.dtype, W_dec: Tensor = table) -> torch.dtype:
        latents = DeadLatents.where(dead, W_dec, 12, precision)
        assert latents is not None
        return latents.dtype

    assert dtype(many, torch.bfloat16) == torch.bfloat16
    assert dtype(few, torch.bfloat16) == torch.float32
    assert dtype(many, torch.float32, table.double()) == torch.float64
    assert DeadLatents.where(many & few & False, table, 12, torch.bfloat16) is None


@pytest.mark.filterwarnings("ignore")  # SAELens's imports warn of deprecations of their own
def test_a_topk_step_has_the_latents_and_gradients_of_saelens() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    sae, x = started(CLASSES["topk"]), activations(8)
    assert isinstance(sae, TopKSAE)
    lens = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=D_IN, d_sae=sae.d_sae, k=sae.k, rescale_acts_by_decoder_norm=False)
    )
    lens.load_state_dict({name: value.contiguous() for name, value in sae.state_dict().items()})
    latents = lens.encode(x)
    latents = latents.to_dense() if latents.is_sparse else latents
    x_hat = latents @ lens.W_dec + lens.b_dec
    loss = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    loss.backward()
    got = sae.loss(x)
    torch.testing.assert_close(sae.encode(x), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.x_hat, x_hat, rtol=1e-5, atol=1e-5)
    assert got.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    for name, gradient in gradients(sae, got.loss).items():
        torch.testing.assert_close(gradient, getattr(lens, name).grad, rtol=1e-5, atol=1e-5)


@each_class
def test_equal_inputs_give_equal_bits(make: Callable[[], SAE]) -> None:
    sae, x, dead = started(make), activations(9), torch.arange(256) % 5 == 0
    twin = copy.deepcopy(sae)
    first = gradients(sae, sae.loss(x, dead).loss)
    again = gradients(sae, sae.loss(x, dead).loss)
    other = gradients(twin, twin.loss(x, dead).loss)
    for name, gradient in first.items():
        assert torch.equal(gradient, again[name])
        assert torch.equal(gradient, other[name])


@each_class
@pytest.mark.parametrize("dead", [None, torch.arange(256) % 5 == 0], ids=["none dead", "some dead"])
def test_memory_layout_survives_whatever_training_does(make: Callable[[], SAE], dead: Tensor | None) -> None:
    sae = started(make)
    layouts = {name: p.stride() for name, p in sae.named_parameters()}
    assert layouts["W_enc"] == (1, D_IN)
    assert sae.W_enc.shape == (D_IN, 256)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
    for seed in range(2):
        optimizer.zero_grad()
        sae.loss(activations(seed), dead).loss.backward()
        optimizer.step()
    twin = make()
    twin.load_state_dict({name: value.contiguous() for name, value in sae.state_dict().items()})
    for each in (sae, copy.deepcopy(sae), twin, sae.folded(2.0), sae.to(torch.float64).to(torch.float32)):
        assert {name: p.stride() for name, p in each.named_parameters()} == layouts
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == layouts[name]
        assert optimizer.state[parameter]["exp_avg"].stride() == layouts[name]


def test_a_step_of_the_fused_adam_moves_every_weight_as_the_plain_one_does() -> None:
    """The fused one reads weights and moments in the order of memory, which is W_enc's transposed."""
    ours, plain = started(CLASSES["topk"]), started(CLASSES["topk"])
    for sae, fused in ((ours, True), (plain, False)):
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=fused)
        for seed in range(3):
            optimizer.zero_grad()
            sae.loss(activations(seed)).loss.backward()
            optimizer.step()
    for mine, reference in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)


@needs_bfloat16
@each_class
def test_bfloat16_changes_the_step_only_a_little(make: Callable[[], SAE]) -> None:
    """TopK: other latents at near ties, nothing else. The dense ones: rounding of products to three digits."""
    sae, x, dead = started(make), activations(10), torch.arange(256) % 5 == 0
    full = sae.loss(x, dead)
    expected = gradients(sae, full.loss)
    sae.precision = torch.bfloat16
    low = sae.loss(x, dead)
    assert {t.dtype for t in (low.loss, low.x_hat, *low.terms.values())} == {torch.float32}
    assert low.loss.item() != full.loss.item()
    assert low.loss.item() == pytest.approx(full.loss.item(), rel=5e-3)
    for name, gradient in gradients(sae, low.loss).items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() < 0.1 * expected[name].norm()


@needs_bfloat16
def test_a_topk_value_is_float32_whatever_selects() -> None:
    sae, x = started(CLASSES["topk"]), activations(11)
    sae.precision = torch.bfloat16
    same = (sae.loss(x).x_hat - sae(x).detach()).abs().amax(dim=1) < 1e-5  # where no near tie was decided otherwise
    assert 0.5 < same.float().mean() < 1


@each_class
def test_autocast_outside_changes_nothing(make: Callable[[], SAE]) -> None:
    """`trainer.precision: bf16-mixed` must not reach float32 sums: `model.precision` alone decides."""
    sae, x, dead = started(make), activations(12), torch.arange(256) % 5 == 0
    expected = gradients(sae, sae.loss(x, dead).loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sae.loss(x, dead).loss
    for name, gradient in gradients(sae, loss).items():
        assert torch.equal(gradient, expected[name])


@pytest.mark.gpu
@each_class
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", ["pytorch", "native"])
def test_a_gpu_takes_the_same_step_twice_and_the_one_of_the_cpu(
    make: Callable[[], SAE], precision: torch.dtype, kernels: Kernels, request: pytest.FixtureRequest
) -> None:
    sae, x, dead = started(make), activations(13), torch.arange(256) % 5 == 0
    expected = gradients(sae, sae.loss(x, dead).loss)
    there = copy.deepcopy(sae).cuda()
    there.precision = precision
    request.addfinalizer(lambda: use_kernels("pytorch"))
    use_kernels(kernels, "cuda")
    first = gradients(there, there.loss(x.cuda(), dead.cuda()).loss)
    again = gradients(there, there.loss(x.cuda(), dead.cuda()).loss)
    tolerance = 1e-4 if precision == torch.float32 else 0.1
    for name, gradient in first.items():
        assert torch.equal(gradient, again[name])
        assert (gradient.cpu() - expected[name]).norm() < tolerance * expected[name].norm()
