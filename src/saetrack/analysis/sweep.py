"""Run any number of analyses over a track, with each LLM checkpoint loaded once and each token row run once.

Memory at its peak, beside one LLM and one SAE, with P the positions of the rows that some analysis asked for (all
splits together, about ``rows * context_size``):

    P * d_in * 4 bytes                       activations
    2 * P * L0 * 8 bytes                     latents, sparse: value and index; twice while batches are joined
    rows_per_batch * context_size * d_in * 4 one batch (and the LLM's own working memory for it)

32,768 positions at d_in 1024 and L0 64 are 134 MB of activations and 34 MB of latents. Only one checkpoint's
observation exists at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse
import torch

from saetrack.errors import one_line, wants_traceback
from saetrack.lm.checkpoints import load_llm
from saetrack.lm.forward import EditableLLM, read_activations
from saetrack.lm.outliers import spread, take, within
from saetrack.lm.tokens import TokenRows
from saetrack.lm.unembedding import read_unembedding
from saetrack.sae import SAE
from saetrack.track import Snapshot, Track

from .base import Analysis, AnalysisResult, AnyAnalysis, Observation, Probe, SplitObservation, SweepAnalysis
from .figures import say_order
from .identity_stretches import Kept
from .outdated import missing
from .places import share_a_step

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
"""Told how many pieces of work are done, of how many, and what the next one is."""

Finished = Callable[[str, AnalysisResult], None]
"""Told the name of an analysis and its result."""


def run_analyses(
    track: Track,
    analyses: Mapping[str, AnyAnalysis],
    *,
    device: torch.device | str = "cpu",
    rows_per_batch: int = 32,
    only_kept: bool = False,
    progress: Progress = lambda done, total, text: None,
    finished: Finished = lambda name, result: None,
) -> dict[str, AnalysisResult]:
    """Run analyses on a track and save each result under ``analyses/NAME`` of the track as soon as it is there.

    Those that need only the track run first. The others share one sweep over the LLM checkpoints, the last snapshot
    first and the others in the order of the track. Those that read the results of others run last. An
    analysis that raises is left out from there on; the others go on. LLM checkpoints of equal weights count as one.

    Args:
        track: The track, with at least one snapshot.
        analyses: Name to analysis. The name is the folder's.
        device: Where the LLM and the SAE run.
        rows_per_batch: Token rows in one forward of the LLM.
        only_kept: Count features only over stretches in which they kept their identity, which the identity analysis
            must have found; the results go to ``analyses/NAME-kept``.
        progress: Called before each analysis and each LLM checkpoint.
        finished: Called with each result when it is saved, whatever becomes of the others.

    Returns:
        Name to result, in the order of ``analyses``.

    Raises:
        ValueError: If the track is empty, or ``rows_per_batch`` is not positive, or something in ``analyses`` is none
            or cannot be restricted.
        RuntimeError: If an analysis raised; it is named, and its own error is the cause. The results of those that
            finished are saved.
    """
    _check(track, analyses, rows_per_batch)
    track = track.distinct()
    kept = _restrict(track, analyses) if only_kept else None
    for analysis in analyses.values():
        if analysis.kept is not kept:  # also if it was restricted in another run
            analysis.kept = kept
    sweeping = {name: a for name, a in analyses.items() if isinstance(a, SweepAnalysis)}
    runs = _Runs(track, kept, len(analyses) + (len(track) if sweeping else 0), progress, finished)
    for name, analysis in analyses.items():
        if isinstance(analysis, Analysis) and not analysis.reads_results:
            runs.finish(name, partial(analysis.run, track))
    probes: dict[str, Probe] = {}
    for name, analysis in sweeping.items():
        probe = runs.attempt(name, partial(analysis.begin, track))
        if probe is not None:
            probes[name] = probe
    if probes:
        _sweep(track, {name: sweeping[name] for name in probes}, probes, runs, torch.device(device), rows_per_batch)
    for name, analysis in analyses.items():
        if isinstance(analysis, Analysis) and analysis.reads_results:
            runs.finish(name, partial(analysis.run, track))
    runs.raise_failures()
    return {name: runs.results[name] for name in analyses}


def _check(track: Track, analyses: Mapping[str, object], rows_per_batch: int) -> None:
    if len(track) == 0:
        raise ValueError(f"{track.path} holds no snapshot yet, so there is nothing to analyse. Run `saetrack fit`.")
    if rows_per_batch < 1:
        raise ValueError(f"rows_per_batch is {rows_per_batch}; a forward needs at least 1 row.")
    for name, analysis in analyses.items():
        if not isinstance(analysis, Analysis | SweepAnalysis):
            raise ValueError(
                f"Analysis {name!r} is a {type(analysis).__name__}; expected an instance of a subclass of "
                "saetrack.analysis.Analysis or saetrack.analysis.SweepAnalysis."
            )


def _as_one(track: Track) -> str:
    """What of the track counts as one LLM checkpoint, as a sentence."""
    groups = [" = ".join(map(str, steps)) for steps in track.equal_weights]
    return f" LLM steps {', '.join(groups)} have equal weights and count as one." if groups else ""


def _without(lost: list[int]) -> str:
    """What snapshots of the track are missing, as a sentence."""
    if not lost:
        return ""
    return (
        f" Missing snapshots: {', '.join(f'{number:04d}' for number in lost)}. Those before and after are compared as "
        "neighbours; what was measured against a missing one, such as `fvu_shift`, stands as it was."
    )


def _restrict(track: Track, analyses: Mapping[str, AnyAnalysis]) -> Kept:
    """Tell the analyses where features kept their identity."""
    for name, analysis in analyses.items():
        if not analysis.restrictable:
            raise ValueError(
                f"--only_kept is given, but {name!r} is not made to leave out features that did not keep their "
                "identity. Leave it out, or leave out --only_kept."
            )
    return Kept.of(track)


class _Runs:
    """Results so far, and who failed: one broken analysis must not cost the others their hour of forwards."""

    def __init__(self, track: Track, kept: Kept | None, pieces: int, progress: Progress, finished: Finished) -> None:
        self.track = track
        self.kept = kept
        self._begun, self._pieces, self._progress, self._finished = 0, pieces, progress, finished
        self.results: dict[str, AnalysisResult] = {}
        self.failures: dict[str, Exception] = {}

    def say(self, text: str) -> None:
        """Name the next piece of work."""
        self._progress(self._begun, self._pieces, text)
        self._begun += 1

    def attempt(self, name: str, action: Callable[[], Any]) -> Any:
        """What ``action`` returns, or None when it raised."""
        try:
            return action()
        except Exception as error:
            if wants_traceback(error):  # else `raise_failures` says all there is to say
                logger.exception("Analysis %r failed.", name)
            self.failures[name] = error
            return None

    def finish(self, name: str, action: Callable[[], AnalysisResult]) -> None:
        """Get a result and save it, with the LLM steps that it is of: a track may grow."""

        def save() -> AnalysisResult:
            result, folder = action(), name
            whole = self.track.whole
            settings = {**result.settings, "steps": whole.steps, "equal_weights": whole.equal_weights}
            lost = missing(whole)
            settings |= {"missing": lost} if lost else {}
            result = replace(result, settings=settings, summary=result.summary + _as_one(whole) + _without(lost))
            if share_a_step(whole.steps):  # in a null chain all would be at one step
                result = replace(result, scalars={})
            if self.kept is not None:
                settings = {**result.settings, "kept": self.kept.facts()}
                result = replace(result, settings=settings, summary=result.summary + self.kept.summary())
                folder = f"{name}-kept"
            if not whole.is_forward_chain:
                for figure in result.figures.values():
                    say_order(figure, [s.step for s in sorted(whole, key=lambda s: s.number)])
            result.save(self.track.analyses_dir / folder)
            return result

        self.say(name)
        result = self.attempt(name, save)
        if result is not None:
            self.results[name] = result
            self._finished(name, result)

    def raise_failures(self) -> None:
        """Raise if any analysis failed, from the first error."""
        if not self.failures:
            return
        said = {name: one_line(e) or f"{type(e).__name__}: {e}" for name, e in self.failures.items()}
        causes = " ".join(f"Analysis {name!r} failed: {line.rstrip('.')}." for name, line in said.items())
        kept = (
            f"The results of {', '.join(map(repr, self.results))} are saved." if self.results else "Nothing was saved."
        )
        raise RuntimeError(f"{causes} {kept}") from next(iter(self.failures.values()))


def _sweep(
    track: Track,
    analyses: Mapping[str, SweepAnalysis],
    probes: Mapping[str, Probe],
    runs: _Runs,
    device: torch.device,
    rows_per_batch: int,
) -> None:
    wanted = {
        "selection": max(probe.selection_rows for probe in probes.values()),
        "evaluation": max(probe.evaluation_rows for probe in probes.values()),
    }
    rows = {split: _first_rows(track.tokens(split), n) for split, n in wanted.items() if n}
    reader = _Reader(
        track.facts["hookpoint"],
        track.facts["llm_dtype"],
        device,
        rows_per_batch,
        embeddings=any(probe.embeddings for probe in probes.values()),
        unembedding=any(probe.unembedding for probe in probes.values()),
        llm=any(probe.llm for probe in probes.values()),
    )
    order = [len(track) - 1, *range(len(track) - 1)]
    for number, index in enumerate(order, start=1):
        snapshot = track[index]
        runs.say(f"LLM checkpoint {number} of {len(order)} (step {snapshot.step})")
        whole = reader.read(snapshot, rows)
        for name, analysis in analyses.items():
            if name not in runs.failures:
                runs.attempt(name, partial(analysis.observe, snapshot, _part(whole, probes[name])))
        del whole
        if all(name in runs.failures for name in analyses):
            return
    for name, analysis in analyses.items():
        if name not in runs.failures:
            runs.finish(name, analysis.finish)


def _first_rows(rows: TokenRows, count: int) -> TokenRows:
    return rows.select(slice(count))


@dataclass(frozen=True)
class _Reader:
    """Reads activations and latents of one snapshot after the other; holds no LLM between them."""

    hookpoint: str
    dtype: str
    device: torch.device
    rows_per_batch: int
    embeddings: bool
    unembedding: bool
    llm: bool

    def read(self, snapshot: Snapshot, rows: Mapping[str, TokenRows]) -> Observation:
        """Load the snapshot's LLM checkpoint and run all rows through it and the SAE."""
        if not (rows or self.embeddings or self.unembedding or self.llm):
            return Observation()
        model = load_llm(snapshot.llm, dtype=self.dtype, device=self.device)
        sae = snapshot.sae().to(self.device)
        limit = snapshot.norm_limit
        splits = {split: self._read_split(model, sae, split_rows, limit) for split, split_rows in rows.items()}
        return Observation(
            **splits,
            embeddings=model.get_input_embeddings().weight.detach().float().cpu() if self.embeddings else None,
            unembedding=read_unembedding(model) if self.unembedding else None,
            llm=EditableLLM(model, self.hookpoint) if self.llm else None,
        )

    @torch.inference_mode()
    def _read_split(self, model: Any, sae: SAE, rows: TokenRows, norm_limit: float) -> SplitObservation:
        usable = rows.usable()  # [R, T]
        positions = np.argwhere(usable)  # [P, 2]
        activations = np.empty((len(positions), sae.d_in), dtype=np.float32)
        latents: list[scipy.sparse.csr_array] = []
        done = 0
        for start in range(0, len(rows.tokens), self.rows_per_batch):
            batch = slice(start, start + self.rows_per_batch)
            tokens = torch.from_numpy(rows.tokens[batch].astype(np.int64)).to(self.device)
            contexts = rows.contexts(batch)
            x = read_activations(model, tokens, [self.hookpoint], contexts)[self.hookpoint]  # [B, T, d_in]
            x = x[torch.from_numpy(usable[batch]).to(x.device)].float()  # [p, d_in]
            activations[done : done + len(x)] = x.cpu().numpy()
            mask = within(x, norm_limit)
            latents.append(spread(sae.encode_sparse(take(x, mask)), mask))
            done += len(x)
        return SplitObservation(rows, positions, activations, _join(latents, sae.d_sae))


