"""The language model's side of training: checkpoints, token rows, and the activations of the current stage."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from saetrack.lm import files
from saetrack.lm.checkpoints import CheckpointSource, LLMCheckpoint, load_llm, release_memory
from saetrack.lm.corpus import Corpus, StdlibCorpus
from saetrack.lm.dataset_corpus import DatasetCorpus
from saetrack.lm.forward import activation_widths, module_name, refuse_leaking_documents
from saetrack.lm.loading import vocabulary_size
from saetrack.lm.rows import Bos, Layout
from saetrack.lm.tokens import RowSettings, TokenizedCorpus, TokenRows, tokenize_corpus
from saetrack.training.stream import (
    ActivationStream,
    Batch,
    Forward,
    StageOrder,
    finished,
    forwards,
    refuse_infinite,
)
from saetrack.training.warm_start import Calibration

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenSettings:
    """How the corpus becomes token rows, and how much of it measures instead of trains."""

    context_size: int = 128
    """Tokens in a row, BOS included."""
    bos: Bos = "always"
    """Whether BOS begins every row and every document: `always`, where the tokenizer has one; `tokenizer`, where it
    puts one before a text by itself; `never`."""
    layout: Layout = "packed"
    """How documents share rows. `packed`: each sees those before it, as in the training of most LLMs; `masked`: the
    same rows, but attention and positions begin anew with each document; `separate`: a document begins a row of its
    own, and padding fills it."""
    leave_out_special: bool = True
    """Whether activations at all special tokens of the tokenizer are left out; those at BOS and padding always are."""
    outlier_norm: float | None = None
    """Leave out activations whose norm is over this many times the median, such as attention sinks: from training,
    evaluation and the latents that analyses see. 10 finds them; null keeps all."""
    max_tokens: int | None = None
    """Read no more of the corpus than this; null reads all of it."""
    calibration_tokens: int = 65_536
    """Tokens of the training split on which every LLM checkpoint's mean, scale and rotation are measured."""
    selection_tokens: int = 65_536
    """Tokens of the selection split kept in the track, on which analyses choose."""
    evaluation_tokens: int = 65_536
    """Tokens of the evaluation split kept in the track, on which snapshots are measured."""
    held_out_tokens: int = 8_192
    """Tokens of the selection split on which a stage's convergence is seen."""
    ce_tokens: int = 16_384
    """Of these, the tokens on which the LLM's cross-entropy is taken (four whole forwards each)."""
    split_share: float = 0.05
    """Share of the documents held out for selection, and again for evaluation."""
    cache_dir: Path = Path("~/.cache/saetrack/tokens")
    """Where tokenised corpora are kept for every run that uses them."""

    def __post_init__(self) -> None:
        for name in ("calibration", "selection", "evaluation", "held_out", "ce"):
            require_positive(f"data.tokens.{name}_tokens", getattr(self, f"{name}_tokens"))
        if not 0 < self.split_share < 0.5:
            raise ValueError(
                f"data.tokens.split_share is {self.split_share}, but it is taken twice, and the rest trains; give a "
                "share between 0 and 0.5, such as 0.05."
            )
        if self.outlier_norm is not None and not self.outlier_norm > 1:
            raise ValueError(
                f"data.tokens.outlier_norm is {self.outlier_norm}, but half of the activations have a norm over the "
                "median; give at least 2, such as 10, or null."
            )


def require_positive(name: str, value: float) -> None:
    """Raise ValueError unless a setting is above 0."""
    if not value > 0:
        raise ValueError(f"{name} is {value}; it must be above 0.")


