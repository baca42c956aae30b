"""Do the instruments find what was planted? The rows that need neither an LLM nor the training of an SAE.

PYTHONPATH=. python benchmarks/validation_simulated.py              all rows, about ten minutes on one core
PYTHONPATH=. python benchmarks/validation_simulated.py drift phases only these

Dictionaries, tables, activations or latents are planted (tests/unit/analysis/planted*.py), the analysis runs on them as
it does for a user, and its answer is compared with the plant, many times over, each repeat with a seed of its own. The
rows on trained SAEs are in benchmarks/validation.py. tests/unit/analysis/test_validation.py runs each row with fewer
repeats.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from validation_rows import HEADER, Row, line

from saetrack.analysis.dictionaries import Dictionaries
from saetrack.analysis.drift_controls import calibrate
from saetrack.analysis.drift_geometry import procrustes, unit_rows
from saetrack.analysis.figures import step_position
from saetrack.analysis.formation import Formation
from saetrack.analysis.formation_times import crossing_times
from saetrack.analysis.phases import Phases
from saetrack.analysis.semantics import Semantics
from tests.unit.analysis.planted import STEPS, PlantedFeature, PlantedSeries, rising, sweep
from tests.unit.analysis.planted_rates import EVEN, Rates, plant_rates, track_with_chain
from tests.unit.analysis.planted_text import CLASS_OF, PlantedText, observe
from tests.unit.analysis.planted_track import Displacements, planted_stage, random_rows, tangent, write_track

Floats = NDArray[np.floating]

ARMS = ((0, 2), (1, 2), (2, 3))
"""Replica and null controls; `saetrack control` makes two of each by default."""


def null_excess(folder: Path, arms: tuple[int, int], repeats: int, learning: float = 0.03) -> list[Row]:
    """Stages in which the LLM did nothing, though training once more still moves every row by ``learning``."""
    held = np.zeros(2)
    for seed in range(repeats):
        moves = Displacements(llm=0.0, learning=learning)
        track = planted_stage(folder / f"null-{arms}-{seed}", np.random.default_rng([seed, *arms]), arms, moves)
        found = calibrate(track).stages.iloc[0]
        held += [found["excess_low"] <= 0 <= found["excess_high"], found["energy_low"] <= 0 <= found["energy_high"]]
    what = f"in a null chain the interval contains 0, {arms[0]} replicas and {arms[1]} nulls"
    rows = [Row(f"excess drift: {what}", ">= 0.90", held[0], repeats)]
    return [*rows, Row(f"energy: {what}", ">= 0.90", held[1], repeats)] if min(1 + arms[0], arms[1]) > 2 else rows


def drift_recovered(folder: Path, repeats: int) -> Row:
    """Energy over the planted displacement of the unit rows, which a rotation of the whole space turns too."""
    ratios = []
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        rotation = np.linalg.qr(rng.normal(size=(32, 32)))[0]
        moves = Displacements(llm=0.02, noise=0.01, learning=0.02)
        track = planted_stage(folder / f"drift-{seed}", rng, (2, 2), moves, rotation=rotation)
        found = calibrate(track).stages.iloc[0]
        # rows are scaled back to length 1: what arms have in common shrinks by the same factor
        shrunk = 1 / (1 + 2 * (moves.llm + moves.noise + moves.learning))
        ratios.append(found["energy"] / (moves.llm * shrunk))
    what = "planted drift recovered (energy; the space turned too)"
    return Row(what, "0.9-1.1", float("nan"), repeats, float(np.mean(ratios)))


def map_leaves(name: str, features: int, d_in: int, repeats: int) -> Row:
    """Share of displacements of features' own that a map between activations leaves, all features of like weight."""
    left = []
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        before = random_rows(rng, features, d_in)
        after = unit_rows(before + tangent(rng, before, 0.02))
        latents = rng.random((4000, features)) * (rng.random((4000, features)) < 2 / features)
        turned = before @ procrustes(latents @ before, latents @ after)
        left.append((1 - (turned * after).sum(axis=1)).mean() / (1 - (before * after).sum(axis=1)).mean())
    return Row(f"(planted drift that a transport map leaves, {name})", "-", float("nan"), repeats, float(np.mean(left)))


