"""Whose code may run: what the user named, in a config or in an environment variable, and nothing that a file names.

A track records how its LLM is built, but a track may come from elsewhere; so reading it takes the user's word again.
"""

import os
from pathlib import Path

VARIABLE = "SAETRACK_TRUST"

_given: set[str] = set()


def trust(name: str) -> None:
    """Let a factory, or the code in a folder of LLMs, run in this process; for names that the user gave."""
    _given.add(name)


def is_trusted(name: str) -> bool:
    """Whether the user gave the name: in this process, or in the variable, where commas part them."""
    return name in _names()


def is_trusted_folder(folder: str) -> bool:
    """Whether the user gave the folder, or one that it lies in."""
    place = Path(folder).resolve()
    return not {Path(name).resolve() for name in _names()}.isdisjoint({place, *place.parents})


def _names() -> set[str]:
    return _given | {name for name in os.environ.get(VARIABLE, "").split(",") if name}