class ActivationDataModule(LightningDataModule):
    """Yields the activations of one LLM checkpoint after another, at one hookpoint or several.

    The LLM lives here and never in the LightningModule, where DDP would broadcast it and every resume file
    would hold it.

    Args:
        source: Where the LLM checkpoints are.
        hookpoints: Dotted names of the modules whose output is read, e.g. ``gpt_neox.layers.3``. Each gets its
            own SAE and its own track; the LLM runs once for all of them. ``gpt_neox.layers.3@b`` is a lane: one more
            SAE on that module, with an initialisation and a shuffle of its own.
        corpus: The text. By default the source code of Python's standard library, which is on every machine.
        tokens: How the corpus becomes token rows.
        batch_size: Activations in an optimizer step, over all processes.
        chunk_tokens: Activations that one process holds and shuffles together, in the LLM's dtype; docs/stream.md says
            what memory a run takes.
        llm_dtype: Data type of the LLM's weights and forward, apart from the SAE's, which is float32.
        seed: Seed of every draw in the run. On the command line it is ``seed_everything``.
    """

    def __init__(
        self,
        source: CheckpointSource,
        hookpoints: list[str],
        corpus: Corpus | None = None,
        tokens: TokenSettings = TokenSettings(),
        batch_size: int = 4096,
        chunk_tokens: int = 131_072,
        llm_dtype: str = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not hookpoints or len(set(hookpoints)) != len(hookpoints):
            raise ValueError(f"data.hookpoints is {hookpoints}; name at least one module, and each only once.")
        require_positive("data.batch_size", batch_size)
        require_positive("data.chunk_tokens", chunk_tokens)
        if isinstance(corpus, DatasetCorpus) and corpus.streaming and tokens.max_tokens is None:
            raise ValueError(
                f"data.corpus streams {corpus.path}, which may have no end; set `data.tokens.max_tokens`, with room "
                "for `scheduler.tokens_first`. That much is tokenised once and kept."
            )
        self.source = source
        self.hookpoints = hookpoints
        self.corpus = corpus or StdlibCorpus()
        self.tokens = tokens
        self.batch_size = batch_size
        self.chunk_tokens = chunk_tokens
        self.llm_dtype = llm_dtype
        self.seed = seed
        self.scales: dict[str, float] = {}
        """Activation scale of the current LLM checkpoint by hookpoint; set by ``calibrate``."""
        self.norm_limits: dict[str, float] = {}
        """Norm over which its activations are left out, in its own units; set by ``calibrate``."""
        self.widths: dict[str, int] = {}
        """``d_in`` by hookpoint; set by ``read_widths``."""
        self._llms: dict[LLMCheckpoint, PreTrainedModel] = {}
        self.stream: ActivationStream | None = None
        """The batches of the current stage; set by ``begin_stage``."""
        self.before: LLMCheckpoint | None = None
        """The LLM checkpoint whose activations come beside the current one's; set by ``begin_stage``."""
        self.arm = 0
        """Which repetition of the stage the current one is, 0 for the track's own; set by ``begin_stage``."""

    def prepare_data(self) -> None:
        """Make the checkpoints and the token rows exist; Lightning calls this on one process."""
        self.source.prepare()
        self._tokenize()

    def setup(self, stage: str) -> None:
        """List the LLM checkpoints and open the token rows."""
        self.checkpoints = self.source.checkpoints()
        self.corpus_rows = self._tokenize()

    def _tokenize(self) -> TokenizedCorpus:
        t = self.tokens
        return tokenize_corpus(
            self.corpus,
            self.source.tokenizer(),
            self.source.tokenizer_name,
            t.context_size,
            t.cache_dir.expanduser(),
            t.max_tokens,
            selection_share=t.split_share,
            evaluation_share=t.split_share,
            settings=RowSettings(t.bos, t.layout, t.leave_out_special),
            vocab_size=vocabulary_size(self.source.checkpoints()[-1]),
        )

    @property
    def device(self) -> torch.device:
        """Where the LLM runs and the activations are."""
        return self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")

    def fetch(self, *checkpoints: LLMCheckpoint | None) -> None:
        """Have LLM checkpoints on the disk. Every rank calls it, and one of each machine downloads for all there.

        Raises:
            FileNotFoundError: If one is neither here nor on a Hub that can be reached.
            OSError: If the Hub fails in the middle of it.
        """
        if self.trainer is None or self.trainer.local_rank == 0:
            for checkpoint in checkpoints:
                if checkpoint is not None:
                    files.fetch(checkpoint.model, checkpoint.revision, checkpoint.cache_dir)
        if self.trainer is not None:
            self.trainer.strategy.barrier()

    def llm(self, checkpoint: LLMCheckpoint) -> PreTrainedModel:
        """The LLM of a checkpoint. Asking for another frees it, unless the stage reads both."""
        if checkpoint not in self._llms:
            kept = (self.checkpoint, self.before) if self.before is not None else ()
            self.release_llms(*kept)
            llm = load_llm(checkpoint, self.llm_dtype, self.device)
            self._refuse_other_widths(checkpoint, llm)
            self._llms[checkpoint] = llm
        return self._llms[checkpoint]

    def _refuse_other_widths(self, checkpoint: LLMCheckpoint, llm: PreTrainedModel) -> None:
        """Raise unless the LLM is as wide at the hookpoints as the first was."""
        widths = activation_widths(llm, list(self.widths)) if self.widths else {}
        for hookpoint, width in widths.items():
            if width != self.widths[hookpoint]:
                raise ValueError(
                    f"{hookpoint} of LLM checkpoint step {checkpoint.step} ({checkpoint.model}) is {width} wide, but "
                    f"that of the first is {self.widths[hookpoint]}; all must be checkpoints of one LLM. Take it out "
                    "of `data.source`, or choose the others with `scheduler.steps`."
                )

    def release_llms(self, *kept: LLMCheckpoint | None) -> None:
        """Free the LLMs in memory, but for those of the checkpoints ``kept``."""
        for checkpoint in self._llms.keys() - set(kept):
            del self._llms[checkpoint]
        release_memory()

    def read_widths(self, checkpoint: LLMCheckpoint) -> None:
        """Read the widths of the hookpoints from the first LLM checkpoint that is visited.

        Raises:
            ValueError: If there is no module of a hookpoint's name (the closest ones are listed), or the LLM cannot
                read rows as long as ``data.tokens.context_size``, or not keep the documents in them apart.
        """
        self.fetch(checkpoint)
        llm = self.llm(checkpoint)
        longest = getattr(llm.config, "max_position_embeddings", None)
        if longest and 0 < longest < self.tokens.context_size:
            raise ValueError(
                f"data.tokens.context_size is {self.tokens.context_size}, but the LLM reads at most {longest} tokens "
                f"(max_position_embeddings in its config.json); set it to {longest} or less."
            )
        if self.tokens.layout == "masked":
            refuse_leaking_documents(llm, self.tokens.context_size)
        self.widths = activation_widths(llm, self.hookpoints)

    def begin_stage(
        self,
        checkpoint: LLMCheckpoint,
        tokens: int,
        before: LLMCheckpoint | None = None,
        arm: int = 0,
        limits_before: Mapping[str, float] | None = None,
    ) -> None:
        """Make ``train_dataloader`` yield the activations of ``checkpoint``, ``tokens`` of them over all ranks.

        Args:
            checkpoint: The LLM checkpoint of the stage.
            tokens: Its budget.
            before: The LLM checkpoint of the stage before, whose activations at the same positions come with the
                batches; None for none.
            arm: Which repetition of the stage; each has another order of the same rows.
            limits_before: By hookpoint, the norm over which activations of ``before`` are left out.

        Raises:
            ValueError: If the budget does not fill a batch, or the corpus is shorter than the budget.
        """
        order = StageOrder(
            rows=self.corpus_rows.train,
            tokens=tokens,
            batch_size=self.batch_size,
            chunk_tokens=self.chunk_tokens,
            seed=self.seed,
            step=checkpoint.step,
            rank=self.trainer.global_rank if self.trainer is not None else 0,
            world_size=self.trainer.world_size if self.trainer is not None else 1,
            arm=arm,
        )
        order.chunk_rows(0)  # holds the budget against the corpus before the LLM is loaded
        self.checkpoint, self.before, self.arm = checkpoint, before, arm
        self.stream = ActivationStream(
            order,
            self._fill,
            lambda: self.scales,
            lambda: self.norm_limits,
            limits_before,
            ahead=self.device.type == "cuda",
        )

    def train_dataloader(self) -> ActivationStream:
        """The batches of the current stage on this rank."""
        if self.stream is None:
            raise RuntimeError("No stage has begun: add a CheckpointScheduler to the trainer's callbacks.")
        return self.stream

    def _fill(self, chunk: int) -> Generator[float, None, Batch]:
        """Make the activations of a chunk, as `Filling` takes them."""
        assert self.stream is not None
        train, rows = self.corpus_rows.train, self.stream.order.chunk_rows(chunk)
        dtype = getattr(torch, self.llm_dtype)
        before: dict[str, Tensor] = {}
        if self.before is not None:
            before = yield from self._harvesting(self.before, train, rows, dtype, (0.0, 0.5))
        span = (0.0 if self.before is None else 0.5, 1.0)
        now = yield from self._harvesting(self.checkpoint, train, rows, dtype, span)
        return Batch(now, before)

    def _harvesting(
        self,
        checkpoint: LLMCheckpoint,
        rows: TokenRows,
        indices: NDArray[np.int64],
        dtype: torch.dtype = torch.float32,
        span: tuple[float, float] = (0.0, 1.0),
    ) -> Generator[float, None, dict[str, Tensor]]:
        """Activations of token rows in the LLM's own units, in one buffer per module.

        Yields after each forward how far it is between the two ends of ``span``.
        """
        n = int(rows.usable(indices).sum())
        widths = {module_name(hookpoint): width for hookpoint, width in self.widths.items()}
        buffers = {module: torch.empty(n, d, dtype=dtype, device=self.device) for module, d in widths.items()}
        llm = self.llm(checkpoint)
        read: list[Forward] = []
        done = 0
        for forward in forwards(llm, rows, list(widths), indices, buffers):
            read.append(forward)
            done += len(forward.rows)
            yield span[0] + (span[1] - span[0]) * done / len(indices)
        # all at once and not after each, for the look at a result waits until a GPU has it
        finite = torch.stack([torch.stack(list(forward.finite.values())) for forward in read]).tolist()
        for forward, found in zip(read, finite, strict=True):
            refuse_infinite(forward, llm.dtype, checkpoint, dict(zip(forward.finite, found, strict=True)))
        return {hookpoint: buffers[module_name(hookpoint)] for hookpoint in self.hookpoints}

    def _harvested(self, checkpoint: LLMCheckpoint, rows: TokenRows, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Activations of token rows in the LLM's own units, ``[n, d_in]`` by hookpoint."""
        return finished(self._harvesting(checkpoint, rows, indices))

    def held_out_activations(self, checkpoint: LLMCheckpoint) -> dict[str, Tensor]:
        """Activations of an LLM checkpoint that no SAE is trained on, in its own units, ``[n, d_in]`` by hookpoint.

        They are of the selection split: when a stage has converged is a choice, not a measurement.
        """
        rows = self.measuring_rows("selection")
        n_rows = min(-(-self.tokens.held_out_tokens // self.tokens.context_size), len(rows.tokens))
        return self._harvested(checkpoint, rows, _evenly(n_rows, len(rows.tokens)))

    def calibrate(self, calibrations: Mapping[str, Calibration]) -> None:
        """Take what was measured of the current LLM checkpoint, by hookpoint."""
        self.scales = {hookpoint: calibration.scale for hookpoint, calibration in calibrations.items()}
        self.norm_limits = {hookpoint: calibration.norm_limit for hookpoint, calibration in calibrations.items()}

    @property
    def _calibration_rows(self) -> NDArray[np.int64]:
        total = len(self.corpus_rows.train.tokens)
        return _evenly(min(-(-self.tokens.calibration_tokens // self.tokens.context_size), total), total)

    def left_out_shares(self) -> dict[str, float]:
        """Share of the calibration rows' positions that do not count whatever the LLM does there, by the reason."""
        return self.corpus_rows.train.select(self._calibration_rows).left_out_shares()

    def calibration_activations(self, checkpoint: LLMCheckpoint) -> dict[str, Tensor]:
        """Activations of an LLM checkpoint on the calibration rows, in its own units, ``[n, d_in]`` by hookpoint."""
        return self._harvested(checkpoint, self.corpus_rows.train, self._calibration_rows)

    def measuring_rows(self, split: str) -> TokenRows:
        """The rows of ``selection`` or ``evaluation`` that are kept in the track.

        They are spread evenly over the split: the first ones would be a handful of long documents.
        """
        rows: TokenRows = getattr(self.corpus_rows, split)
        wanted = getattr(self.tokens, f"{split}_tokens")
        n_rows = -(-wanted // self.tokens.context_size)
        if len(rows.tokens) < n_rows:
            raise ValueError(
                f"data.tokens.{split}_tokens asks for {wanted:,} tokens, but the {split} split of the corpus holds "
                f"{rows.tokens.size:,}. Lower it, raise `data.tokens.split_share`, or name a larger corpus."
            )
        chosen = _evenly(n_rows, len(rows.tokens))
        return rows.select(chosen)


def _evenly(n: int, total: int) -> NDArray[np.int64]:
    """``n`` of ``total`` indices, evenly spaced."""
    return np.linspace(0, total - 1, n).astype(np.int64)
