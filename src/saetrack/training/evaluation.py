"""What a snapshot is worth, measured on the evaluation split, on the LLM checkpoint it belongs to.

Every rank measures its share of the rows; the sums are added, so the numbers do not depend on the number
of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from saetrack.lm.checkpoints import LLMCheckpoint
from saetrack.lm.forward import edit_activations, next_token_losses
from saetrack.lm.outliers import spread, take, within
from saetrack.lm.tokens import TokenRows
from saetrack.metrics import FVU, CELossRecovered, ExplainedVariance, FiringStatistics, FunctionalCorrelation
from saetrack.sae import SAE
from saetrack.training.stream import ROWS_PER_FORWARD, harvest

Latents = list[scipy.sparse.csr_array]
"""Latents of an SAE on this rank's evaluation rows, one ``[n, d_sae]`` matrix for each piece of them. Activations of
outlier norm have none."""

PIECE = 1024
"""Activations whose dense latents are held at a time: with 4,096 evaluation took more memory than training."""
LOGITS = 2**26
"""Logits that are held at a time, 256 MiB in float32, where a row has no more."""


@dataclass(frozen=True)
class Site:
    """One LLM checkpoint with the rows to measure on: what every measurement here needs.

    Args:
        llm: The LLM, loaded.
        checkpoint: What it was loaded from.
        rows: Token rows of the evaluation split.
        rank: This process.
        world_size: Number of processes.
        norm_limits: By hookpoint, the norm over which activations are not measured; none where it is not named.
    """

    llm: PreTrainedModel
    checkpoint: LLMCheckpoint
    rows: TokenRows
    rank: int = 0
    world_size: int = 1
    norm_limits: Mapping[str, float] = field(default_factory=dict)

    def within(self, hookpoint: str, x: Tensor) -> Tensor | None:
        """Which activations are measured; None for all."""
        return within(x, self.norm_limits.get(hookpoint, math.inf))

    @property
    def indices(self) -> NDArray[np.int64]:
        """This rank's rows."""
        return np.arange(len(self.rows.tokens))[self.rank :: self.world_size]


