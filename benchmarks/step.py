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
DEAD = (2, 10)
"""Per cent of the latents that AuxK revives, in two steps of ours."""
TUNED = "MALLOC_TRIM_THRESHOLD_" in os.environ
"""With both sides under an allocator that keeps freed memory, the bars are lower: the peers gain more from it."""


def on(step: Step, batches: list[torch.Tensor]) -> Callable[[], None]:
    """The step on one batch after another."""
    turns = itertools.cycle(batches)
    return lambda: step(next(turns))


def with_native(make: Callable[[], Step]) -> Step:
    """A step on the native kernels, which are put away after it."""
    use_kernels("native")
    step = make()
    use_kernels("pytorch")

    def run(x: torch.Tensor) -> None:
        use_kernels("native")
        step(x)
        use_kernels("pytorch")

    return run


def topk(d_sae: int, rounds: int, only_sparsify: bool = TUNED) -> None:
    """TopK: sparsify, SAELens, dictionary_learning and the floor."""
    batches = activations(BATCH, D_IN)

    def ours(dead_share: float = 0.0) -> Step:
        return step_of(TopKSAE(D_IN, d_sae // D_IN, K), dead_share=dead_share)

    steps: dict[str, Step] = {"ours": ours(), "native": with_native(ours), "sparsify": sparsify(D_IN, d_sae, K)}
    if not only_sparsify:
        steps |= {
            "floor": floor_of(D_IN, d_sae),
            "sae_lens": sae_lens("topk", D_IN, d_sae, K, BATCH, autocast=False),
            "dictionary_learning": dictionary_learning(D_IN, d_sae, K),
        }
    if d_sae == 16384 and not only_sparsify:
        steps |= {f"{percent}_percent_dead": ours(dead_share=percent / 100) for percent in DEAD}
    times = interleaved({name: on(step, batches) for name, step in steps.items()}, rounds)

    def tell(
        figure: str, slow: str, fast: str, bar: float | None, at_most: bool = False, peer: str | None = None
    ) -> None:
        facts = {**ratio(times[slow], times[fast]), **times[slow].facts(slow), **times[fast].facts(fast)}
        facts |= {"d_in": D_IN, "d_sae": d_sae, "batch": BATCH, "k": K, "rounds": rounds}
        facts |= ({} if bar is None else {"bar": bar, "at_most": at_most}) | ({} if peer is None else {"peer": peer})
        report("step", figure, **facts)

    version = installed("eai-sparsify")
    tell("topk_against_sparsify", "sparsify", "ours", 2.8 if TUNED else {4096: 3.5}.get(d_sae, 4.0), peer=version)
    native_bar = 5.0 if TUNED else {4096: 5.5, 16384: 7.0}.get(d_sae, 8.0)
    tell("topk_native_against_sparsify", "sparsify", "native", native_bar, peer=version)
    if only_sparsify:
        return
    tell("topk_against_sae_lens", "sae_lens", "ours", 7.0, peer=installed("sae-lens"))
    patched = f"{installed('dictionary-learning')}, its slow einsum rewritten"
    tell("topk_against_dictionary_learning", "dictionary_learning", "ours", 5.5, peer=patched)
    at_16384 = d_sae == 16384
    tell("topk_over_floor", "ours", "floor", 2.8 if at_16384 else None, at_most=True)
    tell("topk_native_over_floor", "native", "floor", 1.8 if at_16384 else None, at_most=True)
    if at_16384:
        for percent in DEAD:
            tell(f"topk_with_{percent}_percent_dead", f"{percent}_percent_dead", "ours", None)


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
    parser.add_argument("--only", choices=["topk", "sparsify", "relu"], help="sparsify: TopK beside it alone")
    asked = parser.parse_args()
    for size in asked.d_sae:
        if asked.only != "relu":
            topk(size, asked.rounds, TUNED or asked.only == "sparsify")
        gc.collect()
        if asked.only in (None, "relu") and size == 16384 and not TUNED:
            relu(size, asked.rounds)
        gc.collect()
