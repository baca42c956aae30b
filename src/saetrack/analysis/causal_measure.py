"""Ablating features, and other features' directions in their place: which rows, what is changed, what the loss does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse
import torch
from torch.nn.functional import normalize

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from saetrack.lm.forward import EditableLLM

    from .base import SplitObservation

    Floats = NDArray[np.floating]
    Integers = NDArray[np.integer]


MEASURES = ("loss", "divergence")
"""Change of the cross entropy, and Kullback-Leibler divergence of the predictions from the LLM's own, in nats."""
_ARMS = 2  # the feature, and the null


@dataclass(frozen=True)
class Ablations:
    """What ablations did at one LLM checkpoint, summed by document.

    Args:
        sums: For each of `MEASURES`, nats with the feature ablated and with another direction in its place,
            ``[2, D, F]``.
        firings: Positions at which the feature fires and from which something is predicted, in the rows that were run,
            ``[D, F]``.
    """

    sums: dict[str, Floats]
    firings: Integers


@dataclass(frozen=True)
class Targets:
    """Which features are ablated, and by how much a firing exceeds what is left.

    Args:
        features: Their indices, ``[F]``.
        means: Mean latent of each over all positions, ``[F]``, in the snapshot's own units.
        decoder: Rows of all features, ``[d_sae, d_in]``, in the LLM's own units.
        others: Features that a null direction may be, ``[A]``.
    """

    features: Integers
    means: Floats
    decoder: Tensor
    others: Integers


@dataclass(frozen=True)
class _Job:
    row: int
    column: int  # of the features
    other: int  # index of the feature whose direction is the null's


def documents_with_firing(split: SplitObservation) -> Integers:
    """In how many documents each feature fires, ``[d_sae]``."""
    documents, index = np.unique(split.documents, return_inverse=True)
    at = np.arange(len(index))
    membership = scipy.sparse.csr_array((np.ones(len(index)), (index, at)), shape=(len(documents), len(index)))
    counts: Integers = (membership @ split.latents).tocsc().indptr
    return np.diff(counts)


def sample_by_frequency(frequency: Floats, eligible: Integers, count: int, rng: np.random.Generator) -> Integers:
    """One feature out of each of ``count`` strata of firing frequency of (nearly) equal size.

    Every eligible feature has the same chance of being drawn, up to the rounding of the strata's sizes, so a plain mean
    over the sample estimates the mean over all of them.

    Args:
        frequency: ``[d_sae]``.
        eligible: Features to draw from; all are taken when there are not more than ``count``.
        count: Strata.
        rng: Source of the draws.

    Returns:
        Indices, by increasing frequency.
    """
    ordered = eligible[np.lexsort((eligible, frequency[eligible]))]
    if len(ordered) <= count:
        return ordered
    strata = np.array_split(ordered, count) if count else []
    return np.array([rng.choice(stratum) for stratum in strata], dtype=np.int64)


def firing_values(split: SplitObservation, features: Integers) -> Floats:
    """Latents of some features at every place of the rows, ``[R, T, F]``; 0 at BOS."""
    rows, context = split.rows.tokens.shape
    values = np.zeros((rows, context, len(features)), dtype=np.float32)
    values[split.positions[:, 0], split.positions[:, 1]] = split.latents[:, features].toarray()
    return values


