"""What the report shows of every feature: the columns of its table, and the curves of its page."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import normalize

from saetrack.analysis.resampling import share_interval

from .data import Results, plain

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from saetrack.track import Track

    Floats = NDArray[np.floating]

PROGRESS = (
    ("progress_token", "progress_se", "token"),
    ("activation_cosine_centred", "activation_cosine_centred_se", "activation_cosine_centred"),
)
"""Progress, its standard error, and its name in the population's table; the preferred first."""


ADJACENT_DRIFT, WAY_TO_LAST = "Adjacent drift", "Way to its final direction"


@dataclass
class Columns:
    """The table of features: what each column is, and its values ``[d_sae]`` float32, NaN where not known."""

    specs: list[dict[str, Any]] = field(default_factory=list)
    values: dict[str, Floats] = field(default_factory=dict)

    def add(self, key: str, title: str, values: NDArray[Any] | None, about: str, kind: str = "number") -> None:
        """Add a column, unless its values are None."""
        if values is not None:
            self.specs.append({"key": key, "title": title, "kind": kind, "about": about})
            self.values[key] = np.asarray(values, dtype=np.float32)

    def add_names(self, key: str, title: str, values: NDArray[Any] | None, about: str) -> None:
        """Add a column of a few names, as codes into the list of them; -1 where there is none."""
        if values is None:
            return
        names = sorted({str(v) for v in values if isinstance(v, str)})
        codes = np.array([names.index(v) if isinstance(v, str) else -1 for v in values])
        self.add(key, title, codes, about, kind="name")
        self.specs[-1]["names"] = names


def columns(results: Results) -> Columns:
    """The columns of the table, those whose analysis is there.

    Args:
        results: The track's analyses.
    """
    table = Columns()
    classes = results.grid("semantics", "features", "class")
    table.add_names(
        "class", "Class", None if classes is None else classes[:, -1], "What it answers to at the last step"
    )
    formed = ("formation", "features")
    table.add(
        "formed",
        "Formed",
        results.by_feature(*formed, "formed_step"),
        "LLM step from which it is formed, with its interval where one was estimated",
        kind="step",
    )
    for end in ("low", "high"):
        values = results.by_feature(*formed, f"formed_{end}")
        if values is not None:
            table.values[f"formed_{end}"] = np.asarray(values, dtype=np.float32)
    status = results.by_feature(*formed, "status")
    table.add_names("status", "Status", status, "Whether formation could be computed, and what came out")
    firing = results.snapshot_grid("firing_frequency")
    table.add("firing", "Fires", None if firing is None else firing[:, -1], "Share of positions", kind="share")
    way = _first_of(results, "decoder_to_last_without_rotation", "decoder_to_last")
    table.add("drift", "Drift", None if way is None else 1 - way[:, 0], "1 - cosine of first and last decoder row")
    excess = results.grid("drift", "excess", "excess")
    table.add("excess", "Excess drift", None if excess is None else _mean(excess), "Mean turning beyond the null's")
    same = results.snapshot_grid("functional_correlation")
    about = "Lowest functional correlation with the checkpoint before, over the track"
    table.add("identity", "Identity", None if same is None else _lowest(same), about)
    entropy = results.grid("semantics", "features", "n_eff")
    about = "Effective number of tokens that it answers to, at the last step"
    table.add("breadth", "Breadth", None if entropy is None else entropy[:, -1], about)
    return table


def alive(results: Results) -> NDArray[np.uint8]:
    """1 for every feature and step at which it fires, or is not known not to, ``[d_sae, T]``."""
    dead = results.snapshot_grid("dead")
    firing = results.snapshot_grid("firing_frequency")
    lives = np.ones((results.d_sae, len(results.steps))) if firing is None else firing != 0
    return (lives if dead is None else dead == 0).astype(np.uint8)


