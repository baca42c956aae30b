"""Drift on tracks whose dictionaries turn by planted angles."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from saetrack.analysis.drift import Drift
from saetrack.analysis.drift_geometry import principal_plane, procrustes, row_cosines, unit_rows
from saetrack.track import Track

from .planted_track import begin, snapshot

D_IN, D_SAE = 12, 96
STEPS = (0, 1, 4, 16)


def random_rotation(rng: np.random.Generator, d: int = D_IN) -> np.ndarray:
    q, r = np.linalg.qr(rng.normal(size=(d, d)))
    return q * np.sign(np.diag(r))


def turned(rng: np.random.Generator, rows: np.ndarray, angle: float) -> np.ndarray:
    """Every unit row turned by ``angle`` radians in a random direction of its own."""
    noise = rng.normal(size=rows.shape)
    noise -= (noise * rows).sum(axis=1, keepdims=True) * rows
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return np.cos(angle) * rows + np.sin(angle) * noise


def write_track(
    path: Path,
    decoders: Sequence[np.ndarray],
    features: Sequence[dict[str, Any]] | None = None,
    transports: Sequence[np.ndarray] | None = None,
) -> Track:
    """A track with these decoder rows; the encoder is the decoder, and each snapshot has another scale."""
    track = begin(path, D_IN, D_SAE)
    for t, decoder in enumerate(decoders):
        transport = transports[t - 1] if transports is not None and t else None
        snapshot(track, STEPS[t], decoder, transport, None if features is None else features[t], scale=1 + t)
    return Track.open(path)


def curve(tables: dict[str, pd.DataFrame], measure: str, column: str = "mean") -> np.ndarray:
    rows = tables["population"]
    return rows[rows["measure"] == measure][column].to_numpy()


@pytest.fixture
def start() -> np.ndarray:
    return unit_rows(np.random.default_rng(0).normal(size=(D_SAE, D_IN)))


def test_planted_angles_are_recovered(tmp_path: Path, start: np.ndarray) -> None:
    rng, angles, decoders = np.random.default_rng(1), [0.1, 0.5, 1.9], [start]
    for angle in angles:
        decoders.append(turned(rng, decoders[-1], angle))
    result = Drift(replicates=50).run(write_track(tmp_path / "t", decoders))
    for part in ("decoder", "encoder"):
        np.testing.assert_allclose(curve(result.tables, f"{part}_to_previous")[1:], np.cos(angles), atol=1e-6)
    np.testing.assert_allclose([result.scalars["drift"][s] for s in STEPS[1:]], 1 - np.cos(angles), atol=1e-6)
    expected = (decoders[0] * decoders[-1]).sum(axis=1)
    got = result.tables["drift"].query("step == 0")["decoder_to_last"]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert (got < 0).any()  # kept, not clipped


def test_independent_turns_agree_with_the_random_walk(tmp_path: Path, start: np.ndarray) -> None:
    """The rise to 1 of a random walk's cosine to its end is all in the adjacent cosines."""
    rng, decoders = np.random.default_rng(2), [start]
    for _ in STEPS[1:]:
        decoders.append(turned(rng, decoders[-1], 0.4))
    tables = Drift(replicates=50).run(write_track(tmp_path / "t", decoders)).tables
    np.testing.assert_allclose(curve(tables, "decoder_to_last_if_random_walk"), np.cos(0.4) ** np.array([3, 2, 1, 0]))
    np.testing.assert_allclose(curve(tables, "decoder_to_last"), np.cos(0.4) ** np.array([3, 2, 1, 0]), atol=0.06)


@pytest.mark.parametrize("transported", [False, True], ids=["procrustes", "transport"])
def test_a_common_rotation_is_removed(tmp_path: Path, start: np.ndarray, transported: bool) -> None:
    rng = np.random.default_rng(3)
    rotations = [random_rotation(rng) for _ in STEPS[1:]]
    decoders = [start]
    for rotation in rotations:
        decoders.append(turned(rng, decoders[-1] @ rotation, 1e-3))
    result = Drift(replicates=20).run(
        write_track(tmp_path / "t", decoders, transports=rotations if transported else None)
    )
    assert result.settings["rotation"] == ("transport" if transported else "procrustes")
    assert (curve(result.tables, "decoder_to_previous")[1:] < 0.5).all()
    for name in ("decoder_to_previous", "encoder_to_previous", "decoder_to_last", "encoder_to_last"):
        np.testing.assert_allclose(
            curve(result.tables, f"{name}_without_rotation")[1 if "previous" in name else 0 :], 1, atol=1e-5
        )


