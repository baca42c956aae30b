"""A series of SAEs on harvested activations: the package's own classes, starts and batches, the LLM run only once.

`saetrack fit` runs the LLM in every stage and writes a track; to compare dozens of series that is most of the time.
Here the activations of every LLM checkpoint lie on disk and all series read the same ones, in the batches in which
`fit` would have. docs/warm-starts.md says how near its figures are to those of `fit`.
"""

import copy
import json
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from warm_start_maps import MAPS, Moments

from saetrack.lm import FolderSource, LLMCheckpoint
from saetrack.metrics import FiringStatistics, fraction_variance_unexplained, functional_correlation
from saetrack.sae import SAE, resolve_precision
from saetrack.training.adam import ColumnAdam
from saetrack.training.convergence import check_points, has_converged
from saetrack.training.datamodule import ActivationDataModule, TokenSettings
from saetrack.training.module import FeatureState, OptimizerSettings
from saetrack.training.stage import INITIALISE_ON
from saetrack.training.stream import Batch, harvest
from saetrack.training.warm_start import Calibration, own_error

ALIVE = 1e-4  # firing frequency
BATCH = 256
LADDER = (0.1, 0.25, 0.5, 1.0)
"""Budgets of a warm stage, as shares of a cold SAE's tokens."""


class HarvestedData(ActivationDataModule):
    """The activations of a folder of LLM checkpoints, harvested once.

    Args:
        llm: Folder of LLM checkpoints.
        cache: Where the activations go, one folder for each checkpoint.
        hookpoint: Where they are read.
        most_tokens: Largest budget of a stage.
    """

    def __init__(self, llm: Path, cache: Path, hookpoint: str, most_tokens: int) -> None:
        sizes = {"calibration_tokens": 16_384, "evaluation_tokens": 16_384}
        tokens = TokenSettings(**sizes, cache_dir=llm / "tokens")
        super().__init__(FolderSource(llm), [hookpoint], tokens=tokens, batch_size=BATCH, chunk_tokens=32_768)
        self.site, self.cache, self.most_tokens = hookpoint, cache, most_tokens
        self.prepare_data()
        self.setup("fit")
        self.read_widths(self.checkpoints[0])
        self.d_in = self.widths[hookpoint]
        self.begin_stage(self.checkpoints[0], most_tokens)
        assert self.stream is not None
        order, _ = self.stream.order._bounds  # every stage's rows are among those of the longest
        self._rows = np.sort(order)
        counts = self.corpus_rows.train.usable(self._rows).sum(axis=1)
        self._slots = np.concatenate([[0], np.cumsum(counts)])

    def at(self, step: int) -> LLMCheckpoint:
        """The LLM checkpoint of a step."""
        return next(checkpoint for checkpoint in self.checkpoints if checkpoint.step == step)

    def place(self, checkpoint: LLMCheckpoint) -> "Place":
        """What is measured on a checkpoint; harvests it at the first call."""
        folder = self.cache / f"step{checkpoint.step}-{self._slots[-1]}"
        if not (folder / "done").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            self._harvest(checkpoint, folder)
            (folder / "done").touch()
        return _open_place(folder, checkpoint)

    def _harvest(self, checkpoint: LLMCheckpoint, folder: Path) -> None:
        train = np.lib.format.open_memmap(folder / "train.npy", "w+", np.float32, (int(self._slots[-1]), self.d_in))
        at = 0
        for _, x in harvest(self.llm(checkpoint), checkpoint, self.corpus_rows.train, [self.site], self._rows):
            train[at : at + len(x[self.site])] = x[self.site].numpy()
            at += len(x[self.site])
        rows = self.measuring_rows("evaluation")
        batches = harvest(self.llm(checkpoint), checkpoint, rows, [self.site], np.arange(len(rows.tokens)))
        np.save(folder / "evaluation.npy", torch.cat([x[self.site] for _, x in batches]).numpy())
        np.save(folder / "calibration.npy", self.calibration_activations(checkpoint)[self.site].numpy())

    def _fill(self, chunk: int) -> Generator[float, None, Batch]:
        assert self.stream is not None
        rows = np.searchsorted(self._rows, self.stream.order.chunk_rows(chunk))
        taken = np.concatenate([np.arange(self._slots[row], self._slots[row + 1]) for row in rows])
        places = [] if self.before is None else [self.before]
        read = [{self.site: torch.from_numpy(self.place(c).train[taken])} for c in (self.checkpoint, *places)]
        yield 1.0
        return Batch(read[0], read[1] if places else {})


