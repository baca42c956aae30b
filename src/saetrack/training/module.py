"""The LightningModule: the SAEs of all hookpoints and their optimizer, nothing of the LLM."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from saetrack.metrics import fraction_variance_unexplained
from saetrack.sae import SAE, Kernels, LossTerms, Precision, TopKSAE, resolve_precision, sae_record, use_kernels
from saetrack.training.adam import ColumnAdam
from saetrack.training.convergence import Curve, check_points, has_converged
from saetrack.training.datamodule import ActivationDataModule, require_positive
from saetrack.training.ddp import share_gradients
from saetrack.training.divergence import refuse_divergence
from saetrack.training.saes import SAEsByHookpoint, build_sae, refuse_other_names, setting_of
from saetrack.training.step import StepGraph, StepInputs, can_be_recorded, loss_of
from saetrack.training.stream import ActivationStream, Batch

_HELD_OUT_ROWS = 1024  # dense latents of these are held at a time


@dataclass(frozen=True)
class OptimizerSettings:
    """Adam, and how its learning rate runs through a stage."""

    lr: float = 1.0e-3
    """Learning rate of the first stage."""
    lr_next: float | None = None
    """Learning rate of every later stage; null takes ``lr``."""
    warmup_tokens: int = 50_000
    """Tokens over which the learning rate rises from zero, in the first stage."""
    warmup_tokens_next: int | None = None
    """The same in every later stage; null takes ``warmup_tokens``."""
    decay_share: float = 0.2
    """Share of a stage, at its end, over which the learning rate falls linearly to zero."""
    tolerance: float | None = 0.01
    """The decay begins early, and the stage ends with it, once a doubling of the stage's tokens has lowered the
    held-out FVU by less than this share of it; null always spends the whole budget."""

    def __post_init__(self) -> None:
        for name in ("lr", "lr_next"):
            if (rate := getattr(self, name)) is not None:
                require_positive(f"model.optimizer.{name}", rate)
        for name in ("warmup_tokens", "warmup_tokens_next"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"model.optimizer.{name} is {getattr(self, name)}; it cannot be negative.")
        if not 0 <= self.decay_share < 1:
            raise ValueError(
                f"model.optimizer.decay_share is {self.decay_share}; it is a share of a stage, from 0 to below 1."
            )
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            raise ValueError(
                f"model.optimizer.tolerance is {self.tolerance}; it is a share of FVU, from 0 to below 1, or null."
            )

    def warmup(self, first_stage: bool) -> int:
        """Tokens over which the learning rate rises in a stage."""
        later = self.warmup_tokens_next
        return self.warmup_tokens if first_stage or later is None else later

    def lr_share(self, step: int, steps: int, batch_size: int, first_stage: bool) -> float:
        """Share of a stage's learning rate at one of its optimizer steps: warmup, constant, decay to zero.

        Example:
            >>> settings = OptimizerSettings(warmup_tokens=20, decay_share=0.5)
            >>> [settings.lr_share(step, 4, 10, True) for step in range(4)]
            [0.5, 1.0, 1.0, 0.5]
        """
        warmup = self.warmup(first_stage)
        rising = (step + 1) * batch_size / warmup if warmup else 1.0
        falling = (steps - step) / (self.decay_share * steps) if self.decay_share else 1.0
        return max(0.0, min(1.0, rising, falling))


class FeatureState(nn.Module):
    """What training knows of each feature, beside its weights. Saved in the resume file.

    Args:
        d_sae: Number of features.
    """

    tokens_since_fired: Tensor
    revived: Tensor

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.register_buffer("tokens_since_fired", torch.zeros(d_sae, dtype=torch.int64))
        self.register_buffer("revived", torch.zeros(d_sae, dtype=torch.bool))

    def update(self, fired: Tensor, tokens: int, dead_after: int) -> None:
        """Count a batch.

        Args:
            fired: Which features fired on any rank, bool ``[d_sae]``.
            tokens: Activations in the batch over all ranks.
            dead_after: Tokens without firing after which a feature is dead; one that fires again is revived.
        """
        self.revived |= fired & self.dead(dead_after)
        self.tokens_since_fired.add_(tokens).masked_fill_(fired, 0)

    def dead(self, dead_after: int) -> Tensor:
        """Features that have not fired for ``dead_after`` tokens, bool ``[d_sae]``."""
        return self.tokens_since_fired >= dead_after

    def begin_stage(self, new_features: bool) -> None:
        """Forget the revivals of the stage before; ``new_features`` marks every feature as re-initialised."""
        self.revived.fill_(new_features)
        if new_features:
            self.tokens_since_fired.zero_()


class SAEModule(LightningModule):
    """Trains one sparse autoencoder per hookpoint on the batches of the activation stream.

    Args:
        sae: The autoencoder: its class and arguments without ``d_in``, which is read from the LLM. Where hookpoints
            differ in it, `SAEsByHookpoint` with one for each.
        optimizer: Learning rates and their schedule within a stage, and when it has converged.
        continuity: Weight of the term that holds features to what they were: their latents stay near those of the
            previous snapshot on the previous LLM checkpoint at the same tokens (`LossTerms.moved`); those that are dead
            or were revived in this stage are free. It keeps that LLM in memory too, and runs it. The weight counts in
            units of the reconstruction error that the previous snapshot has, so that it weighs no more in a series of
            long stages, whose errors are small. It rises and falls with the learning rate, so a stage ends on the
            SAE's own loss. 0 turns it off; the first stage and a ``scratch`` start have none.
        dead_after_tokens: A feature that has not fired for this many tokens is dead, and the autoencoder's
            auxiliary loss tries to revive it.
        log_every_tokens: Tokens between two points of the training curves.
        precision: Dtype of the large matrix products of a step. Where latents are few (TopK) they only choose which
            ones, and values and gradients are float32, but those by which AuxK revives many dead latents; where they
            are dense (StandardSAE, SAETrackSAE) latents and gradients pass through it. ``auto`` is bfloat16 where the
            hardware has it, else float32.
        kernels: ``pytorch``, or ``native``: the inner loops of sparse steps in C++ on a CPU, in Triton on a GPU,
            compiled on first use. On one GPU ``native`` also records TopKSAE's step as a CUDA graph, which takes a
            third of the time at 16,384 latents.
        start: The snapshot to begin the series with, instead of a fresh SAE: a track, such as ``saetrack import``
            makes, or a run with one for each hookpoint, each with ``@step`` where it holds several snapshots, or the
            folder of a snapshot. It becomes the track's first, untrained, at its own LLM step; every other stage has
            ``scheduler.tokens_next``, and ``scheduler.direction`` says which way to go. ``sae`` must be of its class
            and size.
    """

    def __init__(
        self,
        sae: Callable[[int], SAE] | SAEsByHookpoint = TopKSAE,
        optimizer: OptimizerSettings = OptimizerSettings(),
        continuity: float = 1.0,
        dead_after_tokens: int = 500_000,
        log_every_tokens: int = 100_000,
        precision: Precision = "auto",
        kernels: Kernels = "pytorch",
        start: str | None = None,
    ) -> None:
        super().__init__()
        self._choice = sae
        self.settings = optimizer
        require_positive("model.dead_after_tokens", dead_after_tokens)
        require_positive("model.log_every_tokens", log_every_tokens)
        if not (math.isfinite(continuity) and continuity >= 0):
            raise ValueError(f"model.continuity is {continuity}; it must be a finite number of at least 0.")
        self.continuity = continuity
        self.dead_after_tokens = dead_after_tokens
        self.log_every_tokens = log_every_tokens
        self.precision = precision
        self.kernels = kernels
        self.start = start
        """Where the series begins; read by the scheduler."""
        self.first_stage = True
        """Whether the current stage is the first; set by the scheduler, chooses the learning rate."""
        self.previous: dict[str, SAE] = {}
        """Snapshots that the stage began from, in the LLM's own units; set by the scheduler for continuity."""
        self.previous_error: dict[str, float] = {}
        """Their `own_error`; set with them."""
        self.graphs: dict[str, StepGraph] = {}
        """Recorded steps of hookpoints that have them; they belong to a stage and its ``previous``."""
        self.held_out: dict[str, Tensor] = {}
        """Scaled activations on which convergence is seen; set by the scheduler."""
        self.curves: dict[str, Curve] = {}
        """FVU on them through the current stage, by hookpoint. Saved in the resume file."""
        self.hookpoints: list[str] = []
        self.saes = nn.ModuleList()
        self.features = nn.ModuleList()

    @property
    def data(self) -> ActivationDataModule:
        """The DataModule that this module is trained with."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, ActivationDataModule):
            raise RuntimeError(f"SAEModule needs an ActivationDataModule, but the trainer has {data!r}.")
        return data

    @property
    def stream(self) -> ActivationStream:
        """The batches of the current stage."""
        if self.data.stream is None:
            raise RuntimeError("No stage has begun: add a CheckpointScheduler to the trainer's callbacks.")
        return self.data.stream

    def setup(self, stage: str) -> None:
        """Build the SAEs, now that the LLM's widths are known."""
        self.forget_graphs()  # of a fit before this one, after which the weights were moved
        if self.hookpoints:
            return
        device = self.data.device.type
        if device not in ("cpu", "cuda"):  # sums in float64, which others lack
            raise ValueError(f"trainer.accelerator gave the device {device}; set `trainer.accelerator` to cpu or gpu.")
        use_kernels(self.kernels, device)
        refuse_other_names(self._choice, list(self.data.widths))
        for hookpoint, d_in in self.data.widths.items():
            sae = self.build_sae(hookpoint, d_in)
            sae.precision = resolve_precision(self.precision, self.data.device)
            self.hookpoints.append(hookpoint)
            self.saes.append(sae)
            self.features.append(FeatureState(sae.d_sae))
        share_gradients(self, self.trainer, self.data.batch_size)

    def build_sae(self, hookpoint: str, d_in: int) -> SAE:
        """An untrained SAE as the configuration has it for a hookpoint."""
        return build_sae(self._choice, hookpoint, d_in)

    def sae_setting(self, hookpoint: str) -> str:
        """The configuration key under which it stands."""
        return setting_of(self._choice, hookpoint)

    def sae(self, hookpoint: str) -> SAE:
        """The SAE of one hookpoint, in training units."""
        sae = self.saes[self.hookpoints.index(hookpoint)]
        assert isinstance(sae, SAE)
        return sae

    def feature_state(self, hookpoint: str) -> FeatureState:
        """What training knows of the features of one hookpoint."""
        state = self.features[self.hookpoints.index(hookpoint)]
        assert isinstance(state, FeatureState)
        return state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record which SAEs the weights belong to, and what the current stage has seen."""
        checkpoint["saes"] = {hookpoint: sae_record(self.sae(hookpoint)) for hookpoint in self.hookpoints}
        checkpoint["curves"] = self.curves

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the weights of other SAEs, before Lightning meets them with a page of tensor shapes."""
        now = {hookpoint: sae_record(self.sae(hookpoint)) for hookpoint in self.hookpoints}
        saved = checkpoint["saes"]
        refuse_changes({"data.hookpoints": list(saved)}, {"data.hookpoints": list(now)}, "the resume file")
        for hookpoint in self.hookpoints:
            key = self.sae_setting(hookpoint)
            refuse_changes({key: saved[hookpoint]}, {key: now[hookpoint]}, "the resume file")
        self.curves = checkpoint.get("curves", {})  # 0.1.0 had none; its recipe is refused by the scheduler

    def recipe(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the run it continues."""
        precision = resolve_precision(self.precision, self.data.device)
        return {
            "model.optimizer": asdict(self.settings),
            "model.continuity": self.continuity,
            "model.dead_after_tokens": self.dead_after_tokens,
            "model.precision": str(precision).removeprefix("torch."),
            "model.kernels": self.kernels,
        }

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of all SAEs on one batch.

        The SAEs share no weight, so the gradient of the sum is each one's own.
        """
        total = torch.zeros((), device=self.device)
        every = max(1, self.log_every_tokens // self.data.batch_size)
        self._observed: dict[str, tuple[Tensor, Tensor | None]] = {}
        for hookpoint, x in batch.now.items():
            state = self.feature_state(hookpoint)
            dead = state.dead(self.dead_after_tokens)
            given = StepInputs(x, dead, dead | state.revived, batch.before.get(hookpoint))
            weight = 0.0
            if given.before is not None:
                # in units of an error, or it would weigh the more the farther a series brings the error down; of the
                # snapshot before, for that of the batch would let a weight feed on the error that it makes
                weight = self.continuity * self._lr_factor(batch_idx) * self.previous_error[hookpoint]
            loss, out = self._step(hookpoint, given, weight)
            total = total + loss
            self._observed[hookpoint] = out.fired, out.smallest_kept
            if batch_idx % every == 0:
                refuse_divergence(hookpoint, self.sae(hookpoint), float(out.loss.detach()), self.kernels, x, dead)
                self._log_step(hookpoint, out, dead)
        return total

    def _step(self, hookpoint: str, given: StepInputs, continuity: float) -> tuple[Tensor, LossTerms]:
        sae, previous = self.sae(hookpoint), self.previous.get(hookpoint)
        if not can_be_recorded(sae, self.kernels, self.trainer):
            return loss_of(sae, previous, given, continuity)
        if hookpoint not in self.graphs:
            self.graphs[hookpoint] = StepGraph(sae, previous)
        return self.graphs[hookpoint](given, continuity)

    def forget_graphs(self) -> None:
        """Free the memory of recorded steps, and of the gradients that lie in it."""
        self.graphs = {}
        self.zero_grad()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Form the gradients that no recorded step has formed, and put in place what those have."""
        if loss.requires_grad or not self.graphs:
            super().backward(loss, *args, **kwargs)
        for graph in self.graphs.values():
            graph.place_gradients()

    def _log_step(self, hookpoint: str, out: LossTerms, dead: Tensor) -> None:
        """Log this rank's batch against the optimizer step."""
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        values = {"loss": out.loss.detach(), "l0": out.l0, "dead_share": dead.float().mean(), "lr": lr, **out.terms}
        self._log(hookpoint, {name: float(value) for name, value in values.items()})

    def _log(self, hookpoint: str, numbers: Mapping[str, float]) -> None:
        """Straight to the loggers: ``self.log`` costs half a millisecond a call even on steps that are not written."""
        prefix = f"train/{hookpoint}" if len(self.hookpoints) > 1 else "train"
        for log in self.loggers:
            named = {f"{prefix}/{name}": number for name, number in numbers.items()}
            log.log_metrics(named, step=self.trainer.global_step)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Drop the part of the decoder's gradient that would only change the norm of its rows."""
        for hookpoint in self.hookpoints:
            self.sae(hookpoint).remove_parallel_gradient_()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each SAE by its own norm, so that a hookpoint's training does not depend on its neighbours."""
        if gradient_clip_val is not None:
            for hookpoint in self.hookpoints:
                torch.nn.utils.clip_grad_norm_(self.sae(hookpoint).parameters(), gradient_clip_val)

    def optimizer_step(self, epoch: int, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        """Step, put the SAEs in order, count which features fired, and see how far the stage is.

        Here and not in ``on_train_batch_end``: Lightning calls that on the callbacks first, and a resume file
        written there would hold the weights from before the norm was restored.
        """
        super().optimizer_step(epoch, batch_idx, *args, **kwargs)
        reduce = self.trainer.strategy.reduce
        for hookpoint, (fired, smallest_kept) in self._observed.items():
            # the mean over the ranks, or they would infer with thresholds of their own
            everywhere = None if smallest_kept is None else reduce(smallest_kept, reduce_op="mean")
            self.sae(hookpoint).after_step_(everywhere)
            anywhere = reduce(fired.int(), reduce_op="sum") > 0
            self.feature_state(hookpoint).update(anywhere, self.data.batch_size, self.dead_after_tokens)
        if batch_idx + 1 in check_points(len(self.stream)):
            self._see_convergence(batch_idx + 1)

    def _see_convergence(self, batches: int) -> None:
        """Take the held-out FVU after so many batches of the stage, and let a converged stage end."""
        for hookpoint, x in self.held_out.items():
            fvu = float(fraction_variance_unexplained(x, reconstruct(self.sae(hookpoint), x)))
            self.curves.setdefault(hookpoint, []).append((batches * self.data.batch_size, fvu))
            self._log(hookpoint, {"fvu_held_out": fvu})
        tolerance = self.settings.tolerance
        if tolerance is None or self.stream.end < len(self.stream) or not self.curves:
            return
        warmup = self.settings.warmup(self.first_stage)
        converged = all(has_converged(curve, tolerance, warmup) for curve in self.curves.values())
        if self.trainer.strategy.broadcast(converged):  # the ranks' last bits may differ, their stages may not
            self.stream.end = min(len(self.stream), math.ceil(batches / (1 - self.settings.decay_share)))

    def configure_optimizers(self) -> Any:
        """A fresh Adam with the learning-rate schedule of the current stage."""
        settings = self.settings
        lr = settings.lr if self.first_stage or settings.lr_next is None else settings.lr_next
        optimizer = ColumnAdam(self.saes.parameters(), lr=lr)
        schedule = LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _lr_factor(self, step: int) -> float:
        """Share of the stage's learning rate at one of its optimizer steps."""
        stream = self.data.stream
        total = stream.end if stream is not None else 1  # Lightning builds an optimizer before the first stage
        return self.settings.lr_share(step, total, self.data.batch_size, self.first_stage)


@torch.inference_mode()
def reconstruct(sae: SAE, x: Tensor) -> Tensor:
    """Reconstruction of ``x`` ``[n, d_in]``, a few rows at a time, so that their dense latents fit into memory."""
    return torch.cat([sae(part) for part in torch.split(x, _HELD_OUT_ROWS)])


def refuse_changes(saved: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raise if a resumed run differs from the run it continues.

    Args:
        saved: Facts of the run that is continued, possibly nested; keys that ``now`` lacks do not count.
        now: The same facts of this run.
        where: What ``saved`` was read from.

    Raises:
        ValueError: If a value differs; its dotted key and both values are named.
    """
    for key, value in now.items():
        before = saved.get(key)
        if before == value:
            continue
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            refuse_changes(_with_prefix(key, before), _with_prefix(key, value), where)
        else:
            raise ValueError(
                f"{key} is {value}, but {where} was written with {before}. What goes on from there must keep it; "
                "set it back, or begin another track with another `scheduler.track_dir`."
            )


def _with_prefix(prefix: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts by the names that a configuration gives them; an SAE's record has names of its own for two."""
    names = {"class": "class_path", "arguments": "init_args"}
    return {f"{prefix}.{names.get(key, key)}": value for key, value in facts.items()}
