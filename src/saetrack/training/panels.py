"""What only TensorBoard shows: the order of its charts, captioned figures, top contexts, the projector."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

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
    "FVU before and after training on each LLM checkpoint": ["fvu_before", "fvu"],
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
        groups += [(f"{name} by LLM step", f"track_{name}", _FINDINGS[name]) for name in analyses if name in _FINDINGS]
        groups += [("training by optimizer step", "train", _TRAINING)]
        for title, group, charts in groups:
            tags = {chart: [tag(group, hookpoint, name) for name in names] for chart, names in charts.items()}
            pages[place + title] = {chart: ["Multiline", names] for chart, names in tags.items()}
    board.add_custom_scalars(pages)


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
    labels = [str(feature) for feature in alive]
    if semantics is not None:
        table = semantics.tables["features"]
        top = table[table["step"] == last.step].set_index("feature")["top_token"].to_dict()
        labels = [f"{feature} {top[feature]!r}" if feature in top else str(feature) for feature in alive]
    directions = torch.nn.functional.normalize(last.tensor("W_dec")[torch.tensor(alive)], dim=1)
    name = tag("track", hookpoint, "decoder").replace("/", "_")
    board.add_embedding(directions, metadata=labels, global_step=last.step, tag=name)