@dataclass(frozen=True)
class Place:
    """One LLM checkpoint's activations ``[n, d_in]``, in its own units."""

    checkpoint: LLMCheckpoint
    train: np.ndarray
    evaluation: Tensor
    calibration_rows: Tensor
    calibration: Calibration


@cache
def _open_place(folder: Path, checkpoint: LLMCheckpoint) -> Place:
    train = np.load(folder / "train.npy", mmap_mode="r")
    evaluation, rows = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("evaluation", "calibration"))
    return Place(checkpoint, train, evaluation, rows, Calibration.measure(rows))


@dataclass(frozen=True)
class Arm:
    """One way to go through a series.

    Args:
        start: A name in `MAPS`, or ``scratch``.
        continuity: Weight of the term.
        moments: Whether Adam's moments go through the map too.
        fade: The term's weight over a stage, by its share from 0 to 1, times that of the learning rate.
        moved: Another form of the term, in place of `SAE._moved`; given the SAE and the stage before.
        tokens: Budget of a later stage, where it is not the recipe's.
        tolerance: When a stage has converged, as `OptimizerSettings.tolerance`.
        fixed: Whether the weight of continuity is as it is, where the package's counts in units of the error before.
    """

    start: str
    continuity: float = 0.0
    moments: bool = False
    fade: Callable[[float], float] | None = None
    moved: Callable[[SAE, "Trained"], Any] | None = None
    tokens: int | None = None
    tolerance: float | None = None
    fixed: bool = False


@dataclass(frozen=True)
class Recipe:
    """What all arms of a comparison share.

    Args:
        build: An SAE of a given ``d_in``.
        first: Tokens of the first stage, and of a cold SAE.
        later: Tokens of a later stage.
        optimizer: As of `saetrack fit`.
        seed: Of the fresh SAE and of the order of the batches.
        dead_after: Tokens without firing after which a latent is dead.
    """

    build: Callable[[int], SAE]
    first: int
    later: int
    optimizer: OptimizerSettings
    seed: int = 0
    dead_after: int = 100_000


@dataclass(frozen=True)
class Trained:
    """An SAE at the end of a stage, in training units, with what the next one needs.

    Args:
        sae: The SAE.
        place: The LLM checkpoint that it was trained on.
        since_fired: Tokens since each latent fired.
        moments: Adam's, by parameter.
        latents: On the evaluation rows, ``[n, d_sae]``.
        frequency: Firing frequency on them.
        measures: What is compared.
    """

    sae: SAE
    place: Place
    since_fired: Tensor
    moments: Moments
    latents: scipy.sparse.csr_array
    frequency: Tensor
    measures: dict[str, Any] = field(default_factory=dict)

    @property
    def own_units(self) -> SAE:
        """The SAE as its snapshot would hold it."""
        return self.sae.folded(self.place.calibration.scale).requires_grad_(False)


def stage(
    data: HarvestedData, recipe: Recipe, arm: Arm, before: Trained | None, at: Place, tokens: int, order: int = 0
) -> Trained:
    """Train one stage.

    Args:
        data: The batches.
        recipe: The settings.
        arm: How it begins, and what holds it.
        before: Where it begins from; None for a fresh SAE with the schedule of a first stage.
        at: The LLM checkpoint.
        tokens: The budget.
        order: Which repetition of the stage; each has another order of the batches.
    """
    sae, moments = recipe.build(data.d_in), Moments()
    features = FeatureState(sae.d_sae)
    if before is None or arm.start == "scratch":
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + at.checkpoint.step)
        sae.initialise(at.calibration_rows[:INITIALISE_ON] * at.calibration.scale, generator)
    else:
        sae, moments = copy.deepcopy(before.sae), copy.deepcopy(before.moments)
        MAPS[arm.start](sae, moments, before.place, at)
        features.tokens_since_fired.copy_(before.since_fired)
    sae.precision = resolve_precision("auto", torch.device("cpu"))
    held_to = before if arm.continuity and arm.start != "scratch" else None
    data.calibrate({data.site: at.calibration})
    beside = None if held_to is None else held_to.place.checkpoint
    data.begin_stage(at.checkpoint, tokens, beside, arm=1000 * order + recipe.seed)
    fvu_before, _ = _fvu_and_latents(sae.folded(at.calibration.scale), at.evaluation[:4096])
    # 2,048 activations of the training split: when a stage ends is no measurement
    seen = at.calibration_rows[::8] * at.calibration.scale
    _train(data, recipe, arm, sae, features, moments, held_to, seen, first=before is None)
    assert data.stream is not None
    tokens = data.stream.end * data.batch_size
    trained = _measured(sae, at, features.tokens_since_fired, moments)
    trained.measures.update(step=at.checkpoint.step, tokens=tokens, fvu_before=fvu_before)
    if before is not None:
        trained.measures.update(identity(before, trained))
    return trained


