import pytest
import torch
from torch import Tensor

from saetrack.training.adam import ColumnAdam

SHAPES = {"rows": (5, 3), "columns": (5, 3), "vector": (7,)}


def parameter(kind: str) -> torch.nn.Parameter:
    value = torch.randn(SHAPES[kind], generator=torch.Generator().manual_seed(0))
    return torch.nn.Parameter(value.T.contiguous().T if kind == "columns" else value)


def gradient(seed: int, like: Tensor, same_layout: bool) -> Tensor:
    value = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
    return torch.empty_like(like).copy_(value) if same_layout else value


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("same_layout", [True, False], ids=["gradient as parameter", "gradient row-major"])
def test_it_steps_as_the_plain_adam(kind: str, same_layout: bool) -> None:
    mine, plain = parameter(kind), parameter(kind)
    optimizer, reference = ColumnAdam([mine], lr=0.1), torch.optim.Adam([plain], lr=0.1)
    for seed in range(1, 5):
        mine.grad, plain.grad = gradient(seed, mine.detach(), same_layout), gradient(seed, plain.detach(), True)
        optimizer.step()
        reference.step()
        if seed == 2:  # go on from a resume file
            state = optimizer.state_dict()
            optimizer = ColumnAdam([mine], lr=0.1)
            optimizer.load_state_dict(state)
    torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)
    assert mine.stride() == parameter(kind).stride()
    for moment in ("exp_avg", "exp_avg_sq"):
        assert optimizer.state[mine][moment].stride() == mine.stride()
        torch.testing.assert_close(optimizer.state[mine][moment], reference.state[plain][moment])


def test_no_gradient_no_step() -> None:
    still = parameter("columns")
    ColumnAdam([still], lr=0.1).step()
    assert torch.equal(still, parameter("columns"))


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_the_kernel_works_in_place_and_copies_no_gradient(kind: str) -> None:
    moved = parameter(kind)
    moved.grad = gradient(1, moved.detach(), same_layout=True)
    optimizer = ColumnAdam([moved], lr=0.1)
    optimizer.step()
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert "aten::_fused_adam_" in {event.key for event in profile.events()}
    assert "aten::clone" not in {event.key for event in profile.events()}
