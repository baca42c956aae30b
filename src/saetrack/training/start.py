"""The SAEs that a series begins with, when they are not fresh: snapshots of other tracks, imported ones above all."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saetrack.hub import is_hub_address
from saetrack.lm.forward import module_name
from saetrack.sae import SAE
from saetrack.sae.formats.identities import fold_decoder_norms_
from saetrack.sae.topk import TopKSAE
from saetrack.track import Snapshot, Track, tracks_in
from saetrack.training.module import SAEModule

_SNAPSHOT_FOLDER = re.compile(r"\d{4,}-step(\d+)")
_UNEQUAL = 1e-3
"""Relative spread of decoder norms from which top-k would choose other latents once the rows have unit norm."""


@dataclass(frozen=True)
class Start:
    """Where a series begins.

    Args:
        step: The LLM step.
        snapshots: The snapshot of each hookpoint.
    """

    step: int
    snapshots: Mapping[str, Snapshot]

    def facts(self, hookpoint: str) -> dict[str, Any]:
        """What the metadata of the adopted snapshot says of where it comes from."""
        snapshot = self.snapshots[hookpoint]
        origin = {"track": str(snapshot.path.parent.parent), "snapshot": snapshot.path.name, "step": snapshot.step}
        imported = snapshot.metadata.get("imported")
        return {"warm_start": "imported", "warm_started_from": origin, **({"imported": imported} if imported else {})}

    def saes(self, module: SAEModule) -> dict[str, SAE]:
        """The SAEs as the run would write them: of the configured class, in the LLM's own units, decoder norms equal.

        A decoder row's norm goes into its latent, for training keeps rows at one norm; reconstructions stay.

        Raises:
            ValueError: If one is not what ``model.sae`` builds, or unequal norms would change what its top-k chooses.
        """
        return {hookpoint: _fitted(module, hookpoint, snapshot) for hookpoint, snapshot in self.snapshots.items()}


def read_start(address: str | None, hookpoints: Sequence[str]) -> Start | None:
    """Find the snapshots that ``model.start`` names.

    Args:
        address: A track, a run with one track for each hookpoint, or ``hf://owner/name``, each with ``@step`` where it
            holds several snapshots; or a snapshot's folder. None for a fresh start.
        hookpoints: Those of the run.

    Raises:
        FileNotFoundError: If there is no track.
        ValueError: If it has no snapshot of the step or several without one, or a hookpoint has none.
    """
    if address is None:
        return None
    place, step = _place_and_step(address)
    if is_hub_address(place) or (Path(place) / "track.json").is_file():
        tracks = [Track.open(place)]
    else:
        tracks = [Track.open(path) for path in tracks_in(place)] or [Track.open(place)]
    by_module = {track.facts["hookpoint"]: track for track in tracks}
    by_lane = by_module | {track.path.name: track for track in tracks}  # a run's folders are named by hookpoint
    sources = {hookpoint: by_lane.get(hookpoint, by_module.get(module_name(hookpoint))) for hookpoint in hookpoints}
    for hookpoint, track in sources.items():
        if track is None:
            raise ValueError(
                f"model.start {address} reads {', '.join(by_module)}, but data.hookpoints names {hookpoint}; every "
                "hookpoint needs a snapshot to begin with."
            )
    found = {h: _snapshot(track, step, address) for h, track in sources.items() if track is not None}
    steps = {snapshot.step for snapshot in found.values()}
    if len(steps) > 1:
        raise ValueError(f"model.start {address} has snapshots of the LLM steps {sorted(steps)}; give one as `@step`.")
    return Start(steps.pop(), found)


def _place_and_step(address: str) -> tuple[str, int | None]:
    place, _, step = address.rpartition("@")
    if place and step.isdecimal():
        return place, int(step)
    path = Path(address)
    named = _SNAPSHOT_FOLDER.fullmatch(path.name)
    if named is not None and path.parent.name == "snapshots":
        return str(path.parent.parent), int(named[1])
    return address, None


def _snapshot(track: Track, step: int | None, address: str) -> Snapshot:
    if step is not None:
        return track.at(step)
    if len(track) != 1:
        raise ValueError(
            f"model.start {address} holds {len(track)} snapshots, of the LLM steps {track.steps}; say which by "
            f"`model.start: {address}@STEP`."
        )
    only: Snapshot = track[0]
    return only


def _fitted(module: SAEModule, hookpoint: str, snapshot: Snapshot) -> SAE:
    given, own = snapshot.sae(), module.build_sae(hookpoint, module.sae(hookpoint).d_in)
    _refuse_other_shape(given, own, snapshot, hookpoint, module.sae_setting(hookpoint))
    if isinstance(given, TopKSAE):
        norms = given.W_dec.norm(dim=1)
        norms = norms[norms > 0]
        spread = float(norms.max() / norms.min() - 1) if len(norms) else 0.0
        if spread > _UNEQUAL:
            raise ValueError(
                f"model.start {snapshot.path}: its decoder rows differ in norm by up to {spread:.1%}, and its top-k "
                "would choose other latents once they have unit norm, as training needs. Only one with equal norms "
                "can be continued."
            )
    own.load_state_dict(given.state_dict())
    return own.requires_grad_(False)


def _refuse_other_shape(given: SAE, own: SAE, snapshot: Snapshot, hookpoint: str, setting: str) -> None:
    if given.d_in != own.d_in:
        raise ValueError(
            f"model.start {snapshot.path} reads activations of width {given.d_in}, but {hookpoint} of this LLM is "
            f"{own.d_in} wide; it is of another LLM or another module."
        )
    changes: dict[str, tuple[str | int, str | int]] = {}
    if type(given) is not type(own):
        changes[f"{setting}.class_path"] = (type(given).__name__, type(own).__name__)
    elif given.d_sae != own.d_sae:
        changes[f"{setting}.init_args.expansion_factor"] = (given.expansion_factor, own.expansion_factor)
    elif isinstance(given, TopKSAE) and isinstance(own, TopKSAE) and given.k != own.k:
        changes[f"{setting}.init_args.k"] = (given.k, own.k)
    for key, (needed, configured) in changes.items():
        raise ValueError(
            f"model.start {snapshot.path} needs `{key}: {needed}`, but the configuration has {configured}; set it so."
        )


@torch.no_grad()
def equal_norms(sae: SAE, scale: float) -> SAE:
    """The SAE with every decoder row at the norm 1 / scale that a snapshot's rows have, in the LLM's own units."""
    return fold_decoder_norms_(sae.folded(1 / scale)).folded(scale)
