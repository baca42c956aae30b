import hashlib
import json
import logging
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXForCausalLM

from saetrack.lm import files, hub_listing
from saetrack.lm.checkpoints import (
    FolderSource,
    HubSource,
    ListSource,
    LLMCheckpoint,
    PretrainSource,
    RepositoriesSource,
    commit_sha,
    load_llm,
    source_from_string,
    weight_hash,
)

REPO = "someone/tiny"


def commit_name(revision: str) -> str:
    """A stand-in for a commit: 40 hex digits."""
    return hashlib.sha1(revision.encode(), usedforsecurity=False).hexdigest()


def add_revision(cache: Path, revision: str, folder: Path, skip: tuple[str, ...] = ()) -> None:
    """Lay a folder into a cache as huggingface_hub does: blobs, symlinks in a snapshot, and a ref to it."""
    repo = cache / "models--someone--tiny"
    snapshot = repo / "snapshots" / commit_name(revision)
    for path in (repo / "refs", repo / "blobs", snapshot):
        path.mkdir(parents=True, exist_ok=True)
    (repo / "refs" / revision).write_text(commit_name(revision))
    for file in folder.iterdir():
        if file.name in skip:
            continue
        content = file.read_bytes()
        large = file.suffix in (".safetensors", ".bin")
        name = (hashlib.sha256 if large else hashlib.sha1)(content).hexdigest()
        (repo / "blobs" / name).write_bytes(content)
        if not (snapshot / file.name).is_symlink():
            (snapshot / file.name).symlink_to(Path("../../blobs") / name)


@pytest.fixture
def hub_cache(tmp_path: Path, tiny_series: Path) -> Path:
    """Revisions step2, step10 (no tokenizer), step1 (the weights of step2), step4 (no weights) and main."""
    cache = tmp_path / "hub"
    add_revision(cache, "step2", tiny_series / "step2")
    add_revision(cache, "step10", tiny_series / "step10", skip=("tokenizer.json", "tokenizer_config.json"))
    add_revision(cache, "step1", tiny_series / "step2")
    add_revision(cache, "step4", tiny_series / "step4", skip=("model.safetensors", "tokenizer.json"))
    add_revision(cache, "main", tiny_series / "step10")
    return cache


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub_listing.forget_hub()
    yield
    hub_listing.forget_hub()


# Folders


@pytest.mark.parametrize("name", ["step{}", "checkpoint-{}", "step-{}", "step{:06d}"])
def test_folders_are_ordered_by_number_and_others_are_skipped(tmp_path: Path, name: str) -> None:
    for step in (1000, 2, 10, 0):
        (tmp_path / name.format(step)).mkdir()
    for other in (".step3", "resume", "step", "final-step7"):
        (tmp_path / other).mkdir()
    series = FolderSource(tmp_path).checkpoints()
    assert [checkpoint.step for checkpoint in series] == [0, 2, 10, 1000]
    assert [Path(checkpoint.model).name for checkpoint in series] == [name.format(s) for s in (0, 2, 10, 1000)]
    assert {checkpoint.revision for checkpoint in series} == {None}


def test_tokens_seen_are_read_from_the_trainers_state(tmp_path: Path) -> None:
    for step, state in ((1, {"num_input_tokens_seen": 512}), (2, {"num_input_tokens_seen": 0}), (3, {})):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    assert [checkpoint.tokens for checkpoint in FolderSource(tmp_path).checkpoints()] == [512, None, None]


def test_two_folders_of_one_step_are_refused(tmp_path: Path) -> None:
    for name in ("step4", "checkpoint-4", "step1"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r": checkpoint-4 and step4 are both .* of step 4\. Move one"):
        FolderSource(tmp_path).checkpoints()


def test_a_folder_without_checkpoints_says_what_it_holds(tmp_path: Path, tiny_series: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not a folder.*`path`"):
        FolderSource(tmp_path / "nowhere").checkpoints()
    (tmp_path / "epoch3").mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected folders named step\{N\}.*found epoch3"):
        FolderSource(tmp_path).checkpoints()
    with pytest.raises(FileNotFoundError, match="found one model; give the folder above it"):
        FolderSource(tiny_series / "step4").checkpoints()


# Lists


@pytest.mark.parametrize("steps", [(1, 10, 4), (1, 4, 4)], ids=["unordered", "repeated"])
def test_a_list_with_steps_out_of_order_is_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"strictly increasing.* step 4 \(m@b\) follows step \d+ .* at position 2"):
        ListSource([LLMCheckpoint("m", "b", step) for step in steps])


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ListSource\.checkpoints is empty"):
        ListSource([])