def _join(batches: list[scipy.sparse.csr_array], d_sae: int) -> scipy.sparse.csr_array:
    if not batches:
        return scipy.sparse.csr_array((0, d_sae), dtype=np.float32)
    joined = scipy.sparse.csr_array(scipy.sparse.vstack(batches, format="csr"), dtype=np.float32)
    joined.eliminate_zeros()
    joined.sort_indices()
    return joined


def _part(whole: Observation, probe: Probe) -> Observation:
    """What one analysis asked for: the first rows of what was read, without copying."""
    return Observation(
        selection=_head(whole.selection, probe.selection_rows),
        evaluation=_head(whole.evaluation, probe.evaluation_rows),
        embeddings=whole.embeddings if probe.embeddings else None,
        unembedding=whole.unembedding if probe.unembedding else None,
        llm=whole.llm if probe.llm else None,
    )


def _head(whole: SplitObservation | None, rows: int) -> SplitObservation | None:
    if whole is None or rows == 0:
        return None
    if rows >= len(whole.rows.tokens):
        return whole
    count = int(np.searchsorted(whole.positions[:, 0], rows))
    latents, stored = whole.latents, int(whole.latents.indptr[count])
    head = scipy.sparse.csr_array(
        (latents.data[:stored], latents.indices[:stored], latents.indptr[: count + 1]), shape=(count, latents.shape[1])
    )
    return SplitObservation(_first_rows(whole.rows, rows), whole.positions[:count], whole.activations[:count], head)
