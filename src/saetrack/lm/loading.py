"""One LLM checkpoint: what it is, a fingerprint of its weights, and loading it."""

import ctypes
import gc
import json
import sys
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from saetrack.lm import files
from saetrack.lm.hub_listing import label
from saetrack.lm.local.formats import LocalFormat
from saetrack.lm.trust import VARIABLE, is_trusted_folder
from saetrack.lm.weight_files import stored_dtypes, weight_names
from saetrack.pickles import DAMAGED, is_archive, objects_in, reason
from saetrack.storage import whole_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LLMCheckpoint:
    """The LLM's weights at one training step.

    Args:
        model: A folder in Hugging Face's format, a repository on the Hub, or a file or folder in another ``format``.
        revision: Branch, tag or commit of the repository; None for a folder.
        step: Optimizer step of the LLM's training, which increases over a series: where a later stage counts from 0
            again, the stages before it are added, and the revision or folder still names the stage and its own step.
            For families that number their checkpoints (Amber's ``ckpt_042``) it is that number.
        tokens: Tokens that the LLM had seen by then, where it is known.
        cache_dir: The Hub's cache on this machine, where it is not the usual one; no part of what the checkpoint is.
        format: How it is read where it is neither a folder in Hugging Face's format nor a repository.
    """

    model: str
    revision: str | None
    step: int
    tokens: int | None = None
    cache_dir: str | None = field(default=None, compare=False, repr=False)
    format: LocalFormat | None = None

    def __str__(self) -> str:
        return f"step {self.step} ({label(self.model, self.revision)})"


def commit_sha(checkpoint: LLMCheckpoint) -> str | None:
    """The commit that the checkpoint's revision points to; None for a folder or where it cannot be resolved.

    Raises:
        FileNotFoundError: If the Hub is reached and has no such revision.
    """
    if checkpoint.format is not None:
        return None
    return files.commit_of(checkpoint.model, checkpoint.revision, checkpoint.cache_dir)