def match(track: Track, other: Track) -> tuple[NDArray[np.integer], Floats, float] | None:
    """The nearest feature of another track for each of this one, by decoder rows of the last snapshots.

    Args:
        track: Whose features are matched.
        other: Where they are looked for, among the features that live.

    Returns:
        Indices and cosines ``[d_sae]``, and what 95 % of random directions (512, seed 0) stay below; None unless both
        are of one LLM and equally wide, so that there is one space.
    """
    if any(track.facts[name] != other.facts[name] for name in ("model", "d_in")):
        return None
    living = np.flatnonzero(alive(Results(other))[:, -1])
    if not len(living):
        return None
    rows, targets = (normalize(t[-1].tensor("W_dec").float(), dim=-1) for t in (track, other))
    random = torch.randn(512, rows.shape[1], generator=torch.Generator().manual_seed(0))
    best = [(part @ targets[living].T).max(dim=1) for part in (*torch.split(rows, 1024), normalize(random, dim=-1))]
    places, cosines = (torch.cat([getattr(b, name) for b in best]).numpy() for name in ("indices", "values"))
    return living[places[: len(rows)]], cosines[: len(rows)], float(np.quantile(cosines[len(rows) :], 0.95))


def life(results: Results) -> NDArray[np.uint8]:
    """How alike every feature is to itself at the checkpoint before, ``[d_sae, T]``.

    Returns:
        0 where it is dead, else 1 + 254 times the functional correlation; a negative one is 0, and so is that of a
        feature that was dead before. 255 at the first checkpoint, and where the track has no correlations.
    """
    same, lives = results.snapshot_grid("functional_correlation"), alive(results)
    if same is None:
        same = np.ones(lives.shape)
    level = 1 + np.rint(254 * np.nan_to_num(same, nan=0.0).clip(0, 1))
    level[:, 0] = 255
    strip: NDArray[np.uint8] = (lives * level).astype(np.uint8)
    return strip


@dataclass
class Curves:
    """The figures of a feature's page, and their values ``[d_sae, T]`` float32 by key."""

    figures: list[dict[str, Any]] = field(default_factory=list)
    values: dict[str, Floats] = field(default_factory=dict)

    def add(self, title: str, y: str, lines: list[tuple[str, Floats | None, bool]], **more: Any) -> None:
        """Add a figure of (name, values, whether it is a null), unless none of the lines that are no null is there."""
        here = [(name, values, null) for name, values, null in lines if values is not None]
        if all(null for _, _, null in here):
            return
        number = len(self.figures)
        specs = []
        for place, (name, values, null) in enumerate(here):
            key = f"curve{number}.{place}"
            self.values[key] = np.asarray(values, dtype=np.float32)
            specs.append({"name": name, "key": key, "null": null})
        self.figures.append({"title": title, "y": y, "lines": specs, **more})

    def band(self, low: Floats | None, high: Floats | None, text: str) -> None:
        """Put a band about the last figure's first line, unless its edges ``[d_sae, T]`` are not known."""
        if low is not None and high is not None:
            line = self.figures[-1]["lines"][0]
            line |= {"low": f"{line['key']}.low", "high": f"{line['key']}.high", "band": text}
            self.values[line["low"]] = np.asarray(low, dtype=np.float32)
            self.values[line["high"]] = np.asarray(high, dtype=np.float32)

    def null(
        self, name: str, values: Floats | None, edges: tuple[Floats, Floats] | None = None, text: str = ""
    ) -> None:
        """Give the last figure a null that is the same for all features, ``[T]``, with its band; none if not known."""
        if values is not None:
            null: dict[str, Any] = {"name": name, "values": plain(values)}
            if edges is not None:
                null |= {"low": plain(edges[0]), "high": plain(edges[1]), "band": text}
            self.figures[-1]["null"] = null

    def of(self, feature: int) -> list[dict[str, Any]]:
        """The figures of one feature with the values of its lines, as the page's JavaScript fills them.

        Args:
            feature: Its index.

        Returns:
            The figures; a line has ``name``, ``null``, ``values`` ``[T]``, and where known ``low``, ``high``, ``band``.
        """
        filled = []
        for figure in self.figures:
            lines: list[dict[str, Any]] = []
            for line in figure["lines"]:
                values = self.values[line["key"]][feature]
                edges = {}
                if "band" in line:
                    edges = {end: self.values[line[end]][feature] for end in ("low", "high")} | {"band": line["band"]}
                lines.append({"name": line["name"], "null": line["null"], "values": values, **edges})
            if "null" in figure:
                lines.append(figure["null"] | {"null": True})
            filled.append(figure | {"lines": lines})
        return filled


