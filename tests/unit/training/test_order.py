"""Series that begin from a snapshot, go both ways, and grow: small fits, and the messages of what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback

from saetrack.analysis.drift import Drift
from saetrack.analysis.lineage import revived_between, rotation_between, stages_between
from saetrack.exchange.exporting import export_track
from saetrack.exchange.importing import ImportedFacts, import_sae
from saetrack.lm import LLMCheckpoint, load_llm
from saetrack.lm.forward import read_activations
from saetrack.sae import SAE, StandardSAE, TopKSAE, sae_record
from saetrack.track import Track
from saetrack.training.control_plan import ControlSettings, plan_controls
from saetrack.training.datamodule import ActivationDataModule
from saetrack.training.order import reachable
from saetrack.training.start import read_start
from tests import trees

HOOKPOINT = "gpt_neox.layers.0"
Fit = Callable[..., Any]
SERIES = [LLMCheckpoint("llm", None, step) for step in (0, 1, 2, 4, 10)]


class Stop(Callback):
    """Ends the run as an exception would, after so many optimizer steps of this process."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_train_batch_end(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise ConnectionError("pulled")


def hashes(track: Track) -> dict[str, str]:
    return {name: value for name, value in trees.hashes(track.path).items() if name != "track.json"}


def resume(run: Path) -> Path:
    return run / "resume" / "last.ckpt"


def origins(track: Track) -> dict[int, int | None]:
    """LLM step of every snapshot, and of the one that it began from."""
    return {s.step: None if (before := track.before(s)) is None else before.step for s in track}


