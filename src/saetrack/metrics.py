"""Every number that saetrack reports of an SAE, each defined once: pure functions, then torchmetrics shells.

The shells add up float64 sums, which torchmetrics sums over ranks, so they equal the functions on all data at once.
"""

from abc import ABC, abstractmethod
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse
import torch
from torch import Tensor
from torchmetrics import Metric

Latents: TypeAlias = Tensor | scipy.sparse.csr_array
"""Latents of n activations, ``[n, d_sae]``: a dense tensor or, as SAE.encode_sparse gives them, a csr_array."""

# A variance below this share of the mean square is rounding of the float64 sums, not variation.
_CONSTANT = 1e-12


def fraction_variance_unexplained(x: Tensor, x_hat: Tensor) -> Tensor:
    """Fraction of the activations' variance that a reconstruction misses.

    FVU = sum_n ||x_n - x_hat_n||^2 / sum_n ||x_n - mean(x)||^2. Both sums run in float64:
    far from zero, E[x^2] - E[x]^2 in float32 loses every digit.

    Args:
        x: Activations, shape ``[batch, d_in]``, any unit.
        x_hat: Reconstruction, same shape and unit as ``x``.

    Returns:
        Dimensionless scalar, float64. 0 is perfect, 1 is no better than the batch
        mean; values above 1 are possible.

    Raises:
        ValueError: If the shapes differ, or if ``x`` is constant over the batch.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> fraction_variance_unexplained(x, x_hat=x.mean(0).expand(2, 2)).item()
        1.0
    """
    x, x_hat = _activation_pair(x, x_hat)
    return (x - x_hat).square().sum() / _total_variation(x)


def explained_variance(x: Tensor, x_hat: Tensor) -> Tensor:
    """Share of the activations' variance that a reconstruction has, not counting a constant offset against it.

    EV = 1 - sum_n ||e_n - mean(e)||^2 / sum_n ||x_n - mean(x)||^2 with e = x - x_hat: scikit-learn's
    ``explained_variance_score`` with ``variance_weighted`` dimensions. EV - (1 - FVU) >= 0 is what the
    offset alone costs, for instance when the mean activation has moved between two LLM checkpoints.

    Args:
        x: Activations, shape ``[batch, d_in]``, any unit.
        x_hat: Reconstruction, same shape and unit as ``x``.

    Returns:
        Dimensionless scalar, float64; 1 is perfect up to an offset.

    Raises:
        ValueError: If the shapes differ, or if ``x`` is constant over the batch.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> explained_variance(x, x_hat=x + 5.0).item()
        1.0
    """
    x, x_hat = _activation_pair(x, x_hat)
    error = x - x_hat
    return 1 - (error - error.mean(dim=0)).square().sum() / _total_variation(x)


def l0(latents: Tensor) -> Tensor:
    """Mean number of latents above zero for one activation, float64; ``latents`` is ``[n, d_sae]``.

    Example:
        >>> l0(torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 3.0]])).item()
        1.5
    """
    return (latents > 0).sum(dim=-1).double().mean()


def firing_frequency(latents: Tensor) -> Tensor:
    """Share of activations for which each latent is above zero, float64 ``[d_sae]``; ``latents`` is ``[n, d_sae]``.

    Example:
        >>> firing_frequency(torch.tensor([[0.0, 2.0], [0.0, 0.0]])).tolist()
        [0.0, 0.5]
    """
    return (latents > 0).double().mean(dim=0)


def dead_share(frequency: Tensor) -> Tensor:
    """Share of latents that never fired, float64; ``frequency`` is the firing frequency ``[d_sae]``.

    The number depends on how many tokens the frequency was counted on, so state it beside.

    Example:
        >>> dead_share(torch.tensor([0.0, 0.5, 0.1, 0.0])).item()
        0.5
    """
    return (frequency == 0).double().mean()


