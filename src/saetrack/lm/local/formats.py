"""What every format of a local LLM checkpoint can do: give its weights, say what they are, and build the LLM."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class LocalFormat(ABC):
    """How the LLM of a checkpoint is read that is no Hugging Face folder.

    The formats are frozen dataclasses of plain values: a snapshot records them, and an analysis reads its LLM by that.
    """

    @abstractmethod
    def weights(self, path: Path) -> dict[str, Tensor]:
        """The LLM's weights by their names in the checkpoint; they may be mapped from the file.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If it is damaged or something else, or a tensor is missing, too many or of a wrong shape.
        """

    @abstractmethod
    def build(self, path: Path, dtype: torch.dtype) -> nn.Module:
        """The LLM with these weights in a dtype, on the CPU.

        Raises:
            FileNotFoundError: As for ``weights``.
            ValueError: As for ``weights``, and if the LLM cannot be made.
        """

    def fingerprint(self, path: Path) -> str:
        """``sha256-of-tensors:`` and a SHA-256 of the weights alone; what else lies in the file has no part in it."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.weights(path).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return f"sha256-of-tensors:{digest.hexdigest()}"


def check_tensors(where: Path, found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size], what: str) -> None:
    """Refuse weights that are not those of the LLM.

    Args:
        where: The file.
        found: The shapes of its weights by name.
        expected: Those that the LLM has.
        what: Where these come from, such as ``its model_args``.

    Raises:
        ValueError: If a tensor is missing, is none of the LLM's, or has another shape; the message names the first.
    """
    missing = sorted(expected.keys() - found.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ValueError(f"{where} has no tensor {missing[0]}{more}, which {what} asks for. Do both belong together?")
    extra = sorted(found.keys() - expected.keys())
    if extra:
        more = f" and {len(extra) - 1} more" if extra[1:] else ""
        raise ValueError(
            f"{where} has a tensor {extra[0]}{more} that the LLM of {what} does not have, so it is another LLM. Check "
            f"that both belong together."
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(
                f"{where}: {name} has shape {tuple(found[name])}, but by {what} it is {tuple(shape)}. Check that both "
                f"belong together."
            )


def assemble(cls: Any, config: Any, weights: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """An LLM of transformers with weights that were checked against it; no random number is drawn."""
    from saetrack.lm.loading import silent_transformers

    with silent_transformers():
        llm: nn.Module = cls.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    return llm


def shapes_of(cls: Any, config: Any) -> dict[str, torch.Size]:
    """Names and shapes of the weights of a class of transformers, without making any."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in cls(config).state_dict().items()}
