"""Which local format lies in a folder, and which one a snapshot names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saetrack.lm.checkpoints import CheckpointSource
from saetrack.lm.local.dcp import METADATA
from saetrack.lm.local.formats import LocalFormat
from saetrack.lm.local.lightning import LightningFormat
from saetrack.lm.local.nanogpt import NanoGPTFormat, NanoGPTSource
from saetrack.lm.local.torchtitan import TorchtitanFormat

_FORMATS: dict[str, type[LocalFormat]] = {
    "nanogpt": NanoGPTFormat,
    "lightning": LightningFormat,
    "torchtitan": TorchtitanFormat,
}


def local_source(folder: Path) -> CheckpointSource | None:
    """The source of a folder of local checkpoints; None where it holds none of them.

    Raises:
        ValueError: If they need more than the folder; the message says what to write in a config.
    """
    if any(folder.glob("*.pt")):
        return NanoGPTSource(folder)
    needs = {"*.ckpt": ("Lightning", "factory"), f"*/{METADATA}": ("Torchtitan", "config")}
    for pattern, (name, argument) in needs.items():
        if any(folder.glob(pattern)):
            raise ValueError(
                f"{folder} holds {pattern}, checkpoints of {name.lower()}, which do not say what their LLM is. Follow "
                f"them in a config, as `class_path: {name}Source` with `{argument}`: see docs/local-series.md."
            )
    return None


def format_from_record(record: Mapping[str, Any] | None) -> LocalFormat | None:
    """The format that a snapshot records; None for Hugging Face's.

    Raises:
        ValueError: If it is none that is known here.
    """
    if record is None:
        return None
    arguments = dict(record)
    kind = arguments.pop("kind", None)
    if kind not in _FORMATS:
        raise ValueError(
            f"The LLM checkpoint is in the format {kind!r}; expected one of {', '.join(_FORMATS)}. A newer "
            f"saetrack may know it."
        )
    return _FORMATS[kind](**arguments)
