"""The beginning and the end of a stage: what is measured, what is done to the SAEs, and what the snapshot says.

When these happen is the scheduler's business.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from lightning import Trainer
from torch import Tensor

from saetrack.lm.checkpoints import LLMCheckpoint, commit_sha
from saetrack.lm.forward import lane_numbers
from saetrack.lm.outliers import norm_limit, take, within
from saetrack.metrics import dead_share, dense_share, fraction_variance_unexplained
from saetrack.sae import SAE, sae_record
from saetrack.track import Snapshot, Track
from saetrack.training import evaluation
from saetrack.training.datamodule import ActivationDataModule
from saetrack.training.divergence import refuse_diverged
from saetrack.training.module import SAEModule, reconstruct
from saetrack.training.start import Start, equal_norms
from saetrack.training.warm_start import Calibration, WarmStart, in_both, orthogonal_map, own_error, recentre, transport

logger = logging.getLogger(__name__)

SINK_NORM = 10
"""Norm, in medians, over which an activation is taken for an attention sink and warned of."""
INITIALISE_ON = 16_384
"""Activations from which a new SAE takes its ``b_dec``."""


@dataclass(frozen=True)
class StageStart:
    """What was measured at one hookpoint when the stage began; its snapshot reports it.

    Args:
        calibration: The LLM checkpoint's mean, covariance and scale.
        rotation: The map of a ``transported`` start.
        fvu_before: FVU of the SAE that the stage starts from, before any training.
        fvu_shift: FVU of the snapshot that the stage began from, unchanged, on this LLM checkpoint.
        left_out: Share of the calibration rows' positions whose activations are left out, by the reason.
    """

    calibration: Calibration
    rotation: Tensor | None
    fvu_before: float
    fvu_shift: float | None
    left_out: dict[str, float] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, for the resume file."""
        return {**vars(self), "calibration": dict(vars(self.calibration))}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> StageStart:
        """The inverse of :meth:`state_dict`."""
        return cls(**{**state, "calibration": Calibration(**state["calibration"])})


@dataclass(frozen=True)
class Stage:
    """One LLM checkpoint's turn.

    Args:
        position: Its place in the order of training, from 0: the number of its snapshot.
        checkpoint: The LLM checkpoint.
        source: Number of the snapshot that it begins from, and is compared with; None in the first stage.
        previous: The LLM checkpoint of that snapshot, which may be an earlier or a later one.
        warm_start: How the SAE begins.
    """

    position: int
    checkpoint: LLMCheckpoint
    source: int | None
    previous: LLMCheckpoint | None
    warm_start: WarmStart


