"""What only TensorBoard shows: the order of its charts, captioned figures, top contexts, the projector."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.image import imread

from saetrack.analysis import AnalysisResult
from saetrack.analysis.figures import foot
from saetrack.track import Track

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

_CONTEXTS = 4
"""Contexts of a feature in a text panel."""

_QUALITY = {
    "FVU: SAE before as it was, after the warm start, after training": ["fvu_shift", "fvu_before", "fvu"],
    "Share of the LLM's CE loss recovered": ["ce_recovered_zero", "ce_recovered_mean"],
    "Dead and dense features (share)": ["dead_share", "dense_share"],
    "L0: active latents per token": ["l0"],
    "Identity: functional correlation with the snapshot before": ["functional_correlation_median"],
}
_FINDINGS = {
    "formation": {"Share of features formed by each LLM step": ["share_formed"]},
    "drift": {
        "Drift from snapshot to snapshot (1 - cosine)": ["drift", "drift_without_rotation", "drift_encoder"],
        "Cosine to the last snapshot": ["cosine_to_last"],
    },
    "semantics": {"Turnover of top contexts": ["turnover"], "Tokens a feature responds to (N_eff)": ["n_eff_median"]},
}
_ABOUT = """
**{model}**, hookpoints {hookpoints}, {checkpoints} LLM checkpoints from step {first} to {last}.

* Begin at **Custom Scalars**: the track's quality, what the analyses found, and the training of the SAEs at the end.
* x is the **LLM's** training step in everything that begins with `track`. Under `train` it is the SAE's optimizer
  step, all stages in a row.
* Set **Smoothing** to 0: each point is one snapshot, and a smoothed curve shows numbers that nobody measured.
* **Histograms**: distributions over the features. **Images**: the figures of the analyses, each with its caption.
  **Text**: the strongest contexts of features drawn at random, by LLM step; the token is between >>> and <<<.
  **Projector**: decoder rows of the last snapshot; colour by class or firing frequency. **HParams**: the recipe and the
  last snapshot's numbers, to compare runs.
* TensorBoard shows ten steps of a text or an image; `--samples_per_plugin text=1000,images=1000` shows all.
* `saetrack report` writes a page on which every feature can be looked at.
"""
_TRAINING = {
    "FVU on held-out activations": ["fvu_held_out"],
    "Loss": ["loss"],
    "Learning rate": ["lr"],
}


def add_layout(board: SummaryWriter, hookpoints: Sequence[str], analyses: Sequence[str] = ()) -> None:
    """The custom-scalars page: the track's quality first, then what the analyses found, then the training.

    Args:
        board: Where to write. A later layout replaces an earlier one.
        hookpoints: As they stand in the tags; one empty name when the run has one.
        analyses: Those that have logged their scalars.
    """
    pages: dict[str, dict[str, list[str | list[str]]]] = {}
    for hookpoint in hookpoints:
        place = f"{hookpoint}: " if hookpoint else ""
        groups = [("quality by LLM step", "track", _QUALITY)]
        groups += [(f"{name} by LLM step", f"track_{name}", _FINDINGS[name]) for name in _FINDINGS if name in analyses]
        groups += [("training by optimizer step", "train", _TRAINING)]
        for title, group, charts in groups:
            pages[place + title] = {
                chart: ["Multiline", [_exactly(tag(group, hookpoint, name)) for name in names]]
                for chart, names in charts.items()
            }
    board.add_custom_scalars(pages)


def _exactly(name: str) -> str:
    """The pattern of one tag: a chart takes all tags that begin with what a pattern matches."""
    return f"^{re.escape(name)}$"


def add_about(board: SummaryWriter, tracks: Sequence[Track], checkpoints: Sequence[int]) -> None:
    """What was tracked and how to read the rest, first among the texts.

    Args:
        board: Where to write.
        tracks: Of the run.
        checkpoints: LLM steps of the series.
    """
    text = _ABOUT.format(
        model=tracks[0].facts["model"],
        hookpoints=", ".join(f"`{track.facts['hookpoint']}`" for track in tracks),
        checkpoints=len(checkpoints),
        first=min(checkpoints),
        last=max(checkpoints),
    )
    board.add_text("about/how_to_read", text, 0)


def tag(group: str, hookpoint: str, name: str) -> str:
    """``GROUP/NAME``, or ``GROUP/HOOKPOINT/NAME`` when ``hookpoint`` is not empty."""
    return "/".join(part for part in (group, hookpoint, name) if part)


def add_figure(board: SummaryWriter, name: str, figure: Figure, caption: str, step: int) -> None:
    """A figure with its caption below it, as an image: TensorBoard has no place for one."""
    width = max(40, int(figure.get_figwidth() * 14))  # letters
    foot(figure, textwrap.fill(caption, width), size=9)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", bbox_inches="tight", dpi=120)
    picture.seek(0)
    board.add_image(name, imread(picture)[:, :, :3], step, dataformats="HWC")


def add_contexts(board: SummaryWriter, hookpoint: str, semantics: AnalysisResult) -> None:
    """The strongest contexts of the analysis' seeded sample of features, a panel for each, by LLM step."""
    table = semantics.tables["contexts"]
    shown = table[table["feature"].isin(semantics.settings["example_features"]) & (table["rank"] < _CONTEXTS)]
    for step in sorted({int(step) for step in shown["step"]}):
        for feature, contexts in shown[shown["step"] == step].groupby("feature"):
            text = "\n".join(_context_line(row) for _, row in contexts.sort_values("rank").iterrows())
            board.add_text(tag("track_contexts", hookpoint, f"feature_{feature}"), text, step)


def _context_line(row: pd.Series) -> str:
    """Activation and context as a line of a Markdown code block, where nothing of the text is markup."""
    tokens = [repr(token)[1:-1] for token in row["tokens"]]  # line ends and what cannot be seen, spelt out
    before, here, after = tokens[: row["center"]], tokens[row["center"]], tokens[row["center"] + 1 :]
    return f"    {row['activation']:8.3f}  {''.join(before)} >>>{here}<<< {''.join(after)}"


def add_projector(board: SummaryWriter, hookpoint: str, track: Track, semantics: AnalysisResult | None) -> None:
    """The decoder of the last snapshot in the projector, each alive feature labelled by its top token."""
    last = track[-1]
    features = last.features
    alive = features.index[~features["dead"]].to_numpy()
    if not len(alive):
        return
    directions = torch.nn.functional.normalize(last.tensor("W_dec")[torch.tensor(alive)], dim=1)
    columns = {"feature": [str(feature) for feature in alive]}
    if semantics is not None:
        table = semantics.tables["features"]
        here = table[table["step"] == last.step].set_index("feature").reindex(alive)
        known = here["top_token"].notna()
        columns["feature"] = [
            f"{f} {token!r}" if k else str(f) for f, token, k in zip(alive, here["top_token"], known, strict=True)
        ]
        columns["class"] = here["class"].fillna("silent").tolist()
    frequency = np.log10(features["firing_frequency"].to_numpy()[alive].clip(min=1e-9))
    columns["firing_frequency_log10"] = [f"{value:.2f}" for value in frequency]
    name = tag("track", hookpoint, "decoder").replace("/", "_")
    board.add_embedding(
        directions,
        metadata=list(zip(*columns.values(), strict=True)),
        metadata_header=list(columns),
        global_step=last.step,
        tag=name,
    )
