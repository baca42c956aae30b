import json
import re
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import SafetensorError

from saetrack.lm import LLMCheckpoint, TokenRows, load_llm, read_activations
from saetrack.sae import SAE, StandardSAE, TopKSAE, sae_from_record, sae_record
from saetrack.track import SCHEMA, Snapshot, Track, tracks_in
from tests.trees import hashes

HOOKPOINT = "gpt_neox.layers.0"
ROWS = TokenRows(np.arange(12, dtype=np.uint16).reshape(3, 4), np.ones((3, 4), dtype=np.int32), bos_token_id=0)
HELD = TokenRows(np.arange(8, dtype=np.uint16).reshape(2, 4) + 7, np.zeros((2, 4), dtype=np.int32), bos_token_id=0)


def an_sae(seed: int, d_in: int = 16) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    sae = TopKSAE(d_in, 2, k=3)
    sae.initialise(torch.randn(100, d_in, generator=generator) + 1, generator)
    with torch.no_grad():
        sae.b_enc.add_(0.1 * torch.randn(sae.b_enc.shape, generator=generator))
    return sae


def new_track(folder: Path, hookpoint: str = HOOKPOINT) -> Track:
    facts = {"saetrack": "0.1.0", "hookpoint": hookpoint, "d_sae": 32, "context_size": 4, "bos_token_id": 0}
    return Track.create(folder / hookpoint, facts, {"selection": ROWS, "evaluation": HELD})


def write(track: Track, position: int, step: int, sae: SAE | None = None, **more: Any) -> Snapshot:
    sae = an_sae(position) if sae is None else sae
    checkpoint = more.pop("checkpoint", LLMCheckpoint("the/llm", f"step{step}", step, 10 * step))
    metadata = {
        "llm": {**asdict(checkpoint), "commit": None},
        "sae": sae_record(sae),
        "warm_start": "prior",
        "fvu": 0.5 / (1 + position),
        "fvu_shift": None,
    }
    statistics = {"mean": torch.arange(16.0) + position, "scale": torch.tensor([2.0])}
    features = pd.DataFrame({"feature": np.arange(sae.d_sae), "dead": np.arange(sae.d_sae) == 3})
    return track.write(position, sae, {**metadata, **more}, statistics, features)


@pytest.fixture
def track(tmp_path: Path) -> Track:
    """Three snapshots, at LLM steps 2, 10 and 100."""
    track = new_track(tmp_path)
    for position, step in enumerate((2, 10, 100)):
        write(track, position, step)
    return track


@pytest.mark.parametrize("wrong", [32, 5000, -1, 1.5, np.float32(2.5), "3"])
def test_a_feature_that_is_not_there_is_refused_by_its_name(track: Track, wrong: Any) -> None:
    for read in (track.decoder, track.encoder):
        with pytest.raises(ValueError, match=re.escape(f"There is no feature {wrong}: {track.path} has 32; give")):
            read([3, wrong, 17])
    chosen = (np.int64(3), torch.tensor(17))
    assert torch.equal(track.decoder(chosen), track.decoder([3, 17]))
    assert torch.equal(track.encoder(chosen), track.encoder([3, 17]))


def test_what_is_written_is_read_back(track: Track) -> None:
    again = Track.open(track.path)
    assert [(s.position, s.step) for s in again] == [(0, 2), (1, 10), (2, 100)]
    assert len(again) == 3
    assert again.at(10).path == again[1].path
    assert again.facts["schema"] == SCHEMA
    assert again.facts["hookpoint"] == HOOKPOINT
    saes = [an_sae(i) for i in range(3)]
    for snapshot, sae in zip(again, saes, strict=True):
        x = torch.randn(20, 16, generator=torch.Generator().manual_seed(9))
        assert torch.equal(snapshot.sae()(x), sae(x).detach())
        assert torch.equal(snapshot.tensor("b_dec"), sae.b_dec.detach())
        assert torch.equal(snapshot.statistics("mean"), torch.arange(16.0) + snapshot.position)
        assert snapshot.features["dead"].tolist() == [i == 3 for i in range(32)]
        assert not any(p.requires_grad for p in snapshot.sae().parameters())
    assert torch.equal(again.decoder(), torch.stack([s.W_dec.detach() for s in saes]))
    assert torch.equal(again.decoder(features=[5, 2]), torch.stack([s.W_dec.detach()[[5, 2]] for s in saes]))
    assert torch.equal(again.encoder(), torch.stack([s.W_enc.detach().T for s in saes]))
    assert torch.equal(again.encoder(features=[31]), torch.stack([s.W_enc.detach().T[[31]] for s in saes]))


