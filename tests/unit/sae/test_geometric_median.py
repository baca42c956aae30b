import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from saetrack.sae import geometric_median


def summed_distance(m: np.ndarray, x: np.ndarray) -> float:
    return sum(float(np.sqrt(np.dot(row - m, row - m))) for row in x)


@pytest.mark.parametrize("offset", [0.0, 1e4], ids=["centred", "far from zero"])
@pytest.mark.parametrize("d_in", [1, 2, 16])
def test_it_minimises_the_summed_distance(d_in: int, offset: float) -> None:
    x = np.random.default_rng(d_in).normal(size=(41, d_in)) ** 3 + offset
    got = geometric_median(torch.from_numpy(x)).numpy()
    found = minimize(summed_distance, np.median(x, axis=0), args=(x,), method="Powell", options={"ftol": 1e-14}).x
    assert summed_distance(got, x) <= summed_distance(found, x) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], [0.0, 0.0]),
        ([[0.0, 0.0]] * 3 + [[4.0, 0.0], [0.0, 4.0]], [0.0, 0.0]),
        ([[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 3.0], [0.0, -0.5]], [0.0, 0.0]),
        ([[2.0, 5.0]], [2.0, 5.0]),
        ([[2.0, 5.0]] * 4, [2.0, 5.0]),
        ([[0.0, 0.0], [1.0, 0.0], [5.0, 0.0]], [1.0, 0.0]),
    ],
    ids=["mean is a point", "most of the mass", "median is a point", "one point", "equal points", "on a line"],
)
def test_a_point_may_coincide_with_the_median(points: list[list[float]], expected: list[float]) -> None:
    np.testing.assert_allclose(geometric_median(torch.tensor(points)), expected, atol=1e-4)


def test_it_stays_at_a_point_that_is_the_median() -> None:
    # The search starts at (0, 0); the other points pull with 2 / sqrt(2) - 1 < 1, less than the point itself holds.
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert not geometric_median(x).any()


def test_it_leaves_a_point_that_is_not_the_median() -> None:
    # The mean, where the search starts, is the point (0, 0); the median is elsewhere.
    x = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [-1.0, 0.1], [-1.0, -0.1], [3.0, 0.0]], dtype=torch.float64)
    got = geometric_median(x)
    assert got[0] < -0.5
    assert summed_distance(got.numpy(), x.numpy()) < summed_distance(np.zeros(2), x.numpy())


def test_massive_activations_do_not_pull_it() -> None:
    x = torch.randn(101, 4, generator=torch.Generator().manual_seed(0))
    x[0] = 1e6
    assert geometric_median(x).norm() < 0.5


def test_bad_input_says_what_was_wrong() -> None:
    with pytest.raises(ValueError, match=r"shape \(0, 3\)"):
        geometric_median(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="1 of 2 activations hold NaN"):
        geometric_median(torch.tensor([[0.0, 1.0], [float("nan"), 1.0]]))
