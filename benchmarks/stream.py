"""Tokens a second of stream and step together, beside the other packages' loops, and the cost of a further hookpoint.

python benchmarks/stream.py FOLDER [--rounds 3] [--only loops | hookpoints]
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

import loops
import torch
from loops import Shape
from measuring import Timing, installed, interleaved, ratio, report
from ours import activations, step_of
from pythia_shape import D_IN, make

from saetrack.sae import TopKSAE


def in_turn(variants: dict[str, Callable[[Timing], None]], rounds: int) -> dict[str, Timing]:
    """Run every loop, again and again; each adds the seconds of its step."""
    timings = {name: Timing() for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            run(timings[name])
    return timings


def beside_the_peers(shape: Shape, rounds: int) -> None:
    """Ours with the LLM in float32, as theirs, and in bfloat16."""
    times = in_turn(
        {
            "ours": lambda t: loops.ours(shape, t),
            "ours_bfloat16": lambda t: loops.ours(shape, t, "bfloat16"),
            "sparsify": lambda t: loops.sparsify(shape, t),
            "sparsify_bfloat16": lambda t: loops.sparsify(shape, t, torch.bfloat16),
            "dictionary_learning": lambda t: loops.dictionary_learning(shape, t),
            "sae_lens": lambda t: loops.sae_lens(shape, t),
        },
        rounds,
    )
    for name, timing in times.items():
        value = round(shape.batch / statistics.median(timing.wall))
        report("stream", f"tokens_per_second_{name}", **facts(shape, rounds), value=value, **timing.facts("step"))
    theirs = ("sparsify", "dictionary_learning")
    fastest = min(theirs, key=lambda name: statistics.median(times[name].wall))
    packages = {"sparsify": "eai-sparsify", "dictionary_learning": "dictionary-learning", "sae_lens": "sae-lens"}
    for llm in ("ours", "ours_bfloat16"):
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
    """What a second and a third hookpoint, in layers before the first, add to a step, in steps of one SAE alone."""
    layers = (shape.layer, shape.layer - 1, shape.layer - 2)
    turns = itertools.cycle(activations(shape.batch, D_IN))
    alone = step_of(TopKSAE(D_IN, shape.d_sae // D_IN, shape.k))

    def one_sae(timing: Timing) -> None:
        measured = interleaved({"step": lambda: alone(next(turns))}, rounds=3, warm_up=1)["step"]
        timing.wall.append(statistics.median(measured.wall))
        timing.cpu.append(statistics.median(measured.cpu))

    variants: dict[str, Callable[[Timing], None]] = {"step": one_sae}
    for n in (1, 2, 3):
        variants[str(n)] = lambda t, n=n: loops.ours(shape, t, layers=layers[:n])  # type: ignore[misc]
    times = in_turn(variants, rounds)
    step = times.pop("step")
    for fewer, more in (("1", "2"), ("2", "3")):
        added = Timing(*([b - a for a, b in zip(*pair, strict=True)] for pair in pairs(times[fewer], times[more])))
        report(
            "stream",
            f"hookpoint_{more}_in_steps_of_its_own",
            **facts(shape, rounds),
            **ratio(added, step),
            bar=1.0,
            at_most=True,
            **step.facts("step"),
            **times[fewer].facts("fewer"),
            **times[more].facts("more"),
        )


def pairs(a: Timing, b: Timing) -> tuple[tuple[list[float], list[float]], tuple[list[float], list[float]]]:
    """Wall and processor times of two variants, round by round."""
    return (a.wall, b.wall), (a.cpu, b.cpu)


def facts(shape: Shape, rounds: int) -> dict[str, int]:
    """What every line says."""
    sizes = {"d_in": D_IN, "d_sae": shape.d_sae, "batch": shape.batch, "k": shape.k}
    return {**sizes, "layer": shape.layer, "rounds": rounds}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["loops", "hookpoints"])
    asked = parser.parse_args()
    make(asked.folder)
    if asked.only != "hookpoints":
        beside_the_peers(Shape(asked.folder), asked.rounds)
    if asked.only != "loops":
        further_hookpoints(Shape(asked.folder), asked.rounds)
