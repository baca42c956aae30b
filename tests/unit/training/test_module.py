import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback

from saetrack.sae import TopKSAE
from saetrack.training.datamodule import ActivationDataModule
from saetrack.training.module import FeatureState, OptimizerSettings, SAEModule, refuse_changes
from saetrack.training.stream import Batch

BATCH = 128
HOOKPOINTS = ["gpt_neox.layers.0", "gpt_neox.layers.1"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",  # the stream is a forward of the LLM in this process
)


class Stage100:
    """The stream of a stage of 100 optimizer steps."""

    end = 100

    def __len__(self) -> int:
        return 100


def a_module(data: ActivationDataModule, settings: OptimizerSettings = OptimizerSettings()) -> SAEModule:
    """A module with its SAEs built and filled, as if in the first stage of a fit."""
    data.widths = dict.fromkeys(data.hookpoints, 16)
    data.stream = Stage100()  # type: ignore[assignment]
    module = SAEModule(lambda d: TopKSAE(d, 2, k=4), settings)
    module.trainer = SimpleNamespace(datamodule=data, world_size=1)  # type: ignore[assignment]
    module.setup("fit")
    for seed, hookpoint in enumerate(data.hookpoints):
        generator = torch.Generator().manual_seed(seed)
        module.sae(hookpoint).initialise(torch.randn(100, 16, generator=generator), generator)
    return module


def test_a_feature_is_dead_after_so_many_tokens_and_revived_when_it_fires() -> None:
    state = FeatureState(3)
    fires = torch.tensor([True, False, False])
    for _ in range(4):
        state.update(fires, tokens=100, dead_after=400)
    assert state.tokens_since_fired.tolist() == [0, 400, 400]
    assert state.dead(400).tolist() == [False, True, True]
    assert not state.dead(401).any()
    assert not state.revived.any()
    state.update(torch.tensor([False, True, False]), tokens=100, dead_after=400)
    assert state.revived.tolist() == [False, True, False]  # feature 0 fired, but never was dead
    assert state.tokens_since_fired.tolist() == [100, 0, 500]
    state.update(fires, tokens=100, dead_after=400)
    assert state.revived.tolist() == [False, True, False]  # once revived in a stage, it says so to the end


def test_a_new_stage_forgets_revivals_but_not_how_long_a_feature_is_dead() -> None:
    state = FeatureState(2)
    state.update(torch.tensor([False, False]), tokens=500, dead_after=400)
    state.update(torch.tensor([True, False]), tokens=500, dead_after=400)
    state.begin_stage(new_features=False)
    assert not state.revived.any()
    assert state.tokens_since_fired.tolist() == [0, 1000]


def test_new_features_are_all_marked_and_start_alive() -> None:
    state = FeatureState(2)
    state.update(torch.tensor([True, False]), tokens=500, dead_after=400)
    state.begin_stage(new_features=True)
    assert state.revived.all()
    assert not state.dead(400).any()


def test_what_is_known_of_features_is_in_the_state_dict() -> None:
    state, twin = FeatureState(2), FeatureState(2)
    state.update(torch.tensor([True, False]), tokens=500, dead_after=400)
    twin.load_state_dict(state.state_dict())
    assert twin.tokens_since_fired.tolist() == [0, 500]


def rates(module: SAEModule) -> list[float]:
    """The learning rate of each of the stage's steps, by really stepping."""
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    assert configured["lr_scheduler"]["interval"] == "step"
    got = []
    for _ in range(100):
        got.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return got


