"""The one file of facts about published series: tokens per step where names do not say them, and chosen subsets."""

import json
from functools import lru_cache
from importlib.resources import files
from typing import Any


@lru_cache(maxsize=1)
def registry() -> dict[str, Any]:
    """The content of ``registry.json``: ``families`` (see ``lm.names.Family``) and ``subsets``, steps by name."""
    facts: dict[str, Any] = json.loads((files("saetrack.lm") / "registry.json").read_text(encoding="utf-8"))
    return facts
