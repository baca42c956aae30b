"""Why does an SAE miss planted features: does the truth not hold as a solution, or is it not found?

python benchmarks/planted_recall.py SERIES          a folder that benchmarks/planted.py wrote, with --documents 15000

Trains the SAE of benchmarks/validation.py on the series' last LLM checkpoint, from the planted directions and from a
random start, by width, learning rate and tokens. Prints a JSON line for each: the loss at the end, FVU, recall, and for
each feature missed the other one that it fires with most often, and how often.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from planted import HOOKPOINT, Truth, fires_with
from transformers import AutoTokenizer

from saetrack.lm import FolderSource
from saetrack.lm.checkpoints import load_llm
from saetrack.lm.forward import read_activations
from saetrack.sae import BatchTopKSAE

ROW, BATCH, WARMUP, DEAD_AFTER, DECAY = 64, 256, 5000, 20_000, 0.2
RUNS = (  # start, seed, latents for each dimension, learning rate, tokens
    ("truth", 0, 4, 3e-3, 300_000),
    *(("random", seed, width, 3e-3, 800_000) for seed in (0, 1) for width in (3, 4)),
    *(
        ("random", seed, 8, lr, tokens)
        for seed, lr, tokens in ((0, 3e-3, 600_000), (0, 6e-3, 150_000), (0, 6e-3, 400_000))
    ),
)


def token_rows(series: Path, llm: str) -> NDArray[np.integer]:
    """The corpus, packed into rows that begin with BOS."""
    tokenizer = AutoTokenizer.from_pretrained(llm)
    documents = (series / "corpus.txt").read_text(encoding="utf-8").splitlines()
    stream = np.concatenate([[0, *ids] for ids in tokenizer(documents)["input_ids"]])
    rows = stream[: len(stream) // ROW * ROW].reshape(-1, ROW).copy()
    rows[:, 0] = 0
    return rows


def activations(series: Path, truth: Truth) -> tuple[torch.Tensor, NDArray[np.bool_]]:
    """Those of the last LLM checkpoint, scaled as in training, and where which planted feature fires."""
    checkpoint = FolderSource(series).checkpoints()[-1]
    llm, rows = load_llm(checkpoint), token_rows(series, checkpoint.model)
    parts, fires = [], []
    for part in np.array_split(rows, max(1, len(rows) // 256)):
        text = part != 0
        x = read_activations(llm, torch.from_numpy(part), [HOOKPOINT])[HOOKPOINT]
        parts.append(x[torch.from_numpy(text)].float().clone())
        fires.append(truth.latents(len(truth.plan.steps) - 1, part)[text] > 0)
    x = torch.cat(parts)
    return x * (x.shape[1] ** 0.5 / x.norm(dim=1).mean()), np.concatenate(fires)


def train(
    x: torch.Tensor, width: int, directions: torch.Tensor | None, seed: int, lr: float, tokens: int
) -> tuple[float, BatchTopKSAE]:
    """Loss over the last tenth of the budget, and the SAE; it begins with ``directions`` where they are given."""
    generator = torch.Generator().manual_seed(seed)
    sae = BatchTopKSAE(x.shape[1], width, k=2)
    with torch.no_grad():
        sae.initialise(x[:8192], generator)
        if directions is not None:
            sae.W_dec[: len(directions)], sae.W_enc[:, : len(directions)] = directions, directions.T
            sae.b_enc[: len(directions)] = 0
            sae.b_dec.zero_()
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    steps, order, losses = tokens // BATCH, torch.randperm(len(x), generator=generator), []
    since = torch.zeros(sae.d_sae)
    for step in range(steps):
        at = step * BATCH % (len(x) - BATCH)
        factor = min(1.0, (step + 1) * BATCH / WARMUP, (steps - step) / (DECAY * steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        out = sae.loss(x[order[at : at + BATCH]], since >= DEAD_AFTER, None)
        optimizer.zero_grad()
        out.loss.backward()
        sae.remove_parallel_gradient_()
        optimizer.step()
        sae.after_step_(out.smallest_kept)
        since += BATCH
        since[out.fired] = 0
        losses.append(float(out.loss.detach()))
    return float(np.mean(losses[-steps // 10 :])), sae


def main() -> None:
    """Train from each start and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("series", type=Path)
    series = parser.parse_args().series
    truth = Truth.load(series)
    there = np.flatnonzero(truth.amplitudes[-1] > 0)
    x, fires = activations(series, truth)
    together = fires_with(fires.T, np.ones(len(fires)))
    directions = torch.from_numpy(truth.directions[-1, there]).float()
    for start, seed, width, lr, tokens in RUNS:
        loss, sae = train(x, width, directions if start == "truth" else None, seed, lr, tokens)
        with torch.no_grad():
            some = x[:16384]
            fvu = float((some - sae(some)).square().sum() / (some - some.mean(0)).square().sum())
        best = torch.nn.functional.normalize(sae.W_dec.detach()) @ directions.T
        missed = there[(best.amax(0) < 0.9).numpy()]
        facts = {
            "start": start,
            "seed": seed,
            "latents": sae.d_sae,
            "lr": lr,
            "tokens": tokens,
            "loss": round(loss, 5),
            "fvu": round(fvu, 4),
        }
        facts["recall"] = round(1 - len(missed) / len(there), 3)
        facts["missed"] = [
            {
                "feature": int(f),
                "kind": truth.kinds[f],
                "with": int(together[f].argmax()),
                "share": round(together[f].max(), 2),
            }
            for f in missed
        ]
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