def curves(results: Results) -> Curves:
    """The curves of every feature, those whose analysis is there.

    Args:
        results: The track's analyses.
    """
    figures = Curves()
    _progress(results, figures)
    firing = results.snapshot_grid("firing_frequency")
    figures.add("Firing frequency", "share of positions", [("feature", firing, False)], domain=(0, None), percent=True)
    if firing is not None:
        _firing_bands(results, figures, firing)
    same = results.snapshot_grid("functional_correlation")
    figures.add(
        "Same feature as before?",
        "functional correlation",
        [("with the checkpoint before", same, False)],
        domain=(None, 1),
    )
    figures.null("median where the LLM did not change", results.curve("drift", "calibration", "correlation_null"))
    near = _first_of(results, "decoder_to_previous_without_rotation", "decoder_to_previous")
    raw = results.grid("drift", "drift", "decoder_to_previous")
    figures.add(
        ADJACENT_DRIFT,
        "1 - cosine with the row before",
        [
            ("without the common rotation", _one_minus(near), False),
            ("as it is", _one_minus(raw), True),
            ("where the LLM did not change", results.grid("drift", "excess", "drift_null"), True),
        ],
        domain=(0, None),
    )
    walk = _first_of(results, "decoder_to_last_without_rotation_if_random_walk", "decoder_to_last_if_random_walk")
    way = _first_of(results, "decoder_to_last_without_rotation", "decoder_to_last")
    figures.add(
        WAY_TO_LAST,
        "cosine with the last row",
        [("feature", way, False), ("if its turns were independent", walk, True)],
        domain=(None, 1),
    )
    entropy = ("semantics", "features")
    tokens, shuffled = (results.grid(*entropy, name) for name in ("n_eff", "n_eff_shuffled"))
    lines = [("feature", tokens, False), ("tokens shuffled", shuffled, True)]
    figures.add("Tokens it answers to", "effective number of tokens", lines, domain=(0, None))
    return figures


def _firing_bands(results: Results, figures: Curves, firing: Floats) -> None:
    """How well a share of the evaluation positions is known, and what is usual."""
    of = np.array([snapshot.metadata.get("evaluation_tokens") or 0 for snapshot in results.track])
    if (of > 0).all():
        _, low, high = share_interval(np.rint(firing * of).astype(np.int64), of)
        figures.band(low, high, "95 % interval, if positions were independent")
    living = np.where(firing > 0, firing, np.nan)
    known = np.isfinite(living).any(axis=0)
    quartiles = np.full((3, firing.shape[1]), np.nan)
    quartiles[:, known] = np.nanquantile(living[:, known], (0.25, 0.5, 0.75), axis=0)
    figures.null("living features", quartiles[1], (quartiles[0], quartiles[2]), "their quartiles")


def _progress(results: Results, figures: Curves) -> None:
    for column, error_column, measure in PROGRESS:
        values = results.grid("formation", "formation", column)
        if values is None:
            continue
        figures.add("Progress of formation", "likeness of its positions", [("feature", values, False)], marks="formed")
        error = results.grid("formation", "formation", error_column)
        if error is not None:
            figures.band(values - 1.96 * error, values + 1.96 * error, "95 % interval")
        low, high = (results.curve("formation", "population", f"null_{end}", measure) for end in ("low", "high"))
        if low is not None and high is not None:
            figures.null("random positions", (low + high) / 2, (low, high), "95 % of random sets")
        return


def _first_of(results: Results, *names: str) -> NDArray[Any] | None:
    return next((grid for name in names if (grid := results.grid("drift", "drift", name)) is not None), None)


def _one_minus(values: Floats | None) -> Floats | None:
    return None if values is None else 1 - values


def _lowest(values: Floats) -> Floats:
    lowest: Floats = np.fmin.reduce(values, axis=1)  # NaN only where all are
    return lowest


def _mean(values: Floats) -> Floats:
    known = np.isfinite(values)
    count = known.sum(axis=1)
    total = np.where(known, values, 0).sum(axis=1)
    mean: Floats = np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)
    return mean
