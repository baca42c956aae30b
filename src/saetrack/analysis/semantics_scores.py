"""The scores by which a feature is called one of a token, of a concept, and so on; all features at once.

Tokens are also counted as *forms* (without leading space, lower case) and as *families* (without a common ending, then
the first four letters), so that " Insert" and "inserting" may be one thing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse
import torch

from .coherence import mean_cosine, unit_vectors
from .columns import token_statistics
from .positions import Kinds, first_of_context, matched_positions, spread_positions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .base import SplitObservation

    Floats = NDArray[np.floating]
    Integers = NDArray[np.integer]

CONTEXT = 20  # tokens on either side that make a position's context
TOP_TYPES = 16  # families whose embeddings are compared, those with most activation
POSITIONS, DRAWS, DISPERSION_DRAWS = 64, 50, 200
_PSEUDO_COUNT = 5.0  # positions of average activation that every token's mean is shrunk with
_PROJECTION = 128  # directions that a context's counts are projected on
_FREQUENCY_CLASSES = 10
# of a mean cosine in float32: random sets that differ by less, as of tokens that occur once or twice, are one set
_ROUNDING = 1e-5
_ENDINGS = ("ingly", "edly", "ing", "ers", "ies", "est", "ed", "er", "es", "ly", "s")
# keys x features held at once as dense float64
_DENSE = 4_000_000


@dataclass(frozen=True)
class Scores:
    """Scores of every feature at one LLM checkpoint, ``[d_sae]``; NaN where a feature fires too rarely to have one.

    Args:
        firing_positions: On the selection rows.
        n_eff_form: Effective number of forms, 2 to the Chao-Shen entropy.
        n_eff_family: Effective number of families.
        r2_token: Share of the activation's variance that its token determines, on the evaluation rows.
        r2_previous: The same for the token before.
        r2_position: The same for the place in the row.
        recall: Share of the positions with its top form at which the feature fires, on the evaluation rows.
        precision: Share of the firing positions that have that form.
        dispersion: ``1 - ||sum_v p(v) e_v||^2`` over unit, mean-centred input embeddings of its top families.
        dispersion_p: Share of random families of like frequency that are as near each other.
        coherence_z: How much more alike its contexts are than random ones of the same tokens, in their deviations; NaN
            too where these do not differ, as its tokens hardly occur elsewhere.
        families: ``[d_sae, 16]``, its top families, -1 for none, and
        shares: their share of the activation.
    """

    firing_positions: Integers
    n_eff_form: Floats
    n_eff_family: Floats
    r2_token: Floats
    r2_previous: Floats
    r2_position: Floats
    recall: Floats
    precision: Floats
    dispersion: Floats
    dispersion_p: Floats
    coherence_z: Floats
    families: Integers
    shares: Floats


@dataclass(frozen=True)
class Vocabulary:
    """Which form and which family every token id has.

    Args:
        form: ``[V]``.
        family: ``[V]``.
    """

    form: Integers
    family: Integers

    @classmethod
    def of(cls, strings: list[str]) -> Vocabulary:
        """Read them off the tokens' text.

        Example:
            >>> words = Vocabulary.of([" Insert", "insert", "inserted", "cat"])
            >>> words.form.tolist(), words.family.tolist()
            ([1, 1, 2, 0], [1, 1, 1, 0])
        """
        forms = [s.strip().lower() or s for s in strings]
        numbered = [np.unique(names, return_inverse=True)[1] for names in (forms, [_family(f) for f in forms])]
        return cls(numbered[0], numbered[1])


def _family(form: str) -> str:
    for ending in _ENDINGS:
        if form.endswith(ending) and len(form) - len(ending) >= 3:
            return form[: -len(ending)][:4]
    return form[:4] if len(form) >= 4 and form.isalpha() else form


class Scorer:
    """Computes `Scores` at one LLM checkpoint after the other, on the same rows.

    Args:
        vocabulary: Forms and families.
        embeddings: ``[V, d_in]``, the input embeddings of the last LLM checkpoint.
        selection: Rows of the selection split; contexts are taken from it once.
        seed: Of positions and random sets.
    """

    def __init__(self, vocabulary: Vocabulary, embeddings: Floats, selection: SplitObservation, seed: int) -> None:
        self.vocabulary = vocabulary
        self.seed = seed
        self._contexts = unit_vectors(_context_vectors(selection, seed))
        self._unrepeated = first_of_context(selection)
        used = np.bincount(selection.tokens, minlength=len(vocabulary.family))
        # a family stands for its most frequent token
        order = np.lexsort((used, vocabulary.family))
        last = np.append(np.diff(vocabulary.family[order]) != 0, True)
        represent = order[last]
        vectors = embeddings[represent]
        self._embeddings = unit_vectors(vectors, vectors.mean(axis=0))
        frequency = np.bincount(vocabulary.family, weights=used)
        rank = np.argsort(np.argsort(frequency[frequency > 0], kind="stable"), kind="stable")
        self._classes = np.full(len(frequency), -1)
        self._classes[frequency > 0] = rank * _FREQUENCY_CLASSES // max(len(rank), 1)

    def scores(self, selection: SplitObservation, evaluation: SplitObservation) -> Scores:
        """All scores at one LLM checkpoint."""
        tokens, held_out = selection.tokens, evaluation.tokens
        forms = token_statistics(selection.latents, self.vocabulary.form[tokens])
        families = token_statistics(selection.latents, self.vocabulary.family[tokens])
        recall, precision = _recall(evaluation.latents, self.vocabulary.form[held_out], forms.top_token)
        top, shares = _top_families(selection.latents, self.vocabulary.family[tokens])
        dispersion, dispersion_p = self._dispersion(top, shares)

        def determined(keys: Integers, keys_held_out: Integers) -> Floats:
            return determination(selection.latents, keys, evaluation.latents, keys_held_out)

        return Scores(
            firing_positions=forms.firing_positions,
            n_eff_form=2.0**forms.entropy_chao_shen,
            n_eff_family=2.0**families.entropy_chao_shen,
            r2_token=determined(tokens, held_out),
            r2_previous=determined(_previous(selection), _previous(evaluation)),
            r2_position=determined(selection.positions[:, 1], evaluation.positions[:, 1]),
            recall=recall,
            precision=precision,
            dispersion=dispersion,
            dispersion_p=dispersion_p,
            coherence_z=self._coherence(selection),
            families=top,
            shares=shares,
        )

    def _coherence(self, selection: SplitObservation) -> Floats:
        """Mean cosine of a feature's contexts against random positions with the same tokens."""
        rng = np.random.default_rng([self.seed, 10])
        width = selection.latents.shape[1]
        anywhere, nowhere = np.zeros(width), np.full(width, np.inf)
        members = spread_positions(selection, self._unrepeated, anywhere, nowhere, POSITIONS, rng)
        enough = np.flatnonzero((members >= 0).sum(axis=1) >= 3)
        z = np.full(width, np.nan)
        if not len(enough):
            return z
        members, kinds = members[enough], Kinds.of(selection.tokens)
        drawn = np.stack([mean_cosine(self._contexts, matched_positions(members, kinds, rng)) for _ in range(DRAWS)])
        spread = drawn.std(axis=0, ddof=1)
        excess = mean_cosine(self._contexts, members) - drawn.mean(axis=0)
        z[enough] = np.divide(excess, spread, out=np.full(len(enough), np.nan), where=spread > _ROUNDING)
        return z

    def _dispersion(self, top: Integers, shares: Floats) -> tuple[Floats, Floats]:
        """Spread of the top families' embeddings, and the share of random families that spread less."""
        rng = np.random.default_rng([self.seed, 11])
        several = np.flatnonzero((top >= 0).sum(axis=1) >= 2)
        dispersion, p = np.full(len(top), np.nan), np.full(len(top), np.nan)
        if not len(several):
            return dispersion, p
        members, weights = top[several], shares[several]
        weights = weights / weights.sum(axis=1, keepdims=True)
        dispersion[several] = self._spread(members, weights)
        nearer, kinds = np.zeros(len(several)), Kinds.of(self._classes)
        for _ in range(DISPERSION_DRAWS):
            nearer += self._spread(matched_positions(members, kinds, rng), weights) <= dispersion[several]
        p[several] = (1 + nearer) / (DISPERSION_DRAWS + 1)
        return dispersion, p

    def _spread(self, members: Integers, weights: Floats) -> Floats:
        index = torch.from_numpy(np.where(members < 0, len(self._embeddings) - 1, members))
        total = torch.nn.functional.embedding_bag(
            index, self._embeddings, mode="sum", per_sample_weights=torch.from_numpy(weights.astype(np.float32))
        )
        spread: Floats = 1 - total.square().sum(1).double().numpy()
        return spread


