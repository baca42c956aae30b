"""The loss of a step with continuity, and the step as a CUDA graph against the one that is not recorded."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from saetrack.sae import SAE, LossTerms, StandardSAE, TopKSAE, use_kernels
from saetrack.sae.sparse import Latents, Selection
from saetrack.track import Track
from saetrack.training import SAEModule
from saetrack.training import module as module_of_training
from saetrack.training.adam import ColumnAdam
from saetrack.training.step import StepGraph, StepInputs, _Recorded, can_be_recorded, loss_of, places_for

D_IN, BATCH = 32, 256


def an_sae(seed: int, device: str = "cpu", **arguments: Any) -> TopKSAE:
    sae = TopKSAE(D_IN, 16, **{"k": 8, "aux_k": 12, "aux_coefficient": 0.5, **arguments})
    generator = torch.Generator().manual_seed(seed)
    sae.initialise(activations(seed), generator)
    return sae.to(device)


def activations(seed: int, device: str = "cpu") -> Tensor:
    return (torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(seed)) + 0.3).to(device)


def inputs(seed: int, n_dead: int = 0, device: str = "cpu", continuity: bool = True) -> StepInputs:
    order = torch.randperm(D_IN * 16, generator=torch.Generator().manual_seed(seed)).to(device)
    before = activations(seed, device) + 0.1 if continuity else None
    return StepInputs(activations(seed, device), order < n_dead, order < n_dead + 20, before)


def gradients(sae: SAE) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}


def test_a_step_is_the_loss_and_what_continuity_weighs() -> None:
    sae, previous, given = an_sae(0), an_sae(1), inputs(2, n_dead=30)
    assert given.before is not None
    out = sae.loss(given.x, given.dead, previous.sparse_latents(given.before), given.new)
    assert out.moved is not None
    loss, parts = loss_of(sae, previous, given, 0.25)
    torch.testing.assert_close(loss, out.loss + 0.25 * out.moved)
    assert parts.terms["continuity"].item() == pytest.approx(out.moved.item())
    loss, parts = loss_of(sae, None, given._replace(before=None), 0.25)
    torch.testing.assert_close(loss, out.loss)
    assert "continuity" not in parts.terms


def test_zeros_among_the_latents_from_before_are_latents_that_were_not_there() -> None:
    x = activations(2)
    choice = torch.stack([torch.randperm(512, generator=torch.Generator().manual_seed(i))[:8] for i in range(BATCH)])
    values = torch.randn(BATCH * 8, generator=torch.Generator().manual_seed(3)).relu()
    with_zeros = Latents(Selection.of_equal_counts(choice, 512), values)
    assert 0 < len(with_zeros.positive().values) < len(values)
    for sae in (an_sae(0), StandardSAE(D_IN, 16)):
        if isinstance(sae, StandardSAE):
            sae.initialise(x, torch.Generator().manual_seed(0))
        moved, into = [], []
        for before in (with_zeros, with_zeros.positive()):
            sae.zero_grad()
            out = sae.loss(x, before=before)
            assert out.moved is not None
            out.moved.backward()
            moved.append(out.moved.item())
            into.append(gradients(sae))
        assert moved[0] == pytest.approx(moved[1], rel=1e-6)
        for name, gradient in into[0].items():
            torch.testing.assert_close(gradient, into[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("n_dead", "places"), [(0, 0), (1, 64), (64, 64), (65, 128), (128, 128), (300, 512), (512, 512)]
)
def test_there_are_places_for_the_next_power_of_two(n_dead: int, places: int) -> None:
    assert places_for(n_dead, an_sae(0)) == places
    assert places_for(n_dead, an_sae(0, aux_coefficient=0.0)) == 0


def test_there_are_no_more_places_than_latents() -> None:
    assert places_for(270, TopKSAE(10, 30, k=2)) == 300


def a_trainer(strategy: Any = None, **plugin: Any) -> Any:
    strategy = strategy or SingleDeviceStrategy(torch.device("cpu"))
    return SimpleNamespace(strategy=strategy, precision_plugin=SimpleNamespace(**plugin))


def test_only_native_steps_of_static_shapes_on_one_gpu_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not can_be_recorded(an_sae(0), "native", a_trainer())  # it is on a CPU
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert can_be_recorded(an_sae(0), "native", a_trainer())
    assert not can_be_recorded(an_sae(0), "pytorch", a_trainer())
    assert not can_be_recorded(StandardSAE(D_IN, 16), "native", a_trainer())
    assert not can_be_recorded(an_sae(0), "native", a_trainer(DDPStrategy()))
    assert not can_be_recorded(an_sae(0), "native", a_trainer(scaler=object()))
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        assert not can_be_recorded(an_sae(0), "native", a_trainer())
    frozen = an_sae(0)
    frozen.b_dec.requires_grad_(False)
    assert not can_be_recorded(frozen, "native", a_trainer())


class Repeated(StepGraph):
    """Stands in for a CUDA graph where there is no GPU.

    As that does, it reads its inputs and the weights where they lay when it was recorded, and writes over what it gave.
    """

    calls = 0

    def __call__(self, *args: Any) -> Any:
        type(self).calls += 1
        return super().__call__(*args)

    def _record(self, given: StepInputs, places: int) -> _Recorded:
        sae = copy.copy(self.sae)
        sae._parameters = {name: nn.Parameter(p.data) for name, p in self.sae._parameters.items() if p is not None}
        sae.dead_places = places
        step = StepGraph(sae, self.previous)
        step._continuity = self._continuity

        def tensors(loss: Tensor, out: LossTerms, gradients: tuple[Tensor, ...]) -> list[Tensor]:
            return [loss, *(x for x in out if isinstance(x, Tensor)), *out.terms.values(), *gradients]

        given_back = step._step(given)
        kept = tensors(*given_back)

        def replay() -> None:
            for own, x in zip(kept, tensors(*step._step(given)), strict=True):
                own.copy_(x)

        for x in kept:
            x.zero_()  # recording does not compute
        return _Recorded(SimpleNamespace(replay=replay), *given_back, kept)  # type: ignore[arg-type]


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> type[Repeated]:
    """Steps are recorded by the rule for a GPU, with `Repeated`, whose calls are counted from here."""

    def rule(sae: SAE, kernels: str, trainer: Any) -> bool:
        there: Any = SimpleNamespace(
            static_shapes=sae.static_shapes, b_dec=SimpleNamespace(is_cuda=True), parameters=sae.parameters
        )
        return can_be_recorded(there, "native", trainer)

    monkeypatch.setattr(module_of_training, "StepGraph", Repeated)
    monkeypatch.setattr(module_of_training, "can_be_recorded", rule)
    monkeypatch.setattr(Repeated, "calls", 0)
    return Repeated


def weights(fitted: Any) -> list[Tensor]:
    return [snapshot.tensor(name) for snapshot in fitted.track for name in ("W_enc", "b_enc", "W_dec", "b_dec")]


def assert_equal(mine: list[Tensor], other: list[Tensor], rtol: float = 1e-4) -> None:
    for a, b in zip(mine, other, strict=True):
        assert (a - b).norm() <= rtol * b.norm()


class LooksForAnomalies(Callback):
    """In the middle of each stage."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        torch.autograd.set_detect_anomaly(3 <= batch_idx < 5)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        torch.autograd.set_detect_anomaly(False)