def dense_share(frequency: Tensor, threshold: float = 0.1) -> Tensor:
    """Share of latents that fire on more than a given share of the tokens, float64.

    Args:
        frequency: Firing frequency of each latent, shape ``[d_sae]``.
        threshold: Share of tokens above which a latent counts as dense; 0.1 as in SAEBench (Karvonen et al. 2025).

    Returns:
        Dimensionless scalar between 0 and 1.

    Example:
        >>> dense_share(torch.tensor([0.0, 0.5, 0.1, 0.05])).item()
        0.25
    """
    return (frequency > threshold).double().mean()


def ce_loss_recovered(ce_clean: Tensor, ce_sae: Tensor, ce_ablated: Tensor) -> Tensor:
    """Share of what the LLM gets from a hookpoint that it still gets from the reconstruction.

    (CE_ablated - CE_sae) / (CE_ablated - CE_clean), where CE_ablated is the cross entropy with the hookpoint's
    output replaced by zeros or by its mean; say which. Bricken et al. 2023, "Towards Monosemanticity".

    Args:
        ce_clean: Cross entropy of the LLM as it is, nats per token.
        ce_sae: The same with the hookpoint's output replaced by the SAE's reconstruction.
        ce_ablated: The same with the hookpoint's output ablated.

    Returns:
        Dimensionless, float64; 1 is no loss at all, 0 no better than the ablation. NaN where the ablation does
        not hurt (ce_ablated <= ce_clean, as in an untrained LLM), because there is nothing to recover then.

    Example:
        >>> ce_loss_recovered(torch.tensor(2.0), torch.tensor(2.5), torch.tensor(4.0)).item()
        0.75
    """
    clean, sae, ablated = ce_clean.double(), ce_sae.double(), ce_ablated.double()
    cost = ablated - clean
    return torch.where(cost > 0, (ablated - sae) / torch.where(cost > 0, cost, 1.0), torch.nan)


def functional_correlation(a: Latents, b: Latents) -> Tensor:
    """Pearson correlation of each latent with the latent of the same index in another SAE, on the same tokens.

    r_i = cov(a_i, b_i) / sqrt(var(a_i) var(b_i)) over tokens, each SAE having read the activations of its own LLM
    checkpoint. It asks whether index i still responds to the same text; the cosine of decoder rows does not.

    Args:
        a: Latents of one SAE, shape ``[n, d_sae]``.
        b: Latents of the other on the same tokens, same shape.

    Returns:
        Shape ``[d_sae]``, float64, between -1 and 1; NaN where either latent is constant.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> a = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]])
        >>> functional_correlation(a, 3 * a.flip(0)).tolist()
        [-1.0, -0.5]
    """
    metric = FunctionalCorrelation(a.shape[1])
    metric.update(a, b)
    return metric.compute()


