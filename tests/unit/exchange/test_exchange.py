import json
import pickle
import sys
import types
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from saetrack.analysis import Analysis
from saetrack.analysis.dictionaries import Dictionaries
from saetrack.analysis.drift import Drift
from saetrack.analysis.quality import Quality
from saetrack.cli import main
from saetrack.exchange import ImportedFacts, export_track, import_map, import_sae
from saetrack.lm import LLMCheckpoint, TokenRows
from saetrack.sae import SAE, GatedSAE, TopKSAE, sae_record
from saetrack.sae.formats import WRITERS, Origin, detect_format, read_foreign
from saetrack.track import Track

HOOKPOINT = "gpt_neox.layers.1"
STEPS = (0, 64)
Run = Callable[..., tuple[int, str, str]]


def random_sae(seed: int, cls: type[SAE] = TopKSAE) -> SAE:
    sae: SAE = TopKSAE(4, 3, k=5) if cls is TopKSAE else GatedSAE(4, 3)
    generator = torch.Generator().manual_seed(seed)
    for value in sae.state_dict().values():
        value.copy_(torch.randn(value.shape, generator=generator))
    return sae.requires_grad_(False)


def write_track(path: Path, cls: type[SAE] = TopKSAE) -> Track:
    rows = TokenRows(np.arange(8).reshape(2, 4), np.zeros((2, 4), dtype=np.int32), 0)
    facts = {"saetrack": "0.1.0", "model": "org/llm", "hookpoint": HOOKPOINT, "d_in": 4, "d_sae": 12}
    facts |= {"context_size": 4, "bos_token_id": 0, "tokenizer": ["org/llm", None]}
    track = Track.create(path / HOOKPOINT, facts, {"selection": rows, "evaluation": rows})
    for position, step in enumerate(STEPS):
        sae = random_sae(position, cls)
        llm = asdict(LLMCheckpoint("org/llm", f"step{step}", step, 1000 * step))
        numbers = {"fvu": 0.125, "l0": 3.0, "dead_share": 0.0, "ce_recovered_zero": None}
        facts = {"llm": {**llm, "commit": None}, "sae": sae_record(sae), "warm_start": "prior", **numbers}
        track.write(position, sae, facts, {"mean": torch.zeros(4)}, pd.DataFrame({"feature": range(12)}))
    return track


@pytest.fixture
def track(tmp_path: Path) -> Track:
    return write_track(tmp_path / "run")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """``saetrack`` with these arguments: exit status, output, errors."""

    def call(*args: object) -> tuple[int, str, str]:
        status = 0
        try:
            main([str(arg) for arg in args])
        except SystemExit as stop:
            status = int(stop.code or 0)
        out = capsys.readouterr()
        return status, out.out, out.err

    return call


@pytest.mark.parametrize("library", WRITERS)
def test_every_snapshot_gets_a_folder_by_step_and_hookpoint(library: str, track: Track, tmp_path: Path) -> None:
    folders = export_track(track, library, "all", tmp_path / "out")
    assert folders == [tmp_path / "out" / f"step{step}" / HOOKPOINT for step in STEPS]
    for snapshot, folder in zip(track, folders, strict=True):
        assert detect_format(folder) == library
        x = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(read_foreign(folder).sae(x), snapshot.sae()(x), rtol=1e-5, atol=1e-5)


def test_an_exported_track_is_a_track_with_a_card_that_gives_its_quality(track: Track, tmp_path: Path) -> None:
    export_track(track, "saetrack", "all", tmp_path / "out", "me/tracked")
    again = Track.open(tmp_path / "out")
    assert again.steps == list(STEPS)
    assert (again.tokens("selection").tokens == track.tokens("selection").tokens).all()
    assert torch.equal(again[1].sae().W_dec, track[1].sae().W_dec)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 64 | 64,000 | 0.125 | 3 | 0 | - |" in card
    assert 'Track.open("hf://me/tracked")' in card
    assert "base_model: org/llm" in card
    assert "snapshots/0001-step64" in card


def test_the_card_says_how_the_snapshots_came_to_be(
    track: Track, write_map: Callable[..., Path], tmp_path: Path
) -> None:
    export_track(track, "saetrack", "all", tmp_path / "out")
    assert "Each was trained from a neighbour in the series" in (tmp_path / "out" / "README.md").read_text()
    made = import_map(write_map([0, 10]), tmp_path / "new", ImportedFacts(hookpoint=HOOKPOINT), None)
    export_track(made, "saetrack", "all", tmp_path / "again")
    assert "trained elsewhere, and imported from files of reference." in (tmp_path / "again" / "README.md").read_text()