def weight_hash(checkpoint: LLMCheckpoint) -> str | None:
    """Fingerprint of the weight files' content; equal strings are equal weights.

    One file: ``sha256:`` and its SHA-256, which is also what the Hub lists for it and names its cached copy by. Shards:
    ``sha256-of-N-shards:`` and the SHA-256 of their N digests in the order of their names. The same tensors saved in
    another format or sharded otherwise have another fingerprint. Other formats are hashed by tensor.

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
    return fingerprints(checkpoint)[0]


def fingerprints(checkpoint: LLMCheckpoint) -> list[str]:
    """``fingerprint``, and behind it those of the same weights in other formats, as far as the Hub says them.

    Raises:
        FileNotFoundError: If weights are missing.
        ValueError: If they are truncated.
    """
    if checkpoint.format is not None:
        return [checkpoint.format.fingerprint(Path(checkpoint.model))]
    return files.fingerprints(checkpoint.model, checkpoint.revision, checkpoint.cache_dir)


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
    release_memory()
    if checkpoint.format is not None:
        llm = checkpoint.format.build(Path(checkpoint.model), getattr(torch, dtype))
    else:
        llm = _load_hugging_face(checkpoint, getattr(torch, dtype))
    return llm.to(device).eval().requires_grad_(False)


def _load_hugging_face(checkpoint: LLMCheckpoint, dtype: torch.dtype) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    folder = files.fetch(checkpoint.model, checkpoint.revision, checkpoint.cache_dir)
    names = weight_names(folder)
    config = read_config(checkpoint, folder)
    try:
        for name in names:
            is_archive(folder / name)  # refuses one that is packed before it fills the memory
        with silent_transformers():
            # use_safetensors=False where there are none: by default transformers would look for a converted copy of
            # the repository's main branch, which is another checkpoint.
            llm, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=names[0].endswith(".safetensors"),
                weights_only=True,
                trust_remote_code=_may_run_code(checkpoint),
                ignore_mismatched_sizes=True,  # reported below, in one line
                local_files_only=True,
                output_loading_info=True,
            )
    except (SafetensorError, *DAMAGED) as error:  # type: ignore[misc]
        unsafe = [] if names[0].endswith(".safetensors") else [n for name in names for n in objects_in(folder / name)]
        found = f"they hold objects of {', '.join(unsafe[:3])}; nothing was run" if unsafe else reason(error)
        raise ValueError(f"The weights of {checkpoint} are damaged ({found}). Write or fetch them again.") from error
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise ValueError(
            f"{checkpoint} has a tensor {name} of shape {tuple(found)}, but by config.json it is {tuple(expected)}. "
            f"Fetch it again, or check that config.json belongs to these weights."
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{checkpoint} has no value for {len(missing)} of its LLM's weights, the first is {missing[0]}; they would "
            f"be random. Fetch it again, or check that config.json belongs to these weights."
        )
    _refuse_whole_numbers(checkpoint, [folder / name for name in names], {n for n, _ in llm.named_parameters()})
    return llm


def _refuse_whole_numbers(checkpoint: LLMCheckpoint, paths: Sequence[Path], parameters: Set[str]) -> None:
    """Parameters are real numbers; transformers would cast whole ones without a word. Masks and counts may be whole."""
    for path in paths:
        for name in parameters & (dtypes := stored_dtypes(path)).keys():
            if not dtypes[name].startswith(("F", "BF", "torch.float", "torch.bfloat")):
                raise ValueError(
                    f"{checkpoint}: {path.name} has a tensor {name} of {dtypes[name]}; expected floating-point "
                    f"numbers, for it is a weight of the LLM. Fetch it again, or save it unquantised."
                )


def read_config(checkpoint: LLMCheckpoint, folder: Path) -> Any:
    """The configuration that lies in the folder with a checkpoint's files; its code runs only by the user's word.

    Raises:
        ValueError: If it is damaged, or of an architecture that transformers does not know.
    """
    import transformers

    path = folder / "config.json"
    try:
        json.loads(path.read_text(encoding="utf-8") if path.is_file() else "{}")
        return transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=_may_run_code(checkpoint), local_files_only=True
        )
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}). Put that of another checkpoint in its place.") from error
    except Exception as error:  # each configuration class has errors of its own
        raise ValueError(
            f"{checkpoint} has a config.json that transformers {transformers.__version__} does not know "
            f"({reason(error)}). If it needs code that lies in its folder, and you trust that, set `trust_remote_code` "
            f"of the FolderSource or ListSource, or {VARIABLE} to the folder; a repository's: download it first."
        ) from error


def _may_run_code(checkpoint: LLMCheckpoint) -> bool:
    return files.is_folder(checkpoint.model) and is_trusted_folder(checkpoint.model)


def vocabulary_size(checkpoint: LLMCheckpoint) -> int | None:
    """How many token ids the LLM knows, from its configuration alone; None where that does not say."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            checkpoint.model,
            revision=checkpoint.revision or "main",
            cache_dir=checkpoint.cache_dir,
            trust_remote_code=False,
        )
    except (OSError, ValueError):  # no such file, or an architecture that transformers does not know
        return None
    return getattr(config.get_text_config(), "vocab_size", None)


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

    Raises:
        ValueError: If the series is not of Hugging Face checkpoints.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = LLMCheckpoint(str(folder), None, 0, 0)
    if folder.is_dir():
        return checkpoint
    if like.format is not None:
        raise ValueError(
            f"{like} is no Hugging Face checkpoint, so there is no configuration to make a random LLM of. Save one "
            "with save_pretrained, and track that series."
        )
    source = files.fetch(like.model, like.revision, like.cache_dir)
    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    with torch.random.fork_rng(devices=[]), whole_folder(folder) as unfinished:
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config, trust_remote_code=False).to(getattr(torch, dtype)).save_pretrained(
            unfinished
        )
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
def silent_transformers() -> Iterator[None]:
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
