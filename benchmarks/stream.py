"""Tokens a second of stream and step together, beside the other packages' loops, and the cost of a further hookpoint.

python benchmarks/stream.py FOLDER [--rounds 3] [--only loops | hookpoints]
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import loops
import torch
from loops import Shape
from measuring import Timing, installed, interleaved, ratio, report
from ours import activations, step_of
from pythia_shape import D_IN, make

from saetrack.sae import TopKSAE

LAYERS = (3, 2, 1)
"""Whose outputs are read with one hookpoint, two, three: the further ones need no further layer of the LLM."""


def one_step(shape: Shape, timing: Timing) -> None:
    """The step of one SAE alone, on activations that are there."""
    turns = itertools.cycle(activations(shape.batch, D_IN))
    alone = step_of(TopKSAE(D_IN, shape.d_sae // D_IN, shape.k))
    measured = interleaved({"step": lambda: alone(next(turns))}, rounds=3, warm_up=1)["step"]
    timing.wall.append(statistics.median(measured.wall))
    timing.cpu.append(statistics.median(measured.cpu))


LOOPS: dict[str, Callable[[Shape, Timing], None]] = {
    "ours": loops.ours,
    "ours_bfloat16": lambda shape, timing: loops.ours(shape, timing, "bfloat16"),
    "ours_bfloat16_native": lambda shape, timing: loops.ours(shape, timing, "bfloat16", kernels="native"),
    "sparsify": loops.sparsify,
    "sparsify_bfloat16": lambda shape, timing: loops.sparsify(shape, timing, torch.bfloat16),
    "dictionary_learning": loops.dictionary_learning,
    "sae_lens": loops.sae_lens,
    "step": one_step,
    "hookpoints_1": lambda shape, timing: loops.ours(shape, timing, layers=LAYERS[:1]),
    "hookpoints_2": lambda shape, timing: loops.ours(shape, timing, layers=LAYERS[:2]),
    "hookpoints_3": lambda shape, timing: loops.ours(shape, timing, layers=LAYERS),
}


def in_turn(names: list[str], folder: Path, rounds: int, script: str = __file__) -> dict[str, Timing]:
    """Run every loop of a script, again and again, each time in a process of its own: none has another's memory."""
    timings = {name: Timing() for name in names}
    for _ in range(rounds):
        for name in names:
            command = [sys.executable, script, str(folder), "--loop", name]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            wall, cpu = json.loads(output.splitlines()[-1])
            print(f"{name}: {wall:.3f} s a step, {cpu:.3f} s of processor time", file=sys.stderr, flush=True)
            timings[name].wall.append(wall)
            timings[name].cpu.append(cpu)
    return timings


def beside_the_peers(shape: Shape, rounds: int) -> None:
    """Ours with the LLM in float32, as theirs, in bfloat16, and that with the native kernels."""
    times = in_turn([name for name in LOOPS if name != "step" and "hookpoints" not in name], shape.folder, rounds)
    for name, timing in times.items():
        value = round(shape.batch / statistics.median(timing.wall))
        report("stream", f"tokens_per_second_{name}", **facts(shape, rounds), value=value, **timing.facts("step"))
    theirs = ("sparsify", "dictionary_learning")
    fastest = min(theirs, key=lambda name: statistics.median(times[name].wall))
    packages = {"sparsify": "eai-sparsify", "dictionary_learning": "dictionary-learning", "sae_lens": "sae-lens"}
    for llm in ("ours", "ours_bfloat16", "ours_bfloat16_native"):
        for peer, bar in ((fastest, 3.0), ("sae_lens", 6.0)):
            report(
                "stream",
                f"{llm}_against_{peer}",
                **facts(shape, rounds),
                peer=installed(packages[peer]),
                **ratio(times[peer], times[llm]),
                bar=bar,
            )
    both = ratio(times["sparsify_bfloat16"], times["ours_bfloat16"])
    report("stream", "both_bfloat16_against_sparsify", **facts(shape, rounds), **both)


def further_hookpoints(shape: Shape, rounds: int) -> None:
    """What a second and a third hookpoint add to a step, in steps of one SAE alone."""
    names = ["hookpoints_1", "hookpoints_2", "hookpoints_3"]
    times = in_turn(["step", *names], shape.folder, rounds)
    step = times["step"]
    for fewer, more in itertools.pairwise(names):
        a, b = times[fewer], times[more]
        added = Timing(
            [y - x for x, y in zip(a.wall, b.wall, strict=True)], [y - x for x, y in zip(a.cpu, b.cpu, strict=True)]
        )
        report(
            "stream",
            f"{more}_added_in_steps_of_its_own",
            **facts(shape, rounds),
            **ratio(added, step),
            bar=1.0,
            at_most=True,
            **step.facts("step"),
            **a.facts("fewer"),
            **b.facts("more"),
        )


def facts(shape: Shape, rounds: int) -> dict[str, int]:
    """What every line says."""
    sizes = {"d_in": D_IN, "d_sae": shape.d_sae, "batch": shape.batch, "k": shape.k}
    return {**sizes, "layer": shape.layer, "rounds": rounds}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["loops", "hookpoints"])
    parser.add_argument("--loop", choices=LOOPS)
    asked = parser.parse_args()
    make(asked.folder)
    if asked.loop:
        taken = Timing()
        LOOPS[asked.loop](Shape(asked.folder), taken)
        print(json.dumps([taken.wall[0], taken.cpu[0]]))
        sys.exit()
    if asked.only != "hookpoints":
        beside_the_peers(Shape(asked.folder), asked.rounds)
    if asked.only != "loops":
        further_hookpoints(Shape(asked.folder), asked.rounds)