def test_a_step_is_read_from_the_name_of_the_revision(tmp_path: Path) -> None:
    def imported(revision: str, model: str = "org/llm", **given: Any) -> tuple[int, int | None]:
        (folder := tmp_path / f"{model}-{revision}-{given}").mkdir(parents=True)
        WRITERS["saelens"](random_sae(0), folder, Origin(model, revision, HOOKPOINT))
        made = import_sae(str(folder), folder / "track", ImportedFacts(**given))
        return made[0].llm.step, made[0].llm.tokens

    assert imported("step-001000-2BT") == (1000, 2 * 10**9)
    assert imported("step64", "EleutherAI/pythia-70m") == (64, 64 * 2**21)
    assert imported("stage2-ingredient1-step10-tokens1B", "allenai/OLMo-2-1124-7B") == (928_656, 928_656 * 2**22)
    assert imported("step64", step=7) == (7, None)
    for unknown in ("stage2-step10", "main", "128"):
        with pytest.raises(ValueError, match="does not say what `--step` is"):
            imported(unknown)


def test_one_step_is_exported_alone(track: Track, tmp_path: Path) -> None:
    export_track(track, "saetrack", "64", tmp_path / "out")
    assert Track.open(tmp_path / "out").steps == [64]


def test_export_errors_are_one_line_and_write_nothing(track: Track, run: Run, tmp_path: Path) -> None:
    to = tmp_path / "out"
    for args, message in {
        ("--format", "saelens", "--step", "65"): "has no snapshot of LLM step 65; the nearest are [0, 64]",
        ("--format", "saelens", "--step", "last"): "--step is 'last'; expected all, or the LLM step of a snapshot",
        ("--format", "gguf"): "invalid choice: 'gguf'",
    }.items():
        status, out, err = run("export", track.path, *args, "--to", to)
        assert status > 0
        assert message in err
        assert err.count("\n") == 1
        assert out == ""
    assert not to.exists()


def test_what_the_other_side_cannot_hold_leaves_no_folder(run: Run, tmp_path: Path) -> None:
    track = write_track(tmp_path / "gated", GatedSAE)
    _, _, err = run("export", track.path, "--format", "sparsify", "--to", tmp_path / "out")
    assert "sparsify cannot hold a GatedSAE: it keeps a fixed number of latents" in err
    assert not list((tmp_path / "out").rglob("*.*"))


def test_an_export_never_overwrites(track: Track, tmp_path: Path) -> None:
    export_track(track, "saelens", "64", tmp_path / "out")
    with pytest.raises(FileExistsError, match="is there already"):
        export_track(track, "saelens", "all", tmp_path / "out")
    assert not (tmp_path / "out" / "step0").exists()


@pytest.mark.parametrize("library", WRITERS)
def test_export_then_import_gives_a_track_of_one_snapshot(library: str, track: Track, run: Run, tmp_path: Path) -> None:
    run("export", track.path, "--format", library, "--step", "64", "--to", tmp_path / "out")
    source, new = tmp_path / "out" / "step64" / HOOKPOINT, tmp_path / "new" / HOOKPOINT
    more = () if library in ("saelens", "sparsify") else ("--model", "org/llm", "--step", "64")
    status, out, _ = run("import", source, "--as", new, *more)
    assert status == 0
    assert "1 snapshot of saetrack.sae.TopKSAE" in out
    made = Track.open(new)
    assert made.steps == [64]
    assert made[0].llm.model == "org/llm"
    assert made.facts["hookpoint"] == HOOKPOINT
    assert made[0].metadata["imported"] == {"format": library, "source": str(source)}
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(made[0].sae()(x), track[1].sae()(x), rtol=1e-5, atol=1e-5)
    assert len(made.metrics()) == 1
    with pytest.raises(ValueError, match="holds no token rows, for it was imported"):
        made.tokens("selection")


@pytest.mark.parametrize(
    ("origin", "given", "message"),
    [
        (Origin(None, "step1", HOOKPOINT), {}, "does not say what `--model` is"),
        (Origin("org/llm", None, HOOKPOINT), {}, "does not say what `--step` is"),
        (Origin("org/llm", "step1", None), {}, "does not say what `--hookpoint` is"),
        (Origin("m", "step1", "blocks.4.hook_resid_pre"), {}, "`--hookpoint gpt_neox.layers.3` in a Pythia"),
        (Origin("m", "step1", "blocks.4.hook_resid_post"), {}, "`--hookpoint transformer.h.4` in a GPT-2"),
    ],
)
def test_what_neither_file_nor_options_say_is_asked_for_and_no_track_is_left(
    origin: Origin, given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "sae").mkdir()
    WRITERS["saelens"](random_sae(0), tmp_path / "sae", origin)
    with pytest.raises(ValueError, match=message) as error:
        import_sae(str(tmp_path / "sae"), tmp_path / "new", ImportedFacts(**given))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_an_import_never_overwrites_a_track(track: Track, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="choose another name with `--as`"):
        import_sae(str(track[1].path), track.path, ImportedFacts())
    assert track.steps == list(STEPS)


def test_a_source_that_is_nothing_is_named(run: Run, tmp_path: Path) -> None:
    _, _, err = run("import", tmp_path / "none", "--as", tmp_path / "new")
    assert "is neither a file or folder here nor the name of a repository" in err
    assert err.count("\n") == 1