def test_the_token_rows_are_in_the_track(track: Track) -> None:
    for split, rows in (("selection", ROWS), ("evaluation", HELD)):
        got = Track.open(track.path).tokens(split)
        np.testing.assert_array_equal(got.tokens, rows.tokens)
        np.testing.assert_array_equal(got.documents, rows.documents)
        assert got.bos_token_id == 0
    with pytest.raises(ValueError, match=r"'selection' and 'evaluation', not 'train'"):
        track.tokens("train")


def test_metrics_are_one_row_per_snapshot_and_numbers_only(track: Track) -> None:
    metrics = track.metrics()
    assert metrics["step"].tolist() == [2, 10, 100]
    assert metrics["tokens"].tolist() == [20, 100, 1000]
    assert metrics["fvu"].tolist() == pytest.approx([0.5, 0.25, 0.5 / 3])
    assert metrics["fvu_shift"].isna().all()
    assert set(metrics.columns) == {"position", "step", "tokens", "fvu", "fvu_shift", "warm_start", "from_step"}


def test_a_step_that_is_not_there_names_the_nearest(track: Track) -> None:
    with pytest.raises(ValueError, match=r"no snapshot of LLM step 11; the nearest are \[2, 10, 100\]"):
        track.at(11)


def test_a_name_that_is_not_there_lists_what_is(track: Track) -> None:
    with pytest.raises(ValueError, match=r"no tensor 'W_skip'; it holds W_dec, W_enc, b_dec, b_enc"):
        track[0].tensor("W_skip")
    with pytest.raises(ValueError, match=r"no tensor 'transport'; it holds mean, scale"):
        track[0].statistics("transport")


def test_the_order_is_numeric_also_past_four_digits(tmp_path: Path) -> None:
    track = new_track(tmp_path)
    for position, step in ((10_000, 512), (9_999, 64), (2, 9), (10, 10)):
        write(track, position, step)
    assert Track.open(track.path).steps == [9, 10, 64, 512]


def test_snapshots_are_in_the_order_of_llm_steps_whatever_the_order_of_training(tmp_path: Path) -> None:
    track = new_track(tmp_path)
    write(track, 0, 100)
    assert write(track, 1, 2).position == 0
    assert track.steps == [2, 100]
    assert [(s.number, s.position) for s in track] == [(1, 0), (0, 1)]
    assert track.before(track.at(2)) is track.at(100)
    assert track.before(track.at(100)) is None
    assert not track.is_forward_chain


@pytest.mark.parametrize("cache_dir", [None, "/mnt/hub"], ids=["usual cache", "own cache"])
def test_the_llm_checkpoint_is_restored_with_its_cache(tmp_path: Path, cache_dir: str | None) -> None:
    checkpoint = LLMCheckpoint("EleutherAI/pythia-70m", "step8", 8, None, cache_dir)
    llm = write(new_track(tmp_path), 0, 8, checkpoint=checkpoint).llm
    assert asdict(llm) == asdict(checkpoint)


def test_metadata_without_a_cache_is_read_too(track: Track) -> None:
    path = track[0].path / "metadata.json"
    facts = json.loads(path.read_text())
    del facts["llm"]["cache_dir"]
    path.write_text(json.dumps(facts))
    assert Track.open(track.path)[0].llm == LLMCheckpoint("the/llm", "step2", 2, 20)


