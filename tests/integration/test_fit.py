"""``saetrack fit`` from a configuration file to files on disk."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from saetrack import Track
from saetrack.cli import main
from tests.trees import hashes

Run = Callable[..., "subprocess.CompletedProcess[str]"]

FEATURE_COLUMNS = [
    "feature",
    "firing_frequency",
    "mean_activation",
    "max_activation",
    "tokens_since_fired",
    "dead",
    "revived",
    "functional_correlation",
    "decoder_cosine_previous",
]


@pytest.fixture
def analysed(config: dict[str, Any]) -> dict[str, Any]:
    config["analyze"] = {"analyses": ["Quality", "Semantics", "Formation", "Drift"]}
    return config


def test_fit_writes_the_documented_track_and_a_second_run_changes_nothing(
    analysed: dict[str, Any], run: Run, fit_here: Run
) -> None:
    done = run(analysed)
    assert done.returncode == 0, done.stderr
    folder = Path(analysed["scheduler"]["track_dir"])
    track = Track.open(folder)
    assert track.steps == [0, 2, 10]
    for snapshot in track:
        assert {p.name for p in snapshot.path.iterdir()} == {
            "cfg.json",
            "sae_weights.safetensors",
            "statistics.safetensors",
            "features.parquet",
            "metadata.json",
        }
        assert list(snapshot.features.columns) == FEATURE_COLUMNS
        assert snapshot.features["functional_correlation"].isna().all() == (snapshot.position == 0)
        assert snapshot.metadata["llm"]["step"] == snapshot.step
        assert snapshot.metadata["llm"]["weight_hash"].startswith("sha256:")
        assert snapshot.metadata["fvu"] < snapshot.metadata["fvu_before"]
    assert [s.metadata["tokens_trained"] for s in track] == [46 * 128, 23 * 128, 23 * 128]
    assert track[0].metadata["fvu_shift"] is None
    assert track[1].metadata["fvu_shift"] is not None
    assert {p.name for p in track.analyses_dir.iterdir()} == {"quality", "semantics", "formation", "drift"}
    for words in ("LLM step", "FVU before", "CE recovered", "drift: ", "saetrack report", "tensorboard --logdir"):
        assert words in done.stdout
    assert yaml.safe_load((folder / "config.yaml").read_text())["scheduler"]["tokens_first"] == 6_000

    before = hashes(folder)
    again = fit_here(analysed)
    assert again.returncode == 0, again.stderr
    assert "complete; nothing was changed" in again.stdout
    assert hashes(folder) == before

    analysed["model"]["sae"]["init_args"]["k"] = 5
    other = fit_here(analysed)
    assert other.returncode == 1
    assert "Choose another `scheduler.track_dir`" in other.stderr
    assert hashes(folder) == before

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    tags = events.Tags()
    assert [e.step for e in events.Scalars("track/fvu")] == [0, 2, 10]
    assert [e.value for e in events.Scalars("track/fvu")] == pytest.approx([s.metadata["fvu"] for s in track])
    assert {"train/loss", "train/l0", "train/lr", "track/l0", "track/dead_share"} <= set(tags["scalars"])
    assert {e.step for e in events.Scalars("track_drift/drift")} == {2, 10}
    assert "track_features/decoder_cosine_to_previous" in tags["histograms"]
    assert any(tag.startswith("track_quality/") for tag in tags["images"])
    (panel, *_) = [tag for tag in tags["tensors"] if tag.startswith("track_contexts/feature_")]
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors(panel)]
    assert all(line.startswith("    ") and ">>>" in line for text in texts for line in text.splitlines())
    assert {event.step for event in events.Tensors(panel)} <= {0, 2, 10}
    assert list((folder / "tensorboard").rglob("projector_config.pbtxt"))
    assert list((folder / "tensorboard").rglob("metadata.tsv"))


def test_a_run_that_is_refused_leaves_no_folder(config: dict[str, Any], fit_here: Run) -> None:
    config["scheduler"]["tokens_next"] = 100
    done = fit_here(config)
    assert done.returncode == 1
    assert "scheduler.tokens_next is 100" in done.stderr
    assert not Path(config["scheduler"]["track_dir"]).exists()


def test_a_dry_run_writes_nothing(config: dict[str, Any], fit_here: Run) -> None:
    folder = Path(config["scheduler"]["track_dir"])
    done = fit_here(config, "--trainer.fast_dev_run", "true")
    assert done.returncode == 0, done.stderr
    assert not folder.exists()
    config["scheduler"]["steps"] = [0, 2]
    assert fit_here(config).returncode == 0
    before = hashes(folder)
    assert fit_here(config, "--trainer.fast_dev_run", "true").returncode == 0
    assert hashes(folder) == before


def test_several_saes_on_one_hookpoint_each_of_its_own_class_and_size(config: dict[str, Any], fit_here: Run) -> None:
    small, large = "gpt_neox.layers.0@small", "gpt_neox.layers.0@large"
    saes = {
        small: {"class_path": "TopKSAE", "init_args": {"expansion_factor": 2, "k": 3}},
        large: {"class_path": "BatchTopKSAE", "init_args": {"expansion_factor": 4, "k": 5}},
    }
    config["data"]["hookpoints"] = [small, large]
    config["model"]["sae"] = {"class_path": "SAEsByHookpoint", "init_args": {"saes": {small: saes[small]}}}
    config["scheduler"]["steps"] = [0, 10]
    refused = fit_here(config)
    assert refused.returncode == 1
    assert "an SAE for gpt_neox.layers.0@small, but none for gpt_neox.layers.0@large" in refused.stderr
    config["model"]["sae"]["init_args"]["saes"] = saes
    done = fit_here(config)
    assert done.returncode == 0, done.stderr
    folder = Path(config["scheduler"]["track_dir"])
    for name, d_sae in ((small, 32), (large, 64)):
        track = Track.open(folder / name)
        sae = track[-1].sae()
        assert track.steps == [0, 10]
        assert (sae.d_sae, type(sae).__name__) == (d_sae, saes[name]["class_path"])
        assert sae.arguments["k"] == saes[name]["init_args"]["k"]
    assert "complete; nothing was changed" in fit_here(config).stdout
    saes[large]["init_args"]["k"] = 4
    assert "Choose another `scheduler.track_dir`" in fit_here(config).stderr
    main(["control", str(folder / large), "--kind", "null", "--positions", "[1]", "--replicas", "1"])
    (control,) = Track.open(folder / large).controls("null")
    assert control[-1].sae().d_sae == 64


def test_two_hookpoints_give_two_tracks_from_one_forward(config: dict[str, Any], fit_here: Run) -> None:
    config["data"]["hookpoints"] = ["gpt_neox.layers.1", "gpt_neox.layers.0"]
    config["scheduler"] |= {"steps": [0, 10], "direction": "backward"}
    config["analyze"] = {"analyses": ["Quality"]}
    done = fit_here(config)
    assert done.returncode == 0, done.stderr
    folder = Path(config["scheduler"]["track_dir"])
    first, second = (Track.open(folder / h) for h in config["data"]["hookpoints"])
    assert first.steps == second.steps == [0, 10]
    assert [s.number for s in first] == [1, 0]
    assert first[0].metadata["warm_started_from"] == {"track": None, "snapshot": "0000-step10", "step": 10}
    assert "SAEs trained backward, from LLM step 10 to 0." in (first.analyses_dir / "quality/quality.svg").read_text()
    assert first.facts["hookpoint"] == "gpt_neox.layers.1"
    assert first[0].metadata["fvu"] != second[0].metadata["fvu"]
    with pytest.raises(ValueError, match="holds 2 tracks; open one of"):
        Track.open(folder)


@pytest.mark.parametrize("sae", ["BatchTopKSAE", "MatryoshkaSAE", "JumpReLUSAE", "GatedSAE"])
def test_every_architecture_is_trained_by_its_name(sae: str, config: dict[str, Any], run: Run) -> None:
    config["model"]["sae"] = {"class_path": sae, "init_args": {"expansion_factor": 4}}
    config["scheduler"]["steps"] = [0, 10]
    options = ("--model.sae.init_args.k", "4") if sae in ("BatchTopKSAE", "MatryoshkaSAE") else ()
    done = run(config, *options)
    assert done.returncode == 0, done.stderr
    track = Track.open(config["scheduler"]["track_dir"])
    for snapshot in track:
        assert type(snapshot.sae()).__name__ == sae
        assert snapshot.metadata["fvu"] < snapshot.metadata["fvu_before"]
        assert 1 < snapshot.metadata["l0"] < 64
    if options:
        threshold = track[-1].tensor("threshold")
        assert threshold.unique().numel() == 1
        assert threshold[0] > 0
        assert track[-1].metadata["l0"] == pytest.approx(4, rel=0.3)


@pytest.mark.parametrize("warm_start", ["prior", "recentred", "scratch"])
def test_every_warm_start_is_what_the_snapshot_says(warm_start: str, config: dict[str, Any], fit_here: Run) -> None:
    config["scheduler"] |= {"warm_start": warm_start, "steps": [0, 10]}
    done = fit_here(config)
    assert done.returncode == 0, done.stderr
    track = Track.open(config["scheduler"]["track_dir"])
    assert [s.metadata["warm_start"] for s in track] == ["scratch", warm_start]
    assert bool(track[1].features["revived"].all()) == (warm_start == "scratch")
    cosine = track[1].features["decoder_cosine_previous"].median()
    assert (cosine < 0.5) == (warm_start == "scratch")
    assert json.loads((track.path / "track.json").read_text())["schema"] == 1


def test_a_series_begins_from_an_imported_sae_and_is_complete_afterwards(
    config: dict[str, Any], fit_here: Run, tmp_path: Path
) -> None:
    config["scheduler"]["steps"] = [10]
    assert fit_here(config).returncode == 0
    main(["export", str(tmp_path / "run"), "--format", "saelens", "--step", "10", "--to", str(tmp_path / "out")])
    main(["import", str(tmp_path / "out/step10/gpt_neox.layers.0"), "--as", str(tmp_path / "imported")])
    config["scheduler"] |= {"track_dir": str(tmp_path / "back"), "steps": [2, 10], "direction": "backward"}
    config["model"]["start"] = str(tmp_path / "imported")
    done = fit_here(config)
    assert done.returncode == 0, done.stderr
    assert "from step" in done.stdout
    before = hashes(tmp_path / "back")
    again = fit_here(config)
    assert "complete; nothing was changed" in again.stdout
    assert hashes(tmp_path / "back") == before
    events = EventAccumulator(str(tmp_path / "back" / "tensorboard"))
    events.Reload()
    assert sorted(event.step for event in events.Scalars("track/fvu")) == [2, 10]