# Repositories


def test_repositories_that_are_one_checkpoint_each_are_a_series() -> None:
    repos = ["T/Tiny-1.1B-intermediate-step-1431k-3T", "T/Tiny-1.1B-step-50K-105b"]
    series = RepositoriesSource(repos, tokenizer="T/Tiny").checkpoints()
    assert [(c.model, c.revision, c.step, c.tokens) for c in series] == [
        (repos[1], None, 50_000, 105 * 10**9),
        (repos[0], None, 1_431_000, 3 * 10**12),
    ]
    with pytest.raises(ValueError, match=r"'google/multiberts-seed_0' does not say its step.*ListSource"):
        RepositoriesSource(["google/multiberts-seed_0"])


def test_the_registry_and_a_chosen_branch_reach_a_hub_series() -> None:
    names = ["stage1-step1000-tokens5B", "stage2-ingredient1-step10-tokens1B", "stage2-ingredient2-step10-tokens1B"]
    source = HubSource("allenai/OLMo-2-1124-7B", revisions=names, ingredient=2)
    assert [(c.step, c.revision) for c in source.checkpoints()] == [(1000, names[0]), (928_656, names[2])]
    with pytest.raises(ValueError, match=r"OLMo-2-1124-7B: .* parallel branches.*`ingredient`"):
        HubSource("allenai/OLMo-2-1124-7B", revisions=names).checkpoints()
    assert HubSource("EleutherAI/pythia-70m", revisions=["step2"]).checkpoints()[0].tokens == 2 * 2_097_152


# Tokenizers


def test_the_tokenizer_is_pinned_to_the_last_checkpoint_that_has_one(
    tmp_path: Path, make_series: Callable[..., Path]
) -> None:
    make_series(tmp_path, steps=[2, 10])
    make_series(tmp_path, steps=[11], tokenizer=False)
    source = FolderSource(tmp_path)
    assert source.tokenizer_name == (str(tmp_path / "step10"), None)
    assert source.tokenizer().bos_token_id == 0
    assert ListSource(source.checkpoints()).tokenizer_name == (str(tmp_path / "step10"), None)
    assert FolderSource(tmp_path, tokenizer=str(tmp_path / "step2")).tokenizer_name == (str(tmp_path / "step2"), None)


def test_a_tokenizer_may_lie_beside_the_checkpoints(tmp_path: Path, make_series: Callable[..., Path]) -> None:
    make_series(tmp_path, steps=[2], tokenizer=False)
    with pytest.raises(FileNotFoundError, match=r"has a tokenizer\. Save one there"):
        _ = FolderSource(tmp_path).tokenizer_name
    with pytest.raises(FileNotFoundError, match=r"ListSource\.tokenizer"):
        _ = ListSource(FolderSource(tmp_path).checkpoints()).tokenizer_name
    make_series(tmp_path / "other", steps=[2])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "other" / "step2" / name, tmp_path / name)
    assert FolderSource(tmp_path).tokenizer_name == (str(tmp_path), None)
    assert len(FolderSource(tmp_path).tokenizer()) == 64


# The Hub, offline


def test_the_cache_of_the_hub_is_a_series(hub_cache: Path) -> None:
    source = HubSource(REPO, cache_dir=hub_cache, tokens_per_step=2_097_152)
    series = source.checkpoints()
    assert [(c.step, c.revision) for c in series] == [(1, "step1"), (2, "step2"), (4, "step4"), (10, "step10")]
    assert [c.tokens for c in series] == [2_097_152 * step for step in (1, 2, 4, 10)]
    assert [commit_sha(c) for c in series] == [commit_name(f"step{step}") for step in (1, 2, 4, 10)]
    assert series[0] == LLMCheckpoint(REPO, "step1", 1, 2_097_152), "where the cache is, is no part of what it is"


