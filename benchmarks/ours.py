"""One training step of ours, as SAEModule takes it, and the floor under it."""

from collections.abc import Callable

import torch
from torch import Tensor

from saetrack.sae import SAE, Precision, resolve_precision
from saetrack.training.adam import ColumnAdam
from saetrack.training.module import FeatureState
from saetrack.training.step import StepGraph, StepInputs, loss_of

LR = 2e-4


def activations(batch: int, d_in: int, n: int = 3, device: str = "cpu") -> list[Tensor]:
    """A few batches in training units (mean norm sqrt(d_in))."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, d_in, generator=generator).to(device) for _ in range(n)]


def step_of(
    sae: SAE, precision: Precision = "auto", dead_share: float = 0.0, device: str = "cpu", recorded: bool = False
) -> Callable[[Tensor], None]:
    """A step of training: AuxK, decoder norm and feature statistics included.

    Args:
        sae: What to train; it is initialised here.
        precision: As ``model.precision``.
        dead_share: Share of the latents that AuxK has to revive, in every step.
        device: Where it is trained.
        recorded: As a CUDA graph.
    """
    sae.initialise(torch.randn(2048, sae.d_in), torch.Generator().manual_seed(0))
    sae.to(device).precision = resolve_precision(precision, torch.device(device))
    optimizer = ColumnAdam(sae.parameters(), lr=LR)
    state = FeatureState(sae.d_sae).to(device)
    never = 2**62 if dead_share == 0 else 0
    stays_dead = (torch.rand(sae.d_sae, generator=torch.Generator().manual_seed(1)) < dead_share).to(device)
    graph = StepGraph(sae, None) if recorded else None

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        dead = state.dead(never) & stays_dead
        given = StepInputs(x, dead, dead | state.revived, None)
        if graph is None:
            loss, out = loss_of(sae, None, given, 0.0)
            loss.backward()
        else:
            _, out = graph(given, 0.0)
            graph.place_gradients()
        sae.remove_parallel_gradient_()
        optimizer.step()
        sae.after_step_(out.smallest_kept)
        state.update(out.fired, len(x), 2**62)

    return step


def floor_of(d_in: int, d_sae: int, precision: Precision = "auto", device: str = "cpu") -> Callable[[Tensor], None]:
    """What no step can do without: one encoder product, and one pass of Adam over both matrices."""
    dtype = resolve_precision(precision, torch.device(device))
    weights = torch.randn(d_sae, d_in, device=device).to(dtype)
    parameters = [torch.nn.Parameter(torch.randn(d_sae, d_in, device=device)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.randn(d_sae, d_in, device=device)
    optimizer = torch.optim.Adam(parameters, lr=LR, fused=True)
    rows = 2048
    kept = torch.empty(rows, d_sae, dtype=dtype, device=device)

    def step(x: Tensor) -> None:
        for part in torch.split(x.to(dtype), rows):
            torch.mm(part, weights.T, out=kept[: len(part)])
        optimizer.step()

    return step
