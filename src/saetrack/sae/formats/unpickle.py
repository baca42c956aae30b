"""Reading pickled SAEs of the reference implementation without running anything that they name.

Its files are whole pickled objects. The classes they name are replaced by stubs that only keep attributes; any other
name but those that rebuild tensors ends the reading before anything of it is called.
"""

from __future__ import annotations

import collections
import gzip
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from saetrack.pickles import DAMAGED, is_archive, load_weights_only, reason, unpickle


class Stub:
    """An object of a class that is not ours: what it was is left out, its attributes are kept."""


_STUBBED = (
    "sae_training.sae_group.SAEGroup",
    "sae_training.sparse_autoencoder.SparseAutoencoder",
    "sae_training.config.LanguageModelSAERunnerConfig",
    "transformer_lens.hook_points.HookPoint",
)


def _load_storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _rebuild_tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *more: Any) -> Any:
    """As torch's, but for a storage that is too small, which torch would enlarge without a word."""
    held = storage._untyped_storage.nbytes() // storage.dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if math.prod(size) else -1
    if min((offset, *size, *stride)) < 0 or max(last + 1, math.prod(size)) > held:
        raise pickle.UnpicklingError(f"a tensor of shape {size} does not fit into {held} numbers")
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, *more)  # type: ignore[no-untyped-call]


# What a tensor, a parameter and a module's empty bookkeeping are pickled as.
_PLAIN: dict[str, Any] = {
    "collections.OrderedDict": collections.OrderedDict,
    "builtins.set": set,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "torch.storage._load_from_bytes": _load_storage,  # torch's own would unpickle anything
    "torch.device": torch.device,
    **{str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)},
}


class _Bounded(io.RawIOBase):
    """What a gzip file holds, up to a size: weights hardly shrink, and what shrinks a hundredfold is none."""

    def __init__(self, path: Path) -> None:
        self._file = gzip.open(path)  # noqa: SIM115 (closed with this)
        self._left = max(100 * path.stat().st_size, 1 << 20)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._file.read(len(buffer))
        self._left -= len(content)
        if self._left < 0:
            raise pickle.UnpicklingError("it is a hundred times as large as its file")
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


def read_pickled(path: Path) -> Any:
    """Read a ``.pt`` that ``torch.save`` wrote, or a ``.pkl`` or ``.pkl.gz``.

    Args:
        path: The file.

    Returns:
        What it holds, with a class of its own below :class:`Stub` for every class of the reference implementation.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it is damaged, or names anything that is not on the list; nothing was called then.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a pickled SAE of the reference implementation.")
    # new ones each time: what a file does to them ends with its reading
    stubs = {name: type(name.rpartition(".")[2], (Stub,), {}) for name in _STUBBED}
    try:
        if is_archive(path):
            # torch's own restricted reader; its tensors lie beside the pickle in the archive
            allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]]
            allowed = [(stub, name) for name, stub in stubs.items()]
            with torch.serialization.safe_globals(allowed):
                return load_weights_only(path)
        with io.BufferedReader(_Bounded(path)) if path.suffix == ".gz" else path.open("rb") as stream:
            return unpickle(stream, {**stubs, **_PLAIN})
    except DAMAGED as error:
        raise ValueError(
            f"{path} is no SAE of the reference implementation, or is damaged: {reason(error)}. Nothing in it was run; "
            f"expected a pickle of {', '.join(name.rpartition('.')[2] for name in _STUBBED)} and tensors."
        ) from error