def determination(
    latents: scipy.sparse.csr_array, keys: Integers, held_out: scipy.sparse.csr_array, held_out_keys: Integers
) -> Floats:
    """Share of a latent's variance that a key (the token, the place) determines, told from other rows.

    ``R^2 = 1 - sum_C (a - m_v)^2 / sum_C (a - mean a)^2`` with ``m_v`` the mean of a latent at key v on the first rows,
    shrunk with 5 positions of average activation, and C the held-out rows. Positions where the latent does not fire are
    weighted down to count as much together as those where it does.

    Args:
        latents: ``[P, d_sae]``.
        keys: ``[P]``.
        held_out: ``[Q, d_sae]``.
        held_out_keys: ``[Q]``.

    Returns:
        ``[d_sae]``; NaN for a latent that fires nowhere on either.
    """
    kinds, kind = np.unique(np.concatenate([keys, held_out_keys]), return_inverse=True)
    fit = _by_key(latents, kind[: len(keys)], len(kinds))
    test = _by_key(held_out, kind[len(keys) :], len(kinds))
    squares = held_out.power(2).sum(axis=0)
    r2 = np.full(latents.shape[1], np.nan)
    block = max(1, _DENSE // len(kinds))
    for start in range(0, len(r2), block):
        part = slice(start, start + block)
        sums, seen = fit.sums[:, part].toarray(), fit.weights(part)
        total, fires = sums.sum(axis=0), fit.fires[part]
        average = total / np.maximum(2 * fires, 1)
        mean = (sums + _PSEUDO_COUNT * average) / (seen + _PSEUDO_COUNT)
        found = test.sums[:, part].toarray()
        missed = squares[part] - 2 * (mean * found).sum(axis=0) + (mean**2 * test.weights(part)).sum(axis=0)
        variance = squares[part] - found.sum(axis=0) ** 2 / np.maximum(2 * test.fires[part], 1)
        known = (fires > 0) & (test.fires[part] > 0)
        r2[part] = np.divide(variance - missed, variance, out=np.full(len(known), np.nan), where=known & (variance > 0))
    return r2


@dataclass(frozen=True)
class _ByKey:
    """Sums and counts of latents by key, ``[K, d_sae]`` sparse, positions by key ``[K]``, firing positions."""

    sums: scipy.sparse.csc_array
    counts: scipy.sparse.csc_array
    positions: Integers
    fires: Integers

    def weights(self, part: slice) -> Floats:
        """Weight of each key's positions, firing and silent ones equal in sum, ``[K, f]``."""
        counts = self.counts[:, part].toarray()
        silent = self.positions.sum() - self.fires[part]
        balance = np.divide(self.fires[part], silent, out=np.zeros(counts.shape[1]), where=silent > 0)
        weights: Floats = counts + balance * (self.positions[:, None] - counts)
        return weights


def _by_key(latents: scipy.sparse.csr_array, kind: Integers, kinds: int) -> _ByKey:
    shape = (len(kind), kinds)
    select = scipy.sparse.csr_array((np.ones(len(kind)), kind, np.arange(len(kind) + 1)), shape=shape).T.tocsr()
    ones = scipy.sparse.csr_array((np.ones(latents.nnz), latents.indices, latents.indptr), shape=latents.shape)
    fires = np.bincount(latents.indices, minlength=latents.shape[1])
    sums = (select @ latents.astype(np.float64)).tocsc()
    return _ByKey(sums, (select @ ones).tocsc(), np.bincount(kind, minlength=kinds), fires)


def _previous(split: SplitObservation) -> Integers:
    row, column = split.positions.T
    return np.where(column > 0, split.rows.tokens[row, np.maximum(column - 1, 0)].astype(np.int64), -1)


def _recall(latents: scipy.sparse.csr_array, forms: Integers, chosen: Integers) -> tuple[Floats, Floats]:
    """Share of the positions with a form at which the feature fires, and of firing positions that have the form."""
    row = np.repeat(np.arange(latents.shape[0]), np.diff(latents.indptr))
    width = latents.shape[1]
    hits = np.bincount(latents.indices[forms[row] == chosen[latents.indices]], minlength=width)
    occurs = np.bincount(forms, minlength=int(chosen.max(initial=0)) + 1)[np.maximum(chosen, 0)]
    fires = np.bincount(latents.indices, minlength=width)
    known = chosen >= 0
    nothing = np.full(width, np.nan)
    return (
        np.divide(hits, occurs, out=nothing.copy(), where=known & (occurs > 0)),
        np.divide(hits, fires, out=nothing, where=known & (fires > 0)),
    )


def _top_families(latents: scipy.sparse.csr_array, families: Integers) -> tuple[Integers, Floats]:
    """The families with most of each feature's activation, and their shares, in descending order."""
    sums = _by_key(latents, families, int(families.max(initial=0)) + 1).sums
    width = latents.shape[1]
    column = np.repeat(np.arange(width), np.diff(sums.indptr))
    order = np.lexsort((-sums.data, column))
    rank = np.arange(len(order)) - sums.indptr[column[order]]
    order, rank = order[rank < TOP_TYPES], rank[rank < TOP_TYPES]
    top, shares = np.full((width, TOP_TYPES), -1, dtype=np.int64), np.zeros((width, TOP_TYPES))
    top[column[order], rank] = sums.indices[order]
    shares[column[order], rank] = sums.data[order] / sums.sum(axis=0)[column[order]]
    return top, shares


def _context_vectors(split: SplitObservation, seed: int) -> Floats:
    """TF-IDF of the tokens around each position, without its own token, on 128 random directions ``[P, 128]``.

    Random directions keep cosines on average, and the random sets that they are compared with have the same error.
    """
    tokens, documents = split.rows.tokens.astype(np.int64), split.rows.documents
    vocabulary = int(tokens.max()) + 1
    pairs = np.unique(np.stack([tokens.ravel(), documents.ravel()]), axis=1)
    number = len(np.unique(documents))
    idf = np.log((1 + number) / (1 + np.bincount(pairs[0], minlength=vocabulary)))
    directions = np.random.default_rng([seed, 12]).normal(size=(vocabulary, _PROJECTION))
    weighted = (idf[:, None] * directions).astype(np.float32)
    row, column = split.positions.T
    own = tokens[row, column]
    vectors = np.zeros((len(row), _PROJECTION), dtype=np.float32)
    for shift in (*range(-CONTEXT, 0), *range(1, CONTEXT + 1)):
        there = column + shift
        inside = (there >= 0) & (there < tokens.shape[1])
        there = np.where(inside, there, column)
        token = tokens[row, there]
        counts = inside & (token != own) & (documents[row, there] == documents[row, column])
        vectors[counts] += weighted[token[counts]]
    return vectors
