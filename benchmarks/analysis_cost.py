"""What do the analyses cost, by the number of LLM checkpoints and of features, in time and memory?

python benchmarks/analysis_cost.py TRACK            of the quickstart; about ten minutes, two cores

All built-in analyses run on the track as `saetrack analyze` runs them, without its controls; then on its first 4 and 6
LLM checkpoints, and on its first 4 with other numbers of features: a part of the dictionary, or that of each snapshot
and of the first one together, on the same text. Each run is a process of its own. JSON lines: seconds of wall and of
processor, those of each analysis and of what they share (the LLM, the SAE, the files), and the peak of memory above
that of importing. A growth of 1 is linear: the logarithm of the ratio of times over that of sizes.
"""

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from measuring import report

from saetrack import Track
from saetrack.analysis.sweep import run_analyses
from saetrack.cli import _built_in_analyses
from saetrack.tensor_files import read_tensors

BAR_SECONDS = 180.0  # of all analyses on the quickstart's track, issue 4 section 4
CHECKPOINTS = (4, 6, 8)
FEATURES = (512, 1024, 2048, 4096)
AT = 4  # checkpoints of the series with other numbers of features
ROWS = (64, 256)  # token rows of each split, for the memory


def shortened(track: Track, folder: Path, checkpoints: int) -> Track:
    """The track with its first LLM checkpoints and without controls; its files are linked, not copied."""
    (folder / "snapshots").mkdir(parents=True)
    for name in ("track.json", "tokens.safetensors"):
        (folder / name).symlink_to(track.path.resolve() / name)
    for snapshot in track[:checkpoints]:
        (folder / "snapshots" / snapshot.path.name).symlink_to(snapshot.path.resolve())
    return Track.open(folder)


def with_features(track: Track, folder: Path, features: int) -> Track:
    """The track with so many features: its first ones, or also those of its first snapshot."""
    d_in, d_sae = track.facts["d_in"], track.facts["d_sae"]
    facts = {name: fact for name, fact in track.facts.items() if name != "schema"}
    rows = {split: track.tokens(split) for split in ("selection", "evaluation")}
    made = Track.create(folder, {**facts, "d_sae": features}, rows)
    own, more = torch.arange(min(features, d_sae)), torch.arange(max(features - d_sae, 0))
    for snapshot in track:
        arguments = {**snapshot.metadata["sae"]["arguments"], "expansion_factor": features // d_in}
        sae = type(snapshot.sae())(**arguments)
        state = {}
        for name, here in snapshot.sae().state_dict().items():
            first = track[0].sae().state_dict()[name]
            axis = here.shape.index(d_sae) if d_sae in here.shape else None
            parts = (here, first) if axis is None else (here.index_select(axis, own), first.index_select(axis, more))
            state[name] = here if axis is None else torch.cat(parts, dim=axis)
        sae.load_state_dict(state)
        table = pd.concat([snapshot.features.iloc[: len(own)], track[0].features.iloc[: len(more)]], ignore_index=True)
        metadata = {**snapshot.metadata, "sae": {**snapshot.metadata["sae"], "arguments": arguments}}
        statistics = read_tensors(snapshot.path / "statistics.safetensors")
        made.write(snapshot.number, sae, metadata, statistics, table.assign(feature=range(features)))
    return Track.open(folder)


def run(folder: Path, rows: int | None) -> None:
    """Run all analyses on one track, as a process of its own, and print what it took."""
    track = Track.open(folder)
    chosen = _built_in_analyses(len(track))
    seconds: dict[str, float] = dict.fromkeys(chosen, 0.0)

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.process_time()
            try:
                return method(*arguments)
            finally:
                seconds[name] += time.process_time() - start

        return call

    for name, analysis in chosen.items():
        for method in ("run", "begin", "observe", "finish"):
            if hasattr(analysis, method):
                setattr(analysis, method, timed(name, getattr(analysis, method)))
    if rows is not None:  # of each split, in every analysis that reads text
        track._token_arrays.update({key: value[:rows] for key, value in track._token_arrays.items()})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    run_analyses(track, chosen)
    facts: dict[str, Any] = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    facts["cpu_s_shared"] = facts["cpu_s"] - sum(seconds.values())
    facts |= {f"cpu_s_{name}": value for name, value in seconds.items()}
    print(json.dumps({**{name: round(value, 2) for name, value in facts.items()}, "peak_mb": round(peak / 1024)}))


def measure(track: Track, rows: int | None = None) -> dict[str, Any]:
    """What `run` prints, of a process of its own."""
    limit = [] if rows is None else ["--rows", str(rows)]
    command = [sys.executable, __file__, str(track.path), "--run", *limit]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    facts: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return facts


def growth(small: dict[str, Any], large: dict[str, Any], ratio: float) -> float:
    """Exponent with which processor time grows."""
    return round(math.log(large["cpu_s"] / small["cpu_s"]) / math.log(ratio), 2)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("track", type=Path)
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(options.track, options.rows)
        return
    track = Track.open(options.track)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found = {n: measure(shortened(track, folder / f"t{n}", n)) for n in CHECKPOINTS}
        whole = found[CHECKPOINTS[-1]]
        report("analyses", "all, no controls", value=whole["wall_s"], bar=BAR_SECONDS, at_most=True, **whole)
        for n, facts in found.items():
            report("analyses", "by checkpoints", value=facts["cpu_s"], checkpoints=n, **facts)
        value = growth(found[4], found[8], 2.0)
        report("analyses", "growth with checkpoints, 4 to 8", value=value, bar=1.1, at_most=True)
        series, wide = shortened(track, folder / "four", AT), {}
        for n in FEATURES:
            wide[n] = measure(with_features(series, folder / f"f{n}", n))
            report("analyses", "by features", value=wide[n]["cpu_s"], features=n, checkpoints=AT, **wide[n])
            shutil.rmtree(folder / f"f{n}")
        for a, b in pairwise(FEATURES):
            value = growth(wide[a], wide[b], b / a)
            report("analyses", f"growth with features, {a} to {b}", value=value, bar=1.0, at_most=True)
        for n in ROWS:
            facts = measure(series, rows=n)
            report("analyses", "memory by token rows", value=facts["peak_mb"], rows=n, checkpoints=AT)


if __name__ == "__main__":
    main()
