"""How long one training step takes on a GPU, beside the peers' own packages and the floor; there are no bars.

python benchmarks/step_gpu.py [--d_sae 16384 65536] [--rounds 9]

A turn is many steps, launched without waiting for each, as in training. SAELens is measured with autocast too, and
sparsify is under bfloat16 autocast by itself on a GPU. Every SAE and its optimizer is in float32. Memory is what a step
takes at its peak beside weights, gradients and Adam's moments, in a process of its own.
"""

import argparse
import gc
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch
from measuring import installed, interleaved, ratio, report
from ours import activations, floor_of, step_of
from peers import Step, dictionary_learning, sae_lens, sparsify

from saetrack.sae import (
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    Kernels,
    MatryoshkaSAE,
    StandardSAE,
    TopKSAE,
    use_kernels,
)

D_IN, BATCH, K, STEPS = 512, 4096, 32, 20
PEERS = {
    "sparsify": "eai-sparsify",
    "sae_lens": "sae-lens",
    "sae_lens_autocast": "sae-lens",
    "dictionary_learning": "dictionary-learning",
}
WEIGHED = ("topk", "topk_native", "sparsify", "sae_lens_autocast", "dictionary_learning")
"""Those whose memory is measured."""


def variants(d_sae: int) -> dict[str, Callable[[], Step]]:
    """What makes each step."""
    factor = d_sae // D_IN
    ours = partial(step_of, device="cuda")
    lens = partial(sae_lens, "topk", D_IN, d_sae, K, BATCH, device="cuda")
    return {
        "topk_native": lambda: ours(TopKSAE(D_IN, factor, K), recorded=True),
        "topk_not_recorded_native": lambda: ours(TopKSAE(D_IN, factor, K)),
        "topk": lambda: ours(TopKSAE(D_IN, factor, K)),
        "topk_2_percent_dead_native": lambda: ours(TopKSAE(D_IN, factor, K), dead_share=0.02, recorded=True),
        "topk_2_percent_dead": lambda: ours(TopKSAE(D_IN, factor, K), dead_share=0.02),
        "batch_topk_native": lambda: ours(BatchTopKSAE(D_IN, factor, K)),
        "matryoshka_native": lambda: ours(MatryoshkaSAE(D_IN, factor, K)),
        "standard": lambda: ours(StandardSAE(D_IN, factor)),
        "jumprelu": lambda: ours(JumpReLUSAE(D_IN, factor)),
        "gated": lambda: ours(GatedSAE(D_IN, factor)),
        "floor": lambda: floor_of(D_IN, d_sae, device="cuda"),
        "sparsify": lambda: sparsify(D_IN, d_sae, K, "cuda"),
        "sae_lens": lambda: lens(autocast=False),
        "sae_lens_autocast": lambda: lens(autocast=True),
        "dictionary_learning": lambda: dictionary_learning(D_IN, d_sae, K, "cuda"),
    }


def kernels_of(name: str) -> Kernels:
    """Those that a variant runs on."""
    return "native" if name.endswith("native") else "pytorch"


def on(step: Step, batches: list[torch.Tensor], kernels: Kernels) -> Callable[[], None]:
    """`STEPS` steps on one batch after another."""
    turns = itertools.cycle(batches)

    def turn() -> None:
        use_kernels(kernels, "cuda")
        for _ in range(STEPS):
            step(next(turns))

    return turn


def weigh(name: str, d_sae: int) -> float:
    """Peak of a step, MiB, without weights, gradients and Adam's moments; the process has done nothing else."""
    use_kernels(kernels_of(name), "cuda")
    step, batches = variants(d_sae)[name](), activations(BATCH, D_IN, device="cuda")
    for x in batches:
        step(x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step(batches[0])
    torch.cuda.synchronize()
    trained = 4 * 4 * (2 * D_IN * d_sae + d_sae + D_IN)
    given = sum(x.nbytes for x in batches)
    return round((torch.cuda.max_memory_allocated() - trained - given) / 2**20, 1)


def measure(d_sae: int, rounds: int) -> None:
    """Every variant in turn, and the memory of some."""
    batches = activations(BATCH, D_IN, device="cuda")
    turns = {name: on(make(), batches, kernels_of(name)) for name, make in variants(d_sae).items()}
    times = interleaved(turns, rounds)
    del turns
    gc.collect()
    torch.cuda.empty_cache()
    sizes = {"d_in": D_IN, "d_sae": d_sae, "batch": BATCH, "k": K, "rounds": rounds, "steps": STEPS}
    for name, timing in times.items():
        facts = {key: round(value / STEPS, 3) for key, value in timing.facts("step").items()}  # they are of a turn
        peer = {"peer": installed(PEERS[name])} if name in PEERS else {}
        over = ratio(timing, times["topk_native"])
        report("step_gpu", f"{name}_over_topk_native", **sizes, **over, **facts, **peer)
    for name in WEIGHED:
        command = [sys.executable, __file__, "--d_sae", str(d_sae), "--weigh", name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        report("step_gpu", f"peak_mib_{name}", **sizes, value=json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d_sae", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--weigh", choices=WEIGHED)
    asked = parser.parse_args()
    if asked.weigh:
        print(weigh(asked.weigh, asked.d_sae[0]))
        sys.exit()
    for size in asked.d_sae:
        measure(size, asked.rounds)