@pytest.fixture
def write_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A map with its pickles, whose classes are named as the reference's."""

    def write(indices: list[int], model: str = "pythia-70m") -> Path:
        names = {"SAEGroup": "sae_training.sae_group", "SparseAutoencoder": "sae_training.sparse_autoencoder"}
        classes = {}
        monkeypatch.setitem(sys.modules, "sae_training", types.ModuleType("sae_training"))
        for name, module in names.items():
            classes[name] = type(name, (), {"__module__": module})
            monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
            setattr(sys.modules[module], name, classes[name])
        for index in indices:
            group, member, config = (classes[n]() for n in ("SAEGroup", "SparseAutoencoder", "SparseAutoencoder"))
            config.model_name, config.hook_point = model, "blocks.2.hook_resid_pre"
            member.cfg, member._parameters = config, dict(random_sae(index).state_dict())
            group.autoencoders = [member]
            (tmp_path / f"{index}.pkl").write_bytes(pickle.dumps(group))
        path = tmp_path / "model_save_map20240101-000000.json"
        path.write_text(json.dumps({str(index): f"{index}.pkl" for index in indices}))
        return path

    return write


def test_a_map_of_the_reference_is_a_whole_track_with_the_steps_of_pythia(
    write_map: Callable[..., Path], run: Run, tmp_path: Path
) -> None:
    path = write_map([153, 0, 10, 11, 33])
    status, out, err = run("import", path, "--as", tmp_path / "new", "--hookpoint", HOOKPOINT)
    assert (status, err) == (0, "")
    assert "5 snapshots" in out
    made = Track.open(tmp_path / "new")
    assert made.steps == [0, 512, 1000, 23_000, 143_000]  # as its released tables pair them
    assert [s.llm.revision for s in made][1:3] == ["step512", "step1000"]
    assert made.facts["model"] == "EleutherAI/pythia-70m"
    assert torch.equal(made[2].tensor("W_dec"), random_sae(11).W_dec)
    assert made[0].features["decoder_cosine_previous"].isna().all()
    expected = torch.nn.functional.cosine_similarity(random_sae(10).W_dec, random_sae(11).W_dec)
    assert made[2].features["decoder_cosine_previous"].to_numpy() == pytest.approx(expected.numpy(), abs=1e-6)


@pytest.mark.parametrize("analysis", [Quality(), Drift(), Dictionaries()], ids=lambda a: type(a).__name__)
def test_an_analysis_of_what_was_not_measured_says_so(
    analysis: Analysis, write_map: Callable[..., Path], tmp_path: Path
) -> None:
    made = import_map(write_map([0, 10, 33]), tmp_path / "new", ImportedFacts(hookpoint=HOOKPOINT), None)
    with pytest.raises(ValueError, match=r"was imported, so .* `saetrack fit --model.start` begins one"):
        analysis.run(made)


def test_the_steps_of_stanford_gpt2_are_known(write_map: Callable[..., Path], tmp_path: Path) -> None:
    path = write_map([9, 10, 47, 48, 181, 301, 608], "stanford-gpt2-small-a")
    made = import_map(path, tmp_path / "new", ImportedFacts(hookpoint=HOOKPOINT), None)
    assert made.steps == [90, 100, 1950, 2000, 15_300, 93_000, 400_000]  # as its released tables pair them


def test_steps_that_are_given_go_before_those_that_are_known(write_map: Callable[..., Path], tmp_path: Path) -> None:
    facts = ImportedFacts(hookpoint=HOOKPOINT)
    made = import_map(write_map([0, 1]), tmp_path / "new", facts, {0: 50, 1: 20})
    assert made.steps == [20, 50]
    assert torch.equal(made[0].tensor("W_dec"), random_sae(1).W_dec)


@pytest.mark.parametrize(
    ("indices", "model", "args", "message"),
    [
        ([154], "pythia-70m", (), "the LLM step of index 154 of pythia-70m is not known"),
        ([3], "own-160m", (), "the LLM step of index 3 of own-160m is not known; give all of them"),
        ([3], "own-160m", ("--steps", '{"2": 5}'), "does not say the LLM step of index 3; add it"),
        ([2, 3], "own-160m", ("--steps", '{"2": 5, "3": 5}'), "gives two indices one LLM step"),
        ([3], "pythia-70m", ("--step", "5"), "--step and --revision are for one SAE"),
    ],
)
def test_a_map_whose_steps_are_not_known_is_refused_in_one_line(
    indices: list[int],
    model: str,
    args: tuple[str, ...],
    message: str,
    write_map: Callable[..., Path],
    run: Run,
    tmp_path: Path,
) -> None:
    path = write_map(indices, model)
    status, _, err = run("import", path, "--as", tmp_path / "new", "--hookpoint", HOOKPOINT, *args)
    assert status == 1
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()
