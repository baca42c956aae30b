"""Loss and gradients of one SAE on one batch, and the same recorded as a CUDA graph."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from lightning import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from saetrack.sae import SAE, Kernels, LossTerms

_LEAST_PLACES = 64  # below it, places for dead latents that are not taken cost nothing
_GRAPHS = 3  # kept: the number of dead latents may go to and fro over a bound
_WARM_UP = 3  # steps before one is recorded, in which kernels are compiled and memory is found


class StepInputs(NamedTuple):
    """What a step is given.

    Attributes:
        x: Activations of a batch in training units, ``[batch, d_in]``.
        dead: Latents to be revived, bool ``[d_sae]``.
        new: Those that may fire where they did not, bool ``[d_sae]``.
        before: Activations of the previous LLM checkpoint at the same tokens, in its own units, ``[batch, d_in]``; None
            without continuity.
    """

    x: Tensor
    dead: Tensor
    new: Tensor
    before: Tensor | None


def loss_of(sae: SAE, previous: SAE | None, given: StepInputs, continuity: float | Tensor) -> tuple[Tensor, LossTerms]:
    """What a step minimises, a scalar, and what it consists of.

    Args:
        sae: The one that is trained.
        previous: The snapshot that continuity compares with, in the LLM's own units; asked where there is ``before``.
        given: The batch and what goes with it.
        continuity: Weight of `LossTerms.moved` in this step.
    """
    before = None
    if given.before is not None:
        assert previous is not None
        before = previous.sparse_latents(given.before)
    out = sae.loss(given.x, given.dead, before, given.new)
    if out.moved is None:
        return out.loss, out
    out.terms["continuity"] = out.moved.detach()
    return out.loss + continuity * out.moved, out


def can_be_recorded(sae: SAE, kernels: Kernels, trainer: Trainer) -> bool:
    """Whether `StepGraph` is for this SAE in this run: with native kernels on one GPU, for classes with static shapes.

    Not where something asks for gradients as autograd hands them out: DDP even of one process, a scaler of gradients,
    the search for anomalies, weights that are not trained.
    """
    return (
        kernels == "native"
        and sae.static_shapes
        and sae.b_dec.is_cuda
        and isinstance(trainer.strategy, SingleDeviceStrategy)
        and getattr(trainer.precision_plugin, "scaler", None) is None
        and not torch.is_anomaly_enabled()
        and all(parameter.requires_grad for parameter in sae.parameters())
    )


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    loss: Tensor
    out: LossTerms
    gradients: tuple[Tensor, ...]
    kept: list[Tensor]
    """Memory that the graph uses and did not make: it knows addresses, and holds on to nothing."""


class StepGraph:
    """`loss_of` and its gradients in one launch.

    A step is about a hundred kernels of a few microseconds each, and launching them takes a processor three to four
    times as long as the GPU needs for them. A CUDA graph is launched once. It repeats what was recorded on the same
    memory, so shapes must be the same: for the dead latents there are as many places as the next power of two, and
    where another number of places is needed another graph is recorded. The bits are those of a step that is not
    recorded and has as many places (`SAE.dead_places`).

    Args:
        sae: What is trained, with static shapes; its weights must stay where they are.
        previous: The snapshot that continuity compares with, or None.
    """

    def __init__(self, sae: SAE, previous: SAE | None) -> None:
        self.sae = sae
        self.previous = previous
        self._given: StepInputs | None = None
        self._continuity = sae.b_dec.new_zeros(())
        self._recorded: dict[int, _Recorded] = {}
        self._last: _Recorded | None = None

    def __call__(self, given: StepInputs, continuity: float) -> tuple[Tensor, LossTerms]:
        """As `loss_of`, detached; valid until the next call. The gradients are put in place by `place_gradients`."""
        if self._given is None:
            self._given = StepInputs(*(x if x is None else torch.empty_like(x) for x in given))  # type: ignore[arg-type]
        for own, x in zip(self._given, given, strict=True):
            if own is not None and x is not None:
                own.copy_(x)
        self._continuity.fill_(continuity)
        places = places_for(int(given.dead.sum()), self.sae)  # the one number that the GPU is waited for
        recorded = self._recorded.pop(places, None) or self._record(self._given, places)
        self._recorded[places] = recorded  # the last, for it is the latest in use
        if len(self._recorded) > _GRAPHS:
            del self._recorded[next(iter(self._recorded))]
        recorded.graph.replay()
        self._last = recorded
        return recorded.loss, recorded.out

    def place_gradients(self) -> None:
        """Give the weights the gradients of the last call, once; they hold until the next, in the graph's memory."""
        if self._last is not None:
            for parameter, gradient in zip(self.sae.parameters(), self._last.gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self._last = None

    def _record(self, given: StepInputs, places: int) -> _Recorded:
        self.sae.dead_places = places
        try:
            aside = _recording_stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UP):
                    self._step(given)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=aside):
                loss, out, gradients = self._step(given)
        finally:
            self.sae.dead_places = None
        saes = [sae for sae in (self.sae, self.previous) if sae is not None]
        return _Recorded(graph, loss, out, gradients, [buffer for sae in saes for buffer in sae.workspace.buffers])

    def _step(self, given: StepInputs) -> tuple[Tensor, LossTerms, tuple[Tensor, ...]]:
        # a backward pass is not under autocast; this one would be under that of Lightning's training step
        with torch.autocast(given.x.device.type, enabled=False):
            loss, out = loss_of(self.sae, self.previous, given, self._continuity)
            gradients = torch.autograd.grad(loss, tuple(self.sae.parameters()))
        moved = None if out.moved is None else out.moved.detach()
        return loss.detach(), out._replace(loss=out.loss.detach(), moved=moved), gradients


@cache
def _recording_stream() -> torch.cuda.Stream:
    """Always the same: cuBLAS keeps 32 MiB for each stream that it has worked on."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def places_for(n_dead: int, sae: SAE) -> int:
    """How many latents AuxK works on where so many are dead: a power of two, at least 64, or all there are; or none."""
    if n_dead == 0 or sae.aux_coefficient == 0:
        return 0
    return min(sae.d_sae, max(_LEAST_PLACES, 1 << (n_dead - 1).bit_length()))