class StageWork:
    """Does the work at both ends of a stage, and remembers between stages what would cost a second LLM load.

    A stage begins from a snapshot on disk, whether or not it was trained in this process: so a series that is resumed
    or extended has the bytes of one trained at once. What is remembered can be made again from the LLM and the track,
    and none of it is saved.

    Args:
        trainer: The trainer.
        module: The SAEs, in training units.
        data: The LLM and its activations.
    """

    def __init__(self, trainer: Trainer, module: SAEModule, data: ActivationDataModule) -> None:
        self.trainer = trainer
        self.module = module
        self.data = data
        self._activations: tuple[LLMCheckpoint, dict[str, Tensor]] | None = None
        self._warned: set[str] = set()
        self._latents: tuple[LLMCheckpoint, dict[str, evaluation.Latents]] | None = None

    def begin(self, stage: Stage, tracks: Mapping[str, Track]) -> dict[str, StageStart]:
        """Measure the LLM checkpoint and start the SAEs on it.

        Args:
            stage: The stage that begins.
            tracks: Those with the snapshots that it begins from, by hookpoint.

        Returns:
            What was measured, by hookpoint.
        """
        sources = source_snapshots(stage, tracks)
        before: dict[str, Tensor] = {}
        if stage.previous is not None and stage.warm_start == "transported":
            before = self._calibration_activations(stage.previous)
        activations = self._calibration_activations(stage.checkpoint)
        limits = {h: norm_limit(x, self.data.tokens.outlier_norm) for h, x in activations.items()}
        calibrations = {h: Calibration.measure(x, limits[h]) for h, x in activations.items()}
        rotations: dict[str, Tensor] = {}
        lanes = lane_numbers(list(calibrations))
        candidates: dict[str, dict[str, SAE]] = {}
        for hookpoint, now in calibrations.items():
            sae = self.module.sae(hookpoint)
            candidates[hookpoint] = {}
            if hookpoint in sources:
                last = self._load(sources[hookpoint], hookpoint)
                candidates[hookpoint]["shift"] = sources[hookpoint].sae().to(self.data.device)
            if stage.previous is None or stage.warm_start == "scratch":
                generator = self._generator(stage, lanes[hookpoint])
                x = take(activations[hookpoint], within(activations[hookpoint], now.norm_limit))
                sae.initialise(x[:INITIALISE_ON] * now.scale, generator)
            elif stage.warm_start == "recentred":
                recentre(sae, last, now)
            elif stage.warm_start == "transported":
                pair = in_both(before[hookpoint], activations[hookpoint], last, now)
                rotations[hookpoint] = orthogonal_map(*pair)
                transport(sae, rotations[hookpoint], last, now)
            self._make_equal_on_every_rank(sae)
            candidates[hookpoint]["before"] = sae.folded(now.scale)
            new_features = stage.previous is not None and stage.warm_start == "scratch"
            self.module.feature_state(hookpoint).begin_stage(new_features)
        fvu = evaluation.reconstruction_fvu(self._site(stage.checkpoint, limits), candidates)
        left_out = {h: self._left_out(stage.checkpoint, h, x, limits[h]) for h, x in activations.items()}
        return {
            h: StageStart(now, rotations.get(h), fvu[h]["before"], fvu[h].get("shift"), left_out[h])
            for h, now in calibrations.items()
        }

    def adopt(self, stage: Stage, start: Start, tracks: Mapping[str, Track], facts: Mapping[str, Any]) -> None:
        """Measure the SAEs that the series begins with, on their own LLM checkpoint, and write them untrained.

        Args:
            stage: The first.
            start: Where they are.
            tracks: Where to write, by hookpoint.
            facts: As for :meth:`finish`.

        Raises:
            ValueError: If one does not fit the run, or reconstructs worse than the mean activation.
        """
        saes, starts = start.saes(self.module), {}
        for hookpoint, x in self._calibration_activations(stage.checkpoint).items():
            limit = norm_limit(x, self.data.tokens.outlier_norm)
            calibration = Calibration.measure(x, limit)
            saes[hookpoint] = equal_norms(saes[hookpoint], calibration.scale).to(self.data.device)
            left_out = self._left_out(stage.checkpoint, hookpoint, x, limit)
            starts[hookpoint] = StageStart(calibration, None, 1.0, None, left_out)
        site = self._site(stage.checkpoint, {h: s.calibration.norm_limit for h, s in starts.items()})
        fvu = evaluation.reconstruction_fvu(site, {h: {"before": sae} for h, sae in saes.items()})
        for hookpoint, sae in fvu.items():
            if not sae["before"] < 1:
                raise ValueError(
                    f"model.start {start.snapshots[hookpoint].path} has FVU {sae['before']:.2f} on LLM step "
                    f"{start.step}, worse than the mean activation: it is of another LLM, module or scale of "
                    "activations. Check `data.source` and `data.hookpoints`."
                )
        starts = {h: replace(s, fvu_before=fvu[h]["before"]) for h, s in starts.items()}
        self._write(stage, starts, saes, tracks, {h: {**facts, **start.facts(h), "tokens_trained": 0} for h in starts})

    def equip(self, stage: Stage, tracks: Mapping[str, Track]) -> None:
        """Give the module the held-out activations of the stage, and the snapshots that continuity compares with.

        The snapshots are read from disk, so a stage that is resumed in its middle meets the same bits.
        """
        activations = self.data.held_out_activations(stage.checkpoint)
        limits = self.data.norm_limits
        self.module.held_out = {h: take(x, within(x, limits[h])) * self.data.scales[h] for h, x in activations.items()}
        self.module.previous, self.module.previous_error = {}, {}
        if self.data.before is not None:
            activations = self.data.held_out_activations(self.data.before)
            for hookpoint, snapshot in source_snapshots(stage, tracks).items():
                sae = snapshot.sae().to(self.data.device)
                error = own_error(sae, Calibration.of(snapshot), activations[hookpoint])
                sae.precision = self.module.sae(hookpoint).precision
                self.module.previous[hookpoint], self.module.previous_error[hookpoint] = sae, error

    def held_out_fvu(self, checkpoint: LLMCheckpoint, snapshots: Mapping[str, Snapshot]) -> dict[str, float]:
        """FVU of each hookpoint's snapshot, as it is, on the held-out activations of an LLM checkpoint."""
        activations = self.data.held_out_activations(checkpoint)
        fvu = {}
        for hookpoint, every in activations.items():
            x = take(every, within(every, norm_limit(every, self.data.tokens.outlier_norm)))
            sae = snapshots[hookpoint].sae().to(x.device)
            fvu[hookpoint] = float(fraction_variance_unexplained(x, reconstruct(sae, x)))
        return fvu

    def finish(
        self,
        stage: Stage,
        start: Mapping[str, StageStart],
        tracks: Mapping[str, Track],
        facts: Mapping[str, Any],
    ) -> None:
        """Measure the SAEs as they are now and write their snapshots.

        Args:
            stage: The stage that ends.
            start: What :meth:`begin` gave.
            tracks: Where to write, by hookpoint.
            facts: What the metadata says beside the stage and the measurements.

        Raises:
            ValueError: If an SAE has diverged; nothing is written then.
        """
        saes = {h: self.module.sae(h).folded(s.calibration.scale).requires_grad_(False) for h, s in start.items()}
        self._write(stage, start, saes, tracks, dict.fromkeys(saes, facts))

    def _write(
        self,
        stage: Stage,
        start: Mapping[str, StageStart],
        saes: Mapping[str, SAE],
        tracks: Mapping[str, Track],
        facts: Mapping[str, Mapping[str, Any]],
    ) -> None:
        limits = {h: s.calibration.norm_limit for h, s in start.items()}
        qualities = evaluation.evaluate(self._site(stage.checkpoint, limits), saes)
        for hookpoint, quality in qualities.items():
            refuse_diverged(hookpoint, stage.checkpoint.step, quality.scalars["fvu"], start[hookpoint].fvu_before)
        means = {h: s.calibration.mean.float() for h, s in start.items()}
        recovered = evaluation.cross_entropy_recovered(
            self._site(stage.checkpoint, limits, self.data.tokens.ce_tokens), saes, means
        )
        latents = {h: quality.latents for h, quality in qualities.items()}
        correlations, sources = self._correlations(stage, tracks, latents), source_snapshots(stage, tracks)
        for hookpoint, sae in saes.items():
            if self.trainer.is_global_zero:
                features = _feature_table(
                    sae,
                    qualities[hookpoint].features,
                    self.module.feature_state(hookpoint).tokens_since_fired,
                    self.module.feature_state(hookpoint).revived,
                    correlations.get(hookpoint),
                    sources.get(hookpoint),
                )
                metadata = {
                    "llm": {
                        **asdict(stage.checkpoint),
                        "commit": commit_sha(stage.checkpoint),
                        **facts[hookpoint]["llm"],
                    },
                    "sae": sae_record(sae),
                    **_descent(stage, sources.get(hookpoint)),
                    **{k: v for k, v in facts[hookpoint].items() if k != "llm"},
                    "left_out": start[hookpoint].left_out,
                    "held_out_curve": [list(point) for point in self.module.curves.get(hookpoint, [])],
                    **_scalars(start[hookpoint], qualities[hookpoint].scalars, recovered[hookpoint], features),
                }
                tracks[hookpoint].write(stage.position, sae, metadata, _statistics(start[hookpoint]), features)
            self.trainer.strategy.barrier()
            tracks[hookpoint].refresh()
        self._latents = (stage.checkpoint, latents)

    def _generator(self, stage: Stage, lane: int) -> torch.Generator:
        """Draws of an SAE that starts anew; the repetitions of a stage have others."""
        repetition = 1_000_000_007 * (1_009 * self.data.arm + lane)
        return torch.Generator().manual_seed(self.data.seed * 1_000_003 + stage.checkpoint.step + repetition)

    def _calibration_activations(self, checkpoint: LLMCheckpoint) -> dict[str, Tensor]:
        """Activations of a checkpoint on the calibration rows; those of the last one asked for are remembered."""
        if self._activations is None or self._activations[0] != checkpoint:
            self._activations = (checkpoint, self.data.calibration_activations(checkpoint))
        return self._activations[1]

    def _correlations(
        self, stage: Stage, tracks: Mapping[str, Track], latents: Mapping[str, evaluation.Latents]
    ) -> dict[str, Tensor]:
        """Functional correlation with the snapshot that the stage began from; empty in the first stage."""
        if stage.previous is None:
            return {}
        if self._latents is None or self._latents[0] != stage.previous:
            snapshots = source_snapshots(stage, tracks)
            saes = {h: snapshot.sae().to(self.data.device) for h, snapshot in snapshots.items()}
            limits = {h: snapshot.norm_limit for h, snapshot in snapshots.items()}
            self._latents = (stage.previous, evaluation.latents_on(self._site(stage.previous, limits), saes))
        before = self._latents[1]
        return {
            h: evaluation.functional_correlation(before[h], after, tracks[h].facts["d_sae"], self.data.device)
            for h, after in latents.items()
        }

    def _load(self, source: Snapshot, hookpoint: str) -> Calibration:
        """Put a snapshot into the module, in the training units of its own LLM checkpoint, which are returned."""
        calibration = Calibration.of(source)
        self.module.sae(hookpoint).load_state_dict(source.sae().folded(1 / calibration.scale).state_dict())
        since_fired = torch.tensor(source.features["tokens_since_fired"].to_numpy())
        self.module.feature_state(hookpoint).tokens_since_fired.copy_(since_fired)
        return calibration

    def _make_equal_on_every_rank(self, sae: SAE) -> None:
        """The ranks compute the same start; a last bit in which their machines differ must not stay."""
        if self.trainer.world_size > 1:
            weights = self.trainer.strategy.broadcast({k: v.cpu() for k, v in sae.state_dict().items()})
            sae.load_state_dict(weights)

    def _left_out(self, checkpoint: LLMCheckpoint, hookpoint: str, x: Tensor, limit: float) -> dict[str, float]:
        """Shares of all positions; without a limit, a warning where there are outliers."""
        shares = self.data.left_out_shares()
        mask = within(x, limit)
        left = 0.0 if mask is None else 1 - mask.double().mean().item()
        if mask is None and hookpoint not in self._warned and self.trainer.is_global_zero:
            sinks = 1 - (x.norm(dim=1) <= norm_limit(x, SINK_NORM)).double().mean().item()
            if sinks:
                self._warned.add(hookpoint)
                logger.warning(
                    "%s of LLM step %d: %.2g%% of its activations have norms over %d times the median, as attention "
                    "sinks have, and weigh most in FVU and scale. `data.tokens.outlier_norm: %d` leaves them out.",
                    *(hookpoint, checkpoint.step, 100 * sinks, SINK_NORM, SINK_NORM),
                )
        return {**shares, "outlier_norm": left * (1 - sum(shares.values()))}

    def _site(
        self, checkpoint: LLMCheckpoint, limits: Mapping[str, float], n_tokens: int | None = None
    ) -> evaluation.Site:
        rows = self.data.measuring_rows("evaluation")
        if n_tokens is not None:
            n_rows = -(-n_tokens // self.data.tokens.context_size)
            rows = rows.select(slice(n_rows))
        llm = self.data.llm(checkpoint)
        return evaluation.Site(llm, checkpoint, rows, self.trainer.global_rank, self.trainer.world_size, limits)


def source_snapshots(stage: Stage, tracks: Mapping[str, Track]) -> dict[str, Snapshot]:
    """The snapshots that a stage begins from, by hookpoint; empty in the first stage."""
    return {} if stage.source is None else {h: track.numbered(stage.source) for h, track in tracks.items()}


def _descent(stage: Stage, source: Snapshot | None) -> dict[str, Any]:
    """How the stage began: the name of its warm start, from what, and which snapshot its measures are against."""
    if source is None:
        return {"warm_start": "scratch", "warm_started_from": None, "compared_with": None}
    origin = {"track": None, "snapshot": source.path.name, "step": source.step}  # no path: it is in this track
    return {
        "warm_start": stage.warm_start,
        "warm_started_from": None if stage.warm_start == "scratch" else origin,
        "compared_with": source.path.name,
    }


def _feature_table(
    sae: SAE,
    firing: Mapping[str, Tensor],
    tokens_since_fired: Tensor,
    revived: Tensor,
    correlation: Tensor | None,
    previous: Snapshot | None,
) -> pd.DataFrame:
    """One row per feature; the two columns of identity are NaN where the stage began from no snapshot."""
    unknown = torch.full((sae.d_sae,), torch.nan, dtype=torch.float64)
    cosine = unknown
    if previous is not None:
        w_dec = sae.W_dec.detach().cpu()
        cosine = torch.nn.functional.cosine_similarity(w_dec.double(), previous.tensor("W_dec").double(), dim=1)
    columns = {
        "feature": torch.arange(sae.d_sae),
        "firing_frequency": firing["firing_frequency"],
        "mean_activation": firing["mean_activation"],
        "max_activation": firing["max_activation"],
        "tokens_since_fired": tokens_since_fired,
        "dead": firing["firing_frequency"] == 0,
        "revived": revived,
        "functional_correlation": unknown if correlation is None else correlation,
        "decoder_cosine_previous": cosine,
    }
    return pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})


