import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from saetrack.sae import (
    SAE,
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    SAETrackSAE,
    StandardSAE,
    TopKSAE,
)

CLASSES: dict[str, Callable[..., SAE]] = {
    "standard": lambda **kw: StandardSAE(8, 4, **kw),
    "topk": lambda **kw: TopKSAE(8, 4, k=3, **kw),
    "saetrack": lambda **kw: SAETrackSAE(8, 4, l1_coefficient=0.01, **kw),
    "batchtopk": lambda **kw: BatchTopKSAE(8, 4, k=3, **kw),
    "matryoshka": lambda **kw: MatryoshkaSAE(8, 4, k=3, prefixes=[4, 12, 32], **kw),
    "jumprelu": lambda **kw: JumpReLUSAE(8, 4, l0_coefficient=0.01, **kw),
    "gated": lambda **kw: GatedSAE(8, 4, **kw),
}
each_class = pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES.keys())


def activations(n: int = 40, d_in: int = 8, seed: int = 0) -> Tensor:
    x = torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed)) + 0.5
    return x * d_in**0.5 / x.norm(dim=1).mean()


def started(make: Callable[..., SAE], seed: int = 1, **arguments: float) -> SAE:
    """An SAE away from its symmetric start, so that no bias is zero and no encoder column parallel to its row.

    Thresholds differ too, and stay above zero.
    """
    sae = make(**arguments)
    generator = torch.Generator().manual_seed(seed)
    sae.initialise(activations(), generator)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name != "W_dec":
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.abs() if name == "threshold" else noise)
    return sae


