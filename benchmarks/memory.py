"""Peak memory of a whole run, each in a process of its own, beside the formula of docs/stream.md.

python benchmarks/memory.py FOLDER [--only NAME ...]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from measuring import report

MIB = 2**20
CALIBRATION, HELD_OUT = 65_536, 8_192  # tokens, as by default


@dataclass(frozen=True)
class Setting:
    """A run.

    Args:
        d_in: Width of the LLM, and of its activations.
        d_sae: Latents of each SAE.
        hookpoints: How many.
        chunk_tokens: As ``data.chunk_tokens``.
        llm_dtype: As ``data.llm_dtype``.
        continuity: Whether a second stage holds the latents to the first's, which keeps both LLMs.
        batch: As ``data.batch_size``.
        vocabulary: Of the LLM.
    """

    d_in: int = 512
    d_sae: int = 16_384
    hookpoints: int = 1
    chunk_tokens: int = 65_536
    llm_dtype: str = "float32"
    continuity: bool = False
    batch: int = 4096
    vocabulary: int = 50_304


SETTINGS = {
    "usual": Setting(),
    "d_sae": Setting(d_sae=32_768, chunk_tokens=16_384),
    "chunk": Setting(chunk_tokens=196_608),
    "d_in": Setting(d_in=1024, d_sae=8192, chunk_tokens=16_384),
    "hookpoints": Setting(hookpoints=3, chunk_tokens=16_384),
    "bfloat16": Setting(llm_dtype="bfloat16", chunk_tokens=16_384),
    "continuity": Setting(continuity=True, chunk_tokens=16_384),
}


def predicted(s: Setting, imports: float, context: int = 128) -> dict[str, float]:
    """The formula, by its terms, in MiB; ``imports`` is what Python and the packages hold.

    Training, what is measured at the end of a stage, and its resume file do not coincide, so the largest counts.
    """
    llms, bytes_each = 1 + s.continuity, 2 if s.llm_dtype == "bfloat16" else 4
    parameters = 2 * s.vocabulary * s.d_in + 6 * 12 * s.d_in**2
    matrix = 4 * s.d_in * s.d_sae
    workspace = matrix // 2 + 64 * MIB  # the encoder in bfloat16, and pre-activations
    forward = 32 * context
    logit = 8 if bytes_each == 4 else bytes_each + 8  # itself, in float32, and its logarithm
    rows = max(1, min(32, 2**26 // (context * s.vocabulary)))
    terms = {
        "imports": imports * MIB,
        "LLM": llms * parameters * bytes_each,
        "SAEs, gradients, Adam": s.hookpoints * 8 * matrix,
        "workspace": s.hookpoints * workspace,
        "snapshot for continuity": s.continuity * s.hookpoints * (2 * matrix + workspace),
        "calibration and held-out": s.hookpoints * (CALIBRATION + HELD_OUT) * 4 * s.d_in,
    }
    parts = {
        "chunk, batches, a gradient turned for Adam": s.hookpoints
        * (llms * s.d_in * (bytes_each * s.chunk_tokens + 2 * 4 * s.batch) + matrix),
        "measuring": s.hookpoints * 2 * matrix + max(20 * 1024 * s.d_sae, logit * rows * context * s.vocabulary),
        "resume file": s.hookpoints * 6 * matrix,
    }
    longest = max(parts, key=lambda name: parts[name])
    terms |= {longest: parts[longest], "forward of the LLM": forward * s.d_in * bytes_each * 10}
    return {name: round(value / MIB, 1) for name, value in terms.items()}


def run(setting: Setting, folder: Path) -> dict[str, Any]:
    """Train in this process, and give its peak by the part of the run, MiB."""
    from lightning import Callback, Trainer, seed_everything
    from pythia_shape import data

    from saetrack.sae import TopKSAE
    from saetrack.training import CheckpointScheduler, OptimizerSettings, ResumeFile, SAEModule

    peaks: dict[str, float] = {"imports": 0.0, "begin": 0.0, "train": 0.0, "end": 0.0}

    def passed(part: str) -> None:
        peaks[part] = max(peaks[part], memory("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here

    class Parts(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                passed("begin")

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            passed("train")

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            passed("end")

    seed_everything(0, verbose=False)
    # the embedding's layers alone are read: how long a forward is does not matter here
    hookpoints = [f"gpt_neox.layers.{i}" for i in range(setting.hookpoints)]
    module = data(folder, hookpoints, setting.chunk_tokens, setting.llm_dtype, setting.batch)
    module.tokens = replace(module.tokens, calibration_tokens=CALIBRATION, held_out_tokens=HELD_OUT, ce_tokens=4096)
    module.tokens = replace(module.tokens, evaluation_tokens=4096)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        passed("imports")
        scheduler = CheckpointScheduler(
            Path(place) / "track",
            steps=[0, 1] if setting.continuity else [0],
            tokens_first=setting.chunk_tokens,
            tokens_next=setting.chunk_tokens,
            allow_duplicates=True,
        )
        settings = OptimizerSettings(lr=2e-4, warmup_tokens=0, tolerance=None)
        Trainer(
            accelerator="cpu",
            max_epochs=-1,
            reload_dataloaders_every_n_epochs=1,
            logger=False,
            callbacks=[scheduler, ResumeFile(), Parts()],
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=place,
        ).fit(SAEModule(lambda d_in: TopKSAE(d_in, setting.d_sae // d_in, k=32), settings), module)
    return peaks


def memory(name: str) -> float:
    """A line of this process's status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def measure(name: str, folder: Path) -> None:
    """Compare one setting, trained in a process of its own, with the formula."""
    command = [sys.executable, __file__, str(folder), "--run", name]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peaks: dict[str, float] = json.loads(output.splitlines()[-1])
    terms = predicted(SETTINGS[name], peaks["imports"])
    peak = max(peaks.values())
    report(
        "memory",
        f"whole_process_{name}",
        **asdict(SETTINGS[name]),
        value=round(abs(sum(terms.values()) / peak - 1), 3),
        bar=0.15,
        at_most=True,
        peak_mib=round(peak),
        predicted_mib=round(sum(terms.values())),
        peaks_mib={part: round(value) for part, value in peaks.items()},
        terms_mib=terms,
    )


def llm_of(setting: Setting, folder: Path) -> Path:
    """The folder with the LLM of a setting, twice as checkpoints of a series."""
    from pythia_shape import make

    place = folder / f"d{setting.d_in}"
    make(place, setting.d_in, setting.vocabulary)
    if not (place / "step1").exists():
        (place / "step1").symlink_to("step0")
    return place


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--run", choices=SETTINGS)
    asked = parser.parse_args()
    if asked.run:
        setting = SETTINGS[asked.run]
        print(json.dumps(run(setting, llm_of(setting, asked.folder))))
    else:
        for each in asked.only:
            measure(each, asked.folder)
