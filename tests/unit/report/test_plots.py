"""The report's figures in matplotlib: the lines that are drawn, against the tables they come from."""

import shutil
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from saetrack.analysis.quality import Quality
from saetrack.analysis.sweep import run_analyses
from saetrack.track import Track
from tests.unit.analysis.conftest import add_controls


def panel(figure: Figure, title: str) -> Axes:
    return next(ax for ax in figure.axes if ax.get_title(loc="left") == title)


def drawn(ax: Axes) -> dict[str, np.ndarray]:
    """Values of every line by its entry in the legend; an entry that has no line would be missing here."""
    lines = {str(line.get_label()): np.asarray(line.get_ydata(), dtype=float) for line in ax.lines}
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(lines)
    return lines


def table(track: Track, name: str) -> pd.DataFrame:
    return pd.read_parquet(track.analyses_dir / f"{name}.parquet")


def test_quality_draws_the_table_and_the_controls(track: Track) -> None:
    add_controls(track)
    run_analyses(track, {"quality": Quality()})
    figure = track.plot.quality()
    lines = drawn(panel(figure, "Unexplained variance"))
    np.testing.assert_allclose(lines["after training"], table(track, "quality/quality")["fvu"], rtol=1e-5)
    null = lines["same LLM checkpoint once more (band: range of runs)"]
    np.testing.assert_allclose(null, [np.nan, 0.3, np.nan, np.nan])
    fresh = lines["fresh SAE, tokens of the first stage (band: range of runs)"]
    np.testing.assert_allclose(fresh, [0.5, np.nan, np.nan, 0.6])
    assert "median feature (band: quartiles of the features)" in drawn(
        panel(figure, "Is index i still the same feature?")
    )


def test_drift_stands_beside_a_random_walk_and_null_steps(track: Track) -> None:
    null = {"step": [4], "drift_null": [0.01], "drift_real": [0.03], "excess": [0.02], "correlation_null": [0.9]}
    pd.DataFrame(null).to_parquet(track.analyses_dir / "drift" / "calibration.parquet")
    figure = track.plot.drift()
    population = table(track, "drift/population").pivot(index="step", columns="measure", values="mean")
    turns = drawn(panel(figure, "Drift from checkpoint to checkpoint"))
    mean = turns["mean (band: 95 % interval of the mean)"]
    np.testing.assert_allclose(mean, 1 - population["decoder_to_previous_without_rotation"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(turns["mean where the LLM did not change"], [np.nan, np.nan, 0.01, np.nan])
    way = drawn(panel(figure, "Way to the final direction"))
    walk = population["decoder_to_last_without_rotation_if_random_walk"]
    np.testing.assert_allclose(way["if its turns were independent"], walk, rtol=1e-4)
    identity = drawn(panel(track.plot.quality(), "Is index i still the same feature?"))
    np.testing.assert_allclose(identity["median where the LLM did not change"], [np.nan, np.nan, 0.9, np.nan])


def test_chosen_features_are_drawn_with_their_own_nulls(track: Track) -> None:
    figure = track.plot.drift(features=[3, 17])
    rows = table(track, "drift/drift").set_index(["feature", "step"])
    lines = drawn(panel(figure, "Way to the final direction"))
    name = "decoder_to_last_without_rotation"
    for feature in (3, 17):
        own = rows.loc[feature]
        np.testing.assert_allclose(lines[f"feature {feature}"], own[name], rtol=1e-5)
        walk = lines[f"{feature}, if its turns were independent"]
        np.testing.assert_allclose(walk, own[f"{name}_if_random_walk"], rtol=1e-5)


def test_a_feature_shows_when_it_formed_with_its_interval(track: Track) -> None:
    folder = track.analyses_dir / "formation"
    folder.mkdir()
    row = {"feature": [17], "status": ["formed"], "formed_step": [4.0], "formed_low": [1.0], "formed_high": [10.0]}
    pd.DataFrame(row).to_parquet(folder / "features.parquet")
    steps = {"feature": 17, "step": track.steps, "progress_token": [0.0, 0.1, 0.2, 0.3], "progress_se": 0.01}
    pd.DataFrame(steps).to_parquet(folder / "formation.parquet")
    null = {"step": track.steps, "baseline": "token", "null_low": -0.02, "null_high": 0.02}
    pd.DataFrame(null).to_parquet(folder / "population.parquet")
    figure = track.plot.feature(17)
    assert "formation: formed, step 4 (95 % interval 1 to 10)" in figure.texts[0].get_text()
    ax = panel(figure, "Progress of formation")
    lines = drawn(ax)
    np.testing.assert_allclose(lines["feature (band: 95 % interval)"], steps["progress_token"], rtol=1e-6)
    np.testing.assert_allclose(lines["random positions (band: 95 % of random sets)"], 0, atol=1e-9)
    (rule,) = (line for line in ax.lines if line.get_label() == "formed, with its 95 % interval")
    assert rule.get_xdata() == pytest.approx([np.log10(5)] * 2)
    lowest, highest = ax.collections[0].get_datalim(ax.transData).intervaly
    assert (lowest, highest) == pytest.approx((-1.96 * 0.01, 0.3 + 1.96 * 0.01), abs=1e-6)


def test_a_notebook_is_given_a_picture(track: Track) -> None:
    assert track.plot.feature(2)._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (
            lambda track: track.plot.formation(),
            r"holds no results of formation. Run `saetrack analyze .*/track --analyses\+=Formation`",
        ),
        (lambda track: track.plot.feature(64), "There is no feature 64: .* has 64; give whole numbers from 0 to 63"),
        (lambda track: track.plot.drift(features=[3, -1]), "There is no feature -1"),
        (lambda track: track.plot.drift(features=range(6)), "1 to 5 features beside each other, but features names 6"),
    ],
    ids=["not run", "beyond the end", "negative", "too many"],
)
def test_what_cannot_be_drawn_gets_one_line(track: Track, draw: Callable[[Track], Figure], message: str) -> None:
    with pytest.raises((FileNotFoundError, ValueError), match=message) as error:
        draw(track)
    assert "\n" not in str(error.value)


def test_a_feature_is_drawn_without_any_analysis(track: Track) -> None:
    shutil.rmtree(track.analyses_dir)
    titles = [ax.get_title(loc="left") for ax in track.plot.feature(2).axes]
    assert titles == ["Firing frequency", "Same feature as before?"]