@pytest.fixture(scope="module")
def two(tiny_fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a finished track of the LLM steps 2 and 10."""
    run = tmp_path_factory.mktemp("two")
    tiny_fit(run, steps=[2, 10])
    return run


@pytest.fixture(scope="module")
def imported(two: Path, tmp_path_factory: pytest.TempPathFactory) -> Track:
    """Its SAE of step 2 by way of a folder of SAELens's, with other decoder norms on the way."""
    folder = tmp_path_factory.mktemp("imported")
    track = Track.open(two / HOOKPOINT)
    export_track(track, "saelens", "2", folder / "saelens")
    facts = ImportedFacts(step=2)
    return import_sae(str(folder / "saelens" / "step2" / HOOKPOINT), folder / "track", facts)


def activations(track: Track, step: int) -> torch.Tensor:
    """The LLM's activations of a step on the track's evaluation rows, about their mean, ``[n, d_in]``."""
    rows = track.tokens("evaluation")
    llm = load_llm(track.at(step).llm, "float32", "cpu")
    x = read_activations(llm, torch.from_numpy(rows.tokens.astype(np.int64)), [HOOKPOINT])[HOOKPOINT]
    x = x[torch.from_numpy(rows.usable())]
    return x - x.mean(dim=0)


def test_a_series_goes_both_ways_from_an_imported_sae(
    tiny_fit: Fit, two: Path, imported: Track, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[tuple[int, int | None]] = []
    begin_stage = ActivationDataModule.begin_stage

    def spied(self: Any, checkpoint: LLMCheckpoint, tokens: int, before: LLMCheckpoint | None, *more: Any) -> None:
        stages.append((checkpoint.step, before and before.step))
        begin_stage(self, checkpoint, tokens, before, *more)

    monkeypatch.setattr(ActivationDataModule, "begin_stage", spied)
    fitted = tiny_fit(tmp_path, direction="both", steps=[0, 2, 10], module={"start": str(imported.path)})
    track, source = fitted.track, Track.open(two / HOOKPOINT).at(2)
    assert origins(track) == {0: 2, 2: None, 10: 2}
    assert [s.number for s in track] == [2, 0, 1]
    assert [s.metadata["tokens_trained"] for s in track] == [896, 0, 896]
    assert stages[:2] == [(10, 2), (0, 2)]  # continuity reads the LLM of the snapshot that the stage began from

    adopted = track.at(2)
    assert adopted.metadata["warm_start"] == "imported"
    assert adopted.metadata["warm_started_from"]["track"] == str(imported.path)
    assert adopted.metadata["imported"]["format"] == "saelens"
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):  # same calibration rows, so also the same scale
        assert torch.allclose(adopted.tensor(name), source.tensor(name), rtol=1e-4, atol=1e-6)
    assert adopted.metadata["fvu"] == pytest.approx(source.metadata["fvu"], rel=1e-4)
    assert track.at(0).metadata["warm_started_from"] == {"track": None, "snapshot": "0000-step2", "step": 2}
    for step in (0, 10):
        here, there = activations(track, step), activations(track, 2)
        rotation = track.at(step).statistics("transport")
        assert (there @ rotation - here).norm() < (there @ rotation.T - here).norm()
        assert track.at(step).metadata["fvu_before"] < track.at(step).metadata["fvu_shift"]
    assert not fitted.module.first_stage

    turn = rotation_between(track, track[0], track[2])
    assert turn is not None
    expected = track.at(0).statistics("transport").T @ track.at(10).statistics("transport")
    assert np.allclose(turn, expected.numpy(), atol=1e-6)
    drift = Drift(trajectories=2, replicates=10).run(track).tables["drift"].set_index(["step", "feature"])
    # trained from step 2 back to step 0, yet between these neighbours the correlation is the one that training measured
    given = drift.loc[2, "functional_correlation"].to_numpy()
    assert np.array_equal(given, track.at(0).features["functional_correlation"].to_numpy(), equal_nan=True)


def test_a_finished_track_grows_in_between_and_before_and_keeps_what_is_there(
    tiny_fit: Fit, two: Path, tmp_path: Path
) -> None:
    kept = hashes(Track.open(two / HOOKPOINT))
    run = shutil.copytree(two, tmp_path / "run")
    grown = tiny_fit(run, steps=[0, 2, 4, 10], ckpt_path=resume(run)).track
    after = hashes(grown)
    assert {name: after[name] for name in kept} == kept
    assert origins(grown) == {0: 2, 2: None, 4: 2, 10: 2}
    assert [s.path.name for s in grown] == ["0003-step0", "0000-step2", "0002-step4", "0001-step10"]
    assert stages_between(grown, grown.at(4), grown.at(10)) == ([grown.at(4)], [grown.at(10)])
    either = grown.at(4).features["revived"] | grown.at(10).features["revived"]
    assert np.array_equal(revived_between(grown, grown.at(4), grown.at(10)), either)

    (replica,) = plan_controls(grown, ControlSettings("replica", positions=[3]))
    assert replica.start is grown.at(2)
    assert [c.step for c in replica.checkpoints] == [2, 0]
    with pytest.raises(ValueError, match="was not trained forward in one go"):
        plan_controls(grown, ControlSettings("null", chain=True))


@pytest.mark.slow
def test_an_extension_that_was_stopped_goes_on_to_the_same_bytes(tiny_fit: Fit, two: Path, tmp_path: Path) -> None:
    run, stopped = (shutil.copytree(two, tmp_path / name) for name in ("run", "stopped"))
    grown = tiny_fit(run, steps=[0, 2, 4, 10], ckpt_path=resume(run)).track
    with pytest.raises(ConnectionError):  # in the middle of the stage of step 4, after its first resume file
        tiny_fit(stopped, [Stop(5)], steps=[0, 2, 4, 10], ckpt_path=resume(stopped))
    assert hashes(tiny_fit(stopped, steps=[0, 2, 4, 10], ckpt_path=resume(stopped)).track) == hashes(grown)


@pytest.mark.slow
def test_a_longer_series_has_the_bytes_of_one_trained_at_once(tiny_fit: Fit, two: Path, tmp_path: Path) -> None:
    tiny_fit(tmp_path, steps=[2])
    longer = tiny_fit(tmp_path, steps=[2, 10], ckpt_path=resume(tmp_path)).track
    assert hashes(longer) == hashes(Track.open(two / HOOKPOINT))


@pytest.mark.slow
def test_an_adopted_snapshot_without_a_resume_file_is_adopted_again(
    tiny_fit: Fit, imported: Track, tmp_path: Path
) -> None:
    options = {"steps": [0, 2], "direction": "backward", "module": {"start": f"{imported.path}@2"}}
    with pytest.raises(ConnectionError):
        tiny_fit(tmp_path / "stopped", [Stop(1)], **options)
    assert Track.open(tmp_path / "stopped" / HOOKPOINT).steps == [2]
    assert hashes(tiny_fit(tmp_path / "stopped", **options).track) == hashes(
        tiny_fit(tmp_path / "run", **options).track
    )


def test_a_step_that_is_done_cannot_be_left_out(tiny_fit: Fit, two: Path) -> None:
    with pytest.raises(ValueError, match=r"scheduler\.steps lacks LLM step 2, on which this track is trained"):
        tiny_fit(two, steps=[4, 10], ckpt_path=resume(two))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("", r"holds 2 snapshots, of the LLM steps \[2, 10\]; say which by"),
        ("@4", "has no snapshot of LLM step 4"),
        (f"/{HOOKPOINT}/snapshots/0009-step7", "has no snapshot of LLM step 7"),
    ],
)
def test_a_start_that_is_not_there_is_named(two: Path, start: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_start(f"{two}{start}", [HOOKPOINT])


def test_a_snapshots_folder_is_a_start_and_every_hookpoint_needs_one(two: Path) -> None:
    start = read_start(str(two / HOOKPOINT / "snapshots" / "0001-step10"), [f"{HOOKPOINT}@lane"])
    assert start is not None
    assert (start.step, start.snapshots[f"{HOOKPOINT}@lane"].number) == (10, 1)
    with pytest.raises(ValueError, match=r"reads gpt_neox\.layers\.0, but data\.hookpoints names gpt_neox\.layers\.1"):
        read_start(f"{two}@2", ["gpt_neox.layers.1"])
    with pytest.raises(FileNotFoundError):
        read_start(f"{two}/nothing@2", [HOOKPOINT])


@pytest.mark.parametrize(
    ("chosen", "start", "direction", "message"),
    [
        ([0, 1], None, "both", "nothing to go both ways from"),
        ([0, 1], 3, "forward", r"model\.start: LLM step 3 is asked for"),
        ([0, 4], 2, "forward", r"names 0, which does not lie forward from the start at LLM step 2"),
        ([2], 2, "both", "Nothing is left to train both"),
    ],
)
def test_a_series_that_cannot_be_is_refused(chosen: list[int], start: int | None, direction: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reachable([c for c in SERIES if c.step in chosen], SERIES, start, direction, named=True)


def test_a_start_belongs_to_the_series_although_the_choice_leaves_it_out() -> None:
    assert [c.step for c in reachable(SERIES[3:], SERIES, 2, "forward", named=True)] == [2, 4, 10]
    assert [c.step for c in reachable(SERIES, SERIES, 2, "backward", named=False)] == [0, 1, 2]


def planted(folder: Path, sae: SAE, imported: Track) -> str:
    """A track with this SAE at step 2, written as `saetrack import` would."""
    facts = {k: v for k, v in imported.facts.items() if k != "schema"}
    track = Track.create(folder, {**facts, "d_in": sae.d_in, "d_sae": sae.d_sae}, {})
    track.write(0, sae, {**imported[0].metadata, "sae": sae_record(sae)}, {}, imported[0].features)
    return str(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopKSAE(8, 4, k=4), r"width 8, but gpt_neox\.layers\.0 of this LLM is 16 wide"),
        (lambda: TopKSAE(16, 2, k=4), r"needs `model\.sae\.init_args\.expansion_factor: 2`"),
        (lambda: TopKSAE(16, 4, k=3), r"needs `model\.sae\.init_args\.k: 3`, but the configuration has 4"),
        (lambda: StandardSAE(16, 4), r"needs `model\.sae\.class_path: StandardSAE`, but the configuration has TopKSAE"),
        (lambda: random_sae(torch.linspace(1, 2, 64)), "differ in norm by up to 100.0%"),
    ],
    ids=["d_in", "d_sae", "k", "class", "unequal norms"],
)
def test_an_sae_that_does_not_fit_is_refused(
    make: Callable[[], SAE], message: str, imported: Track, tmp_path: Path
) -> None:
    start = read_start(planted(tmp_path / "planted", make(), imported), [HOOKPOINT])
    assert start is not None
    own = TopKSAE(16, 4, k=4)
    module: Any = SimpleNamespace(build_sae=lambda *_: own, sae=lambda _: own, sae_setting=lambda _: "model.sae")
    with pytest.raises(ValueError, match=message) as refused:
        start.saes(module)
    assert "\n" not in str(refused.value)


def test_an_sae_that_reconstructs_nothing_is_refused(tiny_fit: Fit, imported: Track, tmp_path: Path) -> None:
    start = planted(tmp_path / "planted", random_sae(torch.full((64,), 300.0)), imported)
    with pytest.raises(ValueError, match="worse than the mean activation"):
        tiny_fit(tmp_path / "run", steps=[2, 10], module={"start": start})


def random_sae(norms: torch.Tensor) -> TopKSAE:
    sae = TopKSAE(16, 4, k=4)
    generator = torch.Generator().manual_seed(0)
    sae.initialise(torch.randn(200, 16, generator=generator), generator)
    sae.W_dec.data.mul_(norms[:, None])
    return sae