def _pieces(site: Site, hookpoints: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The evaluation rows' activations, a few at a time, each with its hookpoint."""
    for _, activations in harvest(site.llm, site.checkpoint, site.rows, hookpoints, site.indices):
        for hookpoint, every in activations.items():
            for piece in torch.split(every, PIECE):
                yield hookpoint, piece


def reconstruction_fvu(site: Site, saes: Mapping[str, Mapping[str, SAE]]) -> dict[str, dict[str, float]]:
    """FVU of several SAEs on the same activations, in one pass over the LLM.

    Args:
        site: Where to measure.
        saes: By hookpoint, SAEs in the LLM's own units by any name.

    Returns:
        FVU by hookpoint and name.
    """
    metrics = {h: {name: FVU(sae.d_in).to(site.llm.device) for name, sae in named.items()} for h, named in saes.items()}
    for hookpoint, every in _pieces(site, list(saes)):
        x = take(every, site.within(hookpoint, every))
        for name, sae in saes[hookpoint].items():
            with torch.inference_mode():
                metrics[hookpoint][name].update(x, sae(x))
    return {h: {name: metric.compute().item() for name, metric in named.items()} for h, named in metrics.items()}


def latents_on(site: Site, saes: Mapping[str, SAE]) -> dict[str, Latents]:
    """Latents of each hookpoint's SAE on this rank's evaluation rows."""
    latents: dict[str, Latents] = {h: [] for h in saes}
    for hookpoint, x in _pieces(site, list(saes)):
        mask = site.within(hookpoint, x)
        latents[hookpoint].append(spread(saes[hookpoint].encode_sparse(take(x, mask)), mask))
    return latents


@dataclass(frozen=True)
class Quality:
    """What was measured of one SAE at the end of its stage.

    Args:
        scalars: FVU, explained variance, L0 and the tokens they were taken on.
        features: Per-feature firing statistics, ``[d_sae]`` each.
        latents: Kept to be compared with the next snapshot's.
    """

    scalars: dict[str, Any]
    features: dict[str, Tensor]
    latents: Latents


def evaluate(site: Site, saes: Mapping[str, SAE]) -> dict[str, Quality]:
    """Reconstruction and firing statistics of each hookpoint's SAE, in one pass over the LLM.

    Args:
        site: Where to measure.
        saes: SAEs in the LLM's own units, by hookpoint.
    """
    device = site.llm.device
    fvu = {h: FVU(sae.d_in).to(device) for h, sae in saes.items()}
    explained = {h: ExplainedVariance(sae.d_in).to(device) for h, sae in saes.items()}
    firing = {h: FiringStatistics(sae.d_sae).to(device) for h, sae in saes.items()}
    latents: dict[str, Latents] = {h: [] for h in saes}
    for hookpoint, every in _pieces(site, list(saes)):
        sae, mask = saes[hookpoint], site.within(hookpoint, every)
        x = take(every, mask)
        with torch.inference_mode():
            dense = sae.encode(x)
            x_hat = sae.decode(dense)
            fvu[hookpoint].update(x, x_hat)
            explained[hookpoint].update(x, x_hat)
            firing[hookpoint].update(dense)
        latents[hookpoint].append(spread(scipy.sparse.csr_array(dense.cpu().numpy()), mask))
    qualities = {}
    for hookpoint in saes:
        statistics = firing[hookpoint].compute()
        scalars = {
            "fvu": fvu[hookpoint].compute().item(),
            "explained_variance": explained[hookpoint].compute().item(),
            "l0": float(statistics.pop("l0")),
            "evaluation_tokens": int(statistics.pop("tokens")),
        }
        qualities[hookpoint] = Quality(scalars, statistics, latents[hookpoint])
    return qualities


def functional_correlation(before: Latents, after: Latents, d_sae: int, device: torch.device) -> Tensor:
    """Pearson correlation of each latent with itself in the snapshot before, on the same rows.

    Each SAE reads its own LLM checkpoint. This is what "the same feature" means here (metrics.py says why).

    Returns:
        ``[d_sae]``, float64, on the CPU; NaN where a latent is constant on the evaluation split.
    """
    metric = FunctionalCorrelation(d_sae).to(device)
    for a, b in zip(before, after, strict=True):
        metric.update(a, b)
    correlation: Tensor = metric.compute()
    return correlation.cpu()


def cross_entropy_recovered(
    site: Site, saes: Mapping[str, SAE], means: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    """How much of the LLM's loss survives when its activations are replaced by their reconstruction.

    BOS positions, and all else that is left out, stay as they are, for the SAE has never seen them, and predictions
    made from them are not counted.

    Args:
        site: Where to measure; ``site.rows`` are the rows of the cross-entropy.
        saes: SAEs in the LLM's own units, by hookpoint.
        means: Mean activation ``[d_in]`` by hookpoint, for the mean ablation.

    Returns:
        By hookpoint: ``ce_clean``, ``ce_sae``, ``ce_zero``, ``ce_mean`` in nats per token, ``ce_recovered_zero``
        and ``ce_recovered_mean``.
    """
    device = site.llm.device
    metrics = {h: CELossRecovered().to(device) for h in saes}
    row = site.rows.tokens.shape[1] * site.llm.config.get_text_config().vocab_size
    rows_at_once = max(1, min(ROWS_PER_FORWARD, LOGITS // row))
    for start in range(0, len(site.indices), rows_at_once):
        losses = _Losses.on(site, site.indices[start : start + rows_at_once])
        clean, _ = losses.each(next(iter(saes)), lambda x: x)
        for hookpoint, sae in saes.items():
            edited, counted = losses.each(hookpoint, sae)
            zero, _ = losses.each(hookpoint, torch.zeros_like)
            mean, _ = losses.each(hookpoint, means[hookpoint].to(device).expand_as)
            as_is, with_sae, at_zero, at_mean = (part[counted].sum() for part in (clean, edited, zero, mean))
            metrics[hookpoint].update(as_is, with_sae, at_zero, at_mean, int(counted.sum()))
    return {h: {name: float(value) for name, value in metric.compute().items()} for h, metric in metrics.items()}


@dataclass(frozen=True)
class _Losses:
    """Cross-entropies of some rows.

    Args:
        site: Where they are.
        tokens: ``[rows, context]``.
        documents: What attention may not cross, of the same shape; None where it may.
        usable: Where an edit applies, of the same shape.
        predicting: Which predictions count, ``[rows, context - 1]``.
    """

    site: Site
    tokens: Tensor
    documents: NDArray[np.int32] | None
    usable: Tensor
    predicting: Tensor

    @classmethod
    def on(cls, site: Site, rows: NDArray[np.int64]) -> _Losses:
        device = site.llm.device
        return cls(
            site,
            torch.from_numpy(site.rows.tokens[rows].astype(np.int64)).to(device),
            site.rows.contexts(rows),
            torch.from_numpy(site.rows.usable(rows)).to(device),
            torch.from_numpy(site.rows.predicting(rows)).to(device),
        )

    def each(self, hookpoint: str, edit: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every prediction with ``edit`` applied where activations count, and which ones count."""
        counted = self.usable

        def replace(x: Tensor) -> Tensor:
            nonlocal counted
            if (mask := self.site.within(hookpoint, x.float())) is not None:
                counted = self.usable & mask
            return torch.where(counted[..., None], edit(x.float()).to(x.dtype), x)

        logits = edit_activations(self.site.llm, self.tokens, hookpoint, replace, self.documents)
        return next_token_losses(logits, self.tokens), self.predicting & counted[:, :-1]