def test_the_learning_rate_warms_up_stays_and_decays(tiny_data: Callable[..., ActivationDataModule]) -> None:
    got = rates(a_module(tiny_data(), OptimizerSettings(lr=2.0, warmup_tokens=10 * BATCH, decay_share=0.2)))
    assert got[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert got[10:80] == pytest.approx([2.0] * 70)
    assert got[80:] == pytest.approx([2.0 * (100 - i) / 20 for i in range(80, 100)])


def test_later_stages_have_their_own_learning_rate(tiny_data: Callable[..., ActivationDataModule]) -> None:
    settings = OptimizerSettings(
        lr=2.0, lr_next=0.5, warmup_tokens=10 * BATCH, warmup_tokens_next=2 * BATCH, decay_share=0
    )
    module = a_module(tiny_data(), settings)
    assert rates(module)[9:] == pytest.approx([2.0] * 91)
    module.first_stage = False
    assert rates(module) == pytest.approx([0.25] + [0.5] * 99)


def test_without_warmup_or_decay_the_rate_is_constant_and_null_takes_the_first(
    tiny_data: Callable[..., ActivationDataModule],
) -> None:
    module = a_module(tiny_data(), OptimizerSettings(lr=2.0, warmup_tokens=0, decay_share=0))
    module.first_stage = False
    assert rates(module) == [2.0] * 100


def test_a_decay_share_that_is_no_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.optimizer.decay_share is 20"):
        OptimizerSettings(decay_share=20)


def gradients(module: SAEModule, size: float) -> None:
    for i, hookpoint in enumerate(module.hookpoints):
        for j, parameter in enumerate(module.sae(hookpoint).parameters()):
            generator = torch.Generator().manual_seed(10 * i + j)
            parameter.grad = size * 10**i * torch.randn(parameter.shape, generator=generator)


def norm_of(module: SAEModule, hookpoint: str) -> float:
    return sum(p.grad.square().sum().item() for p in module.sae(hookpoint).parameters() if p.grad is not None) ** 0.5


def test_each_sae_is_clipped_by_its_own_norm(tiny_data: Callable[..., ActivationDataModule]) -> None:
    module = a_module(tiny_data(HOOKPOINTS))
    gradients(module, size=0.01)
    small, large = (norm_of(module, h) for h in HOOKPOINTS)
    assert small < 1 < large
    module.configure_gradient_clipping(None, gradient_clip_val=None)  # type: ignore[arg-type]
    assert norm_of(module, HOOKPOINTS[1]) == large
    module.configure_gradient_clipping(None, gradient_clip_val=1.0)  # type: ignore[arg-type]
    assert norm_of(module, HOOKPOINTS[0]) == pytest.approx(small)  # its neighbour's norm is nothing to it
    assert norm_of(module, HOOKPOINTS[1]) == pytest.approx(1.0, rel=1e-4)


def test_the_decoders_gradient_has_no_part_along_its_rows(tiny_data: Callable[..., ActivationDataModule]) -> None:
    module = a_module(tiny_data(HOOKPOINTS))
    gradients(module, size=1.0)
    before = {h: module.sae(h).W_dec.grad.clone() for h in HOOKPOINTS}  # type: ignore[union-attr]
    module.on_before_optimizer_step(None)  # type: ignore[arg-type]
    for hookpoint in HOOKPOINTS:
        rows, grad = module.sae(hookpoint).W_dec.detach(), module.sae(hookpoint).W_dec.grad
        assert grad is not None
        assert (before[hookpoint] * rows).sum(1).abs().max() > 0.5
        torch.testing.assert_close((grad * rows).sum(1), torch.zeros(32), rtol=0, atol=1e-4)
        removed = before[hookpoint] - grad  # nothing else is taken: what is gone lies along the row
        cosine = torch.nn.functional.cosine_similarity(removed, rows, dim=1).abs()
        torch.testing.assert_close(cosine, torch.ones(32), rtol=1e-3, atol=1e-3)


class Watch(Callback):
    """Looks at the decoder where a resume file would be written."""

    def __init__(self) -> None:
        self.furthest: list[float] = []
        self.moved: list[bool] = []
        self._before: torch.Tensor | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        w_dec = pl_module.saes[0].W_dec.detach().clone()
        self.furthest.append((w_dec.norm(dim=1) - 1).abs().max().item())
        if self._before is not None:
            self.moved.append(not torch.equal(w_dec, self._before))
        self._before = w_dec


def test_in_a_fit_decoder_rows_have_unit_norm_after_every_step(tiny_fit: Callable[..., Any], tmp_path: Path) -> None:
    watch = Watch()
    fitted = tiny_fit(tmp_path / "run", callbacks=[watch], steps=[0, 10])
    assert len(watch.furthest) == 2000 // BATCH + 1000 // BATCH
    assert max(watch.furthest) < 1e-5
    assert all(watch.moved)
    scale = fitted.track[-1].statistics("scale")
    torch.testing.assert_close(fitted.track.decoder()[-1].norm(dim=1) * scale, torch.ones(64), rtol=1e-4, atol=1e-4)


def test_the_precision_reaches_the_saes_and_the_recipe(
    tiny_data: Callable[..., ActivationDataModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("saetrack.sae.precision.has_bfloat16", lambda device, has=has: has)
        module = a_module(tiny_data(HOOKPOINTS))
        assert [sae.precision for sae in module.saes] == [dtype, dtype]
        assert module.recipe()["model.precision"] == str(dtype).removeprefix("torch.")
    module = SAEModule(precision="bfloat16")
    module.trainer = SimpleNamespace(datamodule=tiny_data())  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"^model\.precision is bfloat16, but this machine's cpu has no bfloat16"):
        module.recipe()


def test_each_change_of_a_resumed_run_is_named() -> None:
    refuse_changes({"a": 1, "gone": 2}, {"a": 1}, "the resume file")
    with pytest.raises(ValueError, match=r"^lr is 2, but the resume file was written with 1\."):
        refuse_changes({"lr": 1}, {"lr": 2}, "the resume file")


def test_the_weights_of_another_sae_are_refused(tiny_data: Callable[..., ActivationDataModule]) -> None:
    checkpoint: dict[str, Any] = {}
    a_module(tiny_data()).on_save_checkpoint(checkpoint)
    other = a_module(tiny_data())
    other.on_load_checkpoint(checkpoint)
    other.saes[0] = TopKSAE(16, 2, k=5)
    with pytest.raises(ValueError, match=r"^model\.sae\.init_args\.k is 5, but .* written with 4\."):
        other.on_load_checkpoint(checkpoint)


def test_continuity_counts_in_units_of_the_error_before_and_frees_what_died(
    tiny_data: Callable[..., ActivationDataModule],
) -> None:
    module = a_module(tiny_data(HOOKPOINTS[:1]))
    module.continuity = 2.5
    sae, state = module.sae(HOOKPOINTS[0]), module.feature_state(HOOKPOINTS[0])
    x = torch.randn(BATCH, 16, generator=torch.Generator().manual_seed(5))
    module.previous, module.previous_error = {HOOKPOINTS[0]: copy.deepcopy(sae)}, {HOOKPOINTS[0]: 0.3}
    before = module.previous[HOOKPOINTS[0]].sparse_latents(x.roll(1, dims=0))
    fires = sae.loss(x).fired.nonzero()[:, 0]
    state.tokens_since_fired[fires[0]], state.revived[fires[1]] = 10**9, True
    dead, new = torch.zeros(2, sae.d_sae, dtype=torch.bool)
    dead[fires[0]], new[fires[:2]] = True, True
    out = sae.loss(x, dead, before, new)
    assert out.moved is not None
    assert all(out.moved < sae.loss(x, dead, before, other).moved - 1e-6 for other in (None, dead, new ^ dead))  # type: ignore[operator]
    share = module._lr_factor(50)
    assert 0 < share < 1  # the learning rate is rising
    expected = out.loss + 2.5 * share * 0.3 * out.moved
    found = module.training_step(Batch({HOOKPOINTS[0]: x}, {HOOKPOINTS[0]: x.roll(1, dims=0)}), 50)
    torch.testing.assert_close(found, expected)
