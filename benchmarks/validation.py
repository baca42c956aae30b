"""Do the instruments find what was planted? Fits, controls and analyses planted series, and prints a table.

python benchmarks/validation.py FOLDER --repeats 4              about four minutes a repeat on one core
python benchmarks/validation.py FOLDER --repeats 4 --controls   about eight: drift of the whole series by energy too

The rows that need no trained SAE are in benchmarks/validation_simulated.py.

Every repeat is a series of its own seed (benchmarks/planted.py) with the ordinary commands run on it; one that is there
already is read and not trained again. The table's counts are over all repeats; the interval is Wilson's,
95 %, as if the cases were independent, though features of one series share a fit.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from planted import HOOKPOINT, Plan, Truth, plant
from validation_rows import HEADER, Row, line, ratio_row

from saetrack import Track
from saetrack.analysis import AnalysisResult
from saetrack.analysis.drift_rows import transport_into
from saetrack.cli import main as saetrack
from saetrack.track import Snapshot

Floats = NDArray[np.floating]

MATCHED = 0.9  # cosine above which a latent is a planted feature
KEPT = 0.5  # functional correlation above which a latent goes on meaning the same
DOCUMENTS = 15_000
STEPS = (0, 1, 2, 4, 8, 16, 32, 64)
DRIFT = 0.2
CONTROLLED = [3, 6, 7]  # stages of the whole series with controls; features begin in the first


def fit_arguments(
    series: Path, run: Path, tokens: tuple[int, int] = (500_000, 200_000), warm_start: str = "transported"
) -> list[str]:
    """What is typed to follow a planted series.

    The SAE and its recipe were chosen on the last LLM checkpoint of seed 0 (benchmarks/planted_recall.py): with fewer
    latents it ends in worse minima, which hold sums of planted features. Under ``transported`` no latent was seen to
    keep a swapped direction, so identity after a swap is judged under ``prior``.
    """
    return [
        "fit",
        "--seed_everything=0",
        f"--scheduler.track_dir={run}",
        f"--scheduler.warm_start={warm_start}",
        f"--scheduler.tokens_first={tokens[0]}",
        f"--scheduler.tokens_next={tokens[1]}",
        "--data.source=FolderSource",
        f"--data.source.path={series}",
        f"--data.hookpoints=[{HOOKPOINT}]",
        "--data.corpus=TextCorpus",
        f"--data.corpus.paths=[{series}/corpus.txt]",
        "--data.corpus.separator=\n",
        "--data.batch_size=256",
        "--data.chunk_tokens=16384",
        "--data.tokens.context_size=64",
        "--data.tokens.split_share=0.1",
        "--data.tokens.calibration_tokens=16384",
        "--data.tokens.selection_tokens=16384",
        "--data.tokens.evaluation_tokens=16384",
        "--data.tokens.ce_tokens=1000",
        "--data.tokens.held_out_tokens=4096",
        f"--data.tokens.cache_dir={series}/tokens",
        "--model.sae=BatchTopKSAE",
        "--model.sae.expansion_factor=8",
        "--model.sae.k=2",
        "--model.continuity=0",
        "--model.optimizer.lr=6e-3",
        "--model.optimizer.warmup_tokens=5000",
        "--model.dead_after_tokens=20000",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
    ]


def matches(snapshot: Snapshot, truth: Truth) -> NDArray[np.integer]:
    """The planted feature that each latent's decoder row is, ``[d_sae]``; -1 where it is none or is dead."""
    rows = snapshot.tensor("W_dec").numpy()
    position = truth.plan.steps.index(snapshot.step)
    cosines = rows @ truth.directions[position].T / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines[:, truth.amplitudes[position] == 0] = -1
    found = (cosines.max(axis=1) >= MATCHED) & ~snapshot.features["dead"].to_numpy(dtype=bool)
    return np.where(found, cosines.argmax(axis=1), -1)


def recall(track: Track, truth: Truth) -> Row:
    """Planted features of the last checkpoint that some latent is."""
    planted = truth.amplitudes[truth.plan.steps.index(track[-1].step)] > 0
    found = np.isin(np.flatnonzero(planted), matches(track[-1], truth))
    what = f"recall of planted features (max cosine >= {MATCHED})"
    return Row(what, ">= 0.95 at FVU <= 0.1", int(found.sum()), len(found))


