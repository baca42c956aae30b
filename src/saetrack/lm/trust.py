"""Whose code may run: what the user named, in a config or in an environment variable, and nothing that a file names.

A track records how its LLM is built, but a track may come from elsewhere; so reading it takes the user's word again.
"""

import os

VARIABLE = "SAETRACK_TRUST"

_given: set[str] = set()


def trust(name: str) -> None:
    """Let a factory, or the code in an LLM's folder, run in this process; for names that the user gave."""
    _given.add(name)


def is_trusted(name: str) -> bool:
    """Whether the user gave the name: in this process, or in the variable, where commas part them."""
    return name in _given or name in os.environ.get(VARIABLE, "").split(",")
