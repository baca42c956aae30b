"""Whether an LLM checkpoint's weights are numbers: a diverged run saves NaN as readily as anything else."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from saetrack.lm import files
from saetrack.lm.loading import LLMCheckpoint
from saetrack.lm.weight_files import weight_names
from saetrack.pickles import read_torch_file


def not_finite(checkpoint: LLMCheckpoint) -> str | None:
    """Name of the first tensor of the weights with a NaN or an infinity; None where all are finite, or none is here.

    One tensor at a time is in memory. Nothing is downloaded.

    Raises:
        FileNotFoundError: If there is a folder, and no weights in it.
        ValueError: If they are damaged.
    """
    return next((name for name, tensor in _tensors(checkpoint) if not torch.isfinite(tensor).all()), None)


def _tensors(checkpoint: LLMCheckpoint) -> Iterator[tuple[str, Tensor]]:
    if checkpoint.format is not None:
        yield from sorted(checkpoint.format.weights(Path(checkpoint.model)).items())
        return
    folder = files.local_folder(checkpoint.model, checkpoint.revision, checkpoint.cache_dir)
    names = [] if folder is None else [name for name in weight_names(folder) if (folder / name).is_file()]
    for name in names:
        assert folder is not None
        if name.endswith(".safetensors"):
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    yield key, file.get_tensor(key)
        else:
            content = read_torch_file(folder / name, "the weights of an LLM")
            yield from ((key, tensor) for key, tensor in content.items() if isinstance(tensor, Tensor))