def followed(track: Track, truth: Truth, t: int) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Latents that are one planted feature in snapshots t - 1 and t, and which one."""
    before, here = matches(track[t - 1], truth), matches(track[t], truth)
    latents = np.flatnonzero((before >= 0) & (before == here))
    return latents, here[latents]


def map_leaves(track: Track, truth: Truth) -> Row:
    """Share of the planted drift that the maps between activations leave, where no feature begins, ends or is swapped.

    The map explains what it can of the activations, so also movements that features made on their own. Where a feature
    comes or goes it also follows that.
    """
    own, left = [], []
    for t in range(1, len(track)):
        transport = transport_into(track[t])
        if transport is None or not is_calm(truth, t):
            continue
        features = followed(track, truth, t)[1]
        turned = truth.directions[t - 1, features] @ transport
        own.append(truth.own_drift()[t, features])
        left.append(1 - (turned * truth.directions[t, features]).sum(axis=1))
    return ratio_row("(planted drift that the transport maps leave)", "-", *map(np.concatenate, (left, own)))


def is_calm(truth: Truth, t: int) -> bool:
    """Whether no planted feature begins, ends or is swapped on entering checkpoint ``t``: each only turns."""
    return t != truth.plan.half and not ((truth.amplitudes[t - 1] > 0) != (truth.amplitudes[t] > 0)).any()


def energy_recovered(track: Track, truth: Truth, calm: bool) -> Row:
    """The drift that the LLM made, by the controls, over the planted drift of the same latents.

    Where features begin, end or are swapped, latents that hold a part of their directions move too, which is drift that
    the LLM made and no turn of a feature: there the ratio says how much that is, and has no bar.

    Args:
        track: With null and replica controls.
        truth: What was planted.
        calm: Whether only stages count in which features turn and nothing else happens, or only the others.
    """
    start = "prior, no rotation" if transport_into(track[1]) is None else "transported"
    what = f"planted drift recovered (energy; {start})"
    if not calm:
        what = f"(the same where features {'begin' if len(track) > 2 else 'are swapped'}; {start})"
    path, energy, planted = track.analyses_dir / "drift", [np.zeros(0)], [np.zeros(0)]
    if (path / "excess.parquet").is_file():
        table = pd.read_parquet(path / "excess.parquet").set_index(["step", "feature"])["energy"]
        for step in pd.read_parquet(path / "calibration.parquet")["step"]:
            t = track.steps.index(step)
            if is_calm(truth, t) != calm:
                continue
            latents, features = followed(track, truth, t)
            counts = np.isin(latents, table.loc[step].index)
            energy.append(table.loc[step].loc[latents[counts]].to_numpy())
            planted.append(truth.own_drift()[t, features[counts]])
    return ratio_row(what, "0.9-1.1" if calm else "-", np.concatenate(energy), np.concatenate(planted))


def identity(track: Track, truth: Truth, swapped: bool) -> Row:
    """Latents that keep a feature's direction into the half-way checkpoint: is their correlation with before right?"""
    t = truth.plan.half
    latents, features = followed(track, truth, t)
    correlation = track[t].features["functional_correlation"].to_numpy()[latents]
    correlation = correlation[(truth.partner[features] != features) == swapped]
    right = correlation < KEPT if swapped else correlation >= KEPT
    what = "swapped features: identity lost" if swapped else "features whose meaning stays: identity kept"
    return Row(f"{what} (functional correlation, {KEPT})", ">= 0.95", int(right.sum()), len(correlation))


def formed_coverage(track: Track, truth: Truth) -> Row:
    """Intervals of the formed step that meet the planted one, which lies between two checkpoints."""
    table = pd.read_parquet(track.analyses_dir / "formation" / "features.parquet")
    found = matches(track[-1], truth)
    latents = table.loc[(table["status"] == "formed") & (found[table["feature"]] >= 0)]
    onset = truth.onset[found[latents["feature"]]]
    steps = np.array(truth.plan.steps)
    late = onset > 0
    before, at = steps[onset[late] - 1], steps[onset[late]]
    held = (latents["formed_low"].to_numpy()[late] <= at) & (latents["formed_high"].to_numpy()[late] >= before)
    return Row("interval of tau meets the planted interval", "0.90-0.98", int(held.sum()), int(late.sum()))


def false_formed(track: Track) -> Row:
    """Random positions with features' tokens that are called formed."""
    status = AnalysisResult.load(track.analyses_dir / "formation").settings["status_of_false_features"]
    return Row("false formed on false features", "<= 0.05", status.get("formed", 0), sum(status.values()))


