"""Do the instruments find what was planted? Fits, controls and analyses planted series, and prints a table.

python benchmarks/validation.py FOLDER --repeats 3              about four minutes a repeat on one core
python benchmarks/validation.py FOLDER --repeats 3 --controls   about eight: drift of the whole series by energy too

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
from validation_rows import HEADER, Row, line

from saetrack import Track
from saetrack.analysis import AnalysisResult
from saetrack.analysis.drift_rows import transport_into
from saetrack.cli import main as saetrack
from saetrack.track import Snapshot

Floats = NDArray[np.floating]

MATCHED = 0.9  # cosine above which a latent is a planted feature
KEPT = 0.5  # functional correlation above which a latent goes on meaning the same
NESTED = 0.99  # a feature that fires with a certain other one this often is nested in it
DOCUMENTS = 15_000
STEPS = (0, 1, 2, 4, 8, 16, 32, 64)
DRIFT = 0.2


def fit_arguments(
    series: Path, run: Path, tokens: tuple[int, int] = (500_000, 200_000), warm_start: str = "transported"
) -> list[str]:
    """What is typed to follow a planted series.

    The SAE and its recipe were chosen on seed 0: with fewer tokens it ends in worse minima, which
    hold sums of planted features. Under ``transported`` no latent was seen to keep a swapped direction,
    so identity after a swap is judged under ``prior``.
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
        "--model.optimizer.lr=1e-2",
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


def recall(track: Track, truth: Truth, nested: bool) -> Row:
    """Planted features of the last checkpoint that some latent is; with ``nested``, all of them.

    A nested feature never fires without a certain other one, so the sum of the two is as good a direction as its own:
    it takes one latent where both fire, and the planted dictionary takes two.
    """
    position = truth.plan.steps.index(track[-1].step)
    planted = truth.amplitudes[position] > 0
    if not nested:
        fires = truth.latents(position, track.tokens("evaluation").tokens)[:, 1:].reshape(-1, len(planted)) > 0
        together = fires.T.astype(np.float64) @ fires / np.maximum(fires.sum(axis=0), 1)[:, None]
        np.fill_diagonal(together, 0)
        planted &= together.max(axis=1) < NESTED
    found = np.isin(np.flatnonzero(planted), matches(track[-1], truth))
    what = "recall of planted features" if nested else "recall of those that are nested in no other"
    return Row(f"{what} (max cosine >= {MATCHED})", ">= 0.95 at FVU <= 0.1", int(found.sum()), len(found))


def followed(track: Track, truth: Truth, t: int) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Latents that are one planted feature in snapshots t - 1 and t, and which one."""
    before, here = matches(track[t - 1], truth), matches(track[t], truth)
    latents = np.flatnonzero((before >= 0) & (before == here))
    return latents, here[latents]


def planted_drift(track: Track, truth: Truth, t: int) -> tuple[Floats, Floats]:
    """Each feature's own drift into snapshot t, and what is left of it once the stage's map has been applied.

    The map is fitted to activations, and all that it can explain of them it does, so also movements that features
    made on their own.

    Returns:
        ``[F]`` each.
    """
    position = truth.plan.steps.index(track[t].step)
    own = truth.own_drift()[position]
    transport = transport_into(track[t])
    if transport is None:
        return own, own
    turned = truth.directions[position - 1] @ transport
    return own, 1 - (turned * truth.directions[position]).sum(axis=1)


def map_leaves(track: Track, truth: Truth) -> Row:
    """Share of the planted drift that the maps between activations leave, where no feature begins, ends or is swapped.

    There the map also follows what came or went.
    """
    own, left, here = [], [], truth.amplitudes
    for t in range(1, len(track)):
        if t == truth.plan.half or (here[t - 1] != here[t]).any():
            continue
        features = followed(track, truth, t)[1]
        both = planted_drift(track, truth, t)
        own.append(both[0][features])
        left.append(both[1][features])
    ratio = float(np.concatenate(left).mean() / np.concatenate(own).mean())
    return Row("(planted drift that the transport maps leave)", "-", float("nan"), sum(map(len, own)), ratio)


def energy_recovered(track: Track, truth: Truth) -> Row:
    """The drift that the LLM made, by the controls, over what the map left of that planted in the same latents."""
    path = track.analyses_dir / "drift" / "excess.parquet"
    start = "no rotation, prior" if transport_into(track[1]) is None else "of what the transport maps leave"
    what, energy, planted = f"planted drift recovered ({start}; energy, by null steps and replicas)", [], []
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
        planted.append(planted_drift(track, truth, t)[1][features[counts]])
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
        recall(track, truth, nested=True),
        recall(track, truth, nested=False),
        formed_coverage(track, truth),
        false_formed(track),
        token_classes(track, truth),
        false_concepts(track),
        energy_recovered(*swap),
        map_leaves(track, truth),
        energy_recovered(track, truth),
        *(identity(*swap, swapped) for swapped in (False, True)),
    ]


def swapped_series(folder: Path, seed: int) -> tuple[Track, Truth]:
    """Two checkpoints without a rotation, followed with ``prior``, at the second of which the swap happens."""
    series, run = folder / f"swap-llm-{seed}", folder / f"swap-run-{seed}"
    plan = Plan((0, 1), seed, DOCUMENTS, rotation=0.0, drift=(DRIFT,), formed_at_init=1.0, dying=0.0)
    follow(plan, series, run, "prior", ["Drift"], controls=True)
    return Track.open(run), Truth.load(series)


def full_series(folder: Path, seed: int, controls: bool) -> tuple[Track, Truth]:
    """All checkpoints, with rotation, drift and onsets."""
    series, run = folder / f"llm-{seed}", folder / f"run-{seed}"
    plan = Plan(STEPS, seed, DOCUMENTS, drift=(DRIFT,))
    follow(plan, series, run, "transported", ["Drift", "Formation", "Semantics"], controls)
    return Track.open(run), Truth.load(series)


def follow(plan: Plan, series: Path, run: Path, warm_start: str, analyses: list[str], controls: bool) -> None:
    """Plant a series, follow it, make its controls if asked to, and analyse it; what is there is not made again."""
    if not (series / "truth.json").is_file():
        plant(series, plan)
    sys.argv = ["saetrack"]  # LightningCLI warns of arguments beside those it is given
    command([*fit_arguments(series, run, warm_start=warm_start), "--ckpt_path=last"])
    for kind in ("null", "replica") if controls else ():
        command(["control", str(run), f"--kind={kind}", "--replicas=2"])
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
    parser.add_argument("--controls", action="store_true", help="null and replica controls of the whole series too")
    options = parser.parse_args()
    repeats = []
    for seed in range(options.repeats):
        repeats.append(rows(*full_series(options.folder, seed, options.controls), swapped_series(options.folder, seed)))
        for row in repeats[-1]:
            sys.stderr.write(json.dumps({"seed": seed, **vars(row)}) + "\n")
    lines = [HEADER, *(line(of_row) for of_row in zip(*repeats, strict=True))]
    (options.folder / "validation.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
