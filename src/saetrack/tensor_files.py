"""Reading safetensors files in part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

RESTORE = "Restore it from a copy, or begin again in another `scheduler.track_dir`."
"""What to do about a damaged file of a track."""


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}). {RESTORE}") from error


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a file; only that one is read.

    Raises:
        ValueError: If there is no tensor of that name (the message lists the names), or the file is damaged.
    """
    with _opened(path) as file:
        names = sorted(file.keys())
        if name not in names:
            raise ValueError(f"{path} holds no tensor {name!r}; it holds {', '.join(names)}.")
        tensor: Tensor = file.get_tensor(name)
        return tensor


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, by name."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_rows(path: Path, name: str, rows: Sequence[int] | None) -> Tensor:
    """Rows of a matrix, all of them for None; no others are read."""
    with _opened(path) as file:
        matrix = file.get_slice(name)
        if rows is None:
            whole: Tensor = matrix[:]
            return whole
        return torch.cat([matrix[int(i) : int(i) + 1] for i in rows])


def damage(path: Path) -> str | None:
    """What is wrong with a file, as far as its header tells; None for nothing."""
    try:
        with safe_open(path, framework="pt"):
            return None
    except (SafetensorError, OSError) as error:
        return str(error)