def token_classes(track: Track, truth: Truth) -> Row:
    """Latents of single-token features that semantics calls so at the last checkpoint."""
    table = pd.read_parquet(track.analyses_dir / "semantics" / "features.parquet")
    last = table[table["step"] == track[-1].step].set_index("feature")["class"]
    found = matches(track[-1], truth)
    tokens = [f for f in last.index if found[f] >= 0 and truth.kinds[found[f]] == "token"]
    return Row("planted token features called token", ">= 0.9", int((last.loc[tokens] == "token").sum()), len(tokens))


def false_concepts(track: Track) -> Row:
    """Latents that semantics would call concepts if the text were permuted under them."""
    result = AnalysisResult.load(track.analyses_dir / "semantics")
    last = result.tables["classes"].tail(result.tables["classes"]["class"].nunique())
    count = int(last["features"].sum())
    share = result.settings["false_concept_share"]
    return Row("false concepts on token-permuted text", "<= 0.05", round(share * count), count)


def rows(track: Track, truth: Truth, swap: tuple[Track, Truth]) -> list[Row]:
    """The rows of one repeat, in the issue's order."""
    return [
        Row("(FVU at the last checkpoint)", "<= 0.1", float("nan"), 1, float(track[-1].metadata["fvu"])),
        recall(track, truth),
        formed_coverage(track, truth),
        false_formed(track),
        token_classes(track, truth),
        false_concepts(track),
        energy_recovered(track, truth, calm=True),
        energy_recovered(track, truth, calm=False),
        energy_recovered(*swap, calm=False),
        map_leaves(track, truth),
        *(identity(*swap, swapped) for swapped in (False, True)),
    ]


def swapped_series(folder: Path, seed: int) -> tuple[Track, Truth]:
    """Two checkpoints without a rotation, followed with ``prior``, at the second of which the swap happens."""
    series, run = folder / f"swap-llm-{seed}", folder / f"swap-run-{seed}"
    plan = Plan((0, 1), seed, DOCUMENTS, rotation=0.0, drift=(DRIFT,), formed_at_init=1.0, dying=0.0)
    follow(plan, series, run, "prior", ["Drift"], positions=[1])
    return Track.open(run), Truth.load(series)


def full_series(folder: Path, seed: int, controls: bool) -> tuple[Track, Truth]:
    """All checkpoints, with rotation, drift and onsets."""
    series, run = folder / f"llm-{seed}", folder / f"run-{seed}"
    plan = Plan(STEPS, seed, DOCUMENTS, drift=(DRIFT,))
    follow(plan, series, run, "transported", ["Drift", "Formation", "Semantics"], CONTROLLED if controls else [])
    return Track.open(run), Truth.load(series)


def follow(plan: Plan, series: Path, run: Path, warm_start: str, analyses: list[str], positions: list[int]) -> None:
    """Plant a series, follow it, make controls of some stages, and analyse it; what is there is not made again."""
    if not (series / "truth.json").is_file():
        plant(series, plan)
    sys.argv = ["saetrack"]  # LightningCLI warns of arguments beside those it is given
    command([*fit_arguments(series, run, warm_start=warm_start), "--ckpt_path=last"])
    for kind in ("null", "replica") if positions else ():
        command(["control", str(run), f"--kind={kind}", f"--positions={positions}", "--replicas=2"])
    command(["analyze", str(run), *(f"--analyses+={name}" for name in analyses)])


def command(arguments: list[str]) -> None:
    """Run a command of saetrack in this process."""
    try:
        saetrack(arguments)
    except SystemExit as stopped:  # fit leaves so when the track was complete
        if stopped.code:
            raise


def main() -> None:
    """Write the table to standard output, and one JSON line for each row and repeat to standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="seed of the first repeat")
    parser.add_argument("--controls", action="store_true", help="null and replica controls of the whole series too")
    options = parser.parse_args()
    repeats = []
    for seed in range(options.first, options.first + options.repeats):
        repeats.append(rows(*full_series(options.folder, seed, options.controls), swapped_series(options.folder, seed)))
        for row in repeats[-1]:
            sys.stderr.write(json.dumps({"seed": seed, **vars(row)}) + "\n")
    lines = [HEADER, *(line(of_row) for of_row in zip(*repeats, strict=True))]
    (options.folder / "validation.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