def _scalars(
    start: StageStart, quality: Mapping[str, Any], recovered: Mapping[str, float], features: pd.DataFrame
) -> dict[str, Any]:
    """The snapshot's numbers, in the order in which a person reads them."""
    frequency = torch.tensor(features["firing_frequency"].to_numpy())
    scalars = {
        "scale": start.calibration.scale,
        "norm_limit": None if math.isinf(start.calibration.norm_limit) else start.calibration.norm_limit,
        "fvu": quality["fvu"],
        "fvu_before": start.fvu_before,
        "fvu_shift": start.fvu_shift,
        "explained_variance": quality["explained_variance"],
        "l0": quality["l0"],
        "dead_share": float(dead_share(frequency)),
        "dense_share": float(dense_share(frequency)),
        "revived": int(features["revived"].sum()),
        "functional_correlation_median": features["functional_correlation"].median(),  # where it is defined
        "evaluation_tokens": quality["evaluation_tokens"],
        **recovered,
    }
    # JSON has no NaN; null says "not defined here"
    return {name: None if pd.isna(value) else value for name, value in scalars.items()}


def _statistics(start: StageStart) -> dict[str, Tensor]:
    statistics = {
        "mean": start.calibration.mean.float(),
        "covariance": start.calibration.covariance.float(),
        "scale": torch.tensor([start.calibration.scale]),
    }
    if start.rotation is not None:
        statistics["transport"] = start.rotation.float()
    return statistics