@pytest.mark.parametrize(
    ("failing", "error", "cause"),
    [
        ("pandas.DataFrame.to_parquet", OSError(28, "No space left on device"), "No space left on device"),
        ("saetrack.track.save_saelens", SafetensorError("I/O error: No space left (os error 28)"), "os error 28"),
        ("saetrack.track.save_file", SafetensorError("I/O error: No space left (os error 28)"), "os error 28"),
        ("saetrack.track.write_json", OSError(122, "Disk quota exceeded"), "Disk quota exceeded"),
    ],
    ids=["features", "weights", "statistics", "metadata"],
)
def test_a_full_disk_leaves_every_finished_snapshot_and_nothing_else(
    track: Track, monkeypatch: pytest.MonkeyPatch, failing: str, error: Exception, cause: str
) -> None:
    before = hashes(track.path)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="could not be written") as raised:
        write(track, 3, 512)
    message = str(raised.value)
    assert "\n" not in message
    assert cause in message
    assert "0003-step512" in message
    assert "`--ckpt_path last`" in message
    assert hashes(track.path) == before
    assert len(list((track.path / "snapshots").iterdir())) == 3
    monkeypatch.undo()
    write(track, 3, 512)
    assert Track.open(track.path).steps == [2, 10, 100, 512]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TypeError("a bug")], ids=lambda e: type(e).__name__)
def test_another_failure_is_not_taken_for_a_full_disk(
    track: Track, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    before = hashes(track.path)
    monkeypatch.setattr(pd.DataFrame, "to_parquet", fail)
    with pytest.raises(type(error)):
        write(track, 3, 512)
    assert hashes(track.path) == before


def test_a_number_that_json_cannot_hold_leaves_no_snapshot(track: Track) -> None:
    before = hashes(track.path)
    with pytest.raises(ValueError, match="JSON"):
        write(track, 3, 512, l0=float("nan"))
    assert hashes(track.path) == before


def test_what_a_killed_run_left_is_ignored_and_replaced(track: Track) -> None:
    left = track.path / "snapshots" / ".0003-step512"
    left.mkdir()
    (left / "sae_weights.safetensors").write_bytes(b"half")
    (left / "stale").touch()
    again = Track.open(track.path)
    assert again.steps == [2, 10, 100]
    assert len(again.metrics()) == 3
    snapshot = write(again, 3, 512)
    assert not left.exists()
    assert not (snapshot.path / "stale").exists()


def test_a_snapshot_that_is_there_is_replaced_by_the_same_bytes(track: Track) -> None:
    before = hashes(track.path)
    write(track, 2, 100)
    assert hashes(track.path) == before
    write(track, 2, 100, fvu=0.125)
    assert Track.open(track.path)[2].metadata["fvu"] == 0.125
    assert len(list((track.path / "snapshots").iterdir())) == 3


@pytest.mark.parametrize("keep", [0, 4, 1000], ids=["empty", "in the header", "in the tensors"])
def test_truncated_weights_name_the_directory(track: Track, keep: int) -> None:
    weights = track[1].path / "sae_weights.safetensors"
    assert weights.stat().st_size > keep
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ValueError, match="is damaged") as raised:
        Track.open(track.path)
    assert str(track[1].path) in str(raised.value)
    assert "another `scheduler.track_dir`" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_weights_that_are_missing_name_the_directory(track: Track) -> None:
    (track[2].path / "sae_weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"0002-step100 is damaged"):
        Track.open(track.path)


@pytest.mark.parametrize("name", ["metadata.json", "features.parquet", "statistics.safetensors"])
@pytest.mark.parametrize("keep", [0, 100], ids=["empty", "cut"])
def test_a_damaged_file_of_a_snapshot_is_named(name: str, keep: int, track: Track) -> None:
    path = track[1].path / name
    path.write_bytes(path.read_bytes()[:keep])
    read = {
        "metadata.json": lambda s: s.metadata,
        "features.parquet": lambda s: s.features,
        "statistics.safetensors": lambda s: s.statistics("mean"),
    }
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged .* Restore it from a copy"):
        read[name](Track.open(track.path)[1])


@pytest.mark.parametrize("content", ["", '{"schema": 1', "[]", "{}", '{"schema": "new"}'])
def test_a_damaged_track_file_is_named(content: str, track: Track) -> None:
    (track.path / "track.json").write_text(content)
    with pytest.raises(ValueError, match=r"track.json is damaged \(.* Restore it from a copy"):
        Track.open(track.path)


def test_damaged_token_rows_are_named(track: Track) -> None:
    path = track.path / "tokens.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged"):
        Track.open(track.path).tokens("selection")
    path.unlink()
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged"):
        Track.open(track.path).tokens("selection")


