"""What a series costs on many GPUs, by arithmetic: nothing here was measured on a GPU. docs/scaling.md explains it.

python benchmarks/scaling.py [--llm pythia-410m] [--d_sae 65536] [--batch 4096] [--gpus 1 8 64] [--flops 989e12] ...
"""

import argparse
from dataclasses import dataclass, fields

FLOAT = 4  # bytes
CALIBRATION, HELD_OUT, EVALUATION, CE = 65_536, 8_192, 65_536, 16_384  # tokens, the defaults of data.tokens


@dataclass(frozen=True)
class LLM:
    """A GPT-NeoX.

    Args:
        name: Its name.
        d: Width.
        layers: How many.
        read: Layers up to the hookpoint, which are all that a harvest runs.
        vocab: Rows of the unembedding.
        context: Tokens in a row.
        stored: Bytes of a parameter in a checkpoint's file.
        held: Bytes of a parameter in memory (data.llm_dtype).
    """

    name: str
    d: int
    layers: int
    read: int
    vocab: int
    context: int = 128
    stored: int = 2
    held: int = 2

    @property
    def parameters(self) -> int:
        """Matrices only: attention 4 d^2 and MLP 8 d^2 a layer, embedding and unembedding."""
        return 12 * self.d**2 * self.layers + 2 * self.vocab * self.d

    def forward_flops(self, layers: int) -> int:
        """FLOPs of one token through so many layers: two a parameter, and attention to every position of the row."""
        return layers * (24 * self.d**2 + 4 * self.context * self.d)

    @property
    def harvest_flops(self) -> int:
        """FLOPs of one activation: the forward stops after the hookpoint."""
        return self.forward_flops(self.read)

    @property
    def whole_flops(self) -> int:
        """FLOPs of one token through all of it, as the cross-entropy needs."""
        return self.forward_flops(self.layers) + 2 * self.d * self.vocab


LLMS = {
    "pythia-410m": LLM("pythia-410m", d=1024, layers=24, read=4, vocab=50_304),
    "pythia-6.9b": LLM("pythia-6.9b", d=4096, layers=32, read=16, vocab=50_432),
}


@dataclass(frozen=True)
class Series:
    """What is trained: a TopK SAE with continuity.

    Args:
        d_sae: Latents.
        k: Active ones.
        batch: Activations in a step, over all GPUs.
        checkpoints: LLM checkpoints.
        tokens_first: Budget of the first stage.
        tokens_next: Budget of every other.
    """

    d_sae: int = 65_536
    k: int = 32
    batch: int = 4096
    checkpoints: int = 154
    tokens_first: int = 300_000_000
    tokens_next: int = 15_000_000

    @property
    def tokens(self) -> int:
        """Activations that are trained on."""
        return self.tokens_first + (self.checkpoints - 1) * self.tokens_next


@dataclass(frozen=True)
class Hardware:
    """Assumptions: published peaks of an H100 SXM in an HGX server, and shares of them.

    Args:
        flops: bfloat16 FLOP/s, dense.
        flops32: float32 FLOP/s.
        memory: Bytes/s of its memory.
        used: Share of all the peaks that is reached.
        inside: Bytes/s from a GPU to others in its machine, one way.
        between: Bytes/s from a GPU to another machine.
        machine: GPUs in a machine.
        host: Seconds of a step that Python and launches take whatever its size.
        disk: Bytes/s at which one process reads or writes files.
        download: Bytes/s from the Hub, for all.
        csr: Seconds in which a CPU core turns 1e9 dense latents into sparse ones; measured, 4.0.
    """

    flops: float = 989e12
    flops32: float = 67e12
    memory: float = 3.35e12
    used: float = 0.4
    inside: float = 450e9
    between: float = 50e9
    machine: int = 8
    host: float = 5e-3
    disk: float = 1e9
    download: float = 100e6
    csr: float = 4.0


def weights(llm: LLM, series: Series) -> int:
    """Bytes of encoder and decoder."""
    return 2 * llm.d * series.d_sae * FLOAT


def factor_bytes(llm: LLM, series: Series) -> int:
    """Bytes of what a batch's gradients are made of.

    Rows of x and of the error; for each latent its index, its value and its gradient, and for each that continuity
    holds index and gradient; two counts.
    """
    return series.batch * (2 * llm.d * FLOAT + 5 * series.k * FLOAT + 2 * 8)


def exchange_seconds(hardware: Hardware, gpus: int, gathered: float, reduced: float = 0.0) -> float:
    """A ring: all-gather moves (n - 1) / n of the whole through every link, all-reduce twice that."""
    link = hardware.inside if gpus <= hardware.machine else hardware.between
    return (gpus - 1) / gpus * (gathered + 2 * reduced) / (link * hardware.used)


def step_seconds(llm: LLM, series: Series, hardware: Hardware, gpus: int) -> dict[str, float]:
    """Parts of one optimizer step of a stage with continuity."""
    local, table = series.batch / gpus, weights(llm, series)
    pairs = series.batch * series.k * llm.d * FLOAT  # bytes of one row for each (activation, latent) pair
    flops, memory = hardware.flops * hardware.used, hardware.memory * hardware.used
    harvest_flops = 2 * local * llm.harvest_flops  # of two LLM checkpoints
    select_flops = 2 * 2 * local * llm.d * series.d_sae  # of the SAE and the snapshot before
    # every pre-activation is written once and read twice, in bfloat16, by the SAE and the snapshot before
    select_bytes = 2 * 3 * 2 * local * series.d_sae
    # four products of two rows a pair (forward, backward, the snapshot before, continuity), and the decoder's sum
    local_bytes = (4 * 2 + 1) * pairs / gpus
    # sums over latents, of the whole batch on every GPU: both matrices, and the encoder once more for continuity
    sum_bytes = 3 * pairs + (3 / 2 + 3 / 2) * table  # what they give, and adding up the encoder's two
    # Adam reads four and writes three; two encoders to bfloat16; the parallel gradient's six passes; the norm's three
    update_bytes = (7 + 2 * 1.5 / 2 + 6 / 2 + 3 / 2) * table
    return {
        "harvest": harvest_flops / flops,
        "select": select_flops / flops + select_bytes / memory,
        "pairs": local_bytes / memory,
        "whole batch": (sum_bytes + update_bytes) / memory,
        "exchange": exchange_seconds(hardware, gpus, gathered=factor_bytes(llm, series)),
        "host": hardware.host,
    }


