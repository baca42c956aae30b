"""The activation stream: batches of one LLM checkpoint's activations, with no hidden state.

Chunk *c* of a stage is a pure function of (the LLM's weights, seed, LLM step, rank, c): which token rows it
holds and how their activations are shuffled. Any batch can be reached without replaying the ones before it,
so resuming needs one number and no buffer is ever saved.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from saetrack.lm.checkpoints import LLMCheckpoint
from saetrack.lm.forward import lane_numbers, module_name, read_activations
from saetrack.lm.outliers import within, within_all
from saetrack.lm.tokens import TokenRows, usable_counts

T = TypeVar("T")

ROWS_PER_FORWARD = 32
"""Token rows in one forward of the LLM on a CPU. A constant, not an option: another size changes the last bits of the
activations, and with them the hashes of the snapshots."""
_TOKENS_PER_FORWARD_GPU = 2**15  # in short rows, or launching the forwards of a small LLM takes longer than they do
_NORMS = 4096  # activations whose norms are taken at a time, in float32


class Forward(NamedTuple):
    """One forward of the LLM over some token rows.

    Attributes:
        number: Which of its harvest, from 0.
        rows: Indices of the token rows, ``[n]``.
        tokens: ``[n, context_size]``.
        activations: By module, only where they count, ``[n_usable, d_in]``, in reading order.
        finite: By module, whether they all are, one bool on the LLM's device.
    """

    number: int
    rows: NDArray[np.int64]
    tokens: Tensor
    activations: dict[str, Tensor]
    finite: dict[str, Tensor]


def rows_per_forward(device: torch.device, context_size: int) -> int:
    """Token rows in one forward of the LLM: `ROWS_PER_FORWARD`, and on a GPU more of them where they are short."""
    return max(ROWS_PER_FORWARD, _TOKENS_PER_FORWARD_GPU // context_size if device.type == "cuda" else 0)


def forwards(
    llm: PreTrainedModel,
    rows: TokenRows,
    modules: list[str],
    indices: NDArray[np.int64],
    buffers: Mapping[str, Tensor] | None = None,
) -> Iterator[Forward]:
    """Run the LLM over token rows, `rows_per_forward` at a time; on a GPU nothing here waits for it.

    Args:
        llm: The LLM, on the device where the activations are wanted.
        rows: The token rows of a split.
        modules: Dotted names of the modules to read.
        indices: Which rows, ``[n]``, in the order wanted.
        buffers: Where the activations of all rows go, by module, ``[n_usable, d_in]`` of any dtype: each forward's are
            then written there and nowhere else, and what is yielded is a view. None makes new tensors, float32.
    """
    filled, at_once = 0, rows_per_forward(llm.device, rows.tokens.shape[1])
    for number, start in enumerate(range(0, len(indices), at_once)):
        chosen = indices[start : start + at_once]
        tokens = torch.from_numpy(rows.tokens[chosen].astype(np.int64)).to(llm.device)
        usable = torch.from_numpy(np.flatnonzero(rows.usable(chosen))).to(llm.device)
        end = filled + len(usable)
        parts = {module: buffer[filled:end] for module, buffer in (buffers or {}).items()}
        take = partial(_take, usable, parts)
        activations = read_activations(llm, tokens, modules, rows.contexts(chosen), take)
        # the extremes take one pass, where isfinite writes three tensors of this size
        finite = {module: torch.stack(x.aminmax()).isfinite().all() for module, x in activations.items()}
        filled = end
        yield Forward(number, chosen, tokens, activations, finite)


def _take(usable: Tensor, parts: Mapping[str, Tensor], module: str, x: Tensor) -> Tensor:
    """The usable ones of a module's activations, in its part of a buffer where there is one, else in float32."""
    x, part = x.flatten(0, 1), parts.get(module)
    if part is None:
        return x.index_select(0, usable).float()
    if x.dtype == part.dtype:
        return torch.index_select(x, 0, usable, out=part)
    return part.copy_(x.index_select(0, usable))


