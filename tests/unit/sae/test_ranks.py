"""Two processes that share a batch have the gradients of one that has it whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.unit.sae.one_of_two_ranks import BATCH, CLASSES, step

WORKER = Path(__file__).with_name("one_of_two_ranks.py")
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def gradients(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What either rank found."""
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "SAETRACK_CACHE": str(tmp_path_factory.getbasetemp() / "kernels")}
    command = [sys.executable, str(WORKER)]
    pair = [subprocess.Popen([*command, str(rank), str(folder), request.param], env=environment) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in pair] == [0, 0]
    return [load_file(folder / f"{rank}.safetensors") for rank in (0, 1)]


@pytest.mark.parametrize("way", ["gradients pytorch", "factors pytorch", "factors native"])
def test_the_gradients_are_those_of_one_process_on_the_same_batch(gradients: list[dict[str, Tensor]], way: str) -> None:
    if f"TopK {way} b_dec" not in gradients[0]:
        pytest.skip("there is no C++ compiler, or no CPU")
    alone = step(CLASSES["TopK"], slice(BATCH))
    for name, parameter in alone.named_parameters():
        got = gradients[0][f"TopK {way} {name}"]
        assert (got - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name


@pytest.mark.parametrize("name", CLASSES)
def test_every_way_says_the_same(gradients: list[dict[str, Tensor]], name: str) -> None:
    dense = {key: gradients[0][f"{name} gradients pytorch {key}"] for key in PARAMETERS}
    others = {key: gradient for key, gradient in gradients[0].items() if key.startswith(f"{name} factors")}
    assert len(others) in (4, 8)
    for way, gradient in others.items():
        expected = dense[way.split()[-1]]
        assert expected.norm() > 0
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), way


def test_both_ranks_have_the_same_bits(gradients: list[dict[str, Tensor]]) -> None:
    zero, one = gradients
    assert zero.keys() == one.keys()
    assert all(torch.equal(zero[key], one[key]) for key in zero)