class AddsToGradients(Callback):
    """A loss of its own, before the other's gradients are there."""

    def on_before_backward(self, trainer: Any, module: Any, loss: Any) -> None:
        for sae in module.saes:
            (0.1 * sae.W_dec.sum()).backward()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize(
    ("settings", "tokens_till_dead"),
    [
        ({}, 256),
        ({"callbacks": [LooksForAnomalies()]}, 256),
        ({"callbacks": [AddsToGradients()]}, 256),
        ({"trainer": {"gradient_clip_val": 0.01}}, 256),
        ({"trainer": {"precision": "bf16-mixed"}}, 10**6),
    ],
    ids=["plain", "not always", "other losses", "clipped", "under autocast"],
)
def test_a_series_of_repeated_steps_is_that_of_steps_that_are_not(
    settings: dict[str, Any],
    tokens_till_dead: int,
    tiny_fit: Callable[..., Any],
    tmp_path: Path,
    repeated: type[Repeated],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = {"dead_after_tokens": tokens_till_dead, "precision": "float32"}
    mine = tiny_fit(tmp_path / "repeated", module=module, **settings)
    calls = repeated.calls
    assert calls >= 29 - 6  # of three stages of 15, 7 and 7 steps some were not, where anomalies were looked for
    assert not mine.module.graphs  # nor the gradients in their memory
    assert all(parameter.grad is None for parameter in mine.module.parameters())
    monkeypatch.setattr(module_of_training, "can_be_recorded", lambda *_: False)
    other = tiny_fit(tmp_path / "not", module=module, **settings)
    assert repeated.calls == calls
    # without dead latents nothing differs, not even the order of a sum
    assert_equal(weights(mine), weights(other), rtol=0 if tokens_till_dead > 256 else 1e-4)


@pytest.mark.parametrize("which", [0, 1])
def test_one_hookpoint_may_be_recorded_and_another_not(
    which: int,
    tiny_fit: Callable[..., Any],
    tmp_path: Path,
    repeated: type[Repeated],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hookpoints = ["gpt_neox.layers.0", "gpt_neox.layers.1"]
    of_both: list[SAE] = []

    class Noted(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            of_both[:] = module.saes

    monkeypatch.setattr(module_of_training, "can_be_recorded", lambda sae, *_: sae is of_both[which])
    mine = tiny_fit(tmp_path / "mine", [Noted()], hookpoints=hookpoints)
    calls = repeated.calls
    monkeypatch.setattr(module_of_training, "can_be_recorded", lambda *_: False)
    other = tiny_fit(tmp_path / "other", hookpoints=hookpoints)
    assert calls == repeated.calls == 29
    for hookpoint in hookpoints:
        for a, b in zip(Track.open(mine.run / hookpoint), Track.open(other.run / hookpoint), strict=True):
            assert_equal([a.tensor("W_dec"), a.tensor("W_enc")], [b.tensor("W_dec"), b.tensor("W_enc")])


def test_a_fit_after_another_records_anew() -> None:
    module = SAEModule()
    module.hookpoints = ["x"]
    module.graphs = {"x": StepGraph(an_sae(0), None)}
    module.setup("fit")
    assert not module.graphs


@pytest.fixture
def native() -> Iterator[None]:
    use_kernels("native", "cuda")
    yield
    use_kernels("pytorch")


def given_by(loss: Tensor, out: LossTerms, sae: SAE) -> list[Tensor]:
    """Loss, its parts and gradients."""
    return [loss, out.fired, out.l0, out.x_hat, *out.terms.values(), *gradients(sae).values()]


def eager(sae: SAE, previous: SAE | None, given: StepInputs, weight: float, places: int | None) -> list[Tensor]:
    """What a step gives that is not recorded."""
    sae.dead_places = places
    sae.zero_grad()
    loss, out = loss_of(sae, previous, given, weight)
    loss.backward()
    sae.dead_places = None
    return given_by(loss.detach(), out, sae)


@pytest.mark.gpu
@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("continuity", [False, True], ids=["first stage", "with continuity"])
def test_a_recorded_step_has_the_bits_of_one_that_is_not(
    continuity: bool, precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saetrack.sae.auxk._FEW_NUMBERS", 0)  # AuxK's products are in that precision too
    sae, previous = an_sae(0, "cuda"), an_sae(1, "cuda") if continuity else None
    sae.precision = precision
    graph, optimizer = StepGraph(sae, previous), ColumnAdam(sae.parameters(), lr=1e-3)
    # none dead, then few, then many, then few again, when one of the graphs is gone
    for step, n_dead in enumerate([0, 0, 5, 70, 70, 300, 512, 30, 0]):
        given, weight = inputs(step, n_dead, "cuda", continuity), 0.1 * step
        expected = eager(sae, previous, given, weight, places_for(n_dead, sae))
        just = eager(sae, previous, given, weight, None)
        optimizer.zero_grad()
        loss, out = graph(given, weight)
        graph.place_gradients()
        mine = given_by(loss, out, sae)
        assert len(mine) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))
        for a, b in zip(mine, just, strict=True):
            assert (a.float() - b.float()).norm() <= (1e-4 if precision == torch.float32 else 0.05) * b.float().norm()
        sae.remove_parallel_gradient_()
        optimizer.step()
        sae.after_step_()


@pytest.mark.gpu
@pytest.mark.usefixtures("native")
def test_memory_that_a_recorded_step_uses_is_given_to_nobody_else() -> None:
    sae, previous = an_sae(0, "cuda"), an_sae(1, "cuda")
    sae.precision = previous.precision = torch.bfloat16  # so that both have a workspace
    graph = StepGraph(sae, previous)
    first = inputs(2, 30, "cuda")
    expected = eager(sae, previous, first, 0.5, 64)
    graph(inputs(3, 30, "cuda"), 0.5)
    torch.cuda.empty_cache()
    # others take all memory that is free, and the workspaces are asked for more
    filled = [torch.full((n,), torch.nan, device="cuda") for n in (10, 1000, 10**5, 10**6, 10**7) for _ in range(50)]
    with torch.no_grad():
        sae.loss(torch.cat([first.x] * 9))
        previous.sparse_latents(torch.cat([first.x] * 9))
    filled += [torch.full((n,), torch.nan, device="cuda") for n in (10, 1000, 10**5, 10**6, 10**7) for _ in range(50)]
    sae.zero_grad()
    loss, out = graph(first, 0.5)
    graph.place_gradients()
    mine = given_by(loss, out, sae)
    assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))
    assert all(x.isnan().all() for x in filled)


