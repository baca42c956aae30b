"""Dictionaries: does the latent most like index i still stand at index i, and how alike are SAEs of their own?"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from . import figures as look
from .base import Analysis, AnalysisResult
from .drift_geometry import unit_rows
from .drift_rows import alive, decoder_rows, encoder_rows
from .lineage import rotation_between
from .matching import CosineSimilarity, directional_covariance, match, random_rows, relate

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from saetrack.track import Snapshot, Track

    Floats = NDArray[np.floating]

MARGIN = 0.05
"""How far seeds must be above their null before agreement with them means anything."""
SHARED = 0.7
"""Cosine from which on, of decoder row and encoder column with the same partner, a feature is shared (2501.16615)."""

CAPTION = (
    "Curves above the grey one say that two dictionaries share directions; where matching one to one is above the same "
    "index, features have changed places. Directions are compared and not meanings, and there is no interval: each "
    "pair of dictionaries is one draw."
)


class Dictionaries(Analysis):
    """One-to-one matching of the dictionaries of neighbouring snapshots, and with SAEs trained from scratch.

    For every pair of dictionaries, over the features alive in each: PW-MCC, the mean cosine of decoder rows matched
    one to one so that it is largest (arXiv 2505.20254), and the share that is shared, which have the same partner by
    decoder and by encoder and a cosine of at least 0.7 with it in both (arXiv 2501.16615). Any two dictionaries match
    to some degree, so beside them stands ``null``, the PW-MCC of two random dictionaries spread over directions as
    these are, with its standard deviation, and ``null_shared_share``.

    * ``neighbours``: with the snapshot before, the rotation of a `transported` stage taken out. ``same_index`` is the
      mean cosine of equal indices and ``renaming_gap`` what the matching gains over it; ``kept_index`` is the share
      matched with their own index; births and deaths are features with no partner of at least 0.7 before and after,
      splits those that are the nearest of two or more later ones.
    * ``scratch``: the track with ``scratch`` controls on the same LLM checkpoint, and those with each other, which is
      the seed-to-seed ceiling. ``agreement`` is (track to seeds - null) / (seeds - null) of METHOD's section 7e: 1
      where the series finds what an SAE of its own finds; NaN where the seeds are not at least 0.05 above their null.

    Restricted (``--only_kept``), over the features that kept their identity in the stage, or to the last snapshot.

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
        neighbours = pd.DataFrame([self._neighbours(track, before, after) for before, after in pairs])
        scratch = self._scratch(track)
        missing = f"not available: run `saetrack control {track.path} --kind scratch`"
        settings = {
            "random_pairs": self.random_pairs,
            "seed": self.seed,
            "shared_from": SHARED,
            "margin": MARGIN,
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
            _summary(neighbours),
            {"dictionaries": CAPTION},
        )

    def _neighbours(self, track: Track, before: Snapshot, after: Snapshot) -> dict[str, Any]:
        rotation = rotation_between(track, before, after)
        turn = np.eye(decoder_rows(after).shape[1], dtype=np.float32) if rotation is None else rotation
        a, b = alive(before), alive(after)
        if self.kept is not None:
            a, b = (living & self.kept.into[after.position] for living in (a, b))
        both = np.flatnonzero(a & b)
        decoders = decoder_rows(before) @ turn, decoder_rows(after)
        row = self._compare((decoders[0][a], (encoder_rows(before) @ turn)[a]), _directions(after, b))
        matched = match(CosineSimilarity(decoders[0][both], decoders[1][both]))
        same = _mean(np.einsum("fd,fd->f", decoders[0][both], decoders[1][both]))
        nearest = relate(CosineSimilarity(decoders[0][a], decoders[1][b]))
        return {
            "step": after.step,
            **row,
            "same_index": same,
            "renaming_gap": _mean(matched.similarity) - same,
            "kept_index": _mean(matched.left == matched.right),
            "births": int((nearest.parent_similarity < SHARED).sum()),
            "deaths": int((nearest.child_similarity < SHARED).sum()),
            "splits": len(nearest.splits(SHARED)),
        }

    def _scratch(self, track: Track) -> pd.DataFrame:
        """The track with SAEs of their own, and those among themselves, by LLM step and budget."""
        rows = []
        for first_budget in (False, True):
            controls = [c for c in track.controls("scratch") if c.facts["control"]["first_budget"] is first_budget]
            for step in sorted({step for control in controls for step in control.steps} & set(track.steps)):
                found = [_directions(c.at(step), alive(c.at(step))) for c in controls if step in c.steps]
                snapshot = track.at(step)
                use = alive(snapshot) if self.kept is None else alive(snapshot) & self.kept.to_last[snapshot.position]
                own = [self._compare(_directions(snapshot, use), other) for other in found]
                seeds = [self._compare(*pair) for pair in combinations(found, 2)]
                rows.append({"step": step, "budget": "first" if first_budget else "next", **_agreement(own, seeds)})
        return pd.DataFrame(rows)

    def _compare(self, a: tuple[Floats, Floats], b: tuple[Floats, Floats]) -> dict[str, Any]:
        """Two dictionaries as unit decoder and encoder rows of their live features; NaN where one has none."""
        decoder, encoder = (match(CosineSimilarity(x, y)) for x, y in zip(a, b, strict=True))
        partner = dict(zip(encoder.left.tolist(), zip(encoder.right, encoder.similarity, strict=True), strict=True))
        shared = [
            similarity >= SHARED and partner.get(left, (-1, 0.0))[0] == right and partner[left][1] >= SHARED
            for left, right, similarity in zip(decoder.left.tolist(), decoder.right, decoder.similarity, strict=True)
        ]
        no_null = np.full(self.random_pairs, np.nan), float("nan")
        null, null_shared = self._null(a[0], b[0]) if len(decoder.left) else no_null
        return {
            "features": len(decoder.left),
            "pw_mcc": _mean(decoder.similarity),
            "pw_mcc_encoder": _mean(encoder.similarity),
            "null": float(np.mean(null)),
            "null_sd": float(np.std(null, ddof=1)),
            "shared_share": _mean(np.array(shared)),
            "null_shared_share": null_shared,
        }

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