def test_revisions_load_their_own_weights_from_the_cache(hub_cache: Path, tiny_series: Path) -> None:
    series = {c.step: c for c in HubSource(REPO, cache_dir=hub_cache).checkpoints()}
    for step in (2, 10):
        expected = load_file(tiny_series / f"step{step}" / "model.safetensors")["gpt_neox.embed_in.weight"]
        assert torch.equal(load_llm(series[step]).get_input_embeddings().weight, expected)


def test_the_tokenizer_of_a_hub_series_is_that_of_the_last_revision_with_one(hub_cache: Path) -> None:
    source = HubSource(REPO, cache_dir=hub_cache)
    assert source.tokenizer_name == (REPO, "step2"), "step10 and step4 have none"
    assert source.tokenizer().bos_token_id == 0
    assert HubSource(REPO, cache_dir=hub_cache, steps=[4]).tokenizer_name == (REPO, "main")
    assert HubSource(REPO, cache_dir=hub_cache, tokenizer_revision="step1").tokenizer_name == (REPO, "step1")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in someone/tiny@step4.*`tokenizer_revision`"):
        HubSource(REPO, cache_dir=hub_cache, tokenizer_revision="step4").tokenizer()


def test_steps_and_revisions_choose_from_a_hub_series(hub_cache: Path) -> None:
    assert [c.step for c in HubSource(REPO, cache_dir=hub_cache, steps=[10, 2]).checkpoints()] == [2, 10]
    assert [c.step for c in HubSource(REPO, revisions=["step10", "step9"]).checkpoints()] == [9, 10]
    with pytest.raises(ValueError, match=r"no checkpoint of step 3, which `steps` asks for \(2 of 3"):
        HubSource(REPO, cache_dir=hub_cache, steps=[2, 3, 5]).checkpoints()
    with pytest.raises(ValueError, match=r"Revision 'main' of someone/tiny does not say its step"):
        HubSource(REPO, revisions=["step1", "main"]).checkpoints()


def test_a_repository_that_is_not_cached_says_how_to_fetch_it(tmp_path: Path) -> None:
    source = HubSource("no/where", cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"HF_HUB_OFFLINE is set.*`hf download no/where --revision"):
        source.checkpoints()
    with pytest.raises(FileNotFoundError, match=r"`hf download no/where --revision step3`"):
        load_llm(LLMCheckpoint("no/where", "step3", 3, cache_dir=str(tmp_path)))


def test_a_repository_without_steps_is_refused(tmp_path: Path, tiny_series: Path) -> None:
    add_revision(tmp_path, "main", tiny_series / "step1")
    with pytest.raises(ValueError, match=r"no revision named step\{N\} .* only main.*ListSource"):
        HubSource(REPO, cache_dir=tmp_path).checkpoints()


def test_a_revision_without_weights_is_named(hub_cache: Path) -> None:
    missing = HubSource(REPO, cache_dir=hub_cache, steps=[4]).checkpoints()[0]
    assert weight_hash(missing) is None
    with pytest.raises(FileNotFoundError, match=r"has no weights: expected model\.safetensors .* found config\.json"):
        load_llm(missing)


# The Hub, online


class FakeHub:
    """What HfApi answers for a repository with step9, step10 and main, without a network."""

    def list_repo_refs(self, repo: str) -> SimpleNamespace:
        assert repo == REPO
        return SimpleNamespace(branches=[SimpleNamespace(name=name) for name in ("main", "step10", "step9")])

    def model_info(self, repo: str, revision: str, files_metadata: bool) -> SimpleNamespace:
        assert files_metadata
        lfs = SimpleNamespace(sha256=hashlib.sha256(revision.encode()).hexdigest())
        weights = [SimpleNamespace(rfilename="pytorch_model.bin", lfs=lfs)]
        vocabulary = [SimpleNamespace(rfilename="tokenizer.json", lfs=None)] if revision == "step9" else []
        return SimpleNamespace(sha=commit_name(revision), siblings=weights + vocabulary)


class DeadHub:
    def list_repo_refs(self, repo: str) -> SimpleNamespace:
        raise ConnectionError("no route to host")

    def model_info(self, repo: str, revision: str, files_metadata: bool) -> SimpleNamespace:
        raise ConnectionError("no route to host")


