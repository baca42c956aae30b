"""What two processes with one thread each lose against one process with two threads, on the same batch.

python benchmarks/ddp.py [--d_sae 16384] [--rounds 8]

The step is TopK's as SAEModule takes it, AuxK's bookkeeping included; the run is the step and what it is trained on:
half of pythia-70m's layers on 4,096 tokens, with early stop. Bytes go through gloo, within the memory of one machine.
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import Timing, interleaved, ratio, report
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from saetrack.lm.forward import read_activations
from saetrack.sae import Exchange, TopKSAE, resolve_precision, use_exchange
from saetrack.training.adam import ColumnAdam
from saetrack.training.module import FeatureState

D_IN, BATCH, K, CONTEXT = 512, 4096, 32, 128
HOOKPOINT = "gpt_neox.layers.2"


class Loss(nn.Module):
    """The loss as the forward of a module, which is what DDP wraps."""

    def __init__(self, sae: TopKSAE) -> None:
        super().__init__()
        self.sae = sae
        self.state = FeatureState(sae.d_sae)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and which latents fired."""
        out = self.sae.loss(x, self.state.dead(2**62))
        return out.loss, out.fired


def step_of(d_sae: int, exchange: Exchange, ddp: bool) -> Callable[[Tensor], None]:
    """A step of training with what it exchanges; without ``ddp`` nothing is exchanged at all."""
    sae = TopKSAE(D_IN, d_sae // D_IN, K)
    sae.initialise(torch.randn(2048, D_IN, generator=seeded(1)), seeded(2))
    sae.precision = resolve_precision("auto", torch.device("cpu"))
    optimizer = ColumnAdam(sae.parameters(), lr=2e-4)
    loss: nn.Module = Loss(sae)
    state = loss.state
    assert isinstance(state, FeatureState)
    if ddp:
        left_alone = ["sae.W_enc", "sae.b_enc", "sae.W_dec"] if exchange == "factors" else []
        counted = [f"state.{name}" for name, _ in state.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(loss, [*left_alone, *counted])
        loss = DistributedDataParallel(loss)

    def step(x: Tensor) -> None:
        use_exchange(exchange)
        optimizer.zero_grad()
        error, fired = loss(x)
        error.backward()
        sae.remove_parallel_gradient_()
        optimizer.step()
        sae.normalise_decoder_()
        counts = fired.int()
        if ddp:
            dist.all_reduce(counts)
        state.update(counts > 0, BATCH, 2**62)

    return step


def seeded(seed: int) -> torch.Generator:
    """A generator for draws that are equal on both processes."""
    return torch.Generator().manual_seed(seed)


def pythia_70m() -> GPTNeoXForCausalLM:
    """An LLM of its shape, with random weights."""
    torch.manual_seed(0)
    shape = {"hidden_size": D_IN, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 4 * D_IN}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, vocab_size=50304, max_position_embeddings=2048)).eval()


def variants(d_sae: int, rank: int) -> dict[str, Callable[[], None]]:
    """One process with two threads, two that exchange, and two that do not; each by the step and by the run."""
    llm = pythia_70m()
    batches = itertools.cycle(torch.randn(3, BATCH, D_IN, generator=seeded(0)).unbind())
    tokens = torch.randint(50304, (BATCH // CONTEXT, CONTEXT), generator=seeded(0))
    part = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    rows = slice(rank * len(tokens) // 2, (rank + 1) * len(tokens) // 2)

    def run_of(step: Callable[[Tensor], None], rows: slice) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                x = read_activations(llm, tokens[rows], [HOOKPOINT])[HOOKPOINT].flatten(0, 1)
            step(x.clone())

        return run

    def alone(run: Callable[[], None]) -> Callable[[], None]:
        def run_alone() -> None:
            if rank == 0:
                torch.set_num_threads(2)
                run()
                torch.set_num_threads(1)

        return run_alone

    def together(run: Callable[[], None]) -> Callable[[], None]:
        def to_the_end() -> None:
            dist.barrier()
            run()
            dist.barrier()

        return to_the_end

    one = step_of(d_sae, "nothing", ddp=False)
    pairs = {
        "factors": step_of(d_sae, "factors", ddp=True),
        "gradients": step_of(d_sae, "gradients", ddp=True),
        "nothing": step_of(d_sae, "nothing", ddp=False),
    }
    found = {"one step": alone(lambda: one(next(batches))), "one run": alone(run_of(one, slice(None)))}
    for name, step in pairs.items():
        found[f"{name} step"] = lambda step=step: step(next(batches)[part])
        found[f"{name} run"] = run_of(step, rows)
    return {name: together(run) for name, run in found.items()}


def main(rank: int, folder: Path, d_sae: int, rounds: int) -> None:
    """One of the two processes; the first one says what was measured."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    times = interleaved(variants(d_sae, rank), rounds)
    for timing in times.values():
        both = torch.tensor(timing.cpu)
        dist.all_reduce(both)
        timing.cpu = both.tolist()
    if rank == 0:
        for what in ("step", "run"):
            compare(times, what, {"d_in": D_IN, "d_sae": d_sae, "batch": BATCH, "k": K, "rounds": rounds})
    dist.barrier()
    dist.destroy_process_group()


def compare(times: dict[str, Timing], what: str, shape: dict[str, int]) -> None:
    """Print the speed of two processes as a share of that of one."""
    one = times[f"one {what}"]
    for name in ("factors", "gradients", "nothing"):
        two = times[f"{name} {what}"]
        bar = {"bar": 0.88} if name == "factors" else {}
        facts = {**one.facts("one_process"), **two.facts("two_processes")}
        report("ddp", f"{what}, {name} exchanged", **shape, **ratio(one, two), **bar, **facts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d_sae", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=8)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(main, (Path(folder), asked.d_sae, asked.rounds), nprocs=2)