def test_a_newer_schema_names_both_numbers(track: Track) -> None:
    facts = json.loads((track.path / "track.json").read_text())
    (track.path / "track.json").write_text(json.dumps({**facts, "schema": SCHEMA + 1, "saetrack": "0.9.0"}))
    expected = f"schema {SCHEMA + 1}, but this saetrack reads schemas up to {SCHEMA}; install saetrack 0.9.0"
    with pytest.raises(ValueError, match=expected):
        Track.open(track.path)


def test_a_run_with_one_hookpoint_opens_by_its_folder(track: Track) -> None:
    run = track.path.parent
    (run / "resume").mkdir()
    assert tracks_in(run) == [track.path]
    assert Track.open(run).path == track.path
    assert Track.open(str(run)).steps == [2, 10, 100]


def test_a_run_with_two_hookpoints_asks_which(track: Track) -> None:
    other = new_track(track.path.parent, "gpt_neox.layers.1")
    with pytest.raises(ValueError, match="holds 2 tracks") as raised:
        Track.open(track.path.parent)
    assert str(track.path) in str(raised.value)
    assert str(other.path) in str(raised.value)
    assert len(Track.open(other.path)) == 0


def test_a_folder_without_a_track_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no track"):
        Track.open(tmp_path)


def test_a_second_track_is_not_created_over_the_first(track: Track) -> None:
    before = hashes(track.path)
    with pytest.raises(FileExistsError, match=r"already holds a track; choose another `scheduler.track_dir`"):
        new_track(track.path.parent)
    assert hashes(track.path) == before


def test_a_track_may_be_moved(track: Track, tmp_path: Path) -> None:
    moved = Track.open(shutil.move(track.path, tmp_path / "elsewhere"))
    assert moved.decoder(features=[0]).shape == (3, 1, 16)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package.Thing", "cannot be imported"),
        ("Nameless", "cannot be imported"),
        ("pathlib.Path", "not a subclass"),
    ],
)
def test_an_sae_class_that_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        sae_from_record({"class": name, "arguments": {}})
    assert repr(name) in str(raised.value)


def test_a_name_that_is_no_snapshot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a name like 0007-step64"):
        Snapshot(tmp_path / "step64")


@pytest.mark.parametrize("sae", [TopKSAE(16, 4, k=4), StandardSAE(16, 4)], ids=lambda s: type(s).__name__)
def test_saelens_opens_a_snapshot_and_reconstructs_the_llms_own_activations(
    sae: SAE, tmp_path: Path, tiny_series: Path
) -> None:
    checkpoint = LLMCheckpoint(str(tiny_series / "step10"), None, 10)
    tokens = torch.randint(1, 60, (8, 32), generator=torch.Generator().manual_seed(5))
    x = read_activations(load_llm(checkpoint), tokens, [HOOKPOINT])[HOOKPOINT].flatten(0, 1)
    scale = (4.0 / x.norm(dim=1).mean()).item()
    sae.initialise(x * scale, torch.Generator().manual_seed(6))
    snapshot = write(new_track(tmp_path), 0, 10, sae=sae.folded(scale), checkpoint=checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports (transformer_lens, ...) warn of deprecations of their own
        import sae_lens

        lens = sae_lens.SAE.load_from_disk(snapshot.path)
    with torch.no_grad():
        ours = snapshot.sae()(x)
        torch.testing.assert_close(lens(x), ours, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lens(x), sae(x * scale) / scale, rtol=1e-5, atol=1e-5)
    fvu = ((x - ours).square().sum() / (x - x.mean(0)).square().sum()).item()
    assert fvu < 0.95  # in the LLM's own units it does reconstruct, untrained as it is
    assert lens.cfg.metadata.hook_name == HOOKPOINT
    assert lens.cfg.metadata.prepend_bos is True
