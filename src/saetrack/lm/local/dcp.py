"""Tensors of a folder that ``torch.distributed.checkpoint`` wrote, without its unpickling.

``.metadata`` is a pickle of torch's own data classes: it is read with a list of these and nothing else. The tensors lie
in ``.distcp`` files, each as torch.save writes it, and are read with ``weights_only``; whatever is no tensor (the
optimizer's settings, the data loader's state) is a pickle, and is left alone.
"""

import io
import pathlib
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saetrack.pickles import DAMAGED, reason, unpickle

METADATA = ".metadata"


def tensor_shapes(folder: Path) -> dict[str, torch.Size]:
    """Names and shapes of the tensors in a checkpoint.

    Raises:
        FileNotFoundError: If there is no ``.metadata``.
        ValueError: As for ``read_tensors``.
    """
    return {name: entry.size for name, entry in _tensors(_read_metadata(folder)).items()}


def read_tensors(folder: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Some of the tensors of a checkpoint, put together from their shards, in the data type that they have there.

    Raises:
        FileNotFoundError: If ``.metadata`` or a file with a shard is missing.
        ValueError: If a file is damaged, names anything but torch's own data classes, or leads out of the folder.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    metadata = _read_metadata(folder)
    entries = _tensors(metadata)
    for index, info in metadata.storage_data.items():
        if index.fqn in names:
            _refuse_leaving(folder, info.relative_path)
    state = {name: torch.empty(entries[name].size, dtype=entries[name].properties.dtype) for name in names}

    class Reader(FileSystemReader):
        def read_metadata(self, *_args: Any, **_options: Any) -> Any:
            return metadata

    class Planner(DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
            raise RuntimeError(f"{read_item.dest_index.fqn} is no tensor")  # torch would unpickle it

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process
            load(state, storage_reader=Reader(folder), planner=Planner(), no_dist=True)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise ValueError(f"{folder} is damaged ({reason(cause)}). Write or fetch it again.") from error
    return state


def _read_metadata(folder: Path) -> Any:
    path = folder / METADATA
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {METADATA}, which torch.distributed.checkpoint writes last; it is not complete."
        )
    try:
        with path.open("rb") as stream:
            metadata = unpickle(stream, _allowed())
        whole = {name: sum(chunk.sizes.numel() for chunk in t.chunks) for name, t in _tensors(metadata).items()}
        lacking = [name for name, t in _tensors(metadata).items() if whole[name] != t.size.numel()]
        stored = {index.fqn: info.relative_path for index, info in metadata.storage_data.items()}
        lacking += [name for name in whole if name not in stored]
    except DAMAGED as error:
        raise ValueError(
            f"{path} is damaged, or no metadata of torch.distributed.checkpoint ({reason(error)}); nothing in it was "
            f"run. Where you trust it, convert the checkpoint with torch.distributed.checkpoint.format_utils."
        ) from error
    if lacking:
        raise ValueError(f"{path}: the shards of {lacking[0]} are not the whole tensor. Write or fetch it again.")
    return metadata


def _tensors(metadata: Any) -> dict[str, Any]:
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    if not isinstance(metadata, Metadata):
        raise TypeError(f"it holds a {type(metadata).__name__}")
    return {n: entry for n, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)}


def _refuse_leaving(folder: Path, name: str) -> None:
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder / METADATA} names the file {name}, which is outside of its folder; it is not read.")
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} lacks {name}, which its {METADATA} names. Write or fetch it again.")


def _allowed() -> dict[str, Any]:
    """What ``.metadata`` may name: data classes that hold what they are given, and torch's words for data types."""
    from torch.distributed.checkpoint import filesystem, metadata

    classes = (
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.TensorProperties,
        metadata.TensorStorageMetadata,
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
    )
    return {
        **{f"{cls.__module__}.{cls.__name__}": cls for cls in classes},
        **{str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
        "torch.Size": torch.Size,
        "torch.serialization._get_layout": torch.serialization._get_layout,
        # where it was written, on whatever system
        **{f"pathlib{m}.{cls}Path": pathlib.PurePosixPath for m in ("", "._local") for cls in ("Posix", "Windows")},
    }
