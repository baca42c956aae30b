"""What is downloaded while a series is trained: the next LLM checkpoint ahead of its stage, and no more than fits."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from lightning import Callback, LightningModule, Trainer

from saetrack.lm import files, hub_cache
from saetrack.lm.checkpoints import LLMCheckpoint
from saetrack.training.scheduler import CheckpointScheduler, scheduler_of

_FEWEST = 3


class HubDownloads(Callback):
    """Downloads the LLM checkpoint of the next stage while this one trains, and keeps the Hub's cache small.

    What was in the cache before the run, what another process of saetrack reads, and the revision of the tokenizer are
    never evicted. Series in folders, and checkpoints without a revision (a RepositoriesSource's), are left alone.

    Args:
        keep_checkpoints: LLM checkpoints that the run keeps in the Hub's cache, at least 3: the stage's own, the one
            that the stage began from, which a resumed stage reads, and the next; where a series turns, one or two
            more. Older ones that it downloaded are deleted, and an analysis that reads the LLM downloads them again.
            Null keeps all.
    """

    def __init__(self, keep_checkpoints: int | None = None) -> None:
        super().__init__()
        if keep_checkpoints is not None and keep_checkpoints < _FEWEST:
            raise ValueError(
                f"hub.keep_checkpoints is {keep_checkpoints}; it must be at least {_FEWEST} (this stage's LLM "
                "checkpoint, the one before and the next), or null to keep all."
            )
        if keep_checkpoints is not None and not hub_cache.CAN_LOCK:
            raise ValueError(f"hub.keep_checkpoints is {keep_checkpoints}, which needs file locks that Windows lacks.")
        self.keep_checkpoints = keep_checkpoints
        self._run = ""
        self._tokenizer: str | None = None
        self._position: int | None = None
        self._thread: threading.Thread | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note whose the downloads are from now on. It runs before the scheduler's, which loads the first LLM."""
        if self.keep_checkpoints is not None:
            self._run = str(scheduler_of(trainer).track_dir.resolve())
            files.downloads_for = self._run
            self._tokenizer = trainer.datamodule.source.tokenizer_name[1]  # type: ignore[attr-defined]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Make room and fetch what is next, once a stage; here, for a stage may begin in its middle."""
        scheduler = scheduler_of(trainer)
        if self._position == scheduler.position or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._position = scheduler.position
        if self.keep_checkpoints is not None:
            self._make_room(trainer, scheduler, self.keep_checkpoints)
        # with max_rise the next one is known only when the stage has ended
        ahead = [] if scheduler.max_rise is not None else scheduler.checkpoints[scheduler.position + 1 :]
        if ahead and ahead[0].revision is not None and trainer.local_rank == 0:
            self._fetch(ahead[0])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """What is downloaded later in this process is not the run's."""
        files.downloads_for = None

    def _fetch(self, checkpoint: LLMCheckpoint) -> None:
        """One download is under way at a time. What fails here the stage itself asks for again, and says so."""
        if self._thread is not None:
            self._thread.join()
        self._thread = threading.Thread(target=_fetch_quietly, args=(checkpoint,), name="next LLM", daemon=True)
        self._thread.start()

    def _make_room(self, trainer: Trainer, scheduler: CheckpointScheduler, keep: int) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        position = scheduler.position
        kept = {c.revision for c in scheduler.checkpoints[max(0, position - keep + 2) : position + 2]}
        for at in (position, position + 1):  # where a series turns or is filled in, a stage's source lies farther back
            if at < len(scheduler.checkpoints) and (source := scheduler.source_of(at)) is not None:
                kept.add(scheduler.checkpoints[source].revision)
        kept.add(self._tokenizer)
        cached: dict[hub_cache.CachedRevision, set[str]] = {}
        for c in {*data.checkpoints, *scheduler.checkpoints}:
            if c.revision is not None and (commit := files.cached_commit(c.model, c.revision, c.cache_dir)):
                cached.setdefault(hub_cache.CachedRevision(c.model, commit, c.cache_dir), set()).add(c.revision)
        old = {revision: names for revision, names in cached.items() if kept.isdisjoint(names)}
        for revision in old:
            revision.let_go()
        trainer.strategy.barrier()  # every rank holds what it has read
        if trainer.local_rank == 0:
            for revision, names in old.items():
                revision.evict(self._run, names)


def _fetch_quietly(checkpoint: LLMCheckpoint) -> None:
    """No bar of the download beside that of the training, and no error."""
    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        with contextlib.suppress(OSError, ValueError):
            files.fetch(checkpoint.model, checkpoint.revision, checkpoint.cache_dir)
    finally:
        if shown:  # where the user's environment has them off, asking for them is answered with a warning
            enable_progress_bars()