def _train(
    data: HarvestedData,
    recipe: Recipe,
    arm: Arm,
    sae: SAE,
    features: FeatureState,
    moments: Moments,
    held_to: Trained | None,
    seen: Tensor,
    first: bool,
) -> None:
    """Run a stage's steps as `SAEModule` does, and leave Adam's state in ``moments``."""
    assert data.stream is not None
    settings, stream = recipe.optimizer, data.stream
    points, curve = check_points(len(stream)), []
    rate = settings.lr if first or settings.lr_next is None else settings.lr_next
    optimizer = ColumnAdam(sae.parameters(), lr=rate)
    if arm.moments:
        for name, parameter in sae.named_parameters():
            optimizer.state[parameter] = moments[name]
    previous, weight = None, 0.0
    if held_to is not None:
        previous = held_to.own_units
        error = own_error(previous, held_to.place.calibration, held_to.place.calibration_rows)
        weight = arm.continuity * (1.0 if arm.fixed else error)
        previous.precision = sae.precision
        if arm.moved is not None:
            sae.__dict__["_moved"] = arm.moved(sae, held_to)
    for i, batch in enumerate(stream):
        share = settings.lr_share(i, stream.end, data.batch_size, first)
        optimizer.param_groups[0]["lr"] = rate * share
        z = None if previous is None else previous.sparse_latents(batch.before[data.site])
        dead = features.dead(recipe.dead_after)
        out = sae.loss(batch.now[data.site], dead, z, dead | features.revived)
        loss = out.loss
        if out.moved is not None:
            faded = 1.0 if arm.fade is None else arm.fade(i / stream.end)
            loss = loss + weight * share * faded * out.moved
        optimizer.zero_grad()
        loss.backward()
        sae.remove_parallel_gradient_()
        optimizer.step()
        sae.after_step_(out.smallest_kept)
        features.update(out.fired, data.batch_size, recipe.dead_after)
        if arm.tolerance is not None and not first and i + 1 in points and stream.end == len(stream):
            curve.append(((i + 1) * data.batch_size, _fvu_and_latents(sae, seen)[0]))
            if has_converged(curve, arm.tolerance, settings.warmup(first)):
                stream.end = min(len(stream), math.ceil((i + 1) / (1 - settings.decay_share)))
    sae.__dict__.pop("_moved", None)
    moments.update({name: dict(optimizer.state[parameter]) for name, parameter in sae.named_parameters()})


def _fvu_and_latents(own: SAE, x: Tensor) -> tuple[float, scipy.sparse.csr_array]:
    latents = own.encode_sparse(x)
    x_hat = torch.from_numpy(latents @ own.W_dec.detach().numpy()) + own.b_dec.detach()
    return round(float(fraction_variance_unexplained(x, x_hat)), 5), latents


def _measured(sae: SAE, at: Place, since_fired: Tensor, moments: Moments) -> Trained:
    """Quality on the evaluation rows, of the SAE as a snapshot would hold it."""
    own = sae.folded(at.calibration.scale).requires_grad_(False)
    fvu, latents = _fvu_and_latents(own, at.evaluation)
    firing = FiringStatistics(sae.d_sae)
    firing.update(latents)
    facts = firing.compute()
    frequency = facts["firing_frequency"]
    measures = {
        "fvu": fvu,
        "l0": round(float(facts["l0"]), 2),
        "dead": round(float((frequency == 0).double().mean()), 4),
    }
    return Trained(sae, at, since_fired.clone(), moments, latents, frequency, measures)


