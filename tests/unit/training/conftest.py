"""A whole fit in this process, in about a second: what a test of Lightning's part needs."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback, Trainer, seed_everything

from saetrack.lm import FolderSource, TextCorpus
from saetrack.sae import TopKSAE
from saetrack.track import Track
from saetrack.training import (
    ActivationDataModule,
    CheckpointScheduler,
    OptimizerSettings,
    ResumeFile,
    SAEModule,
    TokenSettings,
)

HOOKPOINT = "gpt_neox.layers.0"
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "home", "while", "birds", "sang", "def", "return"]
BATCH = 128


@dataclass
class Fitted:
    """What a tiny fit leaves."""

    run: Path
    trainer: Trainer
    module: SAEModule
    data: ActivationDataModule

    @property
    def track(self) -> Track:
        return Track.open(self.run / self.data.hookpoints[0])


def build_data(series: Path, folder: Path, hookpoints: list[str] | None = None) -> ActivationDataModule:
    """A DataModule over the tiny series and 100 documents of random words, which it writes into ``folder``."""
    (folder / "text").mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for i in range(100):
        (folder / "text" / f"{i:03d}.txt").write_text(" ".join(draw.choices(WORDS, k=120)))
    settings = TokenSettings(
        context_size=32,
        calibration_tokens=1000,
        selection_tokens=1000,
        evaluation_tokens=1000,
        ce_tokens=500,
        split_share=0.15,
        cache_dir=folder / "cache",
    )
    return ActivationDataModule(
        FolderSource(series),
        hookpoints or [HOOKPOINT],
        TextCorpus([str(folder / "text" / "*.txt")]),
        settings,
        batch_size=BATCH,
        chunk_tokens=1024,
    )


@pytest.fixture(scope="session")
def tiny_data(tiny_series: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ActivationDataModule]:
    """A fresh DataModule each time; the corpus is tokenised once: ``tiny_data(hookpoints=None)``."""
    folder = tmp_path_factory.mktemp("corpus")
    return lambda hookpoints=None: build_data(tiny_series, folder, hookpoints)


@pytest.fixture(scope="session")
def tiny_fit(tiny_data: Callable[..., ActivationDataModule]) -> Callable[..., Fitted]:
    """Fit SAEs to LLM steps 0, 2 and 10 of the tiny series.

    ``tiny_fit(run, callbacks=[], logger=False, hookpoints=None, ckpt_path=None, trainer={}, module={}, tokens={},
    source=None, **scheduler)``
    """

    def fit(
        run: Path,
        callbacks: list[Callback] | None = None,
        logger: Any = False,
        hookpoints: list[str] | None = None,
        ckpt_path: Path | None = None,
        trainer: dict[str, Any] | None = None,
        module: dict[str, Any] | None = None,
        tokens: dict[str, Any] | None = None,
        source: FolderSource | None = None,
        **scheduler: Any,
    ) -> Fitted:
        seed_everything(0, verbose=False)
        data = tiny_data(hookpoints)
        data.tokens = replace(data.tokens, **(tokens or {}))
        data.source = source or data.source
        settings = {"optimizer": OptimizerSettings(warmup_tokens=500), "dead_after_tokens": 1000, **(module or {})}
        trained = SAEModule(lambda d: TopKSAE(d, 4, k=4), log_every_tokens=256, **settings)
        options = {"steps": [0, 2, 10], "tokens_first": 2000, "tokens_next": 1000, **scheduler}
        made = Trainer(
            logger=logger,
            callbacks=[CheckpointScheduler(run, **options), ResumeFile(every_tokens=512), *(callbacks or [])],
            max_epochs=-1,
            reload_dataloaders_every_n_epochs=1,
            enable_model_summary=False,
            default_root_dir=run,
            **{"accelerator": "cpu", "enable_progress_bar": False, **(trainer or {})},
        )
        made.fit(trained, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return Fitted(run, made, trained, data)

    return fit
