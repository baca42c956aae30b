import math

import numpy as np
import pytest
import scipy.sparse
import torch

from saetrack.lm.outliers import norm_limit, spread, take, within


def test_what_is_within_the_limit_is_taken_and_spread_again() -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(50, 8)) * np.where(rng.random(50) < 0.2, 40, 1)[:, None]).float()
    limit = norm_limit(x, 5)
    norms = np.linalg.norm(x.numpy().astype(np.float64), axis=1)
    assert limit == pytest.approx(5 * np.sort(norms)[24], rel=1e-6)  # torch's median is the lower of the middle two
    mask = within(x, limit)
    assert mask is not None
    assert mask.tolist() == (norms <= limit).tolist()
    assert 0 < mask.sum() < 50
    taken = take(x, mask)
    whole = spread(scipy.sparse.csr_array(taken.relu().numpy()), mask)
    np.testing.assert_array_equal(whole.toarray(), np.where(mask[:, None], x.relu(), 0))
    whole.check_format()


def test_without_a_limit_nothing_is_left_out_and_nothing_copied() -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert norm_limit(x, None) == math.inf
    assert within(x, math.inf) is None
    assert take(x, None) is x
    latents = scipy.sparse.csr_array(x.numpy())
    assert spread(latents, None) is latents