def _mean(values: NDArray[Any]) -> float:
    """NaN where there are none."""
    return float(values.mean()) if len(values) else float("nan")


def _random_like(pair: tuple[Floats, Floats], rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Two random dictionaries of as many rows, spread over directions as these are."""
    a, b = (unit_rows(random_rows(directional_covariance(rows), len(rows), rng)) for rows in pair)
    return a, b


def _directions(snapshot: Snapshot, use: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    return decoder_rows(snapshot)[use], encoder_rows(snapshot)[use]


def _agreement(own: list[dict[str, Any]], seeds: list[dict[str, Any]]) -> dict[str, float]:
    def mean(rows: list[dict[str, Any]], name: str) -> float:
        return float(np.mean([row[name] for row in rows])) if rows else float("nan")

    found = {
        "track_to_seeds": mean(own, "pw_mcc"),
        "track_null": mean(own, "null"),
        "seeds": mean(seeds, "pw_mcc"),
        "seeds_null": mean(seeds, "null"),
        "track_shared_share": mean(own, "shared_share"),
        "seeds_shared_share": mean(seeds, "shared_share"),
        "null_shared_share": mean(own, "null_shared_share"),
        "track_encoder": mean(own, "pw_mcc_encoder"),
        "seeds_encoder": mean(seeds, "pw_mcc_encoder"),
    }
    above = found["seeds"] - found["seeds_null"]
    agreement = (found["track_to_seeds"] - found["track_null"]) / above if above > MARGIN else float("nan")
    return {**found, "agreement": agreement}


def _figure(neighbours: pd.DataFrame, scratch: pd.DataFrame) -> Figure:
    figure, axes = look.small_multiples(1 + bool(len(scratch)), panel_width=4.0, panel_height=3.2)
    steps = neighbours["step"].tolist()
    for name, label, colour in (
        ("pw_mcc", "matched one to one", look.BLUE),
        ("same_index", "same index", look.VERMILION),
        ("shared_share", "shared (share)", look.GREEN),
        ("null", "random, matched", look.GREY),
    ):
        look.line(axes[0], steps, neighbours[name], color=colour, label=label)
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
            look.line(axes[1], at, longest[name], color=colour, label=label)
        title = f"With SAEs trained from scratch ({longest['budget'].iloc[0]} budget)"
        look.describe(axes[1], title=title, ylabel="PW-MCC of decoder rows")
        look.step_axis(axes[1], at)
    for ax in axes:
        ax.set_ylim(0, 1)
        look.legend(ax)
    return figure


def _summary(neighbours: pd.DataFrame) -> str:
    compared = neighbours[neighbours["renaming_gap"].notna()]
    if compared.empty:
        return "No two neighbouring snapshots have a live feature in common, so nothing could be matched."
    widest = compared.sort_values("renaming_gap").iloc[-1]
    return (
        f"Matched one to one, neighbouring dictionaries have a mean cosine of {neighbours['pw_mcc'].mean():.2f}, and "
        f"random ones {neighbours['null'].mean():.2f}; at the same index it is {neighbours['same_index'].mean():.2f}. "
        f"The matching gains most into LLM step {int(widest['step'])} ({widest['renaming_gap']:.3f})."
    )
