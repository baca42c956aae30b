from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from saetrack.analysis import Analysis, AnalysisResult
from saetrack.track import Track
from saetrack.training import AnalyzeTrack, ResumeFile, SnapshotCallback, TrackLogger, TrackProgressBar

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
        return AnalysisResult(scalars={"twice": {step: 2.0 * step for step in track.steps}}, figures={"line": figure})


class Told(SnapshotCallback):
    """Notes what is on disk when it is told of a snapshot."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, list[int]]] = []

    def on_snapshot(self, trainer: Any, module: Any, track: Track, snapshot: Any) -> None:
        assert (snapshot.path / "metadata.json").is_file()
        self.seen.append((snapshot.step, Track.open(track.path).steps))


class Descriptions(Callback):
    """Notes what the progress bar says in every stage."""

    def __init__(self) -> None:
        self.descriptions: list[str] = []
        self.metrics: list[dict[str, Any]] = []
        self.totals: set[int] = set()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        bar = trainer.progress_bar_callback
        if bar.train_progress_bar.desc not in self.descriptions:
            self.descriptions.append(bar.train_progress_bar.desc)
        self.totals.add(bar.train_progress_bar.total)
        self.metrics.append(bar.get_metrics(trainer, pl_module))


class Fit:
    """One fit with all the callbacks, looked at by every test here."""

    def __init__(self, tiny_fit: Callable[..., Any], folder: Path) -> None:
        self.told, self.descriptions = Told(), Descriptions()
        logger = TensorBoardLogger(folder, name="tensorboard", version="")
        self.fitted = tiny_fit(
            folder / "run",
            # the projector and the histograms come from TrackLogger, the figures from the analyses at the end
            callbacks=[TrackLogger(), AnalyzeTrack([Steps()]), self.told, TrackProgressBar(), self.descriptions],
            logger=logger,
            trainer={"enable_progress_bar": True},
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
    frequency = fit.events.Histograms("track/log10_firing_frequency_of_alive_features")
    assert [event.step for event in frequency] == STEPS
    alive = [(s.features["firing_frequency"] > 0).sum() for s in fit.fitted.track]
    assert [event.histogram_value.num for event in frequency] == alive
    cosine = fit.events.Histograms("track/decoder_cosine_to_previous_snapshot")
    assert [event.step for event in cosine] == STEPS[1:]
    assert [event.histogram_value.num for event in cosine] == [64, 64]
    assert cosine[0].histogram_value.max <= 1.0 + 1e-6


def test_analyses_give_scalars_by_llm_step_and_figures(fit: Fit) -> None:
    tags = fit.events.Tags()
    twice = next(tag for tag in tags["scalars"] if tag.endswith("/twice"))
    assert twice.startswith("track/")
    assert scalar(fit, twice) == {step: 2.0 * step for step in STEPS}
    figures = [tag for tag in tags["images"] if tag.endswith("/line")]
    assert len(figures) == 1
    assert [event.step for event in fit.events.Images(figures[0])] == [10]


def test_the_projector_holds_the_alive_decoder_rows(fit: Fit) -> None:
    config = (fit.board / "projector_config.pbtxt").read_text()
    assert "track_decoder" in config
    tensors, labels = next(fit.board.rglob("tensors.tsv")), next(fit.board.rglob("metadata.tsv"))
    rows = [[float(v) for v in line.split("\t")] for line in tensors.read_text().splitlines()]
    last = fit.fitted.track[-1]
    alive = last.features.index[~last.features["dead"]].tolist()
    assert [int(line.split()[0]) for line in labels.read_text().splitlines()] == alive
    expected = torch.nn.functional.normalize(last.tensor("W_dec")[alive], dim=1)
    torch.testing.assert_close(torch.tensor(rows), expected, rtol=1e-4, atol=1e-4)


def test_a_snapshot_callback_is_told_when_the_snapshot_is_whole(fit: Fit) -> None:
    assert fit.told.seen == [(0, [0]), (2, [0, 2]), (10, [0, 2, 10])]


def test_the_progress_bar_says_which_llm_checkpoint_of_how_many_and_how_fast(fit: Fit) -> None:
    said = [text.rstrip(": ") for text in fit.descriptions.descriptions]
    assert said == ["LLM step 0 (1 of 3)", "LLM step 2 (2 of 3)", "LLM step 10 (3 of 3)"]
    for metrics in fit.descriptions.metrics:
        assert float(metrics["tokens/s"].replace(",", "")) > 0
        assert float(metrics["loss"]) > 0
        assert "v_num" not in metrics


class Kill(Callback):
    """Ends the run after an optimizer step, as a power cut would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyError("killed")


def test_a_stage_resumed_in_its_middle_is_named_by_the_progress_bar(
    tiny_fit: Callable[..., Any], tmp_path: Path
) -> None:
    descriptions, run = Descriptions(), tmp_path / "run"
    with pytest.raises(KeyError, match="killed"):
        tiny_fit(run, callbacks=[Kill(15 + 6)], steps=[0, 10])  # the second stage's resume file is of its step 4
    tiny_fit(
        run,
        callbacks=[TrackProgressBar(), descriptions],
        ckpt_path=ResumeFile.path(run),
        steps=[0, 10],
        trainer={"enable_progress_bar": True},
    )
    assert [text.rstrip(": ") for text in descriptions.descriptions] == ["LLM step 10 (2 of 2)"]
    assert len(descriptions.metrics) == 7 - 4
    assert descriptions.totals == {7}


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
