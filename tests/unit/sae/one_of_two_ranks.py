"""One of two processes that share a batch: writes the gradients that it has after a step. See test_ranks.py.

python one_of_two_ranks.py RANK FOLDER cpu|cuda
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist

from saetrack.sae import SAE, BatchTopKSAE, Exchange, Kernels, MatryoshkaSAE, TopKSAE, use_exchange, use_kernels

D_IN, BATCH = 6, 16
CLASSES: dict[str, Callable[[], SAE]] = {
    "TopK": lambda: TopKSAE(D_IN, 4, k=3, aux_k=2),
    "BatchTopK": lambda: BatchTopKSAE(D_IN, 4, k=3, aux_k=2),
    "Matryoshka": lambda: MatryoshkaSAE(D_IN, 4, k=3, aux_k=2),
}
DEAD = [1, 5, 6, 20]
"""More than aux_k, so that AuxK chooses among them."""


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(make: Callable[[], SAE], seed: int) -> SAE:
    sae = make()
    for i, parameter in enumerate(sae.parameters()):
        parameter.data.copy_(numbers(100 * seed + i, *parameter.shape))
    return sae


def step(make: Callable[[], SAE], rows: slice, device: str = "cpu") -> SAE:
    """An SAE with the gradients of some rows of the batch, AuxK and continuity included."""
    sae, previous = filled(make, 1).to(device), filled(make, 2).to(device)
    x = numbers(0, BATCH, D_IN) + 3.0
    x[: BATCH // 2] *= 2.0  # the ranks' variances differ
    dead = torch.zeros(sae.d_sae, dtype=torch.bool)
    dead[DEAD] = True
    x = x[rows].to(device)
    out = sae.loss(x, dead.to(device), previous.sparse_latents(1.1 * x), dead.to(device))
    assert out.moved is not None
    (out.loss + 0.1 * out.moved).backward()
    return sae


def main(rank: int, folder: Path, device: str) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    found = {}
    ways: list[tuple[Exchange, Kernels]] = [("gradients", "pytorch"), ("factors", "pytorch")]
    if device == "cpu" and shutil.which("c++"):
        ways.append(("factors", "native"))
    for exchange, kernels in ways:
        use_exchange(exchange)
        use_kernels(kernels)
        for name, make in CLASSES.items():
            sae = step(make, slice(rank * BATCH // 2, (rank + 1) * BATCH // 2), device)
            for key, parameter in sae.named_parameters():
                assert parameter.grad is not None
                if exchange == "gradients" or key == "b_dec":  # what is left to DDP
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= 2
                found[f"{name} {exchange} {kernels} {key}"] = parameter.grad.cpu().contiguous()
    save_file(found, folder / f"{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