class _ReconstructionSums(Metric, ABC):
    """Sums from which FVU and explained variance follow; subclasses only compute.

    Args:
        d_in: Width of the activations.
    """

    full_state_update = False
    tokens: Tensor
    x_sum: Tensor
    x_squares: Tensor
    error_sum: Tensor
    error_squares: Tensor

    def __init__(self, d_in: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, shape in (("tokens", ()), ("x_squares", ()), ("error_squares", ())):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("x_sum", "error_sum"):
            self.add_state(name, torch.zeros(d_in, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Add a batch: activations and reconstruction, both ``[n, d_in]`` in one unit."""
        x, x_hat = _activation_pair(x, x_hat)
        error = x - x_hat
        self.tokens += len(x)
        self.x_sum += x.sum(dim=0)
        self.x_squares += x.square().sum()
        self.error_sum += error.sum(dim=0)
        self.error_squares += error.square().sum()

    def total_variation(self) -> Tensor:
        """Sum of squared distances to the mean; ValueError when there is none."""
        variation = self.x_squares - self.x_sum.square().sum() / self.tokens
        if not variation > _CONSTANT * self.x_squares and torch.isfinite(variation):
            raise ValueError(
                f"All {int(self.tokens)} activations are identical, so the share of explained variance is undefined."
            )
        return variation

    @abstractmethod
    def compute(self) -> Tensor:
        """Give the metric over everything added."""


class FVU(_ReconstructionSums):
    """:func:`fraction_variance_unexplained` over many batches and ranks.

    Args:
        d_in: Width of the activations.
    """

    def compute(self) -> Tensor:
        """Give FVU of everything added, float64; ValueError if all activations were identical or none came."""
        _require_tokens(self.tokens)
        return self.error_squares / self.total_variation()


class ExplainedVariance(_ReconstructionSums):
    """:func:`explained_variance` over many batches and ranks.

    Args:
        d_in: Width of the activations.
    """

    def compute(self) -> Tensor:
        """Give EV of everything added, float64; ValueError if all activations were identical or none came."""
        _require_tokens(self.tokens)
        variation = self.error_squares - self.error_sum.square().sum() / self.tokens
        return 1 - variation / self.total_variation()


class FiringStatistics(Metric):
    """How often and how strongly each latent fires, over many batches and ranks.

    Args:
        d_sae: Number of latents.
    """

    full_state_update = False
    tokens: Tensor
    firings: Tensor
    activation_sum: Tensor
    activation_max: Tensor

    def __init__(self, d_sae: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("firings", torch.zeros(d_sae, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("activation_sum", torch.zeros(d_sae, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("activation_max", torch.zeros(d_sae, dtype=torch.float64), dist_reduce_fx="max")

    def update(self, latents: Latents) -> None:
        """Add the latents of a batch, ``[n, d_sae]``, none negative."""
        _require_width(latents, len(self.firings))
        self.tokens += latents.shape[0]
        if isinstance(latents, Tensor):
            values = latents.double()
            self.firings += (values > 0).sum(dim=0)
            self.activation_sum += values.sum(dim=0)
            if len(values):
                self.activation_max = torch.maximum(self.activation_max, values.amax(dim=0))
        else:
            largest = np.zeros(len(self.firings))
            np.maximum.at(largest, latents.indices, latents.data.astype(np.float64))
            self.firings += self._on_device(_column_sums(latents, (latents.data > 0).astype(np.float64)))
            self.activation_sum += self._on_device(_column_sums(latents, latents.data))
            self.activation_max = torch.maximum(self.activation_max, self._on_device(largest))

    def compute(self) -> dict[str, Tensor]:
        """Give the statistics of everything added.

        Returns:
            "firing_frequency" (share of tokens above zero), "mean_activation" (over the tokens above zero, 0 if there
            is none), "max_activation", each float64 ``[d_sae]`` in the SAE's units; "l0" (mean number of latents
            above zero), scalar float64; "tokens", scalar int64.

        Raises:
            ValueError: If nothing was added.
        """
        _require_tokens(self.tokens)
        return {
            "firing_frequency": self.firings / self.tokens,
            "mean_activation": self.activation_sum / self.firings.clamp_min(1),
            "max_activation": self.activation_max.clone(),
            "l0": self.firings.sum() / self.tokens,
            "tokens": self.tokens.clone(),
        }

    def _on_device(self, column: np.ndarray) -> Tensor:
        return torch.from_numpy(column).to(self.firings.device)


class FunctionalCorrelation(Metric):
    """:func:`functional_correlation` over many batches and ranks.

    Args:
        d_sae: Number of latents of either SAE.
    """

    full_state_update = False
    tokens: Tensor
    sums: Tensor

    def __init__(self, d_sae: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(5, d_sae, dtype=torch.float64), dist_reduce_fx="sum")  # a, b, aa, bb, ab

    def update(self, a: Latents, b: Latents) -> None:
        """Add the latents of a batch: two ``[n, d_sae]`` of the same tokens, both dense or both csr_array."""
        if a.shape != b.shape:
            raise ValueError(f"a has shape {tuple(a.shape)} but b has {tuple(b.shape)}; they must be equal.")
        _require_width(a, self.sums.shape[1])
        self.tokens += a.shape[0]
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            a, b = a.double(), b.double()
            self.sums += torch.stack([v.sum(dim=0) for v in (a, b, a * a, b * b, a * b)])
            return
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            raise ValueError("One of a and b is dense and the other sparse; give both in one form.")
        a, b = a.astype(np.float64), b.astype(np.float64)
        product = a.multiply(b).tocsr()
        columns = [(a, a.data), (b, b.data), (a, a.data**2), (b, b.data**2), (product, product.data)]
        sums = np.stack([_column_sums(matrix, values) for matrix, values in columns])
        self.sums += torch.from_numpy(sums).to(self.sums.device)

    def compute(self) -> Tensor:
        """Give the correlations of everything added, float64 ``[d_sae]``, NaN where either latent is constant."""
        _require_tokens(self.tokens)
        a, b, aa, bb, ab = self.sums / self.tokens
        variance_a, variance_b = aa - a.square(), bb - b.square()
        varies = (variance_a > _CONSTANT * aa) & (variance_b > _CONSTANT * bb)
        scale = torch.where(varies, variance_a * variance_b, 1.0).sqrt()
        return torch.where(varies, ((ab - a * b) / scale).clamp(-1, 1), torch.nan)


class CELossRecovered(Metric):
    """Cross entropies and :func:`ce_loss_recovered` over many batches and ranks."""

    full_state_update = False
    tokens: Tensor
    sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")  # clean, sae, zero, mean

    def update(
        self, ce_clean_sum: Tensor, ce_sae_sum: Tensor, ce_zero_sum: Tensor, ce_mean_sum: Tensor, tokens: int
    ) -> None:
        """Add a batch: cross entropy summed over its predicted tokens, in nats, and how many those are.

        Args:
            ce_clean_sum: Of the LLM as it is.
            ce_sae_sum: With the hookpoint's output replaced by the SAE's reconstruction.
            ce_zero_sum: With the hookpoint's output replaced by zeros.
            ce_mean_sum: With the hookpoint's output replaced by its mean.
            tokens: Number of predicted tokens in each of the sums.
        """
        sums = torch.stack([ce_clean_sum, ce_sae_sum, ce_zero_sum, ce_mean_sum]).double()
        self.sums += sums.to(self.sums.device)
        self.tokens += tokens

    def compute(self) -> dict[str, Tensor]:
        """Give scalars in float64.

        Returns:
            "ce_clean", "ce_sae", "ce_zero", "ce_mean" in nats per token; "ce_recovered_zero", "ce_recovered_mean".

        Raises:
            ValueError: If nothing was added.
        """
        _require_tokens(self.tokens)
        clean, sae, zero, mean = self.sums / self.tokens
        return {
            "ce_clean": clean,
            "ce_sae": sae,
            "ce_zero": zero,
            "ce_mean": mean,
            "ce_recovered_zero": ce_loss_recovered(clean, sae, zero),
            "ce_recovered_mean": ce_loss_recovered(clean, sae, mean),
        }


def _activation_pair(x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape != x_hat.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} but x_hat has {tuple(x_hat.shape)}; they must be equal.")
    return x.double(), x_hat.double()


def _total_variation(x: Tensor) -> Tensor:
    variation = (x - x.mean(dim=0)).square().sum()
    if variation == 0:
        raise ValueError(
            f"All {len(x)} activations in x are identical, so the share of explained variance is undefined."
        )
    return variation


def _column_sums(matrix: scipy.sparse.csr_array, values: np.ndarray) -> np.ndarray:
    """Add up, in float64 and column by column, one value for each stored entry of a sparse matrix."""
    return np.bincount(matrix.indices, weights=values, minlength=matrix.shape[1])


def _require_tokens(tokens: Tensor) -> None:
    if tokens == 0:
        raise ValueError("Nothing was added to this metric: call update with at least one token first.")


def _require_width(latents: Latents, d_sae: int) -> None:
    if len(latents.shape) != 2 or latents.shape[1] != d_sae:
        raise ValueError(f"latents have shape {tuple(latents.shape)}; expected [n, {d_sae}].")
