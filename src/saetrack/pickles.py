"""Reading a pickle with a list of what it may name; nothing else is imported, and nothing that it names is run."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Mapping
from typing import IO, Any

DAMAGED: tuple[type[Exception], ...] = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    zlib.error,
    AttributeError,
    TypeError,
    ValueError,
    LookupError,
)
"""What reading a pickle raises that is damaged, is none, or names what is not on the list."""


class _RestrictedUnpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], allowed: Mapping[str, Any]) -> None:
        super().__init__(stream)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in self._allowed:
            raise pickle.UnpicklingError(f"it names {full}")
        return self._allowed[full]


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


def reason(error: BaseException) -> str:
    """The first sentence of an error's message, on one line; its kind where it has none.

    Example:
        >>> reason(ValueError("Weights only load failed. Do set it to False."))
        'Weights only load failed'
    """
    return " ".join(str(error).split()).split(". ")[0][:200].rstrip(".") or type(error).__name__
