"""What two stages of a series on pythia-410m's shape take on a GPU: time of a step, and memory beside docs/stream.md.

python benchmarks/series_gpu.py FOLDER [--kernels pytorch native]

The LLM has random weights, `gpt_neox.layers.3` is read in bfloat16, the SAE is a TopK of 65,536 latents with k 32, the
batch 4,096 and the chunk 524,288 activations, as in configs/pythia-410m-deduped.yaml. The second stage has continuity.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import torch
from lightning import Callback, Trainer, seed_everything
from measuring import report
from pythia_shape import data, make

from saetrack.sae import Kernels, TopKSAE
from saetrack.training import CheckpointScheduler, OptimizerSettings, ResumeFile, SAEModule

D_IN, D_SAE, K, BATCH, CHUNK, LAYER = 1024, 65_536, 32, 4096, 524_288, 3
PER_CHUNK = CHUNK // BATCH
STEPS = 3 * PER_CHUNK
"""Of a stage: each of three chunks is computed while the one before it trains."""


class Stages(Callback):
    """Milliseconds of a step of each stage's second chunk, and the most memory that its training allocates, GiB."""

    def __init__(self) -> None:
        self.ms: list[float] = []
        self.peak: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin with the second chunk, beside whose steps the third is computed."""
        if batch_idx == 0:
            torch.cuda.reset_peak_memory_stats()
        if batch_idx == PER_CHUNK:
            torch.cuda.synchronize()
            self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End with it."""
        if batch_idx == 2 * PER_CHUNK - 1:
            torch.cuda.synchronize()
            self.ms.append(1e3 * (time.perf_counter() - self._began) / PER_CHUNK)
        if batch_idx == STEPS - 1:
            self.peak.append(torch.cuda.max_memory_allocated() / 2**30)


def run(folder: Path, kernels: Kernels) -> None:
    """Train the two stages and print what they took."""
    seed_everything(0, verbose=False)
    stages = Stages()
    with tempfile.TemporaryDirectory(dir=folder) as where:
        module = SAEModule(
            lambda d_in: TopKSAE(d_in, D_SAE // d_in, K),
            OptimizerSettings(lr=2e-4, warmup_tokens=0, tolerance=None),
            kernels=kernels,
        )
        budget = STEPS * BATCH
        Trainer(
            accelerator="gpu",
            devices=1,
            max_epochs=-1,
            reload_dataloaders_every_n_epochs=1,
            logger=False,
            callbacks=[
                CheckpointScheduler(Path(where) / "track", tokens_first=budget, tokens_next=budget),
                ResumeFile(),
                stages,
            ],
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=where,
        ).fit(module, data(folder, [f"gpt_neox.layers.{LAYER}"], CHUNK, "bfloat16", BATCH))
    facts = {"d_in": D_IN, "d_sae": D_SAE, "k": K, "batch": BATCH, "chunk": CHUNK, "kernels": kernels}
    for name, ms, peak in zip(("first", "with continuity"), stages.ms, stages.peak, strict=True):
        tokens = round(1e3 * BATCH / ms)
        report("series_gpu", f"tokens_per_second, {name}", **facts, value=tokens, step_ms=round(ms, 2))
        report("series_gpu", f"peak_gib, {name}", **facts, value=round(peak, 2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kernels", choices=get_args(Kernels), nargs="+", default=get_args(Kernels))
    asked = parser.parse_args()
    make(asked.folder, D_IN, rows=20_000, layers=24, heads=16, checkpoints=2)
    if len(asked.kernels) == 1:
        run(asked.folder, asked.kernels[0])
        sys.exit()
    for each in asked.kernels:  # in a process of its own, so that none has another's memory
        subprocess.run([sys.executable, __file__, str(asked.folder), "--kernels", each], check=True)
