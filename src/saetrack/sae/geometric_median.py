"""The geometric median of a cloud of activations."""

import torch
from torch import Tensor


def geometric_median(x: Tensor, max_iterations: int = 200, tolerance: float = 1e-9) -> Tensor:
    """Find the point with the least summed distance to all activations.

    m = argmin_m sum_n ||x_n - m||, by Weiszfeld's fixed point with the step of Vardi and Zhang
    (2000, PNAS 97(4), eq. 2.6), which stays defined and goes on moving when the iterate meets one
    of the points. Runs in float64. Unlike the mean it is not pulled away by a few massive activations.

    Args:
        x: Activations, shape ``[n, d_in]``, any unit.
        max_iterations: Upper bound of the number of steps; usually a few tens are taken.
        tolerance: Stop when a step is shorter than this share of the mean distance to the points.

    Returns:
        The median, shape ``[d_in]``, unit and dtype of ``x``.

    Raises:
        ValueError: If ``x`` is not ``[n, d_in]`` with n > 0, or holds NaN or infinities.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [0.0, 0.0], [9.0, 0.0]])
        >>> geometric_median(x).round(decimals=6).tolist()  # most of the mass is at the origin
        [0.0, 0.0]
    """
    if x.ndim != 2 or len(x) == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [n, d_in] with at least one activation.")
    points = x.detach().double()
    if not torch.isfinite(points).all():
        bad = int((~torch.isfinite(points)).any(dim=1).sum())
        raise ValueError(f"{bad} of {len(x)} activations hold NaN or infinity; the geometric median needs finite ones.")
    median = points.mean(dim=0)
    for _ in range(max_iterations):
        distances = torch.linalg.vector_norm(points - median, dim=1)  # [n]
        # A point nearer than rounding of the coordinates counts as met: its 1/distance would swamp the others.
        met = distances <= 1e-12 * points.abs().max()
        if met.all():
            break
        weights = torch.where(met, 0.0, 1.0 / distances.masked_fill(met, 1.0))  # [n]
        pull = weights @ points - weights.sum() * median  # sum of the unit vectors towards the points that are not met
        strength = torch.linalg.vector_norm(pull)
        share = (1.0 - met.sum() / strength).clamp_min(0.0) if strength > 0 else torch.zeros_like(strength)
        step = share * pull / weights.sum()
        median = median + step
        if torch.linalg.vector_norm(step) <= tolerance * distances.mean():
            break
    return median.to(x.dtype)
