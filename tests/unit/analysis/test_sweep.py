"""The sweep: one load of each LLM checkpoint, one forward of each row, whatever the number of analyses."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from saetrack.analysis import Analysis, AnalysisResult, Observation, Probe, SweepAnalysis, sweep
from saetrack.analysis.phases import Phases
from saetrack.analysis.sweep import run_analyses
from saetrack.lm.checkpoints import LLMCheckpoint, load_llm
from saetrack.lm.forward import read_activations
from saetrack.terminal import shown
from saetrack.track import Snapshot, Track

Counts = dict[str, Counter]


class Keep(SweepAnalysis):
    """Keeps all that it is shown."""

    def __init__(self, selection_rows: int = 0, evaluation_rows: int = 0) -> None:
        self.probe = Probe(selection_rows, evaluation_rows)

    def begin(self, track: Track) -> Probe:
        self.seen: list[tuple[int, Observation]] = []
        return self.probe

    def observe(self, snapshot: Snapshot, observation: Observation) -> None:
        self.seen.append((snapshot.step, observation))

    def finish(self) -> AnalysisResult:
        return AnalysisResult(scalars={"order": {step: i for i, (step, _) in enumerate(self.seen)}})


class Plain(Analysis):
    """Needs only the track."""

    def run(self, track: Track) -> AnalysisResult:
        return AnalysisResult(tables={"steps": pd.DataFrame({"step": track.steps})})


class Failing(Keep):
    """Fails at one of its methods, at the second call."""

    def __init__(self, at: str) -> None:
        super().__init__(selection_rows=1)
        self.at = at

    def begin(self, track: Track) -> Probe:
        if self.at == "begin":
            raise ValueError("no begin")
        return super().begin(track)

    def observe(self, snapshot: Snapshot, observation: Observation) -> None:
        super().observe(snapshot, observation)
        if self.at == "observe" and len(self.seen) == 2:
            raise ValueError("no second checkpoint")

    def finish(self) -> AnalysisResult:
        if self.at == "finish":
            raise ValueError("no finish")
        return super().finish()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """Counts the loads of each LLM and the token rows that run through it."""
    counts: Counts = {"loads": Counter(), "rows": Counter()}
    current: list[int] = []

    def load(checkpoint: LLMCheckpoint, **kwargs: Any) -> Any:
        current[:] = [checkpoint.step]
        counts["loads"][checkpoint.step] += 1
        return load_llm(checkpoint, **kwargs)

    def read(model: Any, tokens: torch.Tensor, *arguments: Any) -> dict[str, torch.Tensor]:
        for row in tokens:
            counts["rows"][(current[0], tuple(row.tolist()))] += 1
        return read_activations(model, tokens, *arguments)

    monkeypatch.setattr(sweep, "load_llm", load)
    monkeypatch.setattr(sweep, "read_activations", read)
    return counts


def test_each_checkpoint_is_loaded_once_and_each_row_run_once(tiny_track: Track, counted: Counts) -> None:
    analyses = {"one": Keep(selection_rows=8, evaluation_rows=5), "two": Keep(selection_rows=20), "plain": Plain()}
    run_analyses(tiny_track, analyses, rows_per_batch=3)
    assert counted["loads"] == dict.fromkeys((0, 1, 4, 10), 1)
    rows = [*tiny_track.tokens("selection").tokens[:20].tolist(), *tiny_track.tokens("evaluation").tokens[:5].tolist()]
    assert counted["rows"] == Counter((step, tuple(row)) for step in (0, 1, 4, 10) for row in rows)


def test_no_llm_is_loaded_when_no_analysis_wants_one(tiny_track: Track, counted: Counts) -> None:
    assert run_analyses(tiny_track, {"plain": Plain()}).keys() == {"plain"}
    assert not counted["loads"]


def test_the_last_snapshot_comes_first_and_the_others_in_order(tiny_track: Track) -> None:
    analysis = Keep(selection_rows=2)
    run_analyses(tiny_track, {"keep": analysis})
    assert [step for step, _ in analysis.seen] == [10, 0, 1, 4]


def test_observations_are_what_the_llm_and_the_snapshot_give(tiny_track: Track) -> None:
    few, many = Keep(selection_rows=3), Keep(selection_rows=7, evaluation_rows=2)
    run_analyses(tiny_track, {"few": few, "many": many}, rows_per_batch=2)
    for analysis, count in ((few, 3), (many, 7)):
        for step, observation in analysis.seen[:2]:
            snapshot, seen = tiny_track.at(step), observation.selection
            assert seen is not None
            rows = tiny_track.tokens("selection").tokens[:count]
            model = load_llm(snapshot.llm)
            hidden = model(torch.from_numpy(rows.astype(np.int64)), output_hidden_states=True).hidden_states[1]
            keep = np.argwhere(rows != 0)
            x = hidden[keep[:, 0], keep[:, 1]].detach()
            np.testing.assert_array_equal(seen.positions, keep)
            np.testing.assert_allclose(seen.activations, x.numpy(), rtol=1e-4, atol=1e-5)
            dense = snapshot.sae().encode(torch.from_numpy(seen.activations)).numpy()
            np.testing.assert_allclose(seen.latents.toarray(), dense, rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(seen.tokens, rows[rows != 0])
            assert seen.rows.tokens.shape == rows.shape
            assert (seen.latents.data > 0).all()
    assert few.seen[0][1].evaluation is None
    assert many.seen[0][1].evaluation is not None


def test_a_track_with_fewer_rows_gives_all_it_has(tiny_track: Track) -> None:
    analysis = Keep(evaluation_rows=10_000)
    run_analyses(tiny_track, {"keep": analysis})
    assert analysis.seen[0][1].evaluation.rows.tokens.shape == (12, 16)


def test_results_are_saved_in_the_track(tiny_track: Track) -> None:
    results = run_analyses(tiny_track, {"keep": Keep(1), "plain": Plain()})
    assert list(results) == ["keep", "plain"]
    assert AnalysisResult.load(tiny_track.analyses_dir / "keep").scalars["order"] == {10: 0, 0: 1, 1: 2, 4: 3}
    assert AnalysisResult.load(tiny_track.analyses_dir / "plain").tables["steps"]["step"].tolist() == [0, 1, 4, 10]


@pytest.mark.parametrize("at", ["begin", "observe", "finish"])
def test_a_failing_analysis_is_named_and_the_others_are_kept(
    tiny_track: Track, at: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    with pytest.raises(
        RuntimeError, match=r"'bad' failed: ValueError: no [\w ]+\. The results of 'plain', 'good' are saved"
    ):
        run_analyses(tiny_track, {"bad": Failing(at), "plain": Plain(), "good": Keep(1)})
    assert sorted(p.name for p in tiny_track.analyses_dir.iterdir()) == ["good", "plain"]


def test_a_sweep_in_which_all_failed_stops_loading(tiny_track: Track, counted: Counts) -> None:
    with pytest.raises(RuntimeError, match="Nothing was saved"):
        run_analyses(tiny_track, {"bad": Failing("observe")})
    assert sum(counted["loads"].values()) == 2


@pytest.mark.parametrize(
    ("analyses", "rows", "message"),
    [({"quality": 3}, 4, "'quality' is a int"), ({"plain": Plain()}, 0, "rows_per_batch is 0")],
    ids=["no analysis", "no rows"],
)
def test_bad_arguments_are_told(tiny_track: Track, analyses: dict[str, Any], rows: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_analyses(tiny_track, analyses, rows_per_batch=rows)


def test_an_empty_track_is_told(tmp_path: Path, tiny_track: Track) -> None:
    empty = Track.create(tmp_path / "empty", {**tiny_track.facts}, {"selection": tiny_track.tokens("selection")})
    with pytest.raises(ValueError, match="holds no snapshot yet"):
        run_analyses(empty, {"plain": Plain()})


def test_an_analysis_that_refuses_is_one_line_and_one_that_breaks_keeps_its_traceback(
    tiny_track: Track, caplog: pytest.LogCaptureFixture
) -> None:
    class Breaks(Analysis):
        def run(self, track: Track) -> AnalysisResult:
            return track.no_such_thing

    for name, analysis in {"phases": Phases(), "breaks": Breaks()}.items():
        with pytest.raises(RuntimeError, match=f"Analysis '{name}' failed"):
            run_analyses(tiny_track, {name: analysis})
    (broken,) = caplog.records  # what refuses is said by the error alone
    assert broken.getMessage() == "Analysis 'breaks' failed."
    assert broken.exc_info


def test_every_piece_of_work_is_announced_before_it_begins(
    tiny_track: Track, capsys: pytest.CaptureFixture[str]
) -> None:
    analyses = {"plain": Plain(), "first": Keep(selection_rows=2), "second": Keep(evaluation_rows=1)}
    with shown("Analysing", "to do") as progress:
        run_analyses(tiny_track, analyses, progress=progress)
    checkpoints = [f"LLM checkpoint {n} of 4 (step {step})" for n, step in enumerate((10, 0, 1, 4), start=1)]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "Analysing: 7 to do"
    assert said[1:] == [f"Analysing: {piece}" for piece in ("plain", *checkpoints, "first", "second")]
