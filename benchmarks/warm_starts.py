"""What each way to begin a stage costs in FVU and keeps of the features' identity; writes docs/warm-starts.md.

make bench-warm-starts

The series is any folder of `saetrack pretrain`. A run that is there already is read and
not trained again, so the command may be stopped and given again. Each run prints one JSON line.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse

from saetrack import Track
from saetrack.analysis import figures
from saetrack.cli import main as saetrack
from saetrack.lm.loading import load_llm
from saetrack.metrics import functional_correlation
from saetrack.track import Snapshot
from saetrack.training.stream import harvest

STARTS = {
    "prior": ("prior", 0.0),
    "recentred": ("recentred", 0.0),
    "transported": ("transported", 0.0),
    "prior + continuity": ("prior", None),
    "transported + continuity": ("transported", None),
    "scratch": ("scratch", 0.0),
}
"""Name to warm start and weight of continuity; None is the default of `saetrack fit`."""
COLD = "scratch, long"
ALIVE = 1e-4  # firing frequency
SAES = {
    "TopK": ["--model.sae=TopKSAE", "--model.sae.expansion_factor=16", "--model.sae.k=24"],
    "Standard": ["--model.sae=StandardSAE", "--model.sae.expansion_factor=16"],
}


def fit(llm: Path, folder: Path, sae: str, start: str, steps: list[int], tokens: tuple[int, int]) -> Track:
    """Train one series, or open it when it is complete."""
    warm_start, weight = STARTS["scratch" if start == COLD else start]
    config = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
    arguments = [
        "fit",
        f"--config={config}",
        f"--scheduler.track_dir={folder}",
        f"--scheduler.steps={steps}",
        f"--scheduler.warm_start={warm_start}",
        f"--scheduler.tokens_first={tokens[0]}",
        f"--scheduler.tokens_next={tokens[0] if start == COLD else tokens[1]}",
        "--data.source=FolderSource",
        f"--data.source.path={llm}",
        f"--data.tokens.cache_dir={llm}/tokens",
        *SAES[sae],
        "--model.optimizer.tolerance=null",  # equal tokens, so that the FVUs can be compared
        "--analyze.analyses=null",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        "--ckpt_path=last",
    ]
    if weight is not None:
        arguments.append(f"--model.continuity={weight}")
    sys.argv = ["saetrack"]  # LightningCLI warns of arguments beside those it is given
    try:
        saetrack(arguments)
    except SystemExit as stopped:  # the track was complete
        if stopped.code:
            raise
    return Track.open(folder)


def correlation(first: Snapshot, last: Snapshot, track: Track) -> np.ndarray:
    """Functional correlation of every feature between two snapshots, on the evaluation rows; NaN where constant."""
    rows = track.tokens("evaluation")
    latents = []
    for snapshot in (first, last):
        llm, sae, site = load_llm(snapshot.llm), snapshot.sae(), track.facts["hookpoint"]
        batches = harvest(llm, snapshot.llm, rows, [site], np.arange(len(rows.tokens)))
        latents.append([sae.encode_sparse(x[site]) for _, x in batches])
    return functional_correlation(*(scipy.sparse.vstack(parts, format="csr") for parts in latents)).numpy()


def measure(track: Track) -> dict[str, object]:
    """The numbers of one series, a list with one entry for each snapshot where they differ by snapshot."""
    metrics = track.metrics()
    identity = [None]
    for before, after in itertools.pairwise(track):
        alive = (before.features["firing_frequency"] > ALIVE) & (after.features["firing_frequency"] > ALIVE)
        identity.append(float(after.features["functional_correlation"][alive].median()))
    r = np.nan_to_num(correlation(track[0], track[-1], track))
    alive = (track[0].features["firing_frequency"] > ALIVE).to_numpy()
    return {
        "steps": track.steps,
        "tokens": [int(t) for t in metrics["tokens_trained"]],
        "fvu_before": [round(v, 4) for v in metrics["fvu_before"]],
        "fvu": [round(v, 4) for v in metrics["fvu"]],
        "dead_share": [round(v, 4) for v in metrics["dead_share"]],
        "functional_correlation": [v if v is None else round(v, 3) for v in identity],
        "first_to_last_above_half": round(float((r[alive] > 0.5).mean()), 4),
        "first_to_last_above_0.7": round(float((r[alive] > 0.7).mean()), 4),
    }


def thinned(steps: list[int], factor: int) -> list[int]:
    """Every ``factor``-th step, counted from the last, which stays."""
    return steps[::-1][::factor][::-1]


def table(runs: pd.DataFrame) -> str:
    """One row for each run: what a reader compares."""
    rows = []
    for run in runs.to_dict("records"):
        r = [v for v in run["functional_correlation"] if v is not None]
        rows.append(
            {
                "SAE": run["sae"],
                "every": run["thin"],
                "start": run["start"],
                "FVU before (mean)": f"{np.mean(run['fvu_before'][1:]):.3f}",
                "FVU after (mean)": f"{np.mean(run['fvu'][1:]):.4f}",
                "dead (worst)": f"{max(run['dead_share']):.1%}",
                "r to the one before: least": f"{min(r):.2f}",
                "mean": f"{np.mean(r):.2f}",
                "first to last above 0.5": f"{run['first_to_last_above_half']:.1%}",
                "above 0.7": f"{run['first_to_last_above_0.7']:.1%}",
            }
        )
    frame = pd.DataFrame(rows)
    lines = ["| " + " | ".join(frame.columns) + " |", "|" + "---|" * len(frame.columns)]
    return "\n".join(lines + ["| " + " | ".join(str(v) for v in row) + " |" for row in frame.to_numpy()])


def draw(runs: pd.DataFrame, path: Path) -> None:
    """FVU after and functional correlation by LLM step, one row of panels for each SAE and grid."""
    groups = list(runs.groupby(["sae", "thin"], sort=False))
    figure, axes = figures.small_multiples(2 * len(groups), title="Warm starts")
    for left, right, ((sae, thin), group) in zip(axes[::2], axes[1::2], groups, strict=True):
        for colour, run in zip(itertools.cycle(figures.PALETTE), group.to_dict("records"), strict=False):
            figures.line(left, run["steps"][1:], run["fvu"][1:], color=colour, label=run["start"])
            r = run["functional_correlation"][1:]
            figures.line(right, run["steps"][1:], r, color=colour, label=run["start"])
        for ax, what in ((left, "FVU after"), (right, "median functional correlation")):
            figures.step_axis(ax, group["steps"].iloc[0])
            figures.describe(ax, title=f"{sae}, every {thin}", ylabel=what)
            figures.legend(ax)
    figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    """Train what is missing, print a JSON line for each series, write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llm", type=Path, help="Folder of LLM checkpoints.")
    parser.add_argument("out", type=Path, help="Folder of the tracks; results.jsonl, table.md and curves.svg too.")
    parser.add_argument("--saes", nargs="+", choices=SAES, default=list(SAES))
    parser.add_argument("--starts", nargs="+", choices=[*STARTS, COLD], default=[*STARTS, COLD])
    parser.add_argument("--thin", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--tokens", nargs=2, type=int, default=[500_000, 200_000], help="First stage, later stages.")
    options = parser.parse_args()
    steps = sorted(int(p.name.removeprefix("step")) for p in options.llm.glob("step*"))
    runs = []
    for sae, thin, start in itertools.product(options.saes, options.thin, options.starts):
        name = f"{sae}-every{thin}-{start.replace(' ', '')}-{options.tokens[0]}-{options.tokens[1]}"
        track = fit(options.llm, options.out / name, sae, start, thinned(steps, thin), tuple(options.tokens))
        runs.append({"sae": sae, "thin": thin, "start": start, **measure(track)})
        print(json.dumps(runs[-1]), flush=True)
        frame = pd.DataFrame(runs)
        (options.out / "results.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
        (options.out / "table.md").write_text(table(frame) + "\n")
        draw(frame, options.out / "curves.svg")


if __name__ == "__main__":
    main()