def drift_rows(folder: Path, repeats: int = 400) -> Iterator[Row]:
    """Excess drift and energy where the LLM did nothing, and where it did; what the map of activations takes away."""
    for arms in ARMS:
        yield from null_excess(folder, arms, repeats)
    yield drift_recovered(folder, repeats // 4)
    for features in (24, 32, 64, 128, 256):
        yield map_leaves(f"{features} features in 32 dimensions", features, 32, repeats // 20)


def dictionary_rows(folder: Path, repeats: int = 150, shape: tuple[int, int] = (128, 16)) -> Iterator[Row]:
    """PW-MCC of a permuted copy, and of independent dictionaries against their null."""
    permuted, near = 0, {"isotropic": 0, "spread unevenly": 0}
    pairs = 20
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        spread = {"isotropic": np.ones(shape[1]), "spread unevenly": np.geomspace(1, 0.05, shape[1])}
        for name, widths in spread.items():
            a, b = (unit_rows(random_rows(rng, *shape) * widths) for _ in range(2))
            track = write_track(folder / f"{name}-{seed}", [a, rng.permutation(a), b], (0, 1, 2))
            found = Dictionaries(random_pairs=pairs).run(track).tables["neighbours"]
            permuted += bool(abs(found["pw_mcc"].iloc[0] - 1) < 1e-5)
            # of one pair, and of the null: twice a mean over pairs less another
            error = found["null_sd"].iloc[1] * np.sqrt(1 + 5 / pairs)
            near[name] += bool(abs(found["pw_mcc"].iloc[1] - found["null"].iloc[1]) <= 2 * error)
    yield Row("permuted copy of a dictionary: PW-MCC 1", "1", permuted, 2 * repeats)
    what = "independent random dictionary within 2 SE of its null"
    for name, right in near.items():
        yield Row(f"{what}, {name}", ">= 0.9", right, repeats)


def phases_found(
    folder: Path, law: Rates, chain: Rates | None, repeats: int, null_steps: bool = False
) -> list[tuple[int, list[int]]]:
    """How many phases of the drift on the log-step axis, and at which LLM steps they change, in each repeat.

    Args:
        folder: Where to write.
        law: Of the track.
        chain: Of its null chain, if it has one.
        repeats: Number of series.
        null_steps: Whether it has null steps at four stages.
    """
    track = track_with_chain(folder, law.steps, chain is not None)
    analysis = Phases(replicates=20, permutations=200)
    found = []
    for seed in range(repeats):
        plant_rates(track, law, np.random.default_rng([seed, 0]), null_steps)
        if chain is not None:
            plant_rates(track.controls("null")[0], chain, np.random.default_rng([seed, 1]))
        tables = analysis.run(track).tables
        scores = tables["scores"].query("perspective == 'drift' and axis == 'log-step' and accepted")
        boundaries = tables["boundaries"].query("perspective == 'drift' and axis == 'log-step'")
        found.append((int(scores["phases"].item()), boundaries["step"].tolist()))
    return found


def one_phase(folder: Path, name: str, law: Rates, chain: Rates | None, repeats: int) -> Row:
    """How many series in which the LLM did nothing are found to have one phase."""
    right = sum(phases == 1 for phases, _ in phases_found(folder, law, chain, repeats))
    return Row(f"phases on a null chain: 1, {name}", ">= 0.95", right, repeats)


def three_phases(
    folder: Path, name: str, law: Rates, chain: Rates | None, repeats: int, null_steps: bool = False
) -> Row:
    """How many series of three regimes are found to have three, with both boundaries within one checkpoint."""
    planted = np.flatnonzero(np.diff(law.llm)) + 1
    right = 0
    for phases, steps in phases_found(folder, law, chain, repeats, null_steps):
        right += phases == 3 and bool((np.abs(np.searchsorted(law.steps, steps) - planted) <= 1).all())
    return Row(f"phases on three planted regimes: 3, boundaries within 1, {name}", ">= 0.90", right, repeats)


def phase_rows(folder: Path, repeats: int = 100) -> Iterator[Row]:
    """The number of phases of null chains and of planted regimes."""
    still, quiet = Rates.still(), Rates.still(level=0.0005)
    yield one_phase(folder / "own", "with a null chain of its own", still, still, repeats)
    yield one_phase(folder / "even", "without one, even steps", Rates.still(steps=EVEN), None, repeats)
    yield one_phase(folder / "pythia", "without one, Pythia's steps", still, None, repeats)
    for common in (0.05, 0.1, 0.2):
        name = f"noise of a checkpoint {common:.0%}"
        yield three_phases(folder / name, name, Rates.three(common), quiet, repeats)
    for null in (0.002, 0.01):
        name = f"noise 10 %, null steps of {null}"
        yield three_phases(folder / name, name, Rates.three(0.1, null), Rates.still(null), repeats, null_steps=True)
        name += ", at four stages and no chain"
        yield three_phases(folder / name, name, Rates.three(0.1, null), None, repeats, null_steps=True)


def formation_series(seed: int, documents: int, amplitude: float, width: float) -> PlantedSeries:
    """120 features of one law, half formed at LLM step 15, and 80 that never form, each on three of twelve tokens."""
    rng = np.random.default_rng([seed, 7])
    tokens = [tuple(int(t) for t in rng.choice(np.arange(1, 13), 3, replace=False)) for _ in range(200)]
    laws = [rising(15, width)] * 120 + [lambda step: 0.0] * 80
    features = tuple(PlantedFeature(t, 0.2, law) for t, law in zip(tokens, laws, strict=True))
    return PlantedSeries(features, documents=documents, amplitude=amplitude, seed=seed)


def formation_of(name: str, documents: int, amplitude: float, width: float, seeds: int) -> list[Row]:
    """Coverage of the intervals of the formed step, and how many that never form are called formed.

    The truth is the time of the mean curve of all seeds: every feature has the same law.
    """
    curves, tables, false = [], [], np.zeros(2, dtype=int)
    for seed in range(seeds):
        analysis = Formation(n_positions=40, draws=80, replicates=200)
        result = sweep(analysis, formation_series(seed, documents, amplitude, width).observation, STEPS)
        form = result.tables["formation"].query("feature < 120")
        curves.append(form.groupby("step")["progress_token"].mean().to_numpy())
        tables.append(result.tables["features"])
        status = result.settings["status_of_false_features"]
        false += status.get("formed", 0), sum(status.values())
    every = pd.concat(tables)
    formed = every.query("feature < 120 and status == 'formed'")
    axis, mean = step_position(STEPS), np.mean(curves, axis=0)[:, None]
    rows = []
    for share, column in ((0.5, "formed"), (0.9, "formed90")):
        truth = 10 ** crossing_times(mean, axis, share)[0] - 1
        covered = (formed[f"{column}_low"] <= truth) & (truth <= formed[f"{column}_high"].fillna(np.inf))
        what = f"coverage of the 95 % interval of tau at {share}, {name}"
        rows.append(Row(what, "0.90-0.98", int(covered.sum()), len(covered)))
    rows.append(Row(f"(features with a formed step, {name})", "-", len(formed), 120 * seeds))
    never = every.query("feature >= 120")["status"]
    claimed = never.isin(["formed", "not plateaued", "at-init"])
    rows.append(Row(f"false formed on features that never form, {name}", "<= 0.05", int(claimed.sum()), len(never)))
    return [*rows, Row(f"false formed on false features, {name}", "<= 0.05", int(false[0]), int(false[1]))]


def formation_rows(folder: Path, seeds: int = 8) -> Iterator[Row]:
    """Three strengths of features; with fewer documents nothing is called formed."""
    settings = ((300, 3.5, 0.15), (150, 3.5, 0.15), (150, 3.0, 0.3), (150, 4.0, 0.05), (80, 2.5, 0.3))
    for documents, amplitude, width in settings:
        name = f"{documents} documents, amplitude {amplitude}, width {width}"
        yield from formation_of(name, documents, amplitude, width, seeds)


def semantic_rows(folder: Path, seeds: int = 8) -> Iterator[Row]:
    """Classes of planted features, and how many are called concepts where there is none."""
    right, cases = dict.fromkeys(CLASS_OF, 0), dict.fromkeys(CLASS_OF, 0)
    false = features = 0
    for seed in range(seeds):
        text = PlantedText(seed)
        result = observe(Semantics(seed=seed), text)
        last = result.tables["features"].query("step == 1").set_index("feature")["class"]
        for kind, name in CLASS_OF.items():
            which = [f for f, planted in enumerate(text.kinds) if planted == kind]
            cases[kind] += len(which)
            right[kind] += int((last.reindex(which) == name).sum())
        counted = int((last != "insufficient").sum())
        features += counted
        false += round(result.settings["false_concept_share"] * counted)
    both = [kind for kind in CLASS_OF if kind in ("token", "concept")]
    what = "class accuracy, token against concept"
    yield Row(what, ">= 0.9", sum(right[k] for k in both), sum(cases[k] for k in both))
    for kind, name in CLASS_OF.items():
        yield Row(f"(planted {kind} called {name})", "-", right[kind], cases[kind])
    yield Row("false concepts on token-permuted text", "<= 0.05", false, features)


PARTS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "formation": formation_rows,
    "semantics": semantic_rows,
    "drift": drift_rows,
    "phases": phase_rows,
    "dictionaries": dictionary_rows,
}


def main() -> None:
    """Print the table, a row when it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all by default")
    chosen = parser.parse_args().parts or list(PARTS)
    if unknown := sorted(set(chosen) - set(PARTS)):
        parser.error(f"{', '.join(unknown)}: no such part; there are {', '.join(PARTS)}")
    print(HEADER)
    for part in chosen:
        with tempfile.TemporaryDirectory() as folder:
            for row in PARTS[part](Path(folder)):
                print(line([row]), flush=True)


if __name__ == "__main__":
    main()