def dense_exchange_seconds(llm: LLM, series: Series, hardware: Hardware, gpus: int) -> float:
    """What DDP's all-reduce of the gradients would take instead."""
    return exchange_seconds(hardware, gpus, 0.0, reduced=weights(llm, series))


def stage_seconds(llm: LLM, series: Series, hardware: Hardware, gpus: int) -> dict[str, float]:
    """Both ends of a stage: what does not depend on its budget."""
    flops, flops32 = hardware.flops * hardware.used, hardware.flops32 * hardware.used
    everywhere, shared = CALIBRATION + HELD_OUT, 2 * EVALUATION / gpus
    dense = 2 * llm.d * series.d_sae  # FLOPs of one encoder or decoder product, which is float32 in inference
    measure = (everywhere + shared) * llm.harvest_flops / flops
    measure += (3 * EVALUATION / gpus + HELD_OUT) * 2 * dense / flops32  # before, shifted, after; convergence
    measure += 4 * CE / gpus * llm.whole_flops / flops
    return {
        "load": llm.parameters * llm.stored / hardware.disk,
        "snapshot": 4 * weights(llm, series) / hardware.disk,  # written once, read three times by every process
        "measure": measure,
        "sparse latents": EVALUATION / gpus * series.d_sae / 1e9 * hardware.csr,
    }


def series_hours(llm: LLM, series: Series, hardware: Hardware, gpus: int) -> dict[str, float]:
    """Hours of every part of a whole series."""
    steps = series.tokens / series.batch
    parts = {name: steps * seconds for name, seconds in step_seconds(llm, series, hardware, gpus).items()}
    parts |= {n: series.checkpoints * s for n, s in stage_seconds(llm, series, hardware, gpus).items()}
    return {name: seconds / 3600 for name, seconds in parts.items()}


def gpu_bytes(llm: LLM, series: Series, chunk: int = 131_072) -> dict[str, float]:
    """Memory of one GPU: both LLMs, a chunk of both and the next, weights with gradient and moments, the rest."""
    return {
        "LLMs": 2 * llm.parameters * llm.held,
        "activations": 2 * 2 * chunk * llm.d * FLOAT,
        "SAE": (4 + 1 + 0.5 / 2) * weights(llm, series),  # and the snapshot before, and the encoder in bfloat16
        "exchange": factor_bytes(llm, series) + 2**26,
    }


def disk_bytes(llm: LLM, series: Series) -> dict[str, float]:
    """What lies on the disk in the end: snapshots with their covariance, the resume file, two LLM checkpoints."""
    return {
        "snapshots": series.checkpoints * (weights(llm, series) + llm.d**2 * FLOAT),
        "resume": 3 * weights(llm, series),
        "LLM cache": 2 * llm.parameters * llm.stored,
    }


def table(llm: LLM, series: Series, hardware: Hardware, gpus: list[int]) -> str:
    """Hours by part, one column for each number of GPUs, as Markdown."""
    columns = [series_hours(llm, series, hardware, n) for n in gpus]
    lines = [f"| hours, {llm.name}, by GPUs | {' | '.join(map(str, gpus))} |", "|---" * (len(gpus) + 1) + "|"]
    rows = {name: [column[name] for column in columns] for name in columns[0]}
    steps = series.tokens / series.batch / 3600
    rows["**all**"] = [sum(column.values()) for column in columns]
    rows["(dense all-reduce instead of exchange)"] = [
        steps * dense_exchange_seconds(llm, series, hardware, n) for n in gpus
    ]
    lines += [f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} |" for name, values in rows.items()]
    bound = [max(column, key=lambda name: column[name]) for column in columns]
    lines.append(f"| largest part | {' | '.join(bound)} |")
    memory, disk = gpu_bytes(llm, series), disk_bytes(llm, series)
    download = series.checkpoints * llm.parameters * llm.stored
    lines += [
        "",
        "GB on a GPU: " + ", ".join(f"{name} {size / 1e9:.1f}" for name, size in memory.items()),
        "GB on disk: " + ", ".join(f"{name} {size / 1e9:.1f}" for name, size in disk.items()),
        f"GB to download: {download / 1e9:.0f}, {download / hardware.download / 3600:.1f} hours beside the training",
    ]
    return "\n".join(lines)


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llm", nargs="+", default=list(LLMS), choices=LLMS)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 8, 64])
    for field in [*fields(Series), *fields(Hardware)]:
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    asked = vars(parser.parse_args())
    series = Series(**{field.name: asked[field.name] for field in fields(Series)})
    hardware = Hardware(**{field.name: asked[field.name] for field in fields(Hardware)})
    for name in asked["llm"]:
        print(table(LLMS[name], series, hardware, asked["gpus"]), end="\n\n")


if __name__ == "__main__":
    main()
