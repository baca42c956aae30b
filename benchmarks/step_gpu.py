"""How long one training step takes on a GPU, beside the peers' own packages and the floor; there are no bars.

python benchmarks/step_gpu.py [--d_sae 16384 65536] [--rounds 9]

A turn is many steps, launched without waiting for each, as in training. SAELens is measured with autocast too, and
sparsify is under bfloat16 autocast by itself on a GPU. Every SAE and its optimizer is in float32.
"""

import argparse
import gc
import itertools
from collections.abc import Callable

import torch
from measuring import installed, interleaved, ratio, report
from ours import activations, floor_of, step_of
from peers import Step, dictionary_learning, sae_lens, sparsify

from saetrack.sae import (
    SAE,
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


def on(step: Step, batches: list[torch.Tensor], kernels: Kernels) -> Callable[[], None]:
    """`STEPS` steps on one batch after another."""
    turns = itertools.cycle(batches)

    def turn() -> None:
        use_kernels(kernels, "cuda")
        for _ in range(STEPS):
            step(next(turns))

    return turn


def peaks(steps: dict[str, Step], x: torch.Tensor) -> dict[str, float]:
    """The most memory that a step of each holds above what is there between steps, MiB."""
    found = {}
    for name, step in steps.items():
        use_kernels("native" if "native" in name else "pytorch", "cuda")
        step(x)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(x)
        torch.cuda.synchronize()
        found[name] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    return found


def measure(d_sae: int, rounds: int) -> None:
    """TopK beside everything, and the step of every class of ours."""
    batches = activations(BATCH, D_IN, device="cuda")
    factor = d_sae // D_IN
    classes: dict[str, SAE] = {
        "topk": TopKSAE(D_IN, factor, K),
        "batch_topk": BatchTopKSAE(D_IN, factor, K),
        "matryoshka": MatryoshkaSAE(D_IN, factor, k=K),
        "standard": StandardSAE(D_IN, factor),
        "jumprelu": JumpReLUSAE(D_IN, factor),
        "gated": GatedSAE(D_IN, factor),
    }
    steps: dict[str, Step] = {name: step_of(sae, device="cuda") for name, sae in classes.items()}
    for name in ("topk", "batch_topk", "matryoshka"):
        steps[f"{name}_native"] = step_of(type(classes[name])(D_IN, factor, k=K), device="cuda")
    steps |= {
        "topk_2_percent_dead": step_of(TopKSAE(D_IN, factor, K), dead_share=0.02, device="cuda"),
        "floor": floor_of(D_IN, d_sae, device="cuda"),
        "sparsify": sparsify(D_IN, d_sae, K, "cuda"),
        "sae_lens": sae_lens("topk", D_IN, d_sae, K, BATCH, autocast=False, device="cuda"),
        "sae_lens_autocast": sae_lens("topk", D_IN, d_sae, K, BATCH, autocast=True, device="cuda"),
        "dictionary_learning": dictionary_learning(D_IN, d_sae, K, "cuda"),
    }
    turns = {name: on(step, batches, "native" if "native" in name else "pytorch") for name, step in steps.items()}
    times = interleaved(turns, rounds)
    memory = peaks(steps, batches[0])
    sizes = {"d_in": D_IN, "d_sae": d_sae, "batch": BATCH, "k": K, "rounds": rounds, "steps": STEPS}
    packages = {"sparsify": "eai-sparsify", "dictionary_learning": "dictionary-learning"}
    for name in steps:
        # facts are of a turn
        facts = {key: round(value / STEPS, 3) for key, value in times[name].facts("step").items()}
        theirs = name in packages or name.startswith("sae_lens")
        peer = {"peer": installed(packages.get(name, "sae-lens"))} if theirs else {}
        over = ratio(times[name], times["topk_native"])
        report("step_gpu", f"{name}_over_topk_native", **sizes, **over, **facts, peak_mib=memory[name], **peer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d_sae", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    for size in asked.d_sae:
        measure(size, asked.rounds)
        gc.collect()
        torch.cuda.empty_cache()
