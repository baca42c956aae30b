"""One LLM checkpoint: what it is, a fingerprint of its weights, and loading it."""

import ctypes
import gc
import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from saetrack.lm import files
from saetrack.storage import whole_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LLMCheckpoint:
    """The LLM's weights at one training step.

    Args:
        model: A folder in Hugging Face's format, or a repository on the Hub.
        revision: Branch, tag or commit of the repository; None for a folder.
        step: Optimizer step of the LLM's training, which increases over a series: where a later stage counts from 0
            again, the stages before it are added, and the revision or folder still names the stage and its own step.
            For families that number their checkpoints (Amber's ``ckpt_042``) it is that number.
        tokens: Tokens that the LLM had seen by then, where it is known.
        cache_dir: The Hub's cache on this machine, where it is not the usual one; no part of what the checkpoint is.
    """

    model: str
    revision: str | None
    step: int
    tokens: int | None = None
    cache_dir: str | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"step {self.step} ({files.label(self.model, self.revision)})"


def commit_sha(checkpoint: LLMCheckpoint) -> str | None:
    """The commit that the checkpoint's revision points to; None for a folder or where it cannot be resolved.

    Raises:
        FileNotFoundError: If the Hub is reached and has no such revision.
    """
    return files.commit_of(checkpoint.model, checkpoint.revision, checkpoint.cache_dir)


def weight_hash(checkpoint: LLMCheckpoint) -> str | None:
    """Fingerprint of the weight files' content; equal strings are equal weights.

    One file: ``sha256:`` and its SHA-256, which is also what the Hub lists for it and names its cached copy by. Shards:
    ``sha256-of-N-shards:`` and the SHA-256 of their N digests in the order of their names. The same tensors saved in
    another format or sharded otherwise have another fingerprint.

    Returns:
        None when the weights are missing, incomplete or truncated; ``audit`` says which.
    """
    try:
        return fingerprint(checkpoint)
    except (FileNotFoundError, ValueError):
        return None


def fingerprint(checkpoint: LLMCheckpoint) -> str:
    """``weight_hash``, with the reason where there is none.

    Raises:
        FileNotFoundError: If weights are missing.
        ValueError: If they are truncated.
    """
    digests = files.weight_digests(checkpoint.model, checkpoint.revision, checkpoint.cache_dir)
    if len(digests) == 1:
        return f"sha256:{next(iter(digests.values()))}"
    joined = hashlib.sha256("".join(digests.values()).encode()).hexdigest()
    return f"sha256-of-{len(digests)}-shards:{joined}"


def load_llm(
    checkpoint: LLMCheckpoint, dtype: str = "float32", device: str | torch.device = "cpu"
) -> "PreTrainedModel":
    """The checkpoint's causal language model, in evaluation mode and frozen.

    What was freed before is given back to the machine first, so drop the previous LLM (``del llm``) before the call:
    two of them are then never held at once.

    Args:
        checkpoint: What to load; from the Hub only its weights and configuration are downloaded.
        dtype: ``float32``, ``bfloat16`` or ``float16``; apart from the SAE's.
        device: Where to put it.

    Raises:
        FileNotFoundError: If there are no weights, or not all shards.
        ValueError: If ``dtype`` is unknown, the file is damaged, or weights that the architecture needs are not in it.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype of the LLM is {dtype!r}; expected float32, bfloat16 or float16.")
    from transformers import AutoModelForCausalLM

    release_memory()
    folder = files.fetch(checkpoint.model, checkpoint.revision, checkpoint.cache_dir)
    safe = files.weight_names(folder)[0].endswith(".safetensors")
    try:
        with _silent_transformers():
            # use_safetensors=False where there are none: by default transformers would look for a converted copy of
            # the repository's main branch, which is another checkpoint.
            llm, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                use_safetensors=safe,
                weights_only=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except SafetensorError as error:
        raise ValueError(f"The weights of {checkpoint} are damaged ({error}). Write or fetch them again.") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{checkpoint} has no value for {len(missing)} of its LLM's weights, the first is {missing[0]}; they would "
            f"be random. Fetch it again, or check that config.json belongs to these weights."
        )
    return llm.to(device).eval().requires_grad_(False)


def save_random_llm(like: LLMCheckpoint, folder: Path, seed: int, dtype: str = "float32") -> LLMCheckpoint:
    """An LLM of the same architecture with fresh weights, in a folder; one that is there already is left as it is.

    The weights are those that transformers gives a new model of this configuration. Where a series was begun by another
    initialisation, as Pythia's was, they are not of the distribution of its step 0.

    Args:
        like: A checkpoint of the series; only its configuration is used.
        folder: Where it is written, all or nothing.
        seed: Of the weights.
        dtype: ``float32``, ``bfloat16`` or ``float16``.

    Returns:
        The LLM as a checkpoint of step 0.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = LLMCheckpoint(str(folder), None, 0, 0)
    if folder.is_dir():
        return checkpoint
    config = AutoConfig.from_pretrained(files.fetch(like.model, like.revision, like.cache_dir), local_files_only=True)
    with torch.random.fork_rng(devices=[]), whole_folder(folder) as unfinished:
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).save_pretrained(unfinished)
    return checkpoint


def release_memory() -> None:
    """Give freed memory back: Python's garbage, CUDA's cache, and what the C allocator holds on to.

    glibc keeps the pages of freed blocks of up to 32 MB, most of a small LLM, for itself: with one of 22 MB loaded
    again and again, 16 MB stayed behind without this.
    """
    gc.collect()
    torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """No progress bar and no report for every checkpoint; ``load_llm`` checks what matters of the report."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