def refuse_infinite(
    forward: Forward, dtype: torch.dtype, checkpoint: LLMCheckpoint, finite: Mapping[str, bool]
) -> None:
    """Raise ValueError where an LLM checkpoint gave NaN or infinite activations.

    Args:
        forward: The one that did.
        dtype: Of the LLM.
        checkpoint: What it was loaded from.
        finite: By module, whether all are finite.
    """
    for module, is_finite in finite.items():
        if not is_finite:
            advice = "Leave" if dtype == torch.float32 else "Try `data.llm_dtype: float32`, or leave"
            raise ValueError(
                f"{module} of LLM checkpoint step {checkpoint.step} ({checkpoint.model}, revision "
                f"{checkpoint.revision}) gave NaN or infinite activations in forward batch {forward.number} (token "
                f"rows {int(forward.rows[0])} and following). {advice} this checkpoint out of `scheduler.steps`."
            )


def harvest(
    llm: PreTrainedModel, checkpoint: LLMCheckpoint, rows: TokenRows, hookpoints: list[str], indices: NDArray[np.int64]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Activations of token rows, one forward of the LLM at a time, only where they count.

    Args:
        llm: The LLM, on the device where the activations are wanted.
        checkpoint: What ``llm`` was loaded from; only named in the error.
        rows: The token rows of a split.
        hookpoints: Where to read.
        indices: Which rows, ``[n]``, in the order wanted.

    Yields:
        The tokens of one forward ``[rows, context_size]`` and, for each hookpoint, the float32 activations of
        their usable positions ``[n_usable, d_in]``, in reading order; lanes of one module share a tensor.

    Raises:
        ValueError: If an activation is NaN or infinite.
    """
    for forward in forwards(llm, rows, list(dict.fromkeys(map(module_name, hookpoints))), indices):
        refuse_infinite(forward, llm.dtype, checkpoint, {m: bool(ok) for m, ok in forward.finite.items()})
        yield forward.tokens, {h: forward.activations[module_name(h)] for h in hookpoints}


@dataclass(frozen=True)
class StageOrder:
    """Which token rows one process reads in a stage, in which order, and where its chunks begin.

    Every rank gets the same number of batches: a chunk takes as many rows as it needs to fill its batches and
    drops the few activations left over (fewer than ``context_size``).

    Args:
        rows: The training split.
        tokens: Budget of the stage, activations over all ranks.
        batch_size: Activations in an optimizer step, over all ranks.
        chunk_tokens: Activations that one rank shuffles together.
        seed: The run's seed.
        step: LLM step; each LLM checkpoint sees the same rows in another order.
        rank: This process.
        world_size: Number of processes.
        arm: Which repetition of the stage: the same sample of rows in an order of its own. 0 is the track's.
    """

    rows: TokenRows
    tokens: int
    batch_size: int
    chunk_tokens: int
    seed: int
    step: int
    rank: int = 0
    world_size: int = 1
    arm: int = 0

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise ValueError(
                f"The stage has a budget of {self.tokens} tokens, less than one batch of {self.batch_size}; raise "
                "`scheduler.tokens_first` and `scheduler.tokens_next`, or lower `data.batch_size`."
            )

    @property
    def local_batch(self) -> int:
        """Activations of one optimizer step on this rank."""
        return self.batch_size // self.world_size

    @property
    def batches(self) -> int:
        """Optimizer steps in the stage."""
        return self.tokens // self.batch_size

    @property
    def batches_per_chunk(self) -> int:
        """Batches that one chunk fills."""
        return max(1, self.chunk_tokens // self.local_batch)

    @property
    def chunks(self) -> int:
        """Chunks in the stage."""
        return -(-self.batches // self.batches_per_chunk)

    @cached_property
    def _bounds(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """This rank's rows in order, and the place in them where each chunk begins."""
        counts = usable_counts(self.rows)
        context = self.rows.tokens.shape[1]
        # what cutting rows at chunk boundaries and dealing them to the ranks can cost at most
        rounding = (self.chunks + 1) * self.world_size * context
        wanted = self.batches * self.batch_size + rounding
        available = int(counts.sum())
        if available < wanted:
            raise ValueError(
                f"A stage needs {wanted:,} tokens ({self.tokens:,} and what rounding to whole rows takes), but the "
                f"training split of the corpus holds {available:,}. Name a larger corpus (`data.corpus`), raise "
                "`data.tokens.max_tokens`, or lower `scheduler.tokens_first` and `scheduler.tokens_next`."
            )
        # one seeded sample of the corpus for the whole series: stages of equal budget see the same rows
        sample = np.random.default_rng([self.seed]).permutation(len(counts))
        n_rows = int(np.searchsorted(np.cumsum(counts[sample]), wanted)) + 1
        shuffle = np.random.default_rng([self.seed, self.step, *([self.arm] if self.arm else [])]).permutation(n_rows)
        order = sample[shuffle][self.rank :: self.world_size]
        filled = np.cumsum(counts[order])
        starts = [0]
        for chunk in range(self.chunks):
            before = filled[starts[-1] - 1] if starts[-1] else 0
            batches = min(self.batches_per_chunk, self.batches - chunk * self.batches_per_chunk)
            need = before + batches * self.local_batch
            starts.append(min(int(np.searchsorted(filled, need)) + 1, len(order)))
        return order, np.asarray(starts)

    def chunk_rows(self, chunk: int) -> NDArray[np.int64]:
        """Indices of the token rows of one chunk on this rank."""
        order, starts = self._bounds
        return order[starts[chunk] : starts[chunk + 1]]

    def shuffle(self, chunk: int, n: int, lane: int = 0) -> Tensor:
        """The order of a chunk's ``n`` activations; every lane has one of its own."""
        repetition = [self.arm, lane] if self.arm or lane else []
        rng = np.random.default_rng([self.seed, self.step, self.rank, chunk, *repetition])
        return torch.from_numpy(rng.permutation(n))


class Batch(NamedTuple):
    """Activations by hookpoint, ``[n, d_in]``; all at the same positions of the corpus, but for lanes of one module.

    Attributes:
        now: Of the stage's LLM checkpoint, scaled.
        before: Of the LLM checkpoint of the stage before, in its own units; empty where they are not wanted.
    """

    now: dict[str, Tensor]
    before: dict[str, Tensor]


def serve(x: Tensor, positions: Tensor, scale: float = 1.0) -> Tensor:
    """The activations at some positions of a chunk, float32 and times their scale."""
    return x[positions].float().mul_(scale)  # indexing copies, so the chunk stays as it is


def finished(forwards: Generator[float, None, T]) -> T:
    """What a harvest returns, with nothing done in between."""
    made: list[T] = []

    def run() -> Iterator[float]:
        made.append((yield from forwards))

    deque(run(), maxlen=0)
    return made[0]


def _no_outliers(x: Tensor, limit: float) -> Tensor | None:
    """Which activations of a chunk are within a norm, their norms taken in float32; None for all."""
    masks = [mask for part in torch.split(x, _NORMS) if (mask := within(part.float(), limit)) is not None]
    return torch.cat(masks) if masks else None


@cache
def _side_stream() -> torch.cuda.Stream:
    """Always the same: memory that was allocated for one stream of a GPU is not given to another."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


class Filling:
    """A chunk in the making, one forward of the LLM after another.

    On a GPU the forwards can run on a stream of their own, beside the training steps that are launched between them.

    Args:
        forwards: Yields after each forward the share of the chunk that is done, and returns its activations.
        aside: Whether other work is launched in between.
    """

    def __init__(self, forwards: Generator[float, None, Batch], aside: bool = False) -> None:
        self._forwards = self._run(forwards)
        self._done = 0.0
        self._batch: Batch | None = None
        self._stream = _side_stream() if aside and torch.cuda.is_available() else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())  # the LLM's weights may still be on their way

    def _run(self, forwards: Generator[float, None, Batch]) -> Iterator[float]:
        self._batch = yield from forwards

    def advance(self, share: float) -> None:
        """Launch forwards until this share of the chunk is under way."""
        with torch.cuda.stream(self._stream):  # of None it does nothing
            while self._batch is None and self._done < share:
                self._done = next(self._forwards, math.inf)

    def finish(self) -> Batch:
        """The activations, all there."""
        self.advance(math.inf)
        assert self._batch is not None
        if self._stream is not None:
            current = torch.cuda.current_stream()
            current.wait_stream(self._stream)
            for x in (x for part in self._batch for x in part.values()):
                x.record_stream(current)  # its memory is not given to the next chunk while a step still reads it
        return self._batch


class ActivationStream:
    """The batches of one stage on one rank: what Lightning iterates over in an epoch.

    It has Lightning's ``state_dict`` and ``load_state_dict``, so a run resumed in the middle of a stage goes on
    with the next batch.

    Args:
        order: Rows, chunks and shuffles of the stage.
        fill: Given the number of a chunk, makes the activations of its usable positions, as `Filling` takes it: in the
            LLM's own units and dtype, which may be half of float32's memory.
        scales: Gives, by hookpoint, what a batch's activations are multiplied with; 1 where none is named.
        norm_limits: Gives, by hookpoint, the norm over which activations are left out, in the LLM's own units. Both are
            asked at every chunk, for they are measured when a stage begins. What is left out is made up for from the
            same chunk.
        limits_before: By hookpoint, the same norm at the LLM checkpoint of the stage before, where its activations come
            with the batches: what is an outlier at either is left out.
        ahead: Make the next chunk while this one trains, a part of it before each batch, as a GPU can; two chunks are
            then in memory. The batches are the same.
    """

    def __init__(
        self,
        order: StageOrder,
        fill: Callable[[int], Generator[float, None, Batch]],
        scales: Callable[[], Mapping[str, float]] = dict,
        norm_limits: Callable[[], Mapping[str, float]] = dict,
        limits_before: Mapping[str, float] | None = None,
        ahead: bool = False,
    ) -> None:
        self.order = order
        self.end = order.batches
        """Batches after which iteration stops; a stage that has converged lowers it, ``len`` stays the budget."""
        self._fill = fill
        self._scales = scales
        self._norm_limits = norm_limits
        self._limits_before = limits_before or {}
        self._ahead = ahead
        self._position = 0

    def __len__(self) -> int:
        return self.order.batches

    @property
    def is_done(self) -> bool:
        """Whether every batch has been handed out."""
        return self._position in (0, self.end)

    def __iter__(self) -> Iterator[Batch]:
        per_chunk, batch = self.order.batches_per_chunk, self.order.local_batch
        coming: Filling | None = None
        while self._position < self.end:
            chunk, first = divmod(self._position, per_chunk)
            activations = (coming or Filling(self._fill(chunk), self._ahead)).finish()
            coming = None
            lanes = lane_numbers(list(activations.now))
            # on their device once, not a copy that a GPU is waited for at every batch
            shuffles = {
                h: self._shuffle(chunk, h, activations, lanes[h]).to(x.device) for h, x in activations.now.items()
            }
            scales = self._scales()
            for i in range(first, per_chunk):
                if self._position >= self.end:
                    break
                if self._ahead and (chunk + 1) * per_chunk < self.end:
                    coming = coming or Filling(self._fill(chunk + 1), self._ahead)
                    coming.advance((i + 1 - first) / (per_chunk - first))
                at = {h: order[i * batch : (i + 1) * batch] for h, order in shuffles.items()}
                served = Batch(
                    {h: serve(x, at[h], scales.get(h, 1.0)) for h, x in activations.now.items()},
                    {h: serve(x, at[h]) for h, x in activations.before.items()},
                )
                # counted before the batch is handed out: a resume file is written while the batch is in use
                self._position += 1
                if i + 1 == per_chunk or self._position >= self.end:
                    # before the last batch, not after: Lightning does not ask for another, and the end of the stage
                    # would be measured with a whole chunk in memory
                    del activations
                yield served
        self._position = 0

    def _shuffle(self, chunk: int, hookpoint: str, activations: Batch, lane: int) -> Tensor:
        """The order of a chunk's activations without its outliers, with enough of them to fill its batches."""
        x = activations.now[hookpoint]
        order = self.order.shuffle(chunk, len(x), lane)
        mask = _no_outliers(x, self._norm_limits().get(hookpoint, math.inf))
        if hookpoint in activations.before:
            limit = self._limits_before.get(hookpoint, math.inf)
            mask = within_all(mask, _no_outliers(activations.before[hookpoint], limit))
        if mask is None:
            return order
        order = order[mask.cpu()[order]]
        if not len(order):
            raise ValueError(
                f"All {len(x)} activations of {hookpoint} in chunk {chunk} have outlier norms, measured by the "
                "calibration tokens. Raise `data.tokens.outlier_norm`, or `data.tokens.calibration_tokens`."
            )
        # the leftover of whole rows usually covers what is gone; else a few activations are seen twice
        batches = min(self.order.batches_per_chunk, self.order.batches - chunk * self.order.batches_per_chunk)
        need = batches * self.order.local_batch
        return order if len(order) >= need else order.repeat(-(-need // len(order)))[:need]

    def state_dict(self) -> dict[str, Any]:
        """How many batches have been handed out, and of how many."""
        return {"position": self._position, "end": self.end}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after as many batches as ``state_dict`` said."""
        self._position, self.end = state["position"], state["end"]
