"""Reading pickled SAEs of the reference implementation without running anything that they name.

Its files are whole pickled objects. The classes they name are replaced by stubs that only keep attributes; any other
name but those that rebuild tensors ends the reading before anything of it is called.
"""

from __future__ import annotations

import collections
import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from saetrack.pickles import DAMAGED, reason, unpickle

_ZIP = b"PK\x03\x04"


class Stub:
    """An object of a class that is not ours: what it was is left out, its attributes are kept."""


class _Group(Stub): ...


class _Autoencoder(Stub): ...


class _Config(Stub): ...


class _HookPoint(Stub): ...


STUBS: dict[str, type[Stub]] = {
    "sae_training.sae_group.SAEGroup": _Group,
    "sae_training.sparse_autoencoder.SparseAutoencoder": _Autoencoder,
    "sae_training.config.LanguageModelSAERunnerConfig": _Config,
    "transformer_lens.hook_points.HookPoint": _HookPoint,
}


def _load_storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


# What a tensor, a parameter and a module's empty bookkeeping are pickled as.
_PLAIN: dict[str, Any] = {
    "collections.OrderedDict": collections.OrderedDict,
    "builtins.set": set,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "torch.storage._load_from_bytes": _load_storage,  # torch's own would unpickle anything
    "torch.device": torch.device,
    **{str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)},
}


def read_pickled(path: Path) -> Any:
    """Read a ``.pt`` that ``torch.save`` wrote, or a ``.pkl`` or ``.pkl.gz``.

    Args:
        path: The file.

    Returns:
        What it holds, with :class:`Stub` for every object of the reference implementation.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it is damaged, or names anything that is not on the list; nothing was called then.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a pickled SAE of the reference implementation.")
    try:
        with path.open("rb") as file:
            archive = file.read(len(_ZIP)) == _ZIP
        if archive:
            # torch's own restricted reader; its tensors lie beside the pickle in the archive
            allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]]
            allowed = [(stub, name) for name, stub in STUBS.items()]
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location="cpu", weights_only=True)
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            return unpickle(stream, {**STUBS, **_PLAIN})  # type: ignore[arg-type]
    except DAMAGED as error:
        raise ValueError(
            f"{path} is no SAE of the reference implementation, or is damaged: {reason(error)}. Nothing in it was run; "
            f"expected a pickle of {', '.join(name.rpartition('.')[2] for name in STUBS)} and tensors."
        ) from error