def test_what_is_a_features_own_survives_the_removal_of_the_rotation(tmp_path: Path, start: np.ndarray) -> None:
    rng = np.random.default_rng(4)
    rotation = random_rotation(rng)
    track = write_track(tmp_path / "t", [start, turned(rng, start @ rotation, 0.3)], transports=[rotation])
    left = curve(Drift(replicates=20).run(track).tables, "decoder_to_previous_without_rotation")[1]
    assert left == pytest.approx(np.cos(0.3), abs=1e-6)


def test_too_few_rows_to_fit_a_rotation_leave_it_out(tmp_path: Path, start: np.ndarray) -> None:
    dead = {"dead": np.arange(D_SAE) >= 2 * D_IN - 1}
    track = write_track(tmp_path / "t", [start, turned(np.random.default_rng(5), start, 0.3)], [dead, dead])
    tables = Drift(replicates=20).run(track).tables
    assert np.isnan(curve(tables, "decoder_to_previous_without_rotation")).all()
    assert curve(tables, "decoder_to_previous")[1] == pytest.approx(np.cos(0.3), abs=1e-6)


def test_frozen_revived_and_dead_features_are_apart(tmp_path: Path, start: np.ndarray) -> None:
    second = turned(np.random.default_rng(6), start, 0.2)
    second[:10] = start[:10]
    second[10:20] = -start[10:20]
    third = turned(np.random.default_rng(7), second, 0.2)
    index = np.arange(D_SAE)
    tables = [
        {},
        {"revived": (index >= 10) & (index < 20), "dead": (index >= 20) & (index < 25)},
        {},
    ]
    result = Drift(replicates=20).run(write_track(tmp_path / "t", [start, second, third], tables))
    status = result.tables["status"].set_index("step")
    assert status.loc[1].to_dict() == {"alive": D_SAE - 25, "dead": 5, "frozen": 10, "revived": 10}
    assert curve(result.tables, "decoder_to_previous")[1] == pytest.approx(np.cos(0.2), abs=1e-6)
    # dead at one end: five features fewer at the third; revived on the way: ten fewer from the first to the last
    assert curve(result.tables, "decoder_to_previous", "n_features").tolist() == [0, D_SAE - 25, D_SAE - 5]
    assert curve(result.tables, "decoder_to_last", "n_features").tolist() == [D_SAE - 10, D_SAE - 5, D_SAE]
    assert result.scalars["share_frozen"][1] == pytest.approx(10 / D_SAE)
    drawn = set(result.tables["trajectories"]["feature"])
    assert not drawn & set(range(10, 20))


def test_a_frozen_feature_is_found_where_the_stage_began_by_turning_all_of_them(
    tmp_path: Path, start: np.ndarray
) -> None:
    rng = np.random.default_rng(15)
    rotation = random_rotation(rng)
    second = turned(rng, start @ rotation, 0.3)
    second[:7] = start[:7] @ rotation
    result = Drift(replicates=20).run(write_track(tmp_path / "t", [start, second], transports=[rotation]))
    assert result.tables["status"].set_index("step").loc[1, "frozen"] == 7
    left = curve(result.tables, "decoder_to_previous_without_rotation")[1]
    assert left == pytest.approx(np.cos(0.3), abs=1e-6)


def test_a_row_scaled_but_not_turned_is_frozen_and_one_hardly_turned_is_not() -> None:
    rng = np.random.default_rng(8)
    rows = unit_rows(rng.normal(size=(50, 512)))
    scaled = unit_rows((rows / 7.3).astype(np.float32) * np.float32(2.7))
    assert (1 - row_cosines(unit_rows(rows.astype(np.float32)), scaled) < 1e-9).all()
    assert (1 - row_cosines(rows.astype(np.float32), turned(rng, rows, 1e-4).astype(np.float32)) > 1e-9).all()


