"""Dictionaries: does the latent most like index i still stand at index i, and how alike are SAEs of their own?"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from . import figures as look
from .base import Analysis, AnalysisResult
from .controls import null_chains, null_steps, scratch_controls
from .drift_geometry import unit_rows
from .drift_rows import alive, decoder_rows, encoder_rows
from .lineage import ends_of_stage, rotation_between
from .matching import CosineSimilarity, directional_covariance, match, random_rows, relate
from .places import place_names
from .resampling import bootstrap_mean_of_rows, bootstrap_means, bootstrap_replicates, share_of, with_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from saetrack.track import Snapshot, Track

    Floats = NDArray[np.floating]

MARGIN = 0.05
"""How far seeds must be above their null before agreement with them means anything."""
SHARED = 0.7
"""Cosine from which on, of decoder row and encoder column with the same partner, a feature is shared (2501.16615)."""

CAPTION = (
    "Where the blue curve is above the grey one, two dictionaries share directions; where matching the features alive "
    "at both snapshots is above their same index, features have changed places. Bands are 95 % intervals over "
    "features, for one matching: other SAEs would add to them. Directions are compared and not meanings."
)


REPLICATES = 500


@dataclass(frozen=True)
class _Side:
    """One dictionary: unit decoder and encoder rows ``[m, d_in]`` of features, their indices ``[m]``, and d_sae."""

    decoder: Floats
    encoder: Floats
    features: NDArray[np.integer]
    width: int

    @classmethod
    def of(cls, snapshot: Snapshot, use: NDArray[np.bool_], turn: Floats | None = None) -> _Side:
        """Those of a snapshot, turned by a rotation."""
        decoder, encoder = decoder_rows(snapshot)[use], encoder_rows(snapshot)[use]
        if turn is not None:
            decoder, encoder = decoder @ turn, encoder @ turn
        return cls(decoder, encoder, np.flatnonzero(use), len(use))


@dataclass(frozen=True)
class _Compared:
    """Two dictionaries matched one to one; by index of the first one's features, NaN for those without a partner.

    Args:
        similarity: Cosines of decoder rows, ``[d_sae]``.
        encoder: The same of encoder rows, with a matching of its own.
        shared: Whether the partner is the same by both and near by both, 0 or 1.
        null: PW-MCC of random pairs, ``[random_pairs]``.
        null_shared: Share of their rows that is shared, at most.
    """

    similarity: Floats
    encoder: Floats
    shared: Floats
    null: Floats
    null_shared: float


class Dictionaries(Analysis):
    """One-to-one matching of the dictionaries of neighbouring snapshots, and with SAEs trained from scratch.

    For every pair of dictionaries, over the features alive in each: PW-MCC, the mean cosine of decoder rows matched
    one to one so that it is largest (arXiv 2505.20254), and the share that is shared, which have the same partner by
    decoder and by encoder and a cosine of at least 0.7 with it in both (arXiv 2501.16615). Any two dictionaries match
    to some degree, so beside them stands ``null``, the PW-MCC of two random dictionaries spread over directions as
    these are, with its standard deviation ``null_sd`` (of one draw, pooled over the stages), and ``null_shared_share``.

    * ``neighbours``: with the snapshot before, the rotation of a `transported` stage taken out. Over the
      ``features_both`` that are alive at both, ``same_index`` is the mean cosine of equal indices, ``pw_mcc_both`` that
      of the matching, ``renaming_gap`` the difference, and ``kept_index`` the share matched with their own index.
      ``births`` and ``deaths`` are features with no partner of at least 0.7 before and after, ``splits`` those that are
      the nearest of two or more later ones; ``..._null`` is how many there are, on average, where the SAE is trained
      once more on the same LLM checkpoint: in the null steps of the stage, else in the null chains' stage of the same
      place, as ``null_from`` says. A chain has settled on its LLM checkpoint, so it is the weaker null.
    * ``scratch``: the track with ``scratch`` controls on the same LLM checkpoint, and those with each other, which is
      the seed-to-seed ceiling. ``agreement`` is (track to seeds - null) / (seeds - null) of METHOD's section 7e: 1
      where the series finds what an SAE of its own finds; NaN where the seeds are not at least 0.05 above their null.

    Intervals are over features, for one matching, 95 %: a bootstrap of the first dictionary's features for means, alike
    in all pairs of a row, and Wilson's for shares and numbers of features. Other SAEs would add to them.

    Restricted (``--only_kept``), the track's features are those that kept their identity in the stage that led there,
    and null chains, which have no stretches, are left out.

    Args:
        random_pairs: Pairs of random dictionaries for each null.
        seed: Seed of their draw.

    Raises:
        ValueError: If there are fewer than 2 pairs.
    """

    min_snapshots: ClassVar[int] = 2
    restrictable: ClassVar[bool] = True

    def __init__(self, random_pairs: int = 2, seed: int = 0) -> None:
        if random_pairs < 2:
            raise ValueError(f"dictionaries' random_pairs is {random_pairs}; it must be at least 2.")
        self.random_pairs = random_pairs
        self.seed = seed

    def run(self, track: Track) -> AnalysisResult:
        """Match the dictionaries of a track of at least two snapshots.

        Raises:
            ValueError: If there are fewer.
        """
        if len(track) < 2:
            raise ValueError(f"{track.path} holds {len(track)} of the at least 2 snapshots that dictionaries compares.")
        pairs = zip(list(track), list(track)[1:], strict=False)
        nulls = self._null_changes(track)
        neighbours = pd.DataFrame([self._neighbours(track, before, after, nulls) for before, after in pairs])
        drawn = neighbours["null_sd"].notna()
        neighbours.loc[drawn, "null_sd"] = np.sqrt((neighbours["null_sd"] ** 2).mean())
        scratch = self._scratch(track)
        missing = f"not available: run `saetrack control {track.path} --kind scratch`"
        settings = {
            "random_pairs": self.random_pairs,
            "seed": self.seed,
            "shared_from": SHARED,
            "margin": MARGIN,
            "replicates": REPLICATES,
            "null_sd_draws": self.random_pairs * int(drawn.sum()),
            "scratch": "controls of kind scratch" if len(scratch) else missing,
        }
        scalars = {
            name: dict(zip(neighbours["step"].tolist(), neighbours[name].tolist(), strict=True))
            for name in ("pw_mcc", "renaming_gap", "shared_share")
        }
        tables = {"neighbours": neighbours, **({"scratch": scratch} if len(scratch) else {})}
        return AnalysisResult(
            tables,
            {"dictionaries": _figure(neighbours, scratch)},
            scalars,
            settings,
            _summary(neighbours, track.steps),
            {"dictionaries": CAPTION},
        )

    def _neighbours(
        self, track: Track, before: Snapshot, after: Snapshot, nulls: dict[int, tuple[str, dict[str, float]]]
    ) -> dict[str, Any]:
        a, b, both = self._sides(track, before, after, after.position)
        compared = self._compare(a, b)
        matched = match(CosineSimilarity(*both))
        same = np.einsum("fd,fd->f", *both)
        gained = np.where(matched.left == matched.right, 0.0, matched.similarity - same)  # by feature, `left` is sorted
        values = np.stack([matched.similarity, same, gained])
        mean, low, high = bootstrap_means(values, self._rng(), REPLICATES)
        row = {"step": after.step, **self._row([compared]), "features_both": len(same)}
        for i, name in enumerate(("pw_mcc_both", "same_index", "renaming_gap")):
            row |= with_interval(name, (float(mean[i]), float(low[i]), float(high[i])))
        row |= with_interval("kept_index", share_of(int((matched.left == matched.right).sum()), len(same)))
        null_from, expected = nulls.get(after.position, ("", dict.fromkeys(CHANGES, np.nan)))
        for name, (count, of) in _changes(a, b).items():
            _, least, most = share_of(count, of)
            row |= {name: count, f"{name}_low": of * least, f"{name}_high": of * most, f"{name}_null": expected[name]}
        return row | {"null_from": null_from}

    def _sides(
        self, track: Track, before: Snapshot, after: Snapshot, place: int
    ) -> tuple[_Side, _Side, tuple[Floats, Floats]]:
        """What counts of both snapshots of a stage, in the frame of the second; and decoder rows of what is in both."""
        counts = True if self.kept is None else self.kept.into[place]
        rotation, (before, after) = rotation_between(track, before, after), ends_of_stage(track, before, after)
        a, b = alive(before) & counts, alive(after) & counts
        first, second = _Side.of(before, a, rotation), _Side.of(after, b)
        return first, second, (first.decoder[b[a]], second.decoder[a[b]])

    def _null_changes(self, track: Track) -> dict[int, tuple[str, dict[str, float]]]:
        """By place of the stage, where its null is from and the mean births, deaths and splits there."""
        steps = {place: ("null steps", found) for place, found in null_steps(track).items()}
        chains = null_chains(track) if self.kept is None else []
        for place in range(1, len(track)):
            stages = [(chain, chain[place - 1], chain[place]) for chain in chains if place < len(chain)]
            if stages:
                steps.setdefault(place, ("null chain", stages))
        found = {}
        for place, (source, stages) in steps.items():
            counted = [_changes(*self._sides(*stage, place)[:2]) for stage in stages]
            means = {name: float(np.mean([changes[name][0] for changes in counted])) for name in CHANGES}
            found[place] = source, means
        return found

    def _scratch(self, track: Track) -> pd.DataFrame:
        """The track with SAEs of their own, and those among themselves, by LLM step and budget."""
        rows = []
        for budget, controls in sorted(scratch_controls(track).items(), reverse=True):
            for step in sorted({step for control in controls for step in control.steps} & set(track.steps)):
                found = [_Side.of(c.at(step), alive(c.at(step))) for c in controls if step in c.steps]
                snapshot = track.at(step)
                use = alive(snapshot) if self.kept is None else alive(snapshot) & self.kept.at[snapshot.position]
                own = [self._compare(_Side.of(snapshot, use), other) for other in found]
                seeds = [self._compare(*pair) for pair in combinations(found, 2)]
                rows.append({"step": step, "budget": budget, **self._agreement(own, seeds)})
        return pd.DataFrame(rows)

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, 1])

    def _row(self, found: list[_Compared]) -> dict[str, Any]:
        """Means over pairs of dictionaries with their intervals over features; NaN without a pair."""
        names = ("features", "pw_mcc", "pw_mcc_encoder", "null", "null_sd", "shared_share", "null_shared_share")
        if not found:
            ends = [f"{name}_{end}" for name in ("pw_mcc", "shared_share") for end in ("low", "high")]
            return dict.fromkeys([*names, *ends], np.nan)
        similarity, shared = (np.stack([getattr(c, name) for c in found]) for name in ("similarity", "shared"))
        count = int(np.isfinite(similarity).sum(axis=1).mean())
        row: dict[str, Any] = {"features": count}
        row |= with_interval("pw_mcc", bootstrap_mean_of_rows(similarity, self._rng(), REPLICATES))
        row["pw_mcc_encoder"] = float(np.mean([_mean(c.encoder) for c in found]))
        row["null"] = float(np.mean([c.null.mean() for c in found]))
        row["null_sd"] = float(np.mean([c.null.std(ddof=1) for c in found]))
        row |= with_interval("shared_share", share_of(_mean(shared) * count, count))
        return row | {"null_shared_share": float(np.mean([c.null_shared for c in found]))}

    def _agreement(self, own: list[_Compared], seeds: list[_Compared]) -> dict[str, float]:
        track, ceiling = self._row(own), self._row(seeds)
        found: dict[str, float] = {}
        for name, row, prefix in (("track_to_seeds", track, "track"), ("seeds", ceiling, "seeds")):
            found |= {f"{name}{end}": row[f"pw_mcc{end}"] for end in ("", "_low", "_high")}
            found |= {f"{prefix}_null": row["null"], f"{prefix}_encoder": row["pw_mcc_encoder"]}
            found |= {f"{prefix}_shared_share{end}": row[f"shared_share{end}"] for end in ("", "_low", "_high")}
        found["null_shared_share"] = track["null_shared_share"]
        agreement = (np.nan, np.nan, np.nan)
        if found["seeds"] - found["seeds_null"] > MARGIN:
            drawn = [np.array([found["track_to_seeds"]]), np.array([found["seeds"]])]
            for which, pairs in enumerate((own, seeds)):
                values, rng = np.stack([c.similarity for c in pairs]), np.random.default_rng([self.seed, 2, which])
                drawn[which] = np.r_[drawn[which], bootstrap_replicates(values, rng, REPLICATES).mean(axis=1)]
            above = (drawn[0] - found["track_null"]) / (drawn[1] - found["seeds_null"])
            low, high = np.quantile(above[1:], [0.025, 0.975])
            agreement = float(above[0]), float(low), float(high)
        return found | with_interval("agreement", agreement)

    def _compare(self, a: _Side, b: _Side) -> _Compared:
        """Two dictionaries; nothing is matched where one has no live feature."""
        decoder = match(CosineSimilarity(a.decoder, b.decoder))
        encoder = match(CosineSimilarity(a.encoder, b.encoder))
        partner = dict(zip(encoder.left.tolist(), zip(encoder.right, encoder.similarity, strict=True), strict=True))
        shared = [
            similarity >= SHARED and partner.get(left, (-1, 0.0))[0] == right and partner[left][1] >= SHARED
            for left, right, similarity in zip(decoder.left.tolist(), decoder.right, decoder.similarity, strict=True)
        ]
        no_null = np.full(self.random_pairs, np.nan), float("nan")
        null, null_shared = self._null(a.decoder, b.decoder) if len(decoder.left) else no_null
        width = a.width
        return _Compared(
            _by_index(width, a.features[decoder.left], decoder.similarity),
            _by_index(width, a.features[encoder.left], encoder.similarity),
            _by_index(width, a.features[decoder.left], np.asarray(shared, dtype=float)),
            null,
            null_shared,
        )

    def _null(self, a: Floats, b: Floats) -> tuple[Floats, float]:
        """PW-MCC of random pairs ``[random_pairs]``, corrected for the spread being fitted to each of the two alone.

        Beside it the share of their rows with a partner of at least 0.7: what is shared by chance, at most.

        The errors of the two fits have nothing in common, so draws from them match less well than draws from the true
        spreads: by about one standard deviation. Draws from fits to the draws match less well once more, and show how
        much (the bootstrap's correction of a bias; docs/validation.md).
        """
        rng = np.random.default_rng(self.seed)
        found: list[float] = []
        again: list[float] = []
        shared: list[float] = []
        for _ in range(self.random_pairs):
            drawn = a, b
            for values in (found, again):
                drawn = _random_like(drawn, rng)
                similarity = match(CosineSimilarity(*drawn)).similarity
                values.append(float(similarity.mean()))
                shared.append(float((similarity >= SHARED).mean()))
        corrected: Floats = np.asarray(found) + float(np.mean(found) - np.mean(again))
        return corrected, float(np.mean(shared))


def _random_like(pair: tuple[Floats, Floats], rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Two random dictionaries of as many rows, spread over directions as these are."""
    a, b = (unit_rows(random_rows(directional_covariance(rows), len(rows), rng)) for rows in pair)
    return a, b


def _mean(values: Floats) -> float:
    """Of those that are there; NaN where none is."""
    there = values[np.isfinite(values)]
    return float(there.mean()) if len(there) else float("nan")


def _by_index(width: int, features: NDArray[np.integer], values: Floats) -> Floats:
    """Values at the index of their features ``[width]``, NaN elsewhere."""
    found = np.full(width, np.nan)
    found[features] = values
    return found


CHANGES = ("births", "deaths", "splits")


def _changes(a: _Side, b: _Side) -> dict[str, tuple[int, int]]:
    """Number of births, deaths and splits from one dictionary to the next, each with out of how many features."""
    nearest = relate(CosineSimilarity(a.decoder, b.decoder))
    births, deaths = (int((found < SHARED).sum()) for found in (nearest.parent_similarity, nearest.child_similarity))
    before, after = len(a.features), len(b.features)
    return {"births": (births, after), "deaths": (deaths, before), "splits": (len(nearest.splits(SHARED)), before)}


def _figure(neighbours: pd.DataFrame, scratch: pd.DataFrame) -> Figure:
    figure, axes = look.small_multiples(1 + bool(len(scratch)), panel_width=4.0, panel_height=3.2)
    steps = neighbours["step"].tolist()
    for name, label, colour in (
        ("pw_mcc", "matched one to one", look.BLUE),
        ("pw_mcc_both", "matched, alive at both", look.PALETTE[4]),
        ("same_index", "same index", look.VERMILION),
        ("shared_share", "shared (share)", look.GREEN),
        ("null", "random, matched", look.GREY),
    ):
        _drawn(axes[0], neighbours, name, label, colour)
    look.describe(axes[0], title="With the snapshot before", ylabel="cosine of decoder rows, or share")
    look.step_axis(axes[0], steps)
    if len(scratch):
        longest = scratch[scratch["budget"] == scratch["budget"].iloc[-1]]
        at = longest["step"].tolist()
        for name, label, colour in (
            ("track_to_seeds", "series with SAEs of their own", look.BLUE),
            ("seeds", "those with each other", look.GREEN),
            ("track_null", "random, matched", look.GREY),
        ):
            _drawn(axes[1], longest, name, label, colour)
        title = f"With SAEs trained from scratch ({longest['budget'].iloc[0]} budget)"
        look.describe(axes[1], title=title, ylabel="PW-MCC of decoder rows")
        look.step_axis(axes[1], at)
    for ax in axes:
        ax.set_ylim(0, 1)
        look.band_key(ax, quartiles=False)
        look.legend(ax)
    return figure


def _drawn(ax: Axes, table: pd.DataFrame, name: str, label: str, colour: str) -> None:
    steps = table["step"].tolist()
    if f"{name}_low" in table:
        look.band(ax, steps, table[f"{name}_low"], table[f"{name}_high"], color=colour, alpha=0.3)
    look.line(ax, steps, table[name], color=colour, label=label)


def _summary(neighbours: pd.DataFrame, steps: list[int]) -> str:
    if neighbours["renaming_gap"].isna().all():
        return "No two neighbouring snapshots have a live feature in common, so nothing could be matched."
    place = int(np.nanargmax(neighbours["renaming_gap"]))
    row, name = neighbours.iloc[place], place_names(steps)[place + 1]
    gains = "most over equal indices" if row["renaming_gap"] > 0 else "nothing over equal indices in any stage, as"
    return (
        f"The matching gains {gains} into {name}: over the {int(row['features_both'])} features alive "
        f"in both dictionaries the mean cosine of decoder rows is {row['pw_mcc_both']:.3f} matched one to one and "
        f"{row['same_index']:.3f} at the same index, a renaming gap of {row['renaming_gap']:.3f} "
        f"({row['renaming_gap_low']:.3f} to {row['renaming_gap_high']:.3f}). Over all that live in either, PW-MCC is "
        f"{row['pw_mcc']:.3f} there, and {row['null']:.3f} in random dictionaries."
    )
