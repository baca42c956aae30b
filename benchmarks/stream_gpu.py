"""Tokens a second of stream and step together on a GPU, beside the other packages' loops; there are no bars.

python benchmarks/stream_gpu.py FOLDER [--rounds 3]
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import loops
import torch
from loops import Shape
from measuring import Timing, ratio, report
from pythia_shape import D_IN, make
from stream import in_turn

ROWS, STEPS = 20_000, 128
LOOPS: dict[str, Callable[[Shape, Timing], None]] = {
    "ours": lambda shape, timing: loops.ours(shape, timing, batches=STEPS),
    "ours_native": lambda shape, timing: loops.ours(shape, timing, batches=STEPS, kernels="native"),
    "ours_native_bfloat16": lambda shape, timing: loops.ours(
        shape, timing, "bfloat16", batches=STEPS, kernels="native"
    ),
    "sparsify": lambda shape, timing: loops.sparsify(shape, timing, steps=STEPS),
    "sparsify_bfloat16": lambda shape, timing: loops.sparsify(shape, timing, torch.bfloat16, steps=STEPS),
    "dictionary_learning": lambda shape, timing: loops.dictionary_learning(shape, timing, steps=STEPS),
    "sae_lens": lambda shape, timing: loops.sae_lens(shape, timing, steps=STEPS),
}


def main(shape: Shape, rounds: int) -> None:
    """Every loop in a process of its own, one after another, again and again."""
    times = in_turn(list(LOOPS), shape.folder, rounds, __file__)
    for name, timing in times.items():
        value = round(shape.batch / statistics.median(timing.wall))
        sizes = {"d_in": D_IN, "d_sae": shape.d_sae, "batch": shape.batch, "k": shape.k, "rounds": rounds}
        facts = {"over_ours_native": ratio(timing, times["ours_native"])["ratio"], **timing.facts("step")}
        report("stream_gpu", f"tokens_per_second_{name}", **sizes, **facts, value=value)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loop", choices=LOOPS)
    asked = parser.parse_args()
    make(asked.folder, rows=ROWS)
    shape = Shape(asked.folder, device="cuda")
    if asked.loop:
        taken = Timing()
        LOOPS[asked.loop](shape, taken)
        print(json.dumps([taken.wall[0], taken.cpu[0]]))
        sys.exit()
    main(shape, asked.rounds)
