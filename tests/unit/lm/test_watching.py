"""A series that is still being written is what is complete of it, and ends when it says so."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import GPTNeoXForCausalLM

from saetrack.lm.checkpoints import FolderSource, HubSource, LLMCheckpoint, Watch, Watcher
from saetrack.lm.selection import Selection
from saetrack.lm.watching import Growing, unfinished


@pytest.fixture
def sharded(tmp_path: Path, make_llm: Callable[..., GPTNeoXForCausalLM]) -> Path:
    make_llm(seed=0).save_pretrained(tmp_path / "step2", max_shard_size="8KB")
    return tmp_path / "step2"


def watcher(folder: Path, until_step: int | None = None) -> Watcher:
    found = FolderSource(folder, watch=Watch(until_step, every_seconds=0.01)).watcher
    assert found is not None
    return found


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: None, None),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: cut(folder / "config.json"), "config.json is not whole"),
        (lambda folder: sorted(folder.glob("model-*"))[1].unlink(), "lacks 1 of the 4 weight files"),
        (lambda folder: cut(sorted(folder.glob("model-*"))[-1]), "model-00004-of-00004.safetensors is not whole"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "has no weights"),
        (lambda folder: (folder / "trainer_state.json").write_text('{"num_input'), "trainer_state.json is not whole"),
    ],
    ids=["whole", "no config", "half a config", "a shard missing", "a shard cut", "no index", "half a state"],
)
def test_a_folder_counts_when_all_of_it_is_there(
    sharded: Path, damage: Callable[[Path], object], reason: str | None
) -> None:
    assert len(list(sharded.glob("model-*"))) == 4
    damage(sharded)
    found = unfinished(LLMCheckpoint(str(sharded), None, 2))
    assert (found is None) if reason is None else (found is not None and reason in found)


@pytest.mark.parametrize("kept", [1.0, 0.9, 0.0], ids=["whole", "cut", "empty"])
def test_torch_archives_count_when_they_have_their_end(tmp_path: Path, tiny_series: Path, kept: float) -> None:
    (tmp_path / "step1").mkdir()
    shutil.copy(tiny_series / "step1" / "config.json", tmp_path / "step1")
    weights = tmp_path / "step1" / "pytorch_model.bin"
    torch.save({"a": torch.zeros(99)}, weights)
    weights.write_bytes(weights.read_bytes()[: int(kept * weights.stat().st_size)])
    assert (unfinished(LLMCheckpoint(str(tmp_path / "step1"), None, 1)) is None) == (kept == 1)


def test_the_series_so_far_ends_before_the_first_that_is_not_complete(
    tmp_path: Path, make_series: Callable[..., Path]
) -> None:
    watch = watcher(tmp_path / "llm")
    assert watch.look() == Growing([], ended=False)
    (tmp_path / "llm" / "tokenizer").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"llm holds no complete LLM checkpoint\. `fit` waits for one\."):
        FolderSource(tmp_path / "llm", watch=True).checkpoints()
    make_series(tmp_path / "llm", steps=[0, 1, 2, 4])
    weights = tmp_path / "llm" / "step2" / "model.safetensors"
    whole = weights.read_bytes()
    cut(weights)
    now = watch.look()
    assert ([c.step for c in now.series], now.ended) == ([0, 1], False)
    assert now.unfinished == f"{weights} is not whole"
    (tmp_path / "llm" / "done").touch()
    now = watch.look()
    assert ([c.step for c in now.series], now.ended) == ([0, 1, 2, 4], True), "the audit will say what is wrong"
    (tmp_path / "llm" / "done").unlink()
    weights.write_bytes(whole)
    now = watch.look()
    assert ([c.step for c in now.series], now.ended) == ([0, 1, 2, 4], False)


@pytest.mark.parametrize("begun", [b"", b"P", b"PK\x03", b"PK\x03\x04" + bytes(99)], ids=len)
def test_the_first_bytes_of_a_file_are_no_weights(
    begun: bytes, tmp_path: Path, make_series: Callable[..., Path]
) -> None:
    folder = make_series(tmp_path, steps=[1]) / "step1"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(begun)
    assert unfinished(LLMCheckpoint(str(folder), None, 1)) == f"{folder / 'pytorch_model.bin'} is not whole"


def test_shards_that_get_their_names_last_count_then(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*"))[1]
    hidden = shard.rename(shard.with_name(f"tmp-{shard.name}"))
    assert "lacks 1 of the 4 weight files" in str(unfinished(LLMCheckpoint(str(sharded), None, 1)))
    hidden.rename(shard)
    assert unfinished(LLMCheckpoint(str(sharded), None, 1)) is None


def test_a_checkpoint_that_is_written_anew_is_read_anew(tmp_path: Path, make_series: Callable[..., Path]) -> None:
    watch = watcher(make_series(tmp_path, steps=[0, 1]))
    assert len(watch.look().series) == 2
    (tmp_path / "step1").rename(tmp_path / "away")
    assert [c.step for c in watch.look().series] == [0]
    (tmp_path / "away").rename(tmp_path / "step1")
    cut(tmp_path / "step1" / "model.safetensors")
    assert [c.step for c in watch.look().series] == [0]


def test_tokens_that_are_noted_later_do_not_make_another_series(
    tmp_path: Path, make_series: Callable[..., Path]
) -> None:
    watch = watcher(make_series(tmp_path, steps=[0, 1]))
    before = watch.look().series
    (tmp_path / "step1" / "trainer_state.json").write_text(json.dumps({"num_input_tokens_seen": 64}))
    assert watch.look().series == before


@pytest.mark.parametrize(("until", "steps", "ended"), [(4, [0, 1, 4], True), (3, [0, 1], True), (5, [0, 1, 4], False)])
def test_until_step_ends_a_series(tiny_series: Path, tmp_path: Path, until: int, steps: list[int], ended: bool) -> None:
    for step in (0, 1, 4):
        shutil.copytree(tiny_series / f"step{step}", tmp_path / f"step{step}")
    now = watcher(tmp_path, until).look()
    assert ([c.step for c in now.series], now.ended) == (steps, ended)


def test_waiting_says_what_for_and_goes_on_when_it_comes(tmp_path: Path, make_series: Callable[..., Path]) -> None:
    watch = watcher(make_series(tmp_path, steps=[0]), until_step=9)
    said: list[str] = []
    pauses = 0

    def write() -> None:
        nonlocal pauses
        pauses += 1
        if pauses == 2:
            (tmp_path / "step1").mkdir()
        if pauses == 4:
            make_series(tmp_path, steps=[0, 1])

    assert [c.step for c in watch.wait(1, between=write, say=said.append).series] == [0, 1]
    first, second = said
    assert first == (
        f"Waiting for an LLM checkpoint after step 0 in {tmp_path}, with a look every 0.01 s; the series ends at "
        "step 9 or with a file `done` there."
    )
    assert second == f"{first} The next one is not complete: {tmp_path / 'step1'} has no config.json."


@pytest.mark.parametrize(
    ("text", "grows"),
    [
        ("all", True),
        ("every:3", True),
        ("dense:512+every:10", True),
        ("steps:0-64", True),
        ("tokens:1B-", True),
        ("log:20", False),
        ("0,1,2", False),
        ("paper:pythia-410m-deduped", False),
        ("every:3+every:2", False),
        ("log:3+all", False),
    ],
)
def test_choices_that_a_longer_series_would_change_are_known(text: str, grows: bool) -> None:
    selection = Selection(text)
    assert selection.keeps_growing == grows
    series = [LLMCheckpoint("llm", None, step, step * 10**9) for step in (*range(9), 16, 32, 64, 128, 512, 1000, 1100)]
    if grows:
        parts = [[c.step for c in selection.of(series[:n])] for n in range(3, len(series) + 1)]
        assert all(long[: len(short)] == short for short, long in pairwise(parts))


def test_options_that_make_no_sense_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"watch\.every_seconds is 0; it must be above 0\."):
        Watch(every_seconds=0)
    with pytest.raises(ValueError, match="A HubSource with `watch` takes what comes; leave `steps` out"):
        HubSource("me/llm", steps=[1], watch=True)