@pytest.mark.usefixtures("online")
def test_the_hub_gives_order_commits_and_hashes_without_a_download(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hub_listing, "HfApi", FakeHub)
    source = HubSource(REPO, cache_dir=tmp_path)
    series = source.checkpoints()
    assert [c.step for c in series] == [9, 10]
    assert commit_sha(series[1]) == commit_name("step10")
    assert weight_hash(series[1]) == "sha256:" + hashlib.sha256(b"step10").hexdigest()
    assert source.tokenizer_name == (REPO, "step9")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("online")
def test_only_weights_and_configuration_are_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_llm: Callable[..., GPTNeoXForCausalLM]
) -> None:
    llm = make_llm(seed=3)
    llm.config.save_pretrained(tmp_path / "hub")
    torch.save(llm.state_dict(), tmp_path / "hub" / "pytorch_model.bin")
    (tmp_path / "hub" / "README.md").write_text("not wanted")
    weights = (tmp_path / "hub" / "pytorch_model.bin").read_bytes()
    downloaded: list[str] = []

    class OneRevision:
        def model_info(self, repo: str, revision: str, files_metadata: bool) -> SimpleNamespace:
            large = {"pytorch_model.bin": SimpleNamespace(sha256=hashlib.sha256(weights).hexdigest())}
            names = [path.name for path in (tmp_path / "hub").iterdir()]
            siblings = [SimpleNamespace(rfilename=name, lfs=large.get(name)) for name in names]
            return SimpleNamespace(sha=commit_name(revision), siblings=siblings)

    def download(repo: str, name: str, revision: str, cache_dir: str) -> str:
        assert revision == commit_name("step9") or not downloaded, "by the branch's name only the first, to note it"
        downloaded.append(name)
        wanted = [path.name for path in (tmp_path / "hub").iterdir() if path.name not in downloaded]
        add_revision(Path(cache_dir), "step9", tmp_path / "hub", skip=tuple(wanted))
        return ""

    monkeypatch.setattr(hub_listing, "HfApi", OneRevision)
    monkeypatch.setattr(files, "hf_hub_download", download)
    checkpoint = LLMCheckpoint(REPO, "step9", 9, cache_dir=str(tmp_path / "cache"))
    loaded = load_llm(checkpoint)
    assert sorted(downloaded) == ["config.json", "pytorch_model.bin"]
    assert torch.equal(loaded.get_input_embeddings().weight, llm.get_input_embeddings().weight)
    load_llm(checkpoint)
    assert len(downloaded) == 2, "what is there is not asked for again"


@pytest.mark.usefixtures("online")
def test_a_hub_out_of_reach_leaves_the_cache(
    monkeypatch: pytest.MonkeyPatch, hub_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hub_listing, "HfApi", DeadHub)
    with caplog.at_level(logging.WARNING):
        series = HubSource(REPO, cache_dir=hub_cache).checkpoints()
    assert [c.step for c in series] == [1, 2, 4, 10]
    assert "no route to host" in caplog.text
    assert commit_sha(series[0]) == commit_name("step1")


# Fingerprints


def test_the_fingerprint_is_the_sha256_of_the_file_in_a_folder_and_in_the_cache(
    hub_cache: Path, tiny_series: Path
) -> None:
    content = (tiny_series / "step2" / "model.safetensors").read_bytes()
    expected = "sha256:" + hashlib.sha256(content).hexdigest()
    assert weight_hash(LLMCheckpoint(str(tiny_series / "step2"), None, 2)) == expected
    assert weight_hash(LLMCheckpoint(REPO, "step1", 1, cache_dir=str(hub_cache))) == expected
    assert weight_hash(LLMCheckpoint(str(tiny_series / "step4"), None, 4)) != expected


