"""Do the instruments find what was planted? Fits, controls and analyses planted series, and prints a table.

python benchmarks/validation.py FOLDER --repeats 3

Every repeat is a series of its own seed (benchmarks/planted.py) with the ordinary commands run on it; one that is there
already is read and not trained again. The table's counts are over all repeats; the interval is Wilson's,
95 %, as if the cases were independent, though features of one series share a fit.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from planted import HOOKPOINT, Plan, Truth, plant
from validation_rows import Row, table

from saetrack import Track
from saetrack.cli import main as saetrack
from saetrack.track import Snapshot

MATCHED = 0.9  # cosine above which a latent is a planted feature
KEPT = 0.5  # functional correlation above which a latent goes on meaning the same
STEPS = (0, 1, 2, 4, 8, 16, 32, 64)
DRIFT = 0.2


def fit_arguments(
    series: Path, run: Path, tokens: tuple[int, int] = (200_000, 100_000), warm_start: str = "transported"
) -> list[str]:
    """What is typed to follow a planted series.

    Under ``transported`` no latent was seen to keep a swapped direction, so identity after a swap is judged under
    ``prior``.
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
        "--model.sae.expansion_factor=1",
        "--model.sae.k=2",
        "--model.continuity=0",
        "--model.optimizer.lr=3e-3",
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
    what = f"recall of planted features (FVU {track[-1].metadata['fvu']:.3f}, max cosine >= 0.9)"
    return Row(what, ">= 0.95 at FVU <= 0.1", int(found.sum()), len(found))


def followed(track: Track, truth: Truth, t: int) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Latents that are one planted feature in snapshots t - 1 and t, and which one."""
    before, here = matches(track[t - 1], truth), matches(track[t], truth)
    latents = np.flatnonzero((before >= 0) & (before == here))
    return latents, here[latents]


def drift_recovered(track: Track, truth: Truth, measure: str) -> Row:
    """Drift without the common rotation over the planted drift, both means over features and transitions."""
    path = track.analyses_dir / "drift" / "drift.parquet"
    what = f"planted drift recovered ({measure})"
    if not path.is_file():
        return Row(what, "0.9-1.1", float("nan"), 0)
    table = pd.read_parquet(path).set_index(["step", "feature"])
    estimate, planted = [], []
    for t in range(1, len(track)):
        latents, features = followed(track, truth, t)
        estimate.append(1 - table.loc[track[t].step, measure].loc[latents].to_numpy())
        planted.append(truth.own_drift()[truth.plan.steps.index(track[t].step), features])
    known = np.isfinite(np.concatenate(estimate))
    means = [np.concatenate(part)[known].mean() for part in (estimate, planted)]
    return Row(what, "0.9-1.1", float("nan"), int(known.sum()), float(means[0] / means[1]))


def energy_recovered(track: Track, truth: Truth) -> Row:
    """The drift that the LLM made, by the controls, over the planted drift of the same latents."""
    path = track.analyses_dir / "drift" / "excess.parquet"
    what, energy, planted = "planted drift recovered (energy, by null steps and replicas)", [], []
    if not path.is_file():
        return Row(what, "0.9-1.1", float("nan"), 0)
    table = pd.read_parquet(path).set_index(["step", "feature"])["energy"]
    for t in range(1, len(track)):
        if track[t].step not in table.index.get_level_values("step"):
            continue
        latents, features = followed(track, truth, t)
        of_step = table.loc[track[t].step]
        counts = np.isin(latents, of_step.index)
        energy.append(of_step.loc[latents[counts]].to_numpy())
        planted.append(truth.own_drift()[truth.plan.steps.index(track[t].step), features[counts]])
    if not energy or not np.isfinite(np.concatenate(energy)).any():
        return Row(what, "0.9-1.1", float("nan"), 0)
    ratio = np.concatenate(energy).mean() / np.concatenate(planted).mean()
    return Row(what, "0.9-1.1", float("nan"), len(np.concatenate(energy)), float(ratio))


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
    """Intervals of the formed step that hold the planted onset, which lies between two checkpoints."""
    what, must = "coverage of the 95 % interval of tau", "0.90-0.98"
    path = track.analyses_dir / "formation" / "features.parquet"
    table = pd.read_parquet(path) if path.is_file() else pd.DataFrame()
    if not {"formed_low", "formed_high", "status"} <= set(table):
        return Row(what, must, float("nan"), 0)
    found = matches(track[-1], truth)
    latents = table.loc[(table["status"] == "formed") & (found[table["feature"]] >= 0)]
    onset = truth.onset[found[latents["feature"]]]
    steps = np.array(truth.plan.steps)
    late = onset > 0
    before, at = steps[onset[late] - 1], steps[onset[late]]
    held = (latents["formed_low"].to_numpy()[late] <= at) & (latents["formed_high"].to_numpy()[late] >= before)
    return Row(what, must, int(held.sum()), int(late.sum()))


def row_makers() -> list[Callable[[Track, Truth], Row]]:
    """The rows, in the issue's order."""
    return [
        recall,
        formed_coverage,
        lambda track, truth: drift_recovered(track, truth, "decoder_to_previous_without_rotation"),
        energy_recovered,
    ]


def swapped_series(folder: Path, seed: int) -> tuple[Track, Truth]:
    """Two checkpoints without a rotation, followed with ``prior``, at the second of which the swap happens."""
    series, run = folder / f"swap-llm-{seed}", folder / f"swap-run-{seed}"
    if not (series / "truth.json").is_file():
        plant(series, Plan((0, 1), seed=seed, rotation=0.0, formed_at_init=1.0, dying=0.0))
    command([*fit_arguments(series, run, warm_start="prior"), "--ckpt_path=last"])
    return Track.open(run), Truth.load(series)


def run_series(folder: Path, seed: int) -> tuple[Track, Truth]:
    """Plant a series, follow it, make its controls and analyse it; what is there is not made again."""
    series, run = folder / f"llm-{seed}", folder / f"run-{seed}"
    if not (series / "truth.json").is_file():
        plant(series, Plan(STEPS, seed=seed, drift=(DRIFT,)))
    sys.argv = ["saetrack"]  # LightningCLI warns of arguments beside those it is given
    command([*fit_arguments(series, run), "--ckpt_path=last"])
    for kind in ("null", "replica"):
        command(["control", str(run), f"--kind={kind}", "--replicas=2"])
    command(["analyze", str(run), "--analyses+=Drift", "--analyses+=Formation"])
    return Track.open(run), Truth.load(series)


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
    options = parser.parse_args()
    repeats = []
    for seed in range(options.repeats):
        track, truth = run_series(options.folder, seed)
        swap = swapped_series(options.folder, seed)
        repeats.append([make(track, truth) for make in row_makers()] + [identity(*swap, s) for s in (False, True)])
        for row in repeats[-1]:
            sys.stderr.write(json.dumps({"seed": seed, **vars(row)}) + "\n")
    (options.folder / "validation.md").write_text(table(repeats) + "\n", encoding="utf-8")
    print(table(repeats))


if __name__ == "__main__":
    main()
