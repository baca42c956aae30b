"""An SAE's class and arguments as plain facts, and an SAE from such facts."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from saetrack.sae.base import SAE


def sae_record(sae: SAE) -> dict[str, Any]:
    """Class and arguments of an SAE as ``metadata.json`` holds them; :func:`sae_from_record` is the inverse."""
    cls = type(sae)
    module = "saetrack.sae" if cls.__module__.startswith("saetrack.sae.") else cls.__module__
    return {"class": f"{module}.{cls.__qualname__}", "arguments": sae.arguments}


def sae_from_record(record: Mapping[str, Any]) -> SAE:
    """A fresh SAE of the class and arguments that a snapshot's ``metadata.json`` names.

    Args:
        record: ``{"class": dotted name, "arguments": {...}}``.

    Returns:
        The SAE, with its initial weights.

    Raises:
        ValueError: If the name does not lead to a subclass of :class:`saetrack.sae.SAE`.
    """
    module, _, name = str(record["class"]).rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"The SAE class {record['class']!r} cannot be imported ({error}); "
            "install the package that defines it, or put its folder on PYTHONPATH."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, SAE)):
        raise ValueError(f"{record['class']!r} is not a subclass of saetrack.sae.SAE.")
    return cls(**record["arguments"])
