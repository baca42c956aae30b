"""What a run leaves out: told in its track, the same for everyone who reads it, and kept when the run goes on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saetrack.analysis import SplitObservation, SweepAnalysis
from saetrack.analysis.base import AnalysisResult, Probe
from saetrack.analysis.sweep import run_analyses
from saetrack.lm import DatasetCorpus, FolderSource, load_llm, read_activations
from saetrack.track import Snapshot, Track
from saetrack.training import ActivationDataModule, TokenSettings
from saetrack.training.tracks import refuse_another, track_facts

HOOKPOINT = "gpt_neox.layers.0"
SETTINGS = {"outlier_norm": 1.2, "layout": "masked"}


class Look(SweepAnalysis):
    """Keeps what it is shown."""

    def begin(self, track: Track) -> Probe:
        self.seen: dict[int, SplitObservation] = {}
        return Probe(evaluation_rows=8)

    def observe(self, snapshot: Snapshot, observation: Any) -> None:
        self.seen[snapshot.step] = observation.evaluation

    def finish(self) -> AnalysisResult:
        return AnalysisResult()


@pytest.fixture(scope="module")
def fitted(tiny_fit: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    run = tmp_path_factory.mktemp("left-out")
    return tiny_fit(run, steps=[0, 10], tokens=SETTINGS, warm_start="transported")


def test_a_snapshot_says_what_was_left_out(fitted: Any) -> None:
    data, track = fitted.data, fitted.track
    train = data.corpus_rows.train
    rows = train.select(np.linspace(0, len(train.tokens) - 1, -(-1000 // 32)).astype(np.int64))
    tokens, usable = torch.from_numpy(rows.tokens.astype(np.int64)), torch.from_numpy(rows.usable())
    for snapshot in track:
        x = read_activations(load_llm(snapshot.llm), tokens, [HOOKPOINT], rows.documents)[HOOKPOINT][usable]
        norms = x.double().norm(dim=1)
        assert snapshot.norm_limit == pytest.approx(1.2 * norms.median().item(), rel=1e-5)
        kept = norms <= snapshot.norm_limit
        shares = snapshot.metadata["left_out"]
        assert shares["bos"] == pytest.approx((rows.tokens == 0).mean())
        assert shares["special"] == pytest.approx((rows.tokens == 1).mean())  # <|unk|>
        assert shares["padding"] == 0
        assert shares["outlier_norm"] == pytest.approx((~kept).sum().item() / tokens.numel(), abs=1e-6) != 0
        torch.testing.assert_close(snapshot.statistics("mean"), x[kept].mean(0), rtol=1e-4, atol=1e-5)
        evaluated = track.tokens("evaluation").usable().sum()
        assert 0 < snapshot.metadata["evaluation_tokens"] < evaluated
    assert track.facts["outlier_norm"] == 1.2
    assert (track.facts["layout"], track.tokens("evaluation").layout) == ("masked", "masked")
    assert track.facts["left_out_ids"] == [1]


def test_an_analysis_sees_no_latents_where_the_sae_was_left_out(fitted: Any) -> None:
    look, track = Look(), fitted.track
    run_analyses(track, {"look": look})
    rows = track.tokens("evaluation").select(slice(8))
    for snapshot in track:
        seen = look.seen[snapshot.step]
        np.testing.assert_array_equal(seen.positions, np.argwhere(rows.usable()))
        norms = np.linalg.norm(seen.activations, axis=1)
        left = norms > snapshot.norm_limit
        assert 0 < left.sum() < len(left)
        assert seen.latents[left].nnz == 0
        x = torch.from_numpy(seen.activations[~left])
        np.testing.assert_allclose(seen.latents[~left].toarray(), snapshot.sae().encode(x).detach(), atol=1e-5)
        tokens = torch.from_numpy(rows.tokens.astype(np.int64))
        own = read_activations(load_llm(snapshot.llm), tokens, [HOOKPOINT], rows.documents)[HOOKPOINT]
        np.testing.assert_allclose(seen.activations, own[torch.from_numpy(rows.usable())], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"outlier_norm": None}, "outlier_norm is None"), ({"layout": "packed"}, "layout is packed")],
)
def test_a_track_goes_on_as_it_began(fitted: Any, changed: dict[str, Any], message: str) -> None:
    facts = track_facts(fitted.module, fitted.data, HOOKPOINT)
    refuse_another(fitted.track, facts)
    with pytest.raises(ValueError, match=rf"{message}, but .* was written with .*another `scheduler\.track_dir`"):
        refuse_another(fitted.track, facts | changed)


def test_a_track_of_0_1_0_goes_on_with_what_held_then(fitted: Any) -> None:
    facts = track_facts(fitted.module, fitted.data, HOOKPOINT)
    then = {"left_out_ids": [], "layout": "packed", "outlier_norm": None}
    old = Track(fitted.track.path, {name: fact for name, fact in facts.items() if name not in then})
    refuse_another(old, facts | then)
    with pytest.raises(ValueError, match="left_out_ids is"):
        refuse_another(old, facts | then | {"left_out_ids": [1]})
    assert (old.tokens("evaluation").left_out, old.tokens("evaluation").layout) == ((), "packed")


def test_attention_sinks_that_are_kept_are_warned_of(
    tiny_fit: Callable[..., Any],
    fitted: Any,
    make_series: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The embedding of one token, which is a few per cent of the text, is a hundred times the others'."""
    shares = np.bincount(fitted.data.corpus_rows.train.tokens.ravel()) / fitted.data.corpus_rows.train.tokens.size
    sink = int(np.argmax(np.where(shares < 0.1, shares, 0)))
    series = make_series(tmp_path / "llm", steps=[0])
    llm = load_llm(FolderSource(series).checkpoints()[0])
    with torch.no_grad():
        llm.gpt_neox.embed_in.weight[sink] *= 100
    llm.save_pretrained(series / "step0")
    tiny_fit(tmp_path / "run", steps=[0], source=FolderSource(series))
    said = [r.getMessage() for r in caplog.records if "attention sinks" in r.getMessage()]
    assert len(said) == 1
    assert "`data.tokens.outlier_norm: 10`" in said[0]
    assert not Track.open(tmp_path / "run")[0].metadata["left_out"]["outlier_norm"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"outlier_norm": 1.0}, r"data\.tokens\.outlier_norm is 1\.0, but half of the activations"),
        ({"outlier_norm": -3.0}, r"data\.tokens\.outlier_norm is -3\.0"),
        ({"outlier_norm": float("nan")}, r"data\.tokens\.outlier_norm is nan"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        replace(TokenSettings(), **settings)
    assert "\n" not in str(raised.value)


def test_a_stream_needs_a_bound(tiny_series: Path) -> None:
    def data(**tokens: Any) -> ActivationDataModule:
        corpus = DatasetCorpus("some/text", streaming=True)
        return ActivationDataModule(FolderSource(tiny_series), [HOOKPOINT], corpus, TokenSettings(**tokens))

    with pytest.raises(ValueError, match=r"data\.corpus streams some/text.*`data\.tokens\.max_tokens`"):
        data()
    data(max_tokens=1_000_000)
