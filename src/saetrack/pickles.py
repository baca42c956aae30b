"""Reading pickles and files of ``torch.save``: nothing is imported or run that is not on a list.

Such a file can also be made to take all memory: an archive that is packed, a tensor whose elements all lie in one
place. Neither is written by torch.save, and both are refused before anything is made of them.
"""

from __future__ import annotations

import enum
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor

DAMAGED: tuple[type[Exception], ...] = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    RuntimeError,
    EOFError,
    OSError,
    MemoryError,
    zlib.error,
    AttributeError,
    TypeError,
    ValueError,
    LookupError,
)
"""What reading a pickle raises that is damaged, is none, or names what is not on the list."""

_ZIP = b"PK\x03\x04"


_Unpickler: Any = pickle._Unpickler  # typeshed shows that in C, which has neither its methods nor its stack


class _RestrictedUnpickler(_Unpickler):  # type: ignore[misc]
    """Python's own, not the one in C: its memory grows with the pickle and not with a number in it."""

    dispatch: ClassVar = dict(_Unpickler.dispatch)

    def __init__(self, stream: IO[bytes], allowed: Mapping[str, Any]) -> None:
        super().__init__(stream)
        self._allowed = allowed
        classes = {thing for thing in allowed.values() if isinstance(thing, type)}
        self._may_be_filled = {cls for cls in classes if not issubclass(cls, enum.Enum)}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in self._allowed:
            raise pickle.UnpicklingError(f"it names {full}")
        return self._allowed[full]

    def get_extension(self, code: int) -> None:
        """Refuse a name by its number in copyreg: what was read once by another is not looked up again."""
        raise pickle.UnpicklingError(f"it names the extension {code}")

    def load_build(self) -> None:
        """Set attributes, of new objects only: a class or a function would stay changed in this process."""
        if type(self.stack[-2]) not in self._may_be_filled:
            raise pickle.UnpicklingError(f"it changes a {type(self.stack[-2]).__name__}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def unpickle(stream: IO[bytes], allowed: Mapping[str, Any]) -> Any:
    """What a pickle holds, if it names only what is allowed.

    Args:
        stream: The pickle.
        allowed: Full name -> what stands in its place, which need not be what has that name.

    Raises:
        pickle.UnpicklingError: If it names anything else; nothing was called then. A damaged one raises one of
            ``DAMAGED``.
    """
    return _RestrictedUnpickler(stream, allowed).load()


def read_torch_file(path: Path, what: str) -> dict[str, Any]:
    """The dictionary in a file of ``torch.save``; its tensors are mapped, and read from the disk when they are used.

    Args:
        path: The file.
        what: What it should be, for messages.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it is damaged, is no dictionary, or names anything but tensors and plain values; nothing was
            run then.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist (from {Path.cwd()}); expected {what}.")
    try:
        content = load_weights_only(path, mmap=is_archive(path))
    except DAMAGED as error:
        raise ValueError(_why(path, what, error)) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected {what}.")
    return content


def load_weights_only(path: Path, mmap: bool = False) -> Any:
    """``torch.load`` for tensors and plain values, without a word about the pickle's protocol."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def is_archive(path: Path) -> bool:
    """Whether a file is a zip archive, as torch.save writes it since 1.6.

    Raises:
        ValueError: If it is one that torch.save does not write, for it is packed.
    """
    with path.open("rb") as file:
        archive = file.read(len(_ZIP)) == _ZIP
    if archive:
        with zipfile.ZipFile(path) as opened:
            inside = opened.infolist()
        if sum(entry.file_size for entry in inside) > path.stat().st_size:
            raise ValueError("it is packed, and would be larger than its file")
    return archive


def checked_tensor(path: Path, name: str, tensor: Tensor) -> Tensor:
    """A tensor of a file, once it is seen to be no larger than what is there.

    Raises:
        ValueError: If its elements lie on each other, so that a copy of it would be larger than the file.
    """
    size = tensor.numel() * tensor.element_size()
    if size > tensor.untyped_storage().nbytes() or size > path.stat().st_size:
        raise ValueError(
            f"{path}: tensor {name} of shape {tuple(tensor.shape)} is larger than its data; expected one that is "
            "written out. Do not trust this file."
        )
    return tensor


def objects_in(path: Path) -> list[str]:
    """Names of the classes and functions in a file that torch's restricted reader does not know; nothing is run."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except DAMAGED:
        return []


def reason(error: BaseException) -> str:
    """The first sentence of an error's message, on one line; its kind where it has none.

    Example:
        >>> reason(ValueError("Weights only load failed. Do set it to False."))
        'Weights only load failed'
    """
    return " ".join(str(error).split()).split(". ")[0][:200].rstrip(".") or type(error).__name__


def _why(path: Path, what: str, error: Exception) -> str:
    """One line instead of torch's page, which advises to load the file without any restriction."""
    if names := objects_in(path):
        return (
            f"{path} holds objects of {', '.join(names[:3])} beside its tensors, and no object is unpickled; nothing "
            f"in it was run. Where you trust it, load it with torch, and save its tensors and numbers alone."
        )
    return f"{path} is truncated, damaged or no file of torch.save ({reason(error)}); expected {what}. Write it again."
