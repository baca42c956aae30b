"""What each way to begin a stage costs in FVU, and keeps of the features' identity.

make bench-warm-starts

Trains the series of `matrix` on harvested activations (warm_start_series.py) and appends a JSON line for each to
OUT/results.jsonl. A line that is there is not made again, so the command may be stopped and given again, and --minutes
cuts it into pieces. warm_start_page.py makes the tables and figures of docs/warm-starts.md of the lines. Two LLMs are
read: LLM, the quickstart's, and LLM6, one of 6 layers, each the folder of a `saetrack pretrain`.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from measuring import machine
from warm_start_forms import FORMS
from warm_start_series import Arm, HarvestedData, Recipe, Trained, cold, run_series

from saetrack.sae import SAE, StandardSAE, TopKSAE
from saetrack.training.module import OptimizerSettings

SAES = {
    "TopK": partial(TopKSAE, expansion_factor=8, k=24),
    "Standard": partial(StandardSAE, expansion_factor=8),
}
HOOKPOINTS = {"4 layers": "gpt_neox.layers.2", "6 layers": "gpt_neox.layers.3"}
LAST = 256
"""The last LLM step: of 320, the learning rate falls in the last fifth, and what is followed is its constant phase."""
FIRST, LATER = 125_000, 25_000
OPTIMIZER = OptimizerSettings(lr=2e-3, warmup_tokens=10_000, warmup_tokens_next=2_500)
DEAD_AFTER = 12_500
COLD = "cold"
HELD = "transported + continuity"
DEFAULT = "package, 1.0"
"""What `saetrack fit` does by default; the arms of `ARMS` have a larger weight of continuity, to see its effect."""
ARMS = {
    "prior": Arm("prior"),
    HELD: Arm("transported", 2.0),
    "transported": Arm("transported"),
    "regressed + continuity": Arm("regressed", 2.0),
    "regressed": Arm("regressed"),
    "regressed rows": Arm("regressed rows"),
    "regressed rows + continuity": Arm("regressed rows", 2.0),
    "scratch": Arm("scratch"),
    "recentred": Arm("recentred"),
    "prior + continuity": Arm("prior", 2.0),
    "affine": Arm("affine"),
    "affine + continuity": Arm("affine", 2.0),
    "transported + moments": Arm("transported", moments=True),
    "transported + moments + continuity": Arm("transported", 2.0, moments=True),
}
TRIED = {
    "package": (0.25, 0.5, 0.7, 1.0, 1.5, 4.0),
    "equal": (0.5, 1.0, 2.0),
    "between": (0.5, 1.0, 2.0),
    "dead_too": (1.0, 2.0),
    "latents": (1.0, 2.0),
    "not_new": (2.0,),
    "half": (1.0, 2.0),
    "quarter": (1.0,),
}
FRONTIER = {
    f"{form}, {weight}": Arm("transported", weight, moved=None if form == "package" else FORMS[form])
    for form, weights in TRIED.items()
    for weight in weights
}
FRONTIER |= {
    "package, 2.0, fading to 0": Arm("transported", 2.0, fade=lambda share: 1 - share),
    "package, 2.0, half of the stage": Arm("transported", 2.0, fade=lambda share: float(share < 0.5)),
}
FRONTIER |= {f"fixed, {w}": Arm("transported", w, fixed=True) for w in (0.01, 0.03, 0.05, 0.1)}

BUDGETS = {f"{tokens:,} tokens": Arm("transported", 1.0, tokens=tokens) for tokens in (12_500, 50_000)}
BUDGETS |= {f"tolerance {t}": Arm("transported", 1.0, tokens=50_000, tolerance=t) for t in (0.03, 0.1, 0.01)}

LONG = 8
"""A cold SAE of so many times the tokens: a warm start's share of them depends on how far the cold one has come."""
IN_LONG = ("package, 0.25", "package, 0.5", DEFAULT, HELD, "fixed, 0.01", "fixed, 0.05")
"""Weights of continuity that are tried with so many tokens too."""
CLIMBING = ("prior", DEFAULT, HELD, "transported", "transported + moments", "transported + moments + continuity")
"""Arms whose stages are also trained with more and fewer tokens."""


