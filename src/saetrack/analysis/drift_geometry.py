"""Cosines between dictionaries, the rotation that two of them share, and the plane that trajectories are drawn in."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]


def unit_rows(matrix: Floats) -> Floats:
    """Rows scaled to norm 1 (a snapshot's have norm 1 / scale); zero rows stay zero.

    Args:
        matrix: ``[n, d]``.

    Returns:
        ``[n, d]``, in the dtype of ``matrix``.
    """
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    units: Floats = np.divide(matrix, norms, out=np.zeros_like(matrix), where=norms > 0)
    return units


def row_cosines(a: Floats, b: Floats) -> Floats:
    """Cosine of each row of ``a`` with the same row of ``b``, as ``1 - ||a - b||^2 / 2``.

    The difference keeps its digits where the product would round: rows that were never trained, whose cosine is 1
    to within 1e-9, must be told from rows that moved a little.

    Args:
        a: ``[n, d]`` unit rows.
        b: ``[n, d]`` unit rows.

    Returns:
        ``[n]`` float64, NaN where a row is zero.

    Example:
        >>> row_cosines(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[0.0, 1.0], [0.0, -1.0]])).tolist()
        [0.0, -1.0]
    """
    difference = a - b
    cosine: Floats = 1 - 0.5 * np.einsum("nd,nd->n", difference, difference, dtype=np.float64)
    return np.where(a.any(axis=1) & b.any(axis=1), cosine, np.nan)


def procrustes(source: Floats, target: Floats) -> Floats:
    """Orthogonal map ``R`` with the least ``||source R - target||``.

    ``R = U V^T`` from the singular value decomposition of ``source^T target``.

    Args:
        source: ``[n, d]``.
        target: ``[n, d]``.

    Returns:
        ``[d, d]``, to be applied from the right, in the dtype of ``source``.

    Example:
        >>> turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
        >>> np.allclose(procrustes(np.eye(2), turn), turn)
        True
    """
    u, _, vt = np.linalg.svd((source.T @ target).astype(np.float64))
    rotation: Floats = u @ vt
    return rotation.astype(source.dtype)


class Plane(NamedTuple):
    """Two-dimensional picture of trajectories.

    Args:
        coordinates: ``[T, n, 2]``.
        explained: ``[2]``, share of the pooled variance along each axis.
    """

    coordinates: Floats
    explained: Floats


def principal_plane(rows: Floats) -> Plane:
    """The plane of the most variance of all rows of all trajectories together.

    Args:
        rows: ``[T, n, d]`` unit rows of ``n`` features at ``T`` checkpoints.

    Returns:
        Coordinates and explained variance. The sign of an axis is fixed: its largest coordinate is positive.
    """
    checkpoints, features, d = rows.shape
    pooled = rows.reshape(-1, d).astype(np.float64)
    u, singular, _ = np.linalg.svd(pooled - pooled.mean(axis=0), full_matrices=False)
    axes = min(2, len(singular))
    coordinates = np.zeros((len(pooled), 2))
    coordinates[:, :axes] = u[:, :axes] * singular[:axes]
    largest = np.abs(coordinates).argmax(axis=0)
    coordinates *= np.where(coordinates[largest, [0, 1]] < 0, -1.0, 1.0)
    total = (singular**2).sum()
    explained = np.zeros(2)
    if total > 0:
        explained[:axes] = singular[:axes] ** 2 / total
    return Plane(coordinates.reshape(checkpoints, features, 2), explained)
