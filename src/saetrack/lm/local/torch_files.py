"""A file that ``torch.save`` wrote: tensors and plain values, and nothing that would run."""

from pathlib import Path
from typing import Any

import torch

from saetrack.pickles import DAMAGED, reason

_ZIP = b"PK\x03\x04"


def read_torch_file(path: Path, what: str) -> dict[str, Any]:
    """The dictionary in a file; its tensors are mapped, and read from the disk when they are used.

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
    with path.open("rb") as file:
        archive = file.read(len(_ZIP)) == _ZIP
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except DAMAGED as error:
        raise ValueError(_why(path, what, error)) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected {what}.")
    return content


def tensors_in(path: Path, state: Any, prefix: str, what: str) -> dict[str, torch.Tensor]:
    """The tensors of a state dict whose names begin with a prefix, which is taken off as torch.compile's is.

    Raises:
        ValueError: If it is no state dict, or no name begins so.
    """
    if not isinstance(state, dict):
        raise ValueError(f"{path} has a {type(state).__name__} where the weights should be; expected {what}.")
    plain = {str(n).replace("_orig_mod.", ""): t for n, t in state.items() if isinstance(t, torch.Tensor)}
    chosen = {name.removeprefix(prefix): tensor for name, tensor in plain.items() if name.startswith(prefix)}
    if not chosen:
        begins = sorted({name.split(".")[0] + "." for name in plain})
        raise ValueError(
            f"{path} has no tensor whose name begins with {prefix!r}; they begin with "
            f"{', '.join(begins[:6]) or 'nothing, for there are none'}. Name the right one as `prefix`."
        )
    return chosen


def objects_in(path: Path) -> list[str]:
    """Names of the classes and functions in a file that torch's restricted reader does not know; nothing is run."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except DAMAGED:
        return []


def _why(path: Path, what: str, error: Exception) -> str:
    """One line instead of torch's page, which advises to load the file without any restriction."""
    names = objects_in(path)
    if names:
        return (
            f"{path} holds objects of {', '.join(names[:3])} beside its tensors, and no object is unpickled; nothing "
            f"in it was run. Where you trust it, load it with torch, and save its tensors and numbers alone."
        )
    return f"{path} is truncated, damaged or no file of torch.save ({reason(error)}); expected {what}. Write it again."
