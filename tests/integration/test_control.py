"""Controls, trained on a tiny track by the command that a user types."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from saetrack import Track
from saetrack.analysis import AnalysisResult
from saetrack.analysis.quality import Quality
from saetrack.analysis.semantics import Semantics
from saetrack.analysis.sweep import run_analyses
from saetrack.cli import main
from saetrack.lm import load_llm
from saetrack.training.control import ControlScheduler
from saetrack.training.control_plan import ControlSettings, plan_controls
from tests.trees import hashes

Config = dict[str, Any]


@pytest.fixture(scope="module")
def trained(configure: Callable[[Path], Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three snapshots."""
    folder = tmp_path_factory.mktemp("control")
    config = configure(folder / "run")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(folder / "config.yaml")])
    return folder / "run"


@pytest.fixture
def track(trained: Path, tmp_path: Path) -> Track:
    """A copy of it, to write controls into."""
    return Track.open(shutil.copytree(trained, tmp_path / "run"))


def control(track: Track, *options: str) -> None:
    main(["control", str(track.path), *options])


def weights(track: Track, position: int) -> torch.Tensor:
    return torch.nn.functional.normalize(track[position].tensor("W_dec"), dim=1)


def test_a_null_step_trains_the_snapshot_before_once_more_on_its_own_llm_checkpoint(track: Track) -> None:
    control(track, "--kind", "null", "--positions", "[2]", "--replicas", "2")
    first, second = track.controls("null")
    assert [first.path.name, second.path.name] == ["null-0002-0", "null-0002-1"]
    assert first.steps == [2, 2]
    assert torch.equal(weights(first, 0), weights(track, 1))
    assert not torch.equal(weights(first, 1), weights(first, 0))
    assert not torch.equal(weights(first, 1), weights(second, 1))
    assert first[1].metadata["tokens_trained"] == track[2].metadata["tokens_trained"]
    assert first[1].features["functional_correlation"].notna().any()


def test_a_replica_trains_it_on_the_next_as_the_track_did(track: Track) -> None:
    control(track, "--kind", "replica", "--positions", "[1,2]", "--replicas", "1")
    assert [c.steps for c in track.controls("replica")] == [[0, 2], [2, 10]]
    # the warm start is that of the track: equal before any training, up to the rounding of the way over the disk
    mine, its = (t[-1].metadata["fvu_before"] for t in (track.controls("replica")[1], track))
    assert mine == pytest.approx(its, rel=1e-4)


def test_a_replica_in_the_tracks_own_order_is_the_tracks_snapshot(
    track: Track, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ControlScheduler, "arm", lambda *_: 0)
    control(track, "--kind", "replica", "--positions", "[2]", "--replicas", "1")
    cosines = (weights(track.controls()[0], 1) * weights(track, 2)).sum(dim=1)
    assert float(cosines.quantile(0.1)) > 0.9999


def test_a_null_chain_is_as_long_as_the_track_and_stays_on_its_first_llm_checkpoint(track: Track) -> None:
    control(track, "--kind", "null", "--chain", "true", "--replicas", "1")
    (chain,) = track.controls("null")
    assert chain.steps == [0, 0, 0]
    assert not torch.equal(weights(chain, 1), weights(chain, 2))


@pytest.mark.parametrize("budget", ["next", "first"])
def test_scratch_starts_anew_at_every_llm_checkpoint_with_either_budget(track: Track, budget: str) -> None:
    control(track, "--kind", "scratch", "--replicas", "2", "--budget", budget)
    one, other = track.controls("scratch")
    assert one.steps == track.steps
    tokens = track[0 if budget == "first" else 1].metadata["tokens_trained"]
    assert {snapshot.metadata["tokens_trained"] for snapshot in one} == {tokens}
    for position in range(3):
        assert abs((weights(one, position) * weights(other, position)).sum(dim=1)).median() < 0.5


@pytest.mark.parametrize("budget", ["next", "total"])
def test_a_thinned_series_leaves_out_llm_checkpoints_and_may_have_their_tokens(track: Track, budget: str) -> None:
    control(track, "--kind", "thinned", "--thin", "2", "--budget", budget, "--replicas", "1", "--warm_start", "prior")
    (thinned,) = track.controls("thinned")
    assert thinned.path.name == f"thinned-2-{budget}-prior-0"
    assert thinned.steps == [0, 10]
    assert thinned[1].metadata["warm_start"] == "prior"
    assert torch.equal(weights(thinned, 0), weights(track, 0))
    factor = thinned[1].metadata["tokens_trained"] / track[2].metadata["tokens_trained"]
    assert factor == pytest.approx(2 if budget == "total" else 1, rel=0.02)


def test_random_trains_a_fresh_sae_on_an_llm_of_the_same_shape_that_learned_nothing(track: Track) -> None:
    options = ("--kind", "random", "--replicas", "2")
    control(track, *options)
    one, other = track.controls("random")
    assert [one.path.name, other.path.name] == ["random-0", "random-1"]
    assert len(one) == len(other) == 1
    assert one[0].metadata["tokens_trained"] == track[0].metadata["tokens_trained"]
    assert one[0].metadata["warm_start"] == "scratch"
    llms = [load_llm(c[0].llm) for c in (one, other)]
    its = load_llm(track[-1].llm)
    shapes = {name: tensor.shape for name, tensor in its.state_dict().items()}
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    for llm in llms:
        assert {key: tensor.shape for key, tensor in llm.state_dict().items()} == shapes
        assert float(llm.state_dict()[name].std()) == pytest.approx(llm.config.initializer_range, rel=0.2)
        assert not torch.equal(llm.state_dict()[name], its.state_dict()[name])
    assert not torch.equal(llms[0].state_dict()[name], llms[1].state_dict()[name])
    assert one.facts["control"]["llm_seed"] != other.facts["control"]["llm_seed"]
    whole = hashes(track.path / "controls")
    shutil.rmtree(other.path)
    control(track, *options)
    assert hashes(track.path / "controls") == whole