@dataclass(frozen=True)
class Job:
    """One series.

    Args:
        llm: A name in `HOOKPOINTS`.
        sae: A name in `SAES`.
        thin: Every how many LLM checkpoints one is visited, counted from the last.
        seed: Of fresh SAEs and of the order of the batches.
        arm: A name in `ARMS`, `FRONTIER` or `BUDGETS`; or `COLD`, SAEs from scratch with the tokens of the
            first stage.
        null: Whether every snapshot is also trained once more where it is.
        ladder: Whether stages are also trained with more and fewer tokens.
        budget: Times the tokens of every stage, and of a cold SAE.
    """

    llm: str
    sae: str
    thin: int
    seed: int
    arm: str
    null: bool = False
    ladder: bool = False
    budget: int = 1


def matrix() -> Iterator[Job]:
    """All series, the more important ones first."""
    dense = partial(Job, "4 layers", "TopK", 1)
    main = ("prior", DEFAULT, "transported", HELD)
    others = [arm for arm in ARMS if arm not in main]
    elsewhere = (("Standard", "4 layers"), ("TopK", "6 layers"))
    yield dense(0, COLD)
    yield from (dense(0, arm, null=arm in ("prior", DEFAULT)) for arm in (*main, "scratch"))
    yield from (dense(seed, arm) for seed in (1, 2) for arm in main)
    yield from (Job("4 layers", "TopK", 8, 0, arm, ladder=arm in CLIMBING) for arm in (*main, *others))
    yield from (dense(0, arm) for arm in FRONTIER if arm != DEFAULT)
    yield from (Job(llm, sae, thin, 0, arm) for sae, llm in elsewhere for thin in (1, 8) for arm in main)
    yield from (Job("6 layers", "TopK", 1, seed, arm) for seed in (1, 2) for arm in main)
    yield from (dense(0, arm, ladder=True) for arm in main)
    yield dense(0, COLD, budget=LONG)
    yield from (dense(0, arm, ladder=arm == "transported", budget=LONG) for arm in ("prior", "transported"))
    yield from (dense(0, arm, ladder=arm == DEFAULT, budget=LONG) for arm in IN_LONG)
    yield from (dense(1, arm, budget=LONG) for arm in ("prior", "transported", "package, 0.25", DEFAULT))
    yield from (dense(0, arm) for arm in (*BUDGETS, *others) if arm != "scratch")
    yield from (Job("4 layers", "TopK", thin, 0, arm) for thin in (2, 4) for arm in (*main, *others))
    yield from (Job("4 layers", "TopK", 8, 1, arm) for arm in (*main, *others))
    yield from (Job(llm, sae, thin, 0, arm) for sae, llm in elsewhere for thin in (1, 8) for arm in others)
    yield from (Job(llm, sae, 1, 0, arm, budget=LONG) for sae, llm in elsewhere for arm in main)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The results in a file; those from before there were budgets are of the first."""
    return [{"budget": 1} | json.loads(line) for line in file.read_text().splitlines()]


class Bench:
    """Runs jobs, and keeps what they share.

    Args:
        llms: Folder of each LLM's checkpoints.
        out: Where the lines and the harvested activations go.
    """

    def __init__(self, llms: dict[str, Path], out: Path) -> None:
        self.llms, self.results, self.cache = llms, out / "results.jsonl", out / "activations"
        out.mkdir(parents=True, exist_ok=True)
        self.data = lru_cache(maxsize=1)(self._data)
        self.first = lru_cache(maxsize=4)(self._first)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """What is there already."""
        return read_lines(self.results) if self.results.is_file() else []

    def _data(self, llm: str, budget: int) -> HarvestedData:
        cache, most_tokens = self.cache / llm.replace(" ", "-"), round(1.06 * budget * FIRST)
        return HarvestedData(self.llms[llm], cache, HOOKPOINTS[llm], most_tokens)

    def _first(self, llm: str, sae: str, seed: int, step: int, budget: int) -> Trained:
        """The first stage, or a cold SAE: the same for all arms."""
        data, of = self.data(llm, budget), "" if budget == 1 else f"-{budget}"
        file = self.cache.parent / "cold" / f"{llm.replace(' ', '-')}-{sae}-{seed}{of}-step{step}.safetensors"
        return cold(data, recipe(sae, seed, budget), data.place(data.at(step)), file)

    def run(self, job: Job) -> None:
        """Do one job and append its line."""
        began = time.process_time()
        data = self.data(job.llm, job.budget)
        steps = [c.step for c in data.checkpoints if c.step <= LAST][::-1][:: job.thin][::-1]
        if job.arm == COLD:
            result = {"stages": [self._first(job.llm, job.sae, job.seed, step, job.budget).measures for step in steps]}
        else:
            first = self.first(job.llm, job.sae, job.seed, steps[0], job.budget)
            arm = (ARMS | FRONTIER | BUDGETS)[job.arm]
            ladder = self._cold_fvu(job) if job.ladder else None
            result = run_series(data, recipe(job.sae, job.seed, job.budget), arm, first, steps, job.null, ladder)
        facts = {**vars(job), **result, "cpu_s": round(time.process_time() - began), **machine()}
        with self.results.open("a") as lines:
            lines.write(json.dumps(facts) + "\n")
        print(summary(facts), flush=True)

    def _cold_fvu(self, job: Job) -> dict[int, float]:
        wanted = {"llm": job.llm, "sae": job.sae, "seed": job.seed, "arm": COLD, "budget": job.budget}
        for line in self.lines:
            if wanted.items() <= line.items():
                return {trained["step"]: trained["fvu"] for trained in line["stages"]}
        raise RuntimeError(f"{self.results} has no line of the cold SAEs that {job} is held against.")


def recipe(sae: str, seed: int, budget: int = 1) -> Recipe:
    """The settings of all series of one class; a larger budget leaves the warm-ups of the learning rate as they are."""
    build: partial[SAE] = SAES[sae]
    return Recipe(build, budget * FIRST, budget * LATER, OPTIMIZER, seed, budget * DEAD_AFTER)


def summary(facts: dict[str, Any]) -> str:
    """One line for the terminal."""
    stages = facts["stages"]
    r = " ".join(f"{trained['r']:.2f}" for trained in stages[1:] if "r" in trained)
    fvu = " ".join(f"{trained['fvu']:.3f}" for trained in stages)
    kept = f", first to last {facts['first_to_last']['above_half']:.1%}" if "first_to_last" in facts else ""
    dead = max(trained["dead"] for trained in stages)
    where = f"{facts['llm']} {facts['sae']} /{facts['thin']} seed {facts['seed']} {facts['arm']}"
    return f"{where}: FVU {fvu}, r {r}, dead up to {dead:.1%}{kept} ({facts['cpu_s']} s)"


def main() -> None:
    """Do what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llm", type=Path, help="Folder of the 4-layer LLM's checkpoints.")
    parser.add_argument("llm6", type=Path, help="Folder of the 6-layer LLM's.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, help="Begin no series after so many.")
    options = parser.parse_args()
    bench, began = Bench({"4 layers": options.llm, "6 layers": options.llm6}, options.out), time.monotonic()
    for job in matrix():
        if any(all(line[name] == value for name, value in vars(job).items()) for line in bench.lines):
            continue
        if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
            sys.exit(75)  # there is more
        bench.run(job)


if __name__ == "__main__":
    main()