def one_by_one(sae: SAE, x: Tensor, training: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Pre-activations and latents in float64, one latent of one activation at a time."""
    arrays = {name: value.detach().double().numpy() for name, value in sae.state_dict().items()}
    W_enc, b_dec, rows = arrays["W_enc"], arrays["b_dec"], x.double().numpy()
    b_enc = arrays["b_gate" if isinstance(sae, GatedSAE) else "b_enc"]
    pre = np.array([[(row - b_dec) @ W_enc[:, i] + b_enc[i] for i in range(sae.d_sae)] for row in rows])
    latents = np.maximum(pre, 0.0)
    if isinstance(sae, TopKSAE):
        for row, values in zip(latents, pre, strict=True):
            row[sorted(range(sae.d_sae), key=lambda i: -values[i])[sae.k :]] = 0.0
    elif isinstance(sae, (BatchTopKSAE, MatryoshkaSAE)) and training:
        latents[latents < sorted(latents.ravel())[-sae.k * len(x)]] = 0.0
    elif isinstance(sae, (BatchTopKSAE, MatryoshkaSAE, JumpReLUSAE)):
        for i in range(sae.d_sae):
            latents[pre[:, i] <= arrays["threshold"][i], i] = 0.0
    elif isinstance(sae, GatedSAE):
        for i in range(sae.d_sae):
            column = W_enc[:, i] * np.exp(arrays["r_mag"][i])
            for n, row in enumerate(rows):
                size = max(0.0, (row - b_dec) @ column + arrays["b_mag"][i])
                latents[n, i] = size if pre[n, i] > 0 else 0.0
    return pre, latents


@each_class
def test_encoding_and_decoding_match_the_formula(make: Callable[..., SAE]) -> None:
    sae, x = started(make), activations(seed=5)
    _, latents = one_by_one(sae, x)
    expected = latents @ sae.W_dec.detach().double().numpy() + sae.b_dec.detach().double().numpy()
    np.testing.assert_allclose(sae.encode(x).detach(), latents, atol=1e-5)
    np.testing.assert_allclose(sae(x).detach(), expected, atol=1e-5)
    np.testing.assert_allclose(sae(x.view(5, 8, 8)).detach().view(40, 8), expected, atol=1e-5)


@each_class
@pytest.mark.parametrize("n_dead", [None, 0, 2, 9], ids=["none given", "none dead", "fewer than aux_k", "more"])
@pytest.mark.parametrize("few", [0.0, 1.0], ids=["dense", "sparse"])
def test_the_loss_is_the_one_in_the_docstring(
    make: Callable[..., SAE], n_dead: int | None, few: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saetrack.sae.select._FEW", few)
    sae, x = started(make, aux_coefficient=0.25, aux_k=4), activations(seed=6)
    with torch.no_grad():
        sae.encoder_bias.sub_(0.8)  # so that for some activations fewer than k pre-activations are positive
        sae.W_dec.mul_(torch.linspace(0.5, 2.0, 32)[:, None])
    dead = None if n_dead is None else torch.arange(sae.d_sae) < n_dead
    got = sae.loss(x, dead)

    pre, latents = one_by_one(sae, x, training=True)
    assert (latents > 0).sum(axis=1).min() < 3 < (latents > 0).sum()
    W_dec, b_dec, X = sae.W_dec.detach().double().numpy(), sae.b_dec.detach().double().numpy(), x.double().numpy()
    error = X - latents @ W_dec - b_dec
    squares, centred = (error**2).sum(axis=1), X - X.mean(axis=0)
    if isinstance(sae, StandardSAE):
        mse = squares.mean() / 8
        penalty = sae.l1_coefficient * (latents * np.linalg.norm(W_dec, axis=1)).sum(axis=1).mean() / np.sqrt(8)
    elif isinstance(sae, SAETrackSAE):
        mse = np.mean([s / 8 / np.linalg.norm(c) for s, c in zip(squares, centred, strict=True)])
        penalty = sae.l1_coefficient * latents.sum(axis=1).mean()
    elif isinstance(sae, JumpReLUSAE):
        mse, penalty = squares.mean() / 8, sae.l0_coefficient * (latents > 0).sum(axis=1).mean()
    elif isinstance(sae, GatedSAE):
        mse, gate = squares.mean() / 8, np.maximum(pre, 0.0)
        penalty = sae.l1_coefficient * gate.sum(axis=1).mean() / np.sqrt(8) + ((X - gate @ W_dec - b_dec) ** 2).mean()
    else:
        mse, penalty = squares.sum() / (centred**2).sum(), 0.0
    if isinstance(sae, MatryoshkaSAE):
        for end in (4, 12):
            penalty += ((X - latents[:, :end] @ W_dec[:end] - b_dec) ** 2).sum() / (centred**2).sum()
    auxk = 0.0
    if n_dead:
        missed = 0.0
        for values, e in zip(pre, error, strict=True):
            best = sorted(range(n_dead), key=lambda i: -values[i])[:4]
            missed += ((e - sum(values[i] * W_dec[i] for i in best)) ** 2).sum()
        auxk = min(1.0, n_dead / 4) * missed / ((error - error.mean(axis=0)) ** 2).sum()

    assert got.loss.item() == pytest.approx(mse + penalty + 0.25 * auxk, rel=1e-5)
    assert got.terms["mse"].item() == pytest.approx(mse, rel=1e-5)
    assert got.terms["auxk"].item() == pytest.approx(auxk, rel=1e-5)
    assert not any(term.requires_grad for term in [got.x_hat, got.l0, *got.terms.values()])
    np.testing.assert_allclose(got.x_hat, X - error, atol=1e-5)
    np.testing.assert_array_equal(got.fired, (latents > 0).any(axis=0))
    assert got.l0.item() == pytest.approx((latents > 0).sum(axis=1).mean())


def test_the_sparse_topk_loss_has_the_gradients_of_the_dense_one() -> None:
    sae, x = started(CLASSES["topk"]), activations(seed=7)
    sae.loss(x).loss.backward()
    sparse = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad()
    ((x - sae.decode(sae.encode(x))).square().sum() / (x - x.mean(0)).square().sum()).backward()
    assert sparse.keys() == {"W_enc", "b_enc", "W_dec", "b_dec"}
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(sparse[name], parameter.grad, rtol=1e-4, atol=1e-6)


@each_class
def test_a_dead_latent_gets_a_gradient_only_from_auxk_and_living_rows_none_from_it(make: Callable[..., SAE]) -> None:
    sae, x = started(make, aux_coefficient=1.0), activations(seed=8)
    with torch.no_grad():
        sae.encoder_bias[:4] = -50.0  # never fires
    dead = torch.arange(sae.d_sae) < 4
    sae.loss(x).loss.backward()
    without = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad()
    sae.loss(x, dead).loss.backward()
    assert not without["W_dec"][:4].any()
    bias = "b_gate" if isinstance(sae, GatedSAE) else "b_enc"
    assert not without[bias][:4].any()
    assert sae.W_dec.grad is not None
    assert sae.encoder_bias.grad is not None
    assert sae.W_dec.grad[:4].any(dim=1).all()
    assert sae.encoder_bias.grad[:4].all()
    torch.testing.assert_close(sae.W_dec.grad[4:], without["W_dec"][4:])
    torch.testing.assert_close(sae.encoder_bias.grad[4:], without[bias][4:])


@each_class
def test_auxk_revives_killed_latents(make: Callable[..., SAE]) -> None:
    shares = {}
    for coefficient in (0.0, 1 / 32):
        sae = started(make, aux_coefficient=coefficient)
        with torch.no_grad():
            sae.encoder_bias[:16] = -6.0
        dead = torch.arange(sae.d_sae) < 16
        optimizer = torch.optim.Adam(sae.parameters(), lr=0.02)
        for step in range(150):
            terms = sae.loss(activations(128, seed=step), dead)
            optimizer.zero_grad()
            terms.loss.backward()
            optimizer.step()
            sae.after_step_(terms.smallest_kept)
            dead &= ~terms.fired
        shares[coefficient] = dead[:16].double().mean().item()
    assert shares[0.0] == 1.0
    assert shares[1 / 32] <= 0.25


@each_class
@pytest.mark.parametrize(
    "x", [activations(1), activations(1).expand(6, 8), torch.zeros(6, 8)], ids=["one activation", "equal ones", "zeros"]
)
def test_a_batch_without_variance_gives_finite_gradients(make: Callable[..., SAE], x: Tensor) -> None:
    sae = started(make)
    terms = sae.loss(x, torch.ones(sae.d_sae, dtype=torch.bool))
    terms.loss.backward()
    assert torch.isfinite(terms.loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in sae.parameters())


@each_class
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_activation_shows_in_the_loss(make: Callable[..., SAE], bad: float) -> None:
    sae, x = started(make), activations()
    x[3, 2] = bad
    assert not torch.isfinite(sae.loss(x).loss)


@each_class
def test_equal_seeds_start_equal_saes(make: Callable[..., SAE]) -> None:
    first, second, other = (started(make, seed) for seed in (1, 1, 2))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
        assert not torch.equal(value, other.state_dict()[name])


@each_class
def test_initialisation_follows_the_data(make: Callable[..., SAE]) -> None:
    sae, x = make(), activations(400) + 3.0
    sae.initialise(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))
    factor = (sae.W_enc.T * sae.W_dec).sum(dim=1)  # [d_sae]
    torch.testing.assert_close(factor, factor[:1].expand(32))
    torch.testing.assert_close(sae.W_enc, factor[0] * sae.W_dec.T)
    assert not sae.encoder_bias.any()
    torch.testing.assert_close(sae.b_dec, x.median(dim=0).values, atol=0.3, rtol=0)

    def missed() -> float:
        return (x - sae.decode(sae.activate_batch(sae.preactivations(x)))).square().sum().item()

    best = missed()
    assert best < (x - sae.b_dec).square().sum().item()
    for other in (0.95, 1.05):
        with torch.no_grad():
            sae.W_enc.mul_(other)
            assert missed() > best
            sae.W_enc.div_(other)


@each_class
def test_arguments_rebuild_the_sae(make: Callable[..., SAE]) -> None:
    sae = started(make, aux_coefficient=0.5, aux_k=7)
    arguments = json.loads(json.dumps(sae.arguments))
    twin = type(sae)(**arguments)
    twin.load_state_dict(sae.state_dict())
    assert twin.arguments == sae.arguments
    x, dead = activations(), torch.arange(32) < 5
    assert torch.equal(twin.loss(x, dead).loss, sae.loss(x, dead).loss)


@each_class
@pytest.mark.parametrize("scale", [0.03, 1.0, 40.0])
def test_folding_changes_units_and_nothing_else(make: Callable[..., SAE], scale: float) -> None:
    sae, x = started(make), activations()
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    folded = sae.folded(scale)
    torch.testing.assert_close(folded.encode(x / scale), sae.encode(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(folded(x / scale) * scale, sae(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.full((32,), 1 / scale))
    assert folded.arguments == sae.arguments
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


@each_class
def test_sparse_encoding_equals_the_dense_one(make: Callable[..., SAE], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saetrack.sae.base._CHUNK_NUMBERS", 32 * 7)
    sae, x = started(make), activations(40)
    sparse = sae.encode_sparse(x)
    assert (sparse.format, sparse.dtype, sparse.shape) == ("csr", np.float32, (40, 32))
    assert sparse.has_canonical_format
    assert (sparse.data > 0).all()
    np.testing.assert_allclose(sparse.toarray(), sae.encode(x).detach(), rtol=1e-5, atol=1e-6)
    assert sae.encode_sparse(x[:0]).shape == (0, 32)


def test_topk_never_keeps_more_than_k_even_when_fewer_are_positive() -> None:
    sae, x = started(CLASSES["topk"]), activations()
    assert (sae.encode(x) > 0).sum(dim=1).max() <= 3
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    assert not sae.encode(x).any()
    assert sae.loss(x).l0 == 0


def test_only_the_lengths_of_decoder_rows_are_taken_from_their_gradient() -> None:
    sae, x = started(CLASSES["standard"]), activations()
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2.0, 32)[:, None])
    sae.remove_parallel_gradient_()  # without a gradient: nothing to do
    sae.loss(x).loss.backward()
    assert sae.W_dec.grad is not None
    before, rows = sae.W_dec.grad.clone(), sae.W_dec.detach()
    sae.remove_parallel_gradient_()
    directions = rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close((sae.W_dec.grad * directions).sum(dim=1), torch.zeros(32), atol=1e-6, rtol=0)
    removed = before - sae.W_dec.grad
    expected = (before * directions).sum(dim=1, keepdim=True) * directions
    torch.testing.assert_close(removed, expected, atol=1e-6, rtol=1e-4)
    sae.normalise_decoder_()
    torch.testing.assert_close(sae.W_dec.detach(), directions)


def test_a_decoder_row_of_zeros_stays_finite() -> None:
    sae = started(CLASSES["standard"])
    with torch.no_grad():
        sae.W_dec[3] = 0.0
    sae.loss(activations()).loss.backward()
    sae.remove_parallel_gradient_()
    sae.normalise_decoder_()
    assert sae.W_dec.grad is not None
    assert torch.isfinite(sae.W_dec.grad).all()
    assert not sae.W_dec[3].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopKSAE(8, 4, k=33), r"sae.k must be from 1 to d_sae = 8 \* 4 = 32, but is 33; lower `sae.k`"),
        (lambda: TopKSAE(8, 4, k=0), "sae.k must be .* but is 0"),
        (lambda: StandardSAE(8, l1_coefficient=-1.0), "sae.l1_coefficient must be .* at least 0, but is -1.0"),
        (lambda: SAETrackSAE(8, l1_coefficient=float("nan")), "sae.l1_coefficient .* but is nan"),
        (lambda: StandardSAE(8, aux_coefficient=-0.1), "sae.aux_coefficient .* but is -0.1"),
        (lambda: StandardSAE(8, aux_k=0), "sae.aux_k must be at least 1, but is 0; sae.aux_coefficient 0 turns"),
        (lambda: StandardSAE(0), r"d_in \(0\) and sae.expansion_factor \(16\) must be at least 1"),
        (lambda: StandardSAE(8).encode(torch.zeros(3, 9)), r"\(3, 9\), but this SAE reads activations of width 8"),
        (lambda: StandardSAE(8).encode_sparse(torch.zeros(8)), r"shape \(8,\); expected \[n, 8\]"),
        (lambda: StandardSAE(8).folded(0.0), "scale must be positive and finite, but is 0.0"),
        (
            lambda: TopKSAE(8).loss(torch.zeros(3, 8), torch.zeros(5, dtype=torch.bool)),
            r"dead has shape \(5,\); .* 128",
        ),
        (lambda: TopKSAE(8).initialise(torch.zeros(3, 9), torch.Generator()), "width 8"),
    ],
)
def test_bad_input_says_what_was_wrong(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
