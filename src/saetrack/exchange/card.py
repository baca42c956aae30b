"""The model card of a track: what was tracked, how good it is at each step, and how each library opens it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from saetrack.hub import REPOSITORY
from saetrack.track import Snapshot, Track

_COLUMNS = {
    "step": "LLM step",
    "tokens": "LLM tokens",
    "fvu": "FVU",
    "l0": "L0",
    "dead_share": "dead",
    "ce_recovered_zero": "CE recovered (zero)",
    "ce_recovered_mean": "CE recovered (mean)",
}


def model_card(track: Track, snapshots: Sequence[Snapshot], repo: str | None) -> str:
    """The README of a repository with these snapshots, markdown.

    Args:
        track: The track.
        snapshots: Those that are in the repository, at least one.
        repo: The repository, where it is known.
    """
    facts, last = track.facts, snapshots[-1]
    name = repo or "OWNER/NAME"
    sae_class = last.metadata["sae"]["class"].rpartition(".")[2]
    plural = "s" if len(snapshots) > 1 else ""
    return f"""---
library_name: saetrack
tags: [sparse-autoencoder, saelens, training-dynamics]{_base_model(facts["model"])}
---

# Sparse autoencoders through the training of {facts["model"]}

A {sae_class} with {facts["d_sae"]} latents on the output of `{facts["hookpoint"]}` (width {facts["d_in"]}), at
{len(snapshots)} LLM checkpoint{plural}, steps {snapshots[0].step} to {last.step}.
{_origin(snapshots)}
They read the LLM's activations as they are: nothing needs to be normalised.

## Quality by step

{_quality(track, snapshots)}

FVU is the fraction of variance unexplained, L0 the mean number of active latents, CE recovered the share of the
cross-entropy that returns against ablation by zero or by the mean; all on held-out text.

## Loading

With saetrack, the whole track; a snapshot is downloaded when it is asked for:

```python
from saetrack import Track

track = Track.open("hf://{name}")
sae = track.at(step={last.step}).sae()
```

With SAELens, each snapshot is a folder of its own format:

```python
from huggingface_hub import snapshot_download
from sae_lens import SAE

folder = snapshot_download("{name}", allow_patterns="snapshots/{last.path.name}/*")
sae = SAE.load_from_disk(f"{{folder}}/snapshots/{last.path.name}")
```

For sparsify, dictionary_learning and llamascopium, write their files first; what one of them cannot hold is refused:

```bash
saetrack export hf://{name} --format sparsify --step {last.step} --to exported
```
{_loaders(f"exported/step{last.step}/{facts['hookpoint']}")}"""


def _origin(snapshots: Sequence[Snapshot]) -> str:
    """How the snapshots came to be, in a sentence."""
    if all(snapshot.metadata.get("imported") for snapshot in snapshots):
        formats = sorted({snapshot.metadata["imported"]["format"] for snapshot in snapshots})
        return f"They were trained elsewhere, and imported from files of {' and '.join(formats)}."
    if snapshots[0].metadata["warm_start"] == "scratch":
        return "Each was trained from a fresh beginning, so feature *i* of one is not feature *i* of the next."
    return "Each was trained from a neighbour in the series, so feature *i* can be followed by its index."


def _base_model(model: str) -> str:
    return f"\nbase_model: {model}" if REPOSITORY.fullmatch(model) and not Path(model).exists() else ""


def _quality(track: Track, snapshots: Sequence[Snapshot]) -> str:
    rows = track.metrics().set_index("position", drop=False).loc[[s.position for s in snapshots]]
    present = {column: title for column, title in _COLUMNS.items() if column in rows}
    lines = ["| " + " | ".join(present.values()) + " |", "|" + " --- |" * len(present)]
    lines += ["| " + " | ".join(_cell(row[c]) for c in present) + " |" for _, row in rows.iterrows()]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if pd.isna(value):  # type: ignore[call-overload]
        return "-"
    number = float(value)  # type: ignore[arg-type]
    return f"{number:,.0f}" if number == int(number) else f"{number:.4g}"


def _loaders(folder: str) -> str:
    return f"""
```python
from sparsify import SparseCoder

sae = SparseCoder.load_from_disk("{folder}")  # --format sparsify

from dictionary_learning.utils import load_dictionary

sae, config = load_dictionary("{folder}", "cpu")  # --format dictionary_learning

from llamascopium.models.sae import SparseAutoEncoder

sae = SparseAutoEncoder.from_pretrained("{folder}")  # --format llamascopium
```
"""
