"""How long one training step takes, beside the peers' own packages and the floor.

python benchmarks/step.py [--d_sae 4096 16384 32768] [--rounds 5]
"""

import argparse
import gc
import itertools
import os
from collections.abc import Callable

import torch
from measuring import installed, interleaved, ratio, report
from ours import activations, floor_of, step_of
from peers import Step, dictionary_learning, sae_lens, sparsify

from saetrack.sae import StandardSAE, TopKSAE, use_kernels

D_IN, BATCH, K = 512, 4096, 32
TUNED = "MALLOC_TRIM_THRESHOLD_" in os.environ
"""With both sides under an allocator that keeps freed memory, the bars are lower: the peers gain more from it."""


def on(step: Step, batches: list[torch.Tensor]) -> Callable[[], None]:
    """The step on one batch after another."""
    turns = itertools.cycle(batches)
    return lambda: step(next(turns))


def with_native(step: Step) -> Step:
    """The step on the native kernels, which are put away after it."""

    def run(x: torch.Tensor) -> None:
        use_kernels("native")
        step(x)
        use_kernels("pytorch")

    return run


def topk(d_sae: int, rounds: int) -> None:
    """TopK: sparsify, SAELens, dictionary_learning and the floor."""
    batches = activations(BATCH, D_IN)
    steps: dict[str, Step] = {
        "ours": step_of(TopKSAE(D_IN, d_sae // D_IN, K)),
        "native": with_native(step_of(TopKSAE(D_IN, d_sae // D_IN, K))),
        "floor": floor_of(D_IN, d_sae),
        "sparsify": sparsify(D_IN, d_sae, K),
        "sae_lens": sae_lens("topk", D_IN, d_sae, K, BATCH, autocast=False),
        "dictionary_learning": dictionary_learning(D_IN, d_sae, K),
    }
    if d_sae == 16384:
        steps["ours_2_percent_dead"] = step_of(TopKSAE(D_IN, d_sae // D_IN, K), dead_share=0.02)
    times = interleaved({name: on(step, batches) for name, step in steps.items()}, rounds)
    shape = {"d_in": D_IN, "d_sae": d_sae, "batch": BATCH, "k": K, "rounds": rounds}
    peers = {
        "sparsify": (installed("eai-sparsify"), 2.8 if TUNED else {4096: 3.5}.get(d_sae, 4.0)),
        "sae_lens": (installed("sae-lens"), 7.0),
        "dictionary_learning": (f"{installed('dictionary-learning')}, its slow einsum rewritten", 5.5),
    }
    for name, (peer, bar) in peers.items():
        facts = {**times["ours"].facts("ours"), **times[name].facts("peer")}
        report(
            "step", f"topk_against_{name}", **shape, peer=peer, **ratio(times[name], times["ours"]), bar=bar, **facts
        )
    facts = {**ratio(times["sparsify"], times["native"]), **times["native"].facts("ours")}
    bar_native = 5.0 if TUNED else {4096: 5.5, 16384: 7.0}.get(d_sae, 8.0)
    report("step", "topk_native_against_sparsify", **shape, peer=peers["sparsify"][0], bar=bar_native, **facts)
    facts = {**ratio(times["native"], times["floor"]), **times["native"].facts("ours")}
    bar = {"bar": 1.8, "at_most": True} if d_sae == 16384 else {}
    report("step", "topk_native_over_floor", **shape, **bar, **facts)
    facts = {**times["ours"].facts("ours"), **times["floor"].facts("floor")}
    bar = {"bar": 2.8, "at_most": True} if d_sae == 16384 else {}
    report("step", "topk_over_floor", **shape, **ratio(times["ours"], times["floor"]), **bar, **facts)
    if "ours_2_percent_dead" in times:
        dead = times["ours_2_percent_dead"]
        facts = {**times["ours"].facts("none_dead"), **dead.facts("dead")}
        report("step", "topk_with_2_percent_dead", **shape, **ratio(dead, times["ours"]), **facts)


def relu(d_sae: int, rounds: int) -> None:
    """ReLU with L1: SAELens with autocast."""
    batches = activations(BATCH, D_IN)
    steps: dict[str, Step] = {
        "ours": step_of(StandardSAE(D_IN, d_sae // D_IN)),
        "peer": sae_lens("standard", D_IN, d_sae, K, BATCH, autocast=True),
    }
    times = interleaved({name: on(step, batches) for name, step in steps.items()}, rounds)
    shape = {"d_in": D_IN, "d_sae": d_sae, "batch": BATCH, "rounds": rounds, "peer": installed("sae-lens")}
    facts = {**times["ours"].facts("ours"), **times["peer"].facts("peer")}
    report("step", "relu_against_sae_lens_autocast", **shape, **ratio(times["peer"], times["ours"]), bar=2.3, **facts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d_sae", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["topk", "relu"])
    asked = parser.parse_args()
    for size in asked.d_sae:
        if asked.only != "relu":
            topk(size, asked.rounds)
        gc.collect()
        if asked.only != "topk" and size == 16384:
            relu(size, asked.rounds)
        gc.collect()
