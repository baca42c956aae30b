"""What drift reads from a snapshot: its directions, the rotation its stage began with, and which features count."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .drift_geometry import procrustes, row_cosines, unit_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from saetrack.track import Snapshot

    Floats = NDArray[np.floating]

FROZEN = 1e-9
"""A decoder row that turned by less than this (1 - cosine) had no gradient in the stage."""


def decoder_rows(snapshot: Snapshot) -> Floats:
    """Unit decoder rows ``[d_sae, d_in]``."""
    return unit_rows(snapshot.tensor("W_dec").numpy())


def encoder_rows(snapshot: Snapshot) -> Floats:
    """Unit encoder directions ``[d_sae, d_in]``."""
    return unit_rows(snapshot.tensor("W_enc").numpy().T)


def flags(snapshot: Snapshot, name: str) -> NDArray[np.bool_]:
    """A column of the snapshot's feature table as truth values ``[d_sae]``.

    Raises:
        ValueError: If the snapshot was imported, so that nobody has looked when its features fire.
    """
    if name not in snapshot.features:
        raise ValueError(
            f"{snapshot.path} was imported, so it is not known which of its features are {name}; this needs a track "
            "that `saetrack fit` wrote. `saetrack fit --model.start` begins one from an imported SAE."
        )
    return snapshot.features[name].to_numpy(dtype=bool)


def alive(snapshot: Snapshot) -> NDArray[np.bool_]:
    """Which features fired on the evaluation split, ``[d_sae]``."""
    return ~flags(snapshot, "dead")


def transport_into(snapshot: Snapshot) -> Floats | None:
    """The rotation ``[d_in, d_in]`` that the stage began with; None where it began otherwise."""
    if snapshot.metadata["warm_start"] != "transported":
        return None
    transport: Floats = snapshot.statistics("transport").float().numpy()
    return transport


def fitted_rotation(source: Floats, target: Floats, use: NDArray[np.bool_]) -> Floats | None:
    """The rotation that best carries rows onto rows; None where fewer than 2 d_in rows are used.

    Args:
        source: ``[d_sae, d_in]`` unit rows.
        target: The same.
        use: Which rows, ``[d_sae]``.
    """
    return procrustes(source[use], target[use]) if use.sum() >= 2 * source.shape[1] else None


def frozen(before: Floats, after: Floats, transport: Floats | None) -> NDArray[np.bool_]:
    """Which rows end the stage where it began; a `transported` stage began with the rows already turned."""
    began = before if transport is None else before @ transport
    return row_cosines(began, after) > 1 - FROZEN