@pytest.mark.gpu
def test_a_series_of_recorded_steps_is_the_one_of_steps_that_are_not(
    tiny_fit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = []

    class Counted(StepGraph):
        def __call__(self, *args: Any) -> Any:
            recorded.append(self.previous is not None)
            return super().__call__(*args)

    def fit(name: str) -> Any:
        # so few tokens that features die, and are revived
        settings = {"kernels": "native", "dead_after_tokens": 256, "precision": "float32"}
        return tiny_fit(tmp_path / name, trainer={"accelerator": "gpu", "devices": 1}, module=settings)

    monkeypatch.setattr(module_of_training, "StepGraph", Counted)
    with_graphs = fit("graphs")
    assert set(recorded) == {False, True}
    steps = len(recorded)
    again = fit("again")
    monkeypatch.setattr(module_of_training, "can_be_recorded", lambda *_: False)
    without = fit("without")
    assert len(recorded) == 2 * steps
    for mine, same, other in zip(with_graphs.track, again.track, without.track, strict=True):
        assert torch.equal(mine.tensor("W_dec"), same.tensor("W_dec"))
        torch.testing.assert_close(mine.tensor("W_dec"), other.tensor("W_dec"), rtol=1e-3, atol=1e-3)
        assert mine.metadata["fvu"] == pytest.approx(other.metadata["fvu"], rel=1e-3)
