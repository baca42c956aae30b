import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from saetrack.analysis import Analysis, AnalysisResult
from saetrack.track import Track
from saetrack.training import AnalyzeTrack, ResumeFile, SnapshotCallback, TrackLogger

HOOKPOINT = "gpt_neox.layers.0"
STEPS = [0, 2, 10]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",  # the stream is a forward of the LLM in this process
    "ignore:.*smaller than the logging interval.*",  # the module logs by itself
)


class Steps(Analysis):
    """Twice the LLM step as a scalar, and a figure."""

    def run(self, track: Track) -> AnalysisResult:
        figure = Figure(figsize=(1, 1))
        figure.subplots().plot(track.steps, track.steps)
        l0 = {snapshot.step: snapshot.metadata["l0"] for snapshot in track}
        return AnalysisResult(
            scalars={"twice": {step: 2.0 * step for step in track.steps}, "l0": l0},
            figures={"line": figure},
            captions={"line": "What the line says, $5 and all."},
        )


class Told(SnapshotCallback):
    """Notes what is on disk when it is told of a snapshot."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, list[int]]] = []

    def on_snapshot(self, trainer: Any, module: Any, track: Track, snapshot: Any) -> None:
        assert (snapshot.path / "metadata.json").is_file()
        self.seen.append((snapshot.step, Track.open(track.path).steps))


class Fit:
    """One fit with all the callbacks, looked at by every test here."""

    def __init__(self, tiny_fit: Callable[..., Any], folder: Path) -> None:
        self.told = Told()
        logger = TensorBoardLogger(folder, name="tensorboard", version="")
        self.fitted = tiny_fit(
            folder / "run",
            # the projector and the histograms come from TrackLogger, the figures from the analyses at the end
            callbacks=[TrackLogger(), AnalyzeTrack([Steps()]), self.told],
            logger=logger,
        )
        logger.experiment.flush()
        self.board = Path(logger.log_dir)
        self.events = EventAccumulator(str(self.board), size_guidance={"scalars": 0, "histograms": 0, "images": 0})
        self.events.Reload()


@pytest.fixture(scope="module")
def fit(tiny_fit: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Fit:
    return Fit(tiny_fit, tmp_path_factory.mktemp("fit"))


def scalar(fit: Fit, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in fit.events.Scalars(tag)}


@pytest.mark.parametrize("name", ["fvu", "l0", "dead_share", "explained_variance", "dense_share"])
def test_the_tracks_numbers_have_the_llm_step_as_x(fit: Fit, name: str) -> None:
    metrics = fit.fitted.track.metrics()
    assert metrics["step"].tolist() == STEPS
    assert scalar(fit, f"track/{name}") == pytest.approx(dict(zip(STEPS, metrics[name], strict=True)), rel=1e-5)


@pytest.mark.parametrize("name", ["fvu_shift", "functional_correlation_median"])
def test_what_needs_the_snapshot_before_begins_at_the_second(fit: Fit, name: str) -> None:
    metrics = fit.fitted.track.metrics()
    assert metrics[name].isna().tolist() == [True, False, False]
    assert scalar(fit, f"track/{name}") == pytest.approx(dict(zip(STEPS[1:], metrics[name][1:], strict=True)), rel=1e-5)


def test_training_curves_have_the_optimizer_step_as_x(fit: Fit) -> None:
    loss, rate = scalar(fit, "train/loss"), scalar(fit, "train/lr")
    first, later = 2000 // 128, 1000 // 128  # optimizer steps of the stages; every second is logged
    expected = [*range(0, first, 2), *range(first, first + later, 2), *range(first + later, first + 2 * later, 2)]
    assert sorted(loss) == sorted(rate) == expected
    assert {"train/l0", "train/dead_share", "train/mse", "train/auxk"} <= set(fit.events.Tags()["scalars"])
    assert rate[0] == rate[first] == pytest.approx(1e-3 * 128 / 500)  # warmup begins anew in every stage


def test_distributions_over_features_are_histograms_by_llm_step(fit: Fit) -> None:
    frequency = fit.events.Histograms("track_features/firing_frequency_log10")
    assert [event.step for event in frequency] == STEPS
    alive = [(s.features["firing_frequency"] > 0).sum() for s in fit.fitted.track]
    assert [event.histogram_value.num for event in frequency] == alive
    cosine = fit.events.Histograms("track_features/decoder_cosine_to_previous")
    assert [event.step for event in cosine] == STEPS[1:]
    assert [event.histogram_value.num for event in cosine] == [64, 64]
    correlation = fit.events.Histograms("track_features/functional_correlation_with_previous")
    known = [s.features["functional_correlation"].notna().sum() for s in fit.fitted.track]
    assert [event.histogram_value.num for event in correlation] == known[1:]
    assert cosine[0].histogram_value.max <= 1.0 + 1e-6


def test_analyses_give_scalars_by_llm_step_and_figures(fit: Fit) -> None:
    tags = fit.events.Tags()
    twice = next(tag for tag in tags["scalars"] if tag.endswith("/twice"))
    assert twice.startswith("track_")
    assert scalar(fit, twice) == {step: 2.0 * step for step in STEPS}
    figures = [tag for tag in tags["images"] if tag.endswith("/line")]
    assert len(figures) == 1
    (image,) = fit.events.Images(figures[0])
    assert image.step == 10
    assert image.height > 120  # one inch of figure, and the caption below it
    assert not [
        tag for tag in tags["scalars"] if tag.startswith("track_") and tag.endswith("/l0") and "final" not in tag
    ]


def test_the_charts_begin_with_the_tracks_quality_and_every_one_of_them_has_curves(fit: Fit) -> None:
    layout = layout_pb2.Layout()
    layout.ParseFromString(fit.events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["quality by LLM step", "training by optimizer step"]
    scalars = fit.events.Tags()["scalars"]
    charts = {
        chart.title: [tag for pattern in chart.multiline.tag for tag in scalars if re.search(pattern, tag)]
        for category in layout.category
        for chart in category.chart
    }
    assert next(iter(charts.values())) == ["track/fvu_shift", "track/fvu_before", "track/fvu"]
    assert all(charts.values())


def test_a_text_says_what_was_tracked_and_how_to_read_it(fit: Fit) -> None:
    (event,) = fit.events.Tensors("about/how_to_read/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert f"hookpoints `{HOOKPOINT}`, 3 LLM checkpoints from step 0 to 10" in text


def test_the_recipe_stands_beside_the_last_snapshots_numbers(fit: Fit) -> None:
    last = fit.fitted.track[-1]
    assert scalar(fit, "track_final/fvu") == pytest.approx({10: last.metadata["fvu"]}, rel=1e-5)
    content = fit.events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    recipe = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert recipe["scheduler.warm_start"].string_value == "transported"
    assert recipe["data.batch_size"].number_value == 128
    assert recipe["sae/arguments/k"].number_value == 4


def test_another_logger_gets_the_numbers_and_the_recipe(tiny_fit: Callable[..., Any], tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="csv", version="")
    fitted = tiny_fit(
        tmp_path / "run", callbacks=[TrackLogger(), AnalyzeTrack([Steps()])], logger=logger, steps=[0, 10]
    )
    rows = pd.read_csv(tmp_path / "csv" / "metrics.csv")
    got = rows[["step", "track/fvu"]].dropna().set_index("step")["track/fvu"]
    assert got.to_dict() == pytest.approx({s.step: s.metadata["fvu"] for s in fitted.track})
    assert any(name.endswith("/twice") for name in rows.columns)
    assert yaml.safe_load((tmp_path / "csv" / "hparams.yaml").read_text())["scheduler.tokens_next"] == 1000


def test_the_projector_holds_the_alive_decoder_rows(fit: Fit) -> None:
    config = (fit.board / "projector_config.pbtxt").read_text()
    assert "track_decoder" in config
    tensors, labels = next(fit.board.rglob("tensors.tsv")), next(fit.board.rglob("metadata.tsv"))
    rows = [[float(v) for v in line.split("\t")] for line in tensors.read_text().splitlines()]
    last = fit.fitted.track[-1]
    alive = last.features.index[~last.features["dead"]].tolist()
    header, *lines = [line.split("\t") for line in labels.read_text().splitlines()]
    assert header == ["feature", "firing_frequency_log10"]  # and the class, where semantics was run
    assert [int(line[0]) for line in lines] == alive
    assert [float(line[1]) for line in lines] == pytest.approx(
        np.log10(last.features["firing_frequency"][alive]), abs=0.005
    )
    expected = torch.nn.functional.normalize(last.tensor("W_dec")[alive], dim=1)
    torch.testing.assert_close(torch.tensor(rows), expected, rtol=1e-4, atol=1e-4)


def test_a_snapshot_callback_is_told_when_the_snapshot_is_whole(fit: Fit) -> None:
    assert fit.told.seen == [(0, [0]), (2, [0, 2]), (10, [0, 2, 10])]


def test_the_resume_file_is_there_and_says_that_all_is_done(fit: Fit) -> None:
    saved = torch.load(ResumeFile.path(fit.fitted.run), weights_only=True)
    assert next(v for k, v in saved["callbacks"].items() if "Scheduler" in k)["position"] == 3


def test_a_resume_file_after_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ResumeFile.every_tokens is 0"):
        ResumeFile(every_tokens=0)


def test_with_two_hookpoints_each_has_its_own_curves(tiny_fit: Callable[..., Any], tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="tensorboard", version="")
    hookpoints = [HOOKPOINT, "gpt_neox.layers.1"]
    fitted = tiny_fit(tmp_path / "run", callbacks=[TrackLogger()], logger=logger, hookpoints=hookpoints, steps=[0, 10])
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    for hookpoint in hookpoints:
        metrics = Track.open(fitted.run / hookpoint).metrics()
        got = [event.value for event in events.Scalars(f"track/{hookpoint}/fvu")]
        assert got == pytest.approx(metrics["fvu"].tolist(), rel=1e-5)
        assert f"train/{hookpoint}/loss" in events.Tags()["scalars"]


def test_fast_dev_run_writes_nothing(tiny_fit: Callable[..., Any], tmp_path: Path) -> None:
    tiny_fit(tmp_path / "run", callbacks=[TrackLogger(), AnalyzeTrack([Steps()])], trainer={"fast_dev_run": True})
    assert not list((tmp_path / "run").rglob("*"))
