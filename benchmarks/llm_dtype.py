"""What an LLM in bfloat16 costs an SAE: trained on its activations and on float32 ones, both measured on float32 ones.

python benchmarks/llm_dtype.py FOLDER [--llm_steps 32 256] [--steps 250] [--seeds 0 1 2]

FOLDER holds LLM checkpoints, as `saetrack pretrain FOLDER` or `make quickstart` leave them. Both SAEs of a seed begin
with the same weights and see the same tokens in the same order.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch
from accuracy import BATCH, ours, train
from measuring import report
from torch import Tensor

from saetrack.lm import FolderSource, LLMCheckpoint, StdlibCorpus, TokenizedCorpus, TokenRows, load_llm, tokenize_corpus
from saetrack.metrics import fraction_variance_unexplained
from saetrack.sae import TopKSAE
from saetrack.training.stream import harvest

CONTEXT, POOL, HELD_OUT = 128, 300_000, 30_000
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
"""Student's t for a two-sided interval of 95 %, by degrees of freedom."""


def activations(
    checkpoint: LLMCheckpoint, corpus: TokenizedCorpus, hookpoint: str, dtype: str
) -> tuple[Tensor, Tensor]:
    """Those to train on and those of other documents, in the LLM's own units, float32 as the stream gives them."""
    llm = load_llm(checkpoint, dtype)

    def collect(rows: TokenRows, n: int) -> Tensor:
        indices = np.arange(min(len(rows.tokens), -(-n // (CONTEXT - 1))))
        return torch.cat([x[hookpoint] for _, x in harvest(llm, checkpoint, rows, [hookpoint], indices)])[:n]

    return collect(corpus.train, POOL), collect(corpus.evaluation, HELD_OUT)


def compare(checkpoint: LLMCheckpoint, corpus: TokenizedCorpus, hookpoint: str, steps: int, seeds: list[int]) -> None:
    """Report one LLM checkpoint: by how much bfloat16 changes the FVU on float32 activations, over seeds."""
    pools, held_out = {}, {}
    for dtype in ("float32", "bfloat16"):
        pools[dtype], held_out[dtype] = activations(checkpoint, corpus, hookpoint, dtype)
    d_in = pools["float32"].shape[1]
    scale = d_in**0.5 / pools["float32"].norm(dim=1).mean()
    fvu: dict[str, list[float]] = {
        dtype: [
            train(TopKSAE(d_in, 16, k=24), ours, pool * scale, held_out["float32"] * scale, steps, seed)["fvu"]
            for seed in seeds
        ]
        for dtype, pool in pools.items()
    }
    changes = [b / a - 1 for a, b in zip(fvu["float32"], fvu["bfloat16"], strict=True)]
    spread = T_95[len(seeds) - 1] * statistics.stdev(changes) / len(seeds) ** 0.5
    report(
        "llm_dtype",
        f"fvu_of_bfloat16_harvest_at_llm_step_{checkpoint.step}",
        d_in=d_in,
        d_sae=16 * d_in,
        tokens=steps * BATCH,
        seeds=seeds,
        value=round(statistics.mean(changes), 5),
        interval=[round(statistics.mean(changes) + sign * spread, 5) for sign in (-1, 1)],
        change_by_seed=[round(change, 5) for change in changes],
        fvu_float32=[round(x, 5) for x in fvu["float32"]],
        fvu_bfloat16=[round(x, 5) for x in fvu["bfloat16"]],
        # what rounding does to the activations themselves, in the measure of what the SAE misses
        fvu_of_rounding=float(f"{fraction_variance_unexplained(held_out['float32'], held_out['bfloat16']).item():.2g}"),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cache", type=Path, help="where token rows are kept; FOLDER/tokens by default")
    parser.add_argument("--hookpoint", default="gpt_neox.layers.2")
    parser.add_argument("--llm_steps", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked = parser.parse_args()
    source = FolderSource(asked.folder)
    rows = tokenize_corpus(
        StdlibCorpus(), source.tokenizer(), source.tokenizer_name, CONTEXT, asked.cache or asked.folder / "tokens"
    )
    for each in source.checkpoints():
        if each.step in asked.llm_steps:
            compare(each, rows, asked.hookpoint, asked.steps, asked.seeds)