def test_a_random_control_is_analysed_like_a_track_and_stands_beside_its_own(track: Track) -> None:
    control(track, "--kind", "random", "--replicas", "1")
    (untrained,) = track.controls("random")
    run_analyses(untrained, {"semantics": Semantics()})
    run_analyses(track, {"semantics": Semantics(), "quality": Quality()})
    quality, meaning = (AnalysisResult.load(track.analyses_dir / name) for name in ("quality", "semantics"))
    assert quality.settings["fvu_random_llm"] == [untrained[0].metadata["fvu"]]
    classes = AnalysisResult.load(untrained.analyses_dir / "semantics").tables["classes"].set_index("class")["share"]
    assert meaning.settings["class_shares_random_llm"] == pytest.approx(classes.to_dict(), nan_ok=True)


def test_a_control_makes_no_llm_where_the_one_of_its_track_has_gone(
    track: Track, tmp_path: Path, tiny_series: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = track.path.parent / "config.yaml"
    saved, gone = yaml.safe_load(config.read_text()), tmp_path / "gone"
    pretrained = {"class_path": "saetrack.PretrainSource", "init_args": {"folder": str(gone), "pretrain": None}}
    config.write_text(yaml.safe_dump({**saved, "data": {**saved["data"], "source": pretrained}}))
    with pytest.raises(SystemExit):
        control(track, "--kind", "null", "--positions", "[2]", "--replicas", "1")
    said = capsys.readouterr().err
    assert f"error: {gone}, with the LLM checkpoints of this track, is not there" in said
    assert f"`saetrack fit --config {config}`" in said
    assert not gone.exists()
    gone.mkdir()
    for step in (2, 10):  # the series as it is, without step 0, which this control does not need
        (gone / f"step{step}").symlink_to(tiny_series / f"step{step}")
    control(track, "--kind", "null", "--positions", "[2]", "--replicas", "1")
    assert [c.steps for c in track.controls("null")] == [[2, 2]]


def test_a_series_cannot_be_thinned_to_less_than_its_ends(track: Track, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        control(track, "--kind", "thinned", "--thin", "3", "--replicas", "1")
    assert f"--thin is 3, but {track.path} has 3 snapshots" in capsys.readouterr().err
    assert not (track.path / "controls").exists()


def test_a_control_that_was_killed_goes_on_to_the_same_bytes(track: Track) -> None:
    options = ("--kind", "null", "--chain", "true", "--replicas", "2")
    control(track, *options)
    whole = hashes(track.path / "controls")
    for lost in ("null-chain-0/snapshots/0002-step0", "null-chain-1/snapshots/0002-step0"):
        shutil.rmtree(track.path / "controls" / lost)
    shutil.rmtree(track.path / "controls" / "null-chain-1" / "snapshots" / "0001-step0")
    assert not track.controls()
    control(track, *options)
    assert hashes(track.path / "controls") == whole


def test_more_replicas_leave_those_that_are_there_and_see_another_order(track: Track) -> None:
    control(track, "--kind", "null", "--positions", "[1]", "--replicas", "1")
    before = hashes(track.path / "controls" / "null-0001-0")
    control(track, "--kind", "null", "--positions", "[1]", "--replicas", "2")
    assert hashes(track.path / "controls" / "null-0001-0") == before
    first, second = track.controls("null")
    assert not torch.equal(weights(first, 1), weights(second, 1))


def test_the_track_itself_is_not_touched(track: Track) -> None:
    before = hashes(track.path)
    control(track, "--kind", "null", "--positions", "[1]", "--replicas", "1")
    after = {name: value for name, value in hashes(track.path).items() if not name.startswith("controls")}
    assert after == before


def test_a_control_by_another_recipe_is_refused(track: Track, capsys: pytest.CaptureFixture[str]) -> None:
    path = track.path.parent / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["model"]["optimizer"]["lr"] = 0.5
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit):
        control(track, "--kind", "null", "--positions", "[1]")
    assert "model.optimizer.lr is 0.5" in capsys.readouterr().err
    assert not track.controls()


def test_a_track_that_recorded_no_recipe_cannot_have_controls(track: Track) -> None:
    path = track.path / "track.json"
    facts = json.loads(path.read_text())
    del facts["recipe"]
    path.write_text(json.dumps(facts))
    with pytest.raises(SystemExit):
        control(track, "--kind", "null")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "null", "positions": [0]}, r"can be at 1 \(step 2\), 2 \(step 10\)"),
        ({"kind": "scratch", "positions": [3]}, r"can be at 0 \(step 0\), 1"),
        ({"kind": "replica", "chain": True}, "it goes with --kind null"),
        ({"kind": "null", "budget": "first"}, "can have next"),
        ({"kind": "null", "warm_start": "prior"}, "is for --kind thinned"),
        ({"kind": "thinned", "positions": [1]}, "chosen by --thin"),
        ({"kind": "thinned", "thin": 0}, "at least 1"),
        ({"kind": "null", "replicas": 0}, "at least 1"),
        ({"kind": "random", "positions": [1]}, "has no training"),
    ],
)
def test_controls_that_cannot_be_are_refused(track: Track, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_controls(track, ControlSettings(**options))
