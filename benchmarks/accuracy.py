"""What the sparse step and bfloat16 cost in quality: our steps beside dense float32 autograd on the same activations.

python benchmarks/accuracy.py FOLDER [--steps 2000] [--seeds 0 1]

FOLDER holds LLM checkpoints, as `saetrack pretrain FOLDER` or `make quickstart` leave them; the last one is read. Every
variant starts from the same weights and sees the same batches; FVU and the dead share are of activations held out.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from measuring import report
from torch import Tensor

from saetrack.lm import FolderSource, StdlibCorpus, TokenRows
from saetrack.lm.forward import read_activations
from saetrack.lm.loading import load_llm
from saetrack.lm.tokens import tokenize_corpus
from saetrack.metrics import fraction_variance_unexplained
from saetrack.sae import SAE, Kernels, StandardSAE, TopKSAE, int8, use_kernels
from saetrack.training.adam import ColumnAdam
from saetrack.training.module import FeatureState

BATCH, LR, CONTEXT = 2048, 1e-3, 128
HELD_OUT = 50_000
DEAD_AFTER = 100_000
Loss = Callable[[SAE, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From SAE, activations and the dead to the loss and which latents fired."""


def harvest(folder: Path, cache: Path, hookpoint: str, tokens: int) -> tuple[Tensor, Tensor]:
    """Activations in training units (mean norm sqrt(d_in)): those to train on, and those of other documents."""
    source = FolderSource(folder)
    llm = load_llm(source.checkpoints()[-1])
    corpus = tokenize_corpus(StdlibCorpus(), source.tokenizer(), source.tokenizer_name, CONTEXT, cache)

    def collect(rows: TokenRows, n: int) -> Tensor:
        parts: list[Tensor] = []
        for start in range(0, min(len(rows.tokens), -(-n // (CONTEXT - 1))), 64):
            block = slice(start, start + 64)
            tokens = torch.from_numpy(rows.tokens[block].astype("int64"))
            usable = torch.from_numpy(rows.usable(block))
            parts.append(read_activations(llm, tokens, [hookpoint])[hookpoint][usable])
        return torch.cat(parts)[:n]

    train, held_out = collect(corpus.train, tokens), collect(corpus.evaluation, HELD_OUT)
    scale = train.shape[1] ** 0.5 / train.norm(dim=1).mean()
    return train * scale, held_out * scale


def ours(sae: SAE, x: Tensor, dead: Tensor) -> tuple[Tensor, Tensor]:
    """The step that is shipped."""
    out = sae.loss(x, dead)
    return out.loss, out.fired


def dense(sae: SAE, x: Tensor, dead: Tensor) -> tuple[Tensor, Tensor]:
    """The formulas in the docstrings of TopKSAE, StandardSAE and AuxK, every latent in memory, autograd alone."""
    pre = sae.preactivations(x)
    latents = sae.activate(pre)
    error = x - sae.decode(latents)
    if isinstance(sae, StandardSAE):
        penalty = (latents @ sae.W_dec.norm(dim=1)).mean() / sae.d_in**0.5
        loss = error.square().mean() + sae.l1_coefficient * penalty
    else:
        loss = error.square().sum() / (x - x.mean(0)).square().sum()
    if dead.any():
        n = min(sae.aux_k, int(dead.sum()))
        best, where = pre.masked_fill(~dead, -torch.inf).topk(n, dim=1)
        missed = error.detach()
        variance = (missed - missed.mean(0)).square().sum()
        missed = missed - torch.zeros_like(pre).scatter(1, where, best) @ sae.W_dec
        loss = loss + sae.aux_coefficient * min(1.0, int(dead.sum()) / sae.aux_k) * missed.square().sum() / variance
    return loss, (latents > 0).any(0)


def train(sae: SAE, loss_of: Loss, pool: Tensor, held_out: Tensor, steps: int, seed: int) -> dict[str, float]:
    """Train one variant; the learning rate warms up over 5 % of the steps and decays over the last 20 %."""
    draw = torch.Generator().manual_seed(seed)
    sae.initialise(pool[torch.randperm(len(pool), generator=draw)[:8192]], draw)
    optimizer, state = ColumnAdam(sae.parameters(), lr=LR), FeatureState(sae.d_sae)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / (0.05 * steps), (steps - step) / (0.2 * steps))
        x = pool[torch.randint(len(pool), (BATCH,), generator=draw)]
        optimizer.zero_grad()
        loss, fired = loss_of(sae, x, state.dead(DEAD_AFTER))
        loss.backward()
        sae.remove_parallel_gradient_()
        optimizer.step()
        sae.normalise_decoder_()
        state.update(fired, BATCH, DEAD_AFTER)
    with torch.no_grad():
        parts = [(part, sae.encode(part)) for part in torch.split(held_out, 4096)]
        x_hat = torch.cat([sae.decode(latents) for _, latents in parts])
        fired = torch.stack([(latents > 0).any(0) for _, latents in parts]).any(0)
    fvu = fraction_variance_unexplained(held_out, x_hat).item()
    return {"fvu": fvu, "dead_share": 1 - fired.double().mean().item()}


def compare(name: str, make: Callable[[], SAE], pool: Tensor, held_out: Tensor, steps: int, seeds: list[int]) -> None:
    """Report one architecture: the mean over seeds of FVU relative to the dense step's, and the dead shares."""
    variants: dict[str, tuple[Loss, torch.dtype, Kernels]] = {
        "dense": (dense, torch.float32, "pytorch"),
        "float32": (ours, torch.float32, "pytorch"),
        "bfloat16": (ours, torch.bfloat16, "pytorch"),
    }
    if name == "topk":
        variants["8_bits"] = (ours, torch.bfloat16, "pytorch")
        variants["native"] = (ours, torch.bfloat16, "native")
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    for seed in seeds:
        for variant, (loss_of, precision, kernels) in variants.items():
            sae = make()
            sae.precision = precision
            use_kernels(kernels)
            # the SAE is too small for 8-bit numbers to be chosen by themselves
            with mock.patch.object(int8, "is_faster", return_value=variant == "8_bits"):
                results[variant].append(train(sae, loss_of, pool, held_out, steps, seed))
            use_kernels("pytorch")
    reference = results.pop("dense")
    for variant in results:
        changes = [mine["fvu"] / r["fvu"] - 1 for mine, r in zip(results[variant], reference, strict=True)]
        report(
            "accuracy",
            f"{name}_{variant}_fvu_against_dense_float32",
            d_in=pool.shape[1],
            d_sae=make().d_sae,
            steps=steps,
            tokens=len(pool),
            seeds=seeds,
            value=round(abs(statistics.mean(changes)), 5),
            bar=0.005,
            at_most=True,
            change_by_seed=[round(change, 5) for change in changes],
            fvu=[round(r["fvu"], 5) for r in results[variant]],
            dense_fvu=[round(r["fvu"], 5) for r in reference],
            dead_share=[round(r["dead_share"], 4) for r in results[variant]],
            dense_dead_share=[round(r["dead_share"], 4) for r in reference],
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cache", type=Path, help="where token rows are kept; FOLDER/tokens by default")
    parser.add_argument("--hookpoint", default="gpt_neox.layers.2")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="from which the batches are drawn")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", choices=["topk", "standard"])
    asked = parser.parse_args()
    pool, held_out = harvest(asked.folder, asked.cache or asked.folder / "tokens", asked.hookpoint, asked.tokens)
    width = pool.shape[1]
    if asked.only != "standard":
        compare("topk", lambda: TopKSAE(width, 16, k=24), pool, held_out, asked.steps, asked.seeds)
    if asked.only != "topk":
        compare("standard", lambda: StandardSAE(width, 16), pool, held_out, asked.steps, asked.seeds)