def test_the_interval_covers_the_mean_and_the_tables_carry_quartiles(tmp_path: Path, start: np.ndarray) -> None:
    rng = np.random.default_rng(9)
    decoders = [start, np.concatenate([turned(rng, start[:48], 0.1), turned(rng, start[48:], 0.6)])]
    rows = Drift(replicates=400).run(write_track(tmp_path / "t", decoders)).tables["population"]
    row = rows[(rows["measure"] == "decoder_to_previous") & (rows["step"] == 1)].iloc[0]
    error = (np.cos(0.1) - np.cos(0.6)) / 2 / np.sqrt(D_SAE)
    assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert (row["q25"], row["q75"]) == pytest.approx((np.cos(0.6), np.cos(0.1)), abs=1e-5)
    assert row["gap_decades"] == pytest.approx(np.log10(2))


def test_the_result_is_whole_seeded_and_can_be_saved(tmp_path: Path, start: np.ndarray) -> None:
    decoders = [start, turned(np.random.default_rng(10), start, 0.3)]
    nan = {"functional_correlation": np.nan}
    track = write_track(tmp_path / "t", decoders, [nan, {"functional_correlation": 0.25}])
    first, second = Drift(replicates=20).run(track), Drift(replicates=20).run(track)
    first.save(tmp_path / "result")
    assert {p.name for p in (tmp_path / "result").glob("*.svg")} == {
        "adjacent.svg", "to_last.svg", "identity.svg", "cosine_to_previous.svg", "trajectories.svg"
    }  # fmt: skip
    assert first.scalars["functional_correlation_median"] == {1: 0.25}
    assert first.settings == second.settings
    assert "0.25" in first.summary
    for name, table in first.tables.items():
        pd.testing.assert_frame_equal(table, second.tables[name])


def test_named_features_are_drawn_and_wrong_ones_refused(tmp_path: Path, start: np.ndarray) -> None:
    track = write_track(tmp_path / "t", [start, turned(np.random.default_rng(11), start, 0.3)])
    assert Drift(features=[3, 90], replicates=20).run(track).settings["trajectory_features"] == [3, 90]
    with pytest.raises(ValueError, match="from 0 to 95"):
        Drift(features=[96], replicates=20).run(track)


def test_one_snapshot_is_refused(tmp_path: Path, start: np.ndarray) -> None:
    with pytest.raises(ValueError, match="holds 1 of the at least 2 snapshots"):
        Drift().run(write_track(tmp_path / "t", [start]))


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="trajectories is 0"):
        Drift(trajectories=0)


def test_procrustes_of_noisy_rows_is_orthogonal_and_best() -> None:
    rng = np.random.default_rng(12)
    source = rng.normal(size=(200, 6))
    target = source @ random_rotation(rng, 6) + 0.3 * rng.normal(size=(200, 6))
    fitted = procrustes(source, target)
    np.testing.assert_allclose(fitted @ fitted.T, np.eye(6), atol=1e-12)
    best = np.linalg.norm(source @ fitted - target)
    assert all(best < np.linalg.norm(source @ random_rotation(rng, 6) - target) for _ in range(20))


def test_the_plane_of_a_random_walk_explains_what_theory_says() -> None:
    """61 % and 15 % (6 / (pi^2 k^2)): the warning in the docstring is a fact."""
    walk = np.cumsum(np.random.default_rng(13).normal(size=(200, 1, 2000)), axis=0)
    np.testing.assert_allclose(principal_plane(walk).explained, [0.61, 0.15], atol=0.02)


def test_the_plane_of_rows_in_a_plane_keeps_their_distances() -> None:
    rng = np.random.default_rng(14)
    flat = rng.normal(size=(5, 3, 2))
    plane = principal_plane(flat @ random_rotation(rng, 7)[:2])
    assert plane.explained.sum() == pytest.approx(1)
    inside = plane.coordinates.reshape(-1, 2)
    np.testing.assert_allclose(
        np.linalg.norm(inside[:, None] - inside, axis=-1),
        np.linalg.norm(flat.reshape(-1, 1, 2) - flat.reshape(1, -1, 2), axis=-1),
    )