def ablate(
    llm: EditableLLM,
    split: SplitObservation,
    targets: Targets,
    rows_per_feature: int,
    *,
    seed: int,
    rows_per_forward: int,
) -> Ablations:
    """Ablate each feature in rows in which it fires, and a direction of equal size in the same rows.

    In a row, at every position but BOS, the activation x becomes ``x - (z - m) d``: z is the latent there, m its mean,
    d the feature's decoder row. For the null d is the decoder row of another feature at d's length, drawn anew for
    every row. Predictions made from BOS are not counted.

    Args:
        llm: The LLM of the checkpoint.
        split: Its activations' latents on the evaluation rows.
        targets: What is ablated.
        rows_per_feature: At most so many rows for each feature, as many documents as possible among them.
        seed: Of the rows, the same at every checkpoint as far as the feature fires in them, and of the null.
        rows_per_forward: Rows in one forward; three times so many predictions over the vocabulary are held at once.
    """
    z = firing_values(split, targets.features)
    fires = z[:, :-1] > 0  # from the last position nothing is predicted
    usable = split.rows.usable()
    counted = usable[:, :-1]
    documents, document = np.unique(split.rows.documents, return_inverse=True)
    document = document.reshape(usable.shape)[:, :-1]  # [R, T - 1]
    shape = (len(documents), len(targets.features))
    ablations = Ablations({name: np.zeros((_ARMS, *shape)) for name in MEASURES}, np.zeros(shape, dtype=np.int64))
    # in the order of rows, so that a row's jobs share its clean forward
    jobs = sorted(_jobs(split, fires, targets, rows_per_feature, seed), key=lambda job: job.row)
    for start in range(0, len(jobs), rows_per_forward):
        batch = jobs[start : start + rows_per_forward]
        rows, columns = [job.row for job in batch], [job.column for job in batch]
        excess = (z[rows, :, columns] - targets.means[columns][:, None]) * usable[rows]  # [b, T]
        changes = _changes(targets, batch, excess)
        for arm, values in enumerate(_differences(llm, split, rows, changes)):
            for i, (row, column) in enumerate(zip(rows, columns, strict=True)):
                for name, at_position in values.items():
                    place, value = document[row][counted[row]], at_position[i][counted[row]]
                    np.add.at(ablations.sums[name][arm, :, column], place, value)
        for row, column in zip(rows, columns, strict=True):
            np.add.at(ablations.firings[:, column], document[row][fires[row, :, column]], 1)
    return ablations


def _changes(targets: Targets, batch: Sequence[_Job], excess: Floats) -> Iterator[Tensor]:
    """What is added to the activations, ``[b, T, d_in]``: of the features, then of the null."""
    own = targets.decoder[targets.features[[job.column for job in batch]]]  # [b, d_in]
    others = normalize(targets.decoder[[job.other for job in batch]], dim=1)
    taken = -torch.from_numpy(excess.astype(np.float32))[..., None]
    yield taken * own[:, None, :]
    yield taken * (others * own.norm(dim=1, keepdim=True))[:, None, :]


def _differences(
    llm: EditableLLM, split: SplitObservation, rows: Sequence[int], changes: Iterator[Tensor]
) -> Iterator[dict[str, Floats]]:
    """For each of ``changes``, the measures at every position of the rows, ``[b, T - 1]``."""
    unique, place = np.unique(rows, return_inverse=True)
    clean = llm.log_probabilities(_tokens(split, unique))[torch.from_numpy(place)]  # [b, T - 1, vocabulary]
    tokens = _tokens(split, rows)
    targets = tokens[:, 1:, None].to(clean.device)
    for change in changes:
        lost = clean - llm.log_probabilities(tokens, change)
        values = {"loss": lost.gather(-1, targets)[..., 0], "divergence": clean.exp().mul_(lost).sum(dim=-1)}
        yield {name: value.double().cpu().numpy() for name, value in values.items()}


def _jobs(split: SplitObservation, fires: NDArray[np.bool_], targets: Targets, limit: int, seed: int) -> Iterator[_Job]:
    """The rows of each feature, a null direction for each: one row of every document first, then second ones."""
    for column, feature in enumerate(targets.features):
        rng = np.random.default_rng([seed, int(feature)])
        order = rng.permutation(len(fires))
        order = order[fires[order, :, column].any(axis=1)]
        turn: list[int] = []
        seen: dict[int, int] = {}
        for row in order:
            document = int(split.rows.documents[row, int(fires[row, :, column].argmax())])
            seen[document] = seen.get(document, 0) + 1
            turn.append(seen[document])
        chosen = order[np.argsort(turn, kind="stable")][:limit]
        others = targets.others[targets.others != feature]
        for row in chosen:
            yield _Job(int(row), column, int(rng.choice(others)))


def _tokens(split: SplitObservation, rows: Sequence[int] | Integers) -> Tensor:
    return torch.from_numpy(split.rows.tokens[np.asarray(rows)].astype(np.int64))
