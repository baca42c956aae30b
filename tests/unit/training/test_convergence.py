from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback

from saetrack.training import OptimizerSettings
from saetrack.training.convergence import check_points, has_converged

BATCH = 128


@pytest.mark.parametrize("batches", [1, 2, 7, 97, 5000])
def test_the_points_end_with_the_stage_and_are_a_factor_of_root_two_apart(batches: int) -> None:
    points = check_points(batches)
    assert points[-1] == batches
    assert points == sorted(set(points))
    assert all(b / a < 1.6 for a, b in pairwise(points) if a > 8)


def test_a_power_law_converges_where_a_doubling_gains_less_than_the_tolerance() -> None:
    """FVU = f + c / tokens falls by a share of (c / t) / (f + 2c / t) from t / 2 to t: below 5 % from t = 360 on."""
    f, c, tolerance = 0.1, 2.0, 0.05
    first = c * (1 - 2 * tolerance) / (tolerance * f)
    curve: list[tuple[int, float]] = []
    seen = {}
    for batch in check_points(1024):
        curve.append((batch, f + c / batch))
        seen[batch] = has_converged(curve, tolerance)
    assert [b for b, done in seen.items() if done] == [b for b in seen if b > first] == [362, 512, 724, 1024]
    assert not has_converged([(100, 0.5)], tolerance)


def test_points_of_the_warmup_do_not_count() -> None:
    curve = [(100, 0.5), (200, 0.5)]
    assert has_converged(curve, 0.01)
    assert not has_converged(curve, 0.01, after=150)


class Rates(Callback):
    """Notes the learning rate of every step, by stage."""

    def __init__(self) -> None:
        self.stages: list[list[float]] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self.stages.append([])

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.stages[-1].append(trainer.optimizers[0].param_groups[0]["lr"])


def test_a_converged_stage_decays_ends_and_says_so(tiny_fit: Callable[..., Any], tmp_path: Path) -> None:
    settings = OptimizerSettings(lr=0.01, warmup_tokens=256, tolerance=0.9, decay_share=0.5)
    rates = Rates()
    fitted = tiny_fit(
        tmp_path / "early", [rates], module={"optimizer": settings}, tokens_first=6400, tokens_next=6400, steps=[0, 10]
    )
    for snapshot, rate in zip(fitted.track, rates.stages, strict=True):
        curve = snapshot.metadata["held_out_curve"]
        tokens = snapshot.metadata["tokens_trained"]
        # 50 batches; FVU is taken after 2, 3, 4, ... of them, and that after 4 is the first with one at half its tokens
        assert [t // BATCH for t, _ in curve][:3] == [2, 3, 4]
        assert tokens == 8 * BATCH < 6400
        assert len(rate) == 8
        assert rate[3] == pytest.approx(0.01)
        assert rate[-1] < rate[-2] < rate[4]
        assert rate[-1] <= 0.01 * 0.25
        assert curve[-1][1] < curve[0][1]


def test_without_a_tolerance_the_budget_is_spent(tiny_fit: Callable[..., Any], tmp_path: Path) -> None:
    settings = OptimizerSettings(warmup_tokens=256, tolerance=None)
    fitted = tiny_fit(tmp_path / "whole", module={"optimizer": settings}, tokens_first=6400, steps=[0])
    assert fitted.track[0].metadata["tokens_trained"] == 6400
    assert fitted.track[0].metadata["held_out_curve"][-1][0] == 6400


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_a_tolerance_that_is_no_share_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"model.optimizer.tolerance is"):
        OptimizerSettings(tolerance=value)
