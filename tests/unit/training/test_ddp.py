"""What several processes exchange, and what DDP is told to leave alone."""

import copy
from types import SimpleNamespace

import pytest
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from saetrack.sae import SAE, BatchTopKSAE, StandardSAE, TopKSAE, ranks, use_exchange
from saetrack.training.ddp import share_gradients
from saetrack.training.module import FeatureState, SAEModule


def a_module(*saes: SAE) -> SAEModule:
    module = SAEModule()
    module.hookpoints = [str(i) for i in range(len(saes))]
    module.saes = nn.ModuleList(saes)
    module.features = nn.ModuleList(FeatureState(sae.d_sae) for sae in saes)
    return module


def two(strategy: object = None) -> SimpleNamespace:
    return SimpleNamespace(world_size=2, strategy=strategy or DDPStrategy())


@pytest.mark.parametrize("sae", [TopKSAE(4, 4, k=2), BatchTopKSAE(4, 4, k=2)])
def test_ranks_exchange_factors_unless_a_batch_is_larger_than_the_dictionary(sae: SAE) -> None:
    try:
        module = a_module(sae, copy.deepcopy(sae))
        share_gradients(module, two(), batch_size=16)  # type: ignore[arg-type]
        assert ranks.factors_in_use()
        averaged = {name for name, _ in module.named_parameters()} - set(module._ddp_params_and_buffers_to_ignore)
        assert averaged == {"saes.0.b_dec", "saes.1.b_dec"}
        share_gradients(module, two(), batch_size=18)  # type: ignore[arg-type]
        assert not ranks.factors_in_use()
        assert not {name for name, _ in module.named_parameters()} & set(module._ddp_params_and_buffers_to_ignore)
    finally:
        use_exchange("nothing")


def test_dense_gradients_are_left_to_ddp() -> None:
    try:
        module = a_module(StandardSAE(4, 4))
        share_gradients(module, two(), batch_size=2)  # type: ignore[arg-type]
        assert not ranks.factors_in_use()
        # the counts are equal everywhere, so nobody need broadcast them in every step
        assert set(module._ddp_params_and_buffers_to_ignore) == {
            "features.0.tokens_since_fired",
            "features.0.revived",
        }
    finally:
        use_exchange("nothing")


def test_a_batch_that_the_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size is 17 .* which 2 processes .* choose a multiple of 2"):
        share_gradients(a_module(), two(), batch_size=17)  # type: ignore[arg-type]


def test_another_way_to_share_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"SingleDeviceStrategy, but only DDP .* `trainer.strategy: ddp`"):
        share_gradients(a_module(), two(SingleDeviceStrategy("cpu")), batch_size=2)  # type: ignore[arg-type]
