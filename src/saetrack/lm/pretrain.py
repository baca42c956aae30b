"""Pretraining of a small LLM with a checkpoint schedule, so that everything else runs with no network.

The LLM is a GPT-NeoX, the architecture of Pythia, and the series has Pythia's schedule: steps 0, 1, 2, 4, ... 512 and
then every N. Each checkpoint is a Hugging Face folder with the tokenizer in it.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import tokenizers
from transformers import PreTrainedTokenizerFast

from saetrack.lm.corpus import Corpus
from saetrack.lm.pretrain_config import END_OF_TEXT, PretrainConfig
from saetrack.lm.pretrain_module import LossBar, PretrainData, PretrainModule, SeriesWriter
from saetrack.lm.tokens import tokenize_corpus
from saetrack.lm.watching import DONE
from saetrack.storage import whole_folder, write_json, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PretrainConfig", "pretrain", "train_tokenizer"]

logger = logging.getLogger(__name__)

_BPE_CHARACTERS = 1 << 25


def pretrain(
    folder: Path,
    config: PretrainConfig | None = None,
    accelerator: str = "auto",
    cache_dir: Path | None = None,
) -> None:
    """Train a small LLM and save its checkpoints as Hugging Face folders `step0`, `step1`, ...

    Each folder also holds the tokenizer, and appears whole; a file `done` appears when the last one is there.

    A run that was stopped goes on from `folder/resume/last.ckpt` and ends with the weights that it would have had
    without the stop. A finished series is left alone.

    Args:
        folder: Where the checkpoints go.
        config: The LLM and its training.
        accelerator: Where to train: cpu, cuda, mps, or auto for the best that the machine has.
        cache_dir: Where the tokenised corpus is kept; by default `tokens` in the folder.

    Raises:
        FileExistsError: If the folder holds checkpoints that are not of a `pretrain` run.
        ValueError: If the folder holds a series with another configuration, or the corpus is too short.
        RuntimeError: If the loss becomes NaN or infinite.
    """
    config = config or PretrainConfig()
    if _claim(folder, config):
        logger.info("%s holds all its %d checkpoints; nothing to do.", folder, len(config.checkpoint_steps))
        with contextlib.suppress(OSError):  # a finished series may lie where nothing can be written
            _say_done(folder, config)
        return
    tokenizer = _series_tokenizer(folder, config)
    name = (str(folder / "tokenizer"), None)
    corpus = tokenize_corpus(config.corpus, tokenizer, name, config.context_size, cache_dir or folder / "tokens")
    resume_file = folder / "resume" / "last.ckpt"
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[LossBar(), SeriesWriter(folder, config, tokenizer)],
    )
    trainer.fit(
        PretrainModule(config),
        PretrainData(corpus.train, config),
        ckpt_path=resume_file if resume_file.is_file() else None,
        weights_only=True,
    )
    _say_done(folder, config)
    logger.info("Wrote the %d checkpoints of %s.", len(config.checkpoint_steps), folder)


def _say_done(folder: Path, config: PretrainConfig) -> None:
    """Tell whoever watches the series that there will be no more."""
    if not (folder / DONE).is_file():
        write_text(folder / DONE, f"The {len(config.checkpoint_steps)} LLM checkpoints of this series are complete.\n")


def _claim(folder: Path, config: PretrainConfig) -> bool:
    """Note the configuration in an empty folder, or compare it with the one noted there.

    Returns:
        Whether the series in the folder is finished.
    """
    note = folder / "pretrain.json"
    if not note.is_file():
        foreign = sorted(path.name for path in folder.glob("step*"))
        if foreign:
            raise FileExistsError(
                f"{folder} holds {', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}, but no pretrain.json, "
                f"so they are not from `saetrack pretrain`. Choose another folder; to read these, use `FolderSource`."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(note, config.facts)
        return False
    noted = json.loads(note.read_text(encoding="utf-8"))
    finished = all((folder / f"step{step}").is_dir() for step in config.checkpoint_steps)
    # Reading a finished series needs no text, so it may go to a machine with another Python.
    facts = {**config.plain_facts, "corpus": noted["corpus"]} if finished else config.facts
    changed = [name for name, value in facts.items() if noted.get(name) != value]
    if changed:
        differences = ", ".join(f"{name} is {facts[name]!r} but was {noted.get(name)!r}" for name in changed)
        raise ValueError(
            f"{folder} holds a series of another configuration: {differences}. Give the old values to go on with it, "
            f"or choose another folder."
        )
    return finished


def _series_tokenizer(folder: Path, config: PretrainConfig) -> "PreTrainedTokenizerBase":
    """Train the tokenizer of the series, or load the one that an interrupted run has trained."""
    if not (folder / "tokenizer").is_dir():
        logger.info("Training a byte-level BPE of %d tokens.", config.vocab_size)
        with whole_folder(folder / "tokenizer") as unfinished:
            train_tokenizer(config.corpus, config.vocab_size).save_pretrained(unfinished)
    return PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")


def train_tokenizer(corpus: Corpus, vocab_size: int) -> "PreTrainedTokenizerBase":
    """Train a byte-level BPE on the first documents of a corpus, 33 M characters of them at most.

    Token 0 is ``<|endoftext|>``: BOS, EOS and padding at once, as in Pythia.

    Args:
        corpus: The documents. The whole standard library is below the limit.
        vocab_size: At most this many tokens; a small corpus may give fewer.
    """
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_first_documents(corpus), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def _first_documents(corpus: Corpus) -> Iterator[str]:
    left = _BPE_CHARACTERS
    for text in corpus.documents():
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return