def test_shards_are_hashed_in_the_order_of_their_names(
    tmp_path: Path, make_llm: Callable[..., GPTNeoXForCausalLM]
) -> None:
    make_llm(seed=0).save_pretrained(tmp_path, max_shard_size="8KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    digests = "".join(hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards)
    checkpoint = LLMCheckpoint(str(tmp_path), None, 0)
    expected = f"sha256-of-{len(shards)}-shards:{hashlib.sha256(digests.encode()).hexdigest()}"
    assert weight_hash(checkpoint) == expected
    assert load_llm(checkpoint).config.hidden_size == 16

    shards[1].unlink()
    assert weight_hash(checkpoint) is None
    with pytest.raises(FileNotFoundError, match=rf"lacks 1 of the {len(shards)} weight files.* {shards[1].name}"):
        load_llm(checkpoint)


# Loading


def test_an_llm_is_loaded_frozen_in_the_asked_dtype_and_without_a_word(
    tiny_series: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    llm = load_llm(FolderSource(tiny_series).checkpoints()[2], dtype="bfloat16")
    assert not llm.training
    assert not any(parameter.requires_grad for parameter in llm.parameters())
    assert {parameter.dtype for parameter in llm.parameters()} == {torch.bfloat16}
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ValueError, match=r"dtype of the LLM is 'fp16'; expected float32"):
        load_llm(FolderSource(tiny_series).checkpoints()[2], dtype="fp16")


def test_weights_that_are_not_in_the_file_are_not_made_up(tmp_path: Path, tiny_series: Path) -> None:
    folder = Path(shutil.copytree(tiny_series / "step2", tmp_path / "step2"))
    weights = load_file(folder / "model.safetensors")
    del weights["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"step 2 .* no value for 1 .* gpt_neox\.layers\.1\.mlp\.dense_h_to_4h\.weight"
    ):
        load_llm(LLMCheckpoint(str(folder), None, 2))


def test_truncated_weights_are_named(tmp_path: Path, tiny_series: Path) -> None:
    folder = Path(shutil.copytree(tiny_series / "step2", tmp_path / "step2"))
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    checkpoint = LLMCheckpoint(str(folder), None, 2)
    assert weight_hash(checkpoint) is None
    with pytest.raises(ValueError, match=r"weights of step 2 .* damaged"):
        load_llm(checkpoint)


SWAPS = """
import sys, warnings
from pathlib import Path
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.utils import logging
from saetrack.lm import LLMCheckpoint, load_llm, read_activations

logging.disable_progress_bar()
folder = sys.argv[1]
GPTNeoXForCausalLM(GPTNeoXConfig(
    vocab_size=2000, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=1024,
    max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
)).save_pretrained(folder)
tokens = torch.arange(128).reshape(2, 64)
resident = []
for step in range(20):
    llm = load_llm(LLMCheckpoint(folder, None, step))
    read_activations(llm, tokens, ["gpt_neox.layers.4"])
    del llm
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident.append(pages * 4096 / 1e6)
print(*resident)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of resident memory")
def test_twenty_swaps_leave_memory_where_the_second_left_it(tmp_path: Path) -> None:
    script = [sys.executable, "-c", textwrap.dedent(SWAPS), str(tmp_path)]
    output = subprocess.run(script, capture_output=True, text=True, check=True)
    resident = [float(megabytes) for megabytes in output.stdout.split()]
    weights = (tmp_path / "model.safetensors").stat().st_size / 1e6
    assert weights > 20
    assert resident[-1] < 1.05 * resident[1]
    assert resident[-1] - resident[1] < weights, "less than one LLM may stay behind"


# Sources by name


def test_a_pretraining_source_makes_its_folder_and_then_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_series: Callable[..., Path]
) -> None:
    calls: list[tuple[Path, object]] = []

    def pretrain(folder: Path, config: object) -> None:
        calls.append((folder, config))
        make_series(folder, steps=[0, 3])

    stand_in = ModuleType("saetrack.lm.pretrain")
    vars(stand_in).update(pretrain=pretrain, PretrainConfig=lambda: "the defaults")
    monkeypatch.setitem(sys.modules, "saetrack.lm.pretrain", stand_in)
    source = PretrainSource(tmp_path / "llm")
    source.prepare()
    assert calls == [(tmp_path / "llm", "the defaults")]
    assert source.checkpoints() == FolderSource(tmp_path / "llm").checkpoints()
    assert source.tokenizer_name == (str(tmp_path / "llm" / "step3"), None)


def test_a_word_is_a_folder_or_a_repository(tiny_series: Path) -> None:
    assert isinstance(source_from_string(str(tiny_series)), FolderSource)
    assert isinstance(source_from_string("EleutherAI/pythia-14m"), HubSource)
    for wrong in ("gpt", "./runs/llm", "a/b/c", ""):
        with pytest.raises(ValueError, match="neither a folder nor a repository"):
            source_from_string(wrong)
