"""The sets of positions that formation is measured on: each feature's, false ones, and random ones to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .coherence import matched_sets
from .positions import TOP_SHARE, Kinds, firing_quantiles, first_of_context, matched_positions, spread_positions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .base import SplitObservation

    Integers = NDArray[np.integer]
    Bools = NDArray[np.bool_]

BASELINES = ("token", "position", "uniform")


@dataclass(frozen=True)
class FormationSets:
    """Positions on the evaluation rows, the same at every LLM checkpoint. F counts features and false features.

    Args:
        features: ``[F]``, index of the feature; a false feature has the index of the one that it was made from.
        false: ``[F]``, whether the positions are random ones with the feature's tokens: the instrument's own control.
        members: ``[F, n]``, -1 for unused places.
        sizes: ``[F]``, places in use.
        chosen: ``[d_sae, n]``, the positions of every feature of the SAE, also where they are too few.
        counts: ``[d_sae]``, the features that are asked for.
        random: ``[B, n]``, uniform random sets, at most one position of a document.
        matched: Baseline to ``[F, B, n]``, for token and for position in the row.
        keys: Baseline to ``[P]``, what its random sets match.
        documents: ``[P]``, each position's document, numbered from 0.
    """

    features: Integers
    false: Bools
    members: Integers
    sizes: Integers
    chosen: Integers
    counts: Bools
    random: Integers
    matched: dict[str, Integers]
    keys: dict[str, Integers]
    documents: Integers

    @classmethod
    def choose(
        cls,
        selection: SplitObservation,
        evaluation: SplitObservation,
        *,
        n_positions: int,
        n_min: int,
        draws: int,
        false_features: int,
        seed: int,
        counts: Bools | None = None,
    ) -> FormationSets:
        """Choose on the last snapshot: thresholds on the selection rows, positions on the evaluation rows.

        Repeated contexts are left out, and positions whose token or place in the row nothing else has, for they
        cannot be matched.

        Args:
            selection: The last snapshot on the selection rows.
            evaluation: The last snapshot on the evaluation rows.
            n_positions: Most positions of a feature.
            n_min: Features with fewer are not computed.
            draws: Random sets of each kind.
            false_features: Number of false features.
            seed: Of all draws.
            counts: ``[d_sae]``, the features to compute; all, if not given.
        """
        rng = np.random.default_rng([seed, 0])
        keys = {"token": evaluation.tokens, "position": evaluation.positions[:, 1]}
        usable = first_of_context(evaluation)
        for key in keys.values():
            usable &= np.bincount(key)[key] > 1
        median, top = firing_quantiles(selection.latents, (0.5, 1 - TOP_SHARE))
        chosen = spread_positions(evaluation, usable, median, top, n_positions, rng)
        counts = np.ones(len(chosen), dtype=bool) if counts is None else counts
        chosen[~counts] = -1
        features = np.flatnonzero((chosen >= 0).sum(axis=1) >= n_min)
        members = chosen[features]
        made_from, false_members = _false_features(members, evaluation, n_min, false_features, rng)
        members = np.concatenate([members, false_members])
        return cls(
            features=np.concatenate([features, features[made_from]]),
            false=np.arange(len(members)) >= len(features),
            members=members,
            sizes=(members >= 0).sum(axis=1),
            chosen=chosen,
            counts=counts,
            random=random_sets(evaluation.documents, n_positions, draws, rng),
            matched={
                name: matched_sets(members, key, draws, (seed, 1, number))
                for number, (name, key) in enumerate(keys.items())
            },
            keys={**keys, "uniform": np.zeros_like(evaluation.tokens)},
            documents=np.unique(evaluation.documents, return_inverse=True)[1],
        )


def _false_features(
    members: Integers, split: SplitObservation, n_min: int, count: int, rng: np.random.Generator
) -> tuple[Integers, Integers]:
    """Random positions with the tokens of features drawn at random: which rows of ``members``, and the positions.

    As for a real feature, of several positions in a document only the first one stays.
    """
    drawn = np.sort(rng.choice(len(members), size=min(count, len(members)), replace=False))
    matched = matched_positions(members[drawn], Kinds.of(split.tokens), rng)
    document = np.where(matched >= 0, split.documents[matched], -1)
    order = np.argsort(document, axis=1, kind="stable")
    ordered = np.take_along_axis(document, order, axis=1)
    repeated = np.zeros(matched.shape, dtype=bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    np.put_along_axis(matched, order, np.where(repeated, -1, np.take_along_axis(matched, order, axis=1)), axis=1)
    enough = (matched >= 0).sum(axis=1) >= n_min
    return drawn[enough], matched[enough]


def random_sets(documents: Integers, n_positions: int, sets: int, rng: np.random.Generator) -> Integers:
    """Sets of random positions, with as few as possible from any one document.

    Positions are drawn uniformly without replacement; those in a document that the set has already are passed over
    while there are others. Every leading part of a set is itself such a random set, so one draw serves all sizes.

    Args:
        documents: ``[P]``, the document of each position.
        n_positions: Positions in a set.
        sets: Number of sets.
        rng: Source of the draws.

    Returns:
        ``[sets, n_positions]``.

    Raises:
        ValueError: If there are fewer than ``n_positions`` positions.
    """
    if len(documents) < n_positions:
        raise ValueError(
            f"The evaluation rows hold {len(documents)} positions, fewer than the {n_positions} of one set. "
            "Lower `n_positions`, or give the track a longer corpus."
        )
    drawn = np.empty((sets, n_positions), dtype=np.int64)
    for i in range(sets):
        order = rng.permutation(len(documents))
        by_document = np.argsort(documents[order], kind="stable")
        again = np.empty(len(order), dtype=bool)
        repeats = np.diff(documents[order][by_document], prepend=-1) == 0
        again[by_document] = repeats
        drawn[i] = order[np.argsort(again, kind="stable")[:n_positions]]
    return drawn