def cold(data: HarvestedData, recipe: Recipe, at: Place, file: Path) -> Trained:
    """A fresh SAE trained with the first stage's tokens, or read it from ``file``."""
    if not file.is_file():
        trained = stage(data, recipe, Arm("scratch"), None, at, recipe.first)
        tensors = {f"sae.{name}": tensor for name, tensor in trained.sae.state_dict().items()}
        for name, state in trained.moments.items():
            tensors |= {f"moments.{name}.{moment}": tensor for moment, tensor in state.items()}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        file.parent.mkdir(exist_ok=True)
        save_file({**tensors, "since_fired": trained.since_fired}, file, {"measures": json.dumps(trained.measures)})
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        measures = json.loads(opened.metadata()["measures"])
    sae, moments = recipe.build(data.d_in), Moments()
    sae.load_state_dict({name[4:]: tensor for name, tensor in tensors.items() if name.startswith("sae.")})
    sae.precision = resolve_precision("auto", torch.device("cpu"))
    for name, parameter in sae.named_parameters():
        state = {m: tensors[f"moments.{name}.{m}"] for m in ("step", "exp_avg", "exp_avg_sq")}
        moments[name] = {
            m: t if m == "step" else torch.empty_like(parameter, requires_grad=False).copy_(t) for m, t in state.items()
        }  # in the parameter's layout, as Adam keeps them
    return replace(_measured(sae, at, tensors["since_fired"], moments), measures=measures)


def identity(before: Trained, after: Trained) -> dict[str, float]:
    """How far each latent is the same function of the text: median over those alive in both, shares of those before.

    A latent that is constant in one of the two has no correlation, and counts as lost in the shares.
    """
    r = torch.nan_to_num(functional_correlation(before.latents, after.latents))
    was = before.frequency > ALIVE
    both = was & (after.frequency > ALIVE)
    return {
        "r": round(float(r[both].median()), 4),
        "above_half": round(float((r[was] > 0.5).double().mean()), 4),
        "above_0.7": round(float((r[was] > 0.7).double().mean()), 4),
    }


def run_series(
    data: HarvestedData,
    recipe: Recipe,
    arm: Arm,
    first: Trained,
    steps: list[int],
    null: bool = False,
    ladder: dict[int, float] | None = None,
) -> dict[str, Any]:
    """Train a series from its first snapshot on.

    Args:
        data: The batches.
        recipe: The settings.
        arm: How each stage begins.
        first: The trained first stage.
        steps: LLM steps of the series, the first stage's first.
        null: Whether each snapshot is also trained once more on its own LLM checkpoint, to say what that alone does.
        ladder: FVU of a cold SAE by LLM step: each stage is also trained with other budgets, until it reaches that.

    Returns:
        Lists with one entry for each snapshot, and the identity from first to last.
    """
    chain, nulls, rungs = [first], [], []
    for step in steps[1:]:
        place = data.place(data.at(step))
        if ladder is not None:
            rungs.append(_climb(data, recipe, arm, chain[-1], place, ladder[step]))
        chain.append(stage(data, recipe, arm, chain[-1], place, arm.tokens or recipe.later))
        if null:
            again = stage(data, recipe, arm, chain[-1], place, recipe.later, order=1)
            nulls.append({k: again.measures[k] for k in ("step", "fvu", "dead", "r", "above_half", "above_0.7")})
        chain[-2] = replace(chain[-2], moments={})
    result = {"stages": [trained.measures for trained in chain], "first_to_last": identity(chain[0], chain[-1])}
    return result | ({"null_steps": nulls} if null else {}) | ({"rungs": rungs} if rungs else {})


def _climb(data: HarvestedData, recipe: Recipe, arm: Arm, before: Trained, at: Place, cold: float) -> dict[str, Any]:
    """Train a stage with a tenth, a quarter, half and all of a cold SAE's tokens, until its FVU is within 1 %."""
    fvu: dict[str, float] = {}
    for share in LADDER:
        fvu[str(share)] = stage(data, recipe, arm, before, at, round(share * recipe.first)).measures["fvu"]
        if fvu[str(share)] <= 1.01 * cold:
            break
    return {"step": at.checkpoint.step, "cold": cold, "fvu": fvu}
