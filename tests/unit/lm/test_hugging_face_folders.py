"""Folders in Hugging Face's format as they may lie there: whole, in shards, as ``.bin``, and spoiled."""

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPTNeoXForCausalLM

from saetrack.lm import FolderSource, ListSource, LLMCheckpoint, audit, load_llm

State = dict[str, Tensor]
INDEX = "pytorch_model.bin.index.json"
EMBEDDING = "gpt_neox.embed_in.weight"


@pytest.fixture
def llm(make_llm: Callable[..., GPTNeoXForCausalLM]) -> GPTNeoXForCausalLM:
    return make_llm(seed=5)


def safetensors(folder: Path, llm: GPTNeoXForCausalLM) -> None:
    llm.save_pretrained(folder)


def safetensors_shards(folder: Path, llm: GPTNeoXForCausalLM) -> None:
    llm.save_pretrained(folder, max_shard_size="8KB")


def bin_file(folder: Path, llm: GPTNeoXForCausalLM, **changes: Any) -> None:
    llm.config.save_pretrained(folder)
    torch.save({**llm.state_dict(), **changes}, folder / "pytorch_model.bin")


def bin_before_torch_1_6(folder: Path, llm: GPTNeoXForCausalLM) -> None:
    llm.config.save_pretrained(folder)
    torch.save(llm.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def bin_shards(folder: Path, llm: GPTNeoXForCausalLM) -> None:
    llm.config.save_pretrained(folder)
    state = llm.state_dict()
    of = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(state)}
    for shard in set(of.values()):
        torch.save({name: tensor for name, tensor in state.items() if of[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": of}))


FORMS = [safetensors, safetensors_shards, bin_file, bin_before_torch_1_6, bin_shards]


@pytest.mark.parametrize("write", FORMS, ids=lambda write: write.__name__)
def test_every_form_gives_the_same_weights(tmp_path: Path, llm: GPTNeoXForCausalLM, write: Callable[..., None]) -> None:
    write(tmp_path / "step5", llm)
    (checkpoint,) = FolderSource(tmp_path).checkpoints()
    (row,) = audit([checkpoint])
    assert row.fault is None
    assert row.weight_hash is not None
    loaded = load_llm(checkpoint).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in llm.state_dict().items())


class Bomb:
    """Unpickling it would make a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.target}",)


def cut(folder: Path, llm: GPTNeoXForCausalLM) -> None:
    bin_file(folder, llm)
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-200])


def text(folder: Path, llm: GPTNeoXForCausalLM) -> None:
    bin_file(folder, llm)
    (folder / "pytorch_model.bin").write_bytes(b"hello world" * 10)


def bomb(folder: Path, llm: GPTNeoXForCausalLM) -> None:
    bin_file(folder, llm, x=Bomb(folder / "ran"))


def shape(folder: Path, llm: GPTNeoXForCausalLM) -> None:
    bin_file(folder, llm, **{"gpt_neox.final_layer_norm.weight": torch.ones(3)})


def no_index(folder: Path, llm: GPTNeoXForCausalLM) -> None:
    bin_shards(folder, llm)
    (folder / INDEX).write_text("{")


def no_map(folder: Path, llm: GPTNeoXForCausalLM) -> None:
    bin_shards(folder, llm)
    (folder / INDEX).write_text('{"weight_map": {}}')


def leads_out(folder: Path, llm: GPTNeoXForCausalLM) -> None:
    bin_file(folder.parent / "other", llm)
    llm.config.save_pretrained(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../other/pytorch_model.bin"}}))


def unknown_type(folder: Path, llm: GPTNeoXForCausalLM) -> None:
    bin_file(folder, llm)
    (folder / "config.json").write_text('{"model_type": "nosuch"}')


def own_code(folder: Path, llm: GPTNeoXForCausalLM) -> None:
    bin_file(folder, llm)
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "nosuch", "auto_map": auto}))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()")


def whole(folder: Path, llm: GPTNeoXForCausalLM) -> None:
    bin_file(folder, llm)
    torch.save({**llm.state_dict(), EMBEDDING: llm.state_dict()[EMBEDDING].long()}, folder / "pytorch_model.bin")


def whole_safetensors(folder: Path, llm: GPTNeoXForCausalLM) -> None:
    llm.config.save_pretrained(folder)
    save_file({**llm.state_dict(), EMBEDDING: llm.state_dict()[EMBEDDING].long()}, folder / "model.safetensors")


def packed(folder: Path, llm: GPTNeoXForCausalLM) -> None:
    bin_file(folder, llm)
    with zipfile.ZipFile(folder / "packed", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("data.pkl", "version"):
            archive.writestr(f"archive/{name}", bytes(10**6))
    (folder / "packed").replace(folder / "pytorch_model.bin")


def deep(folder: Path, llm: GPTNeoXForCausalLM) -> None:
    bin_file(folder, llm)
    (folder / "config.json").write_text("[" * 100_000)


def no_object(folder: Path, llm: GPTNeoXForCausalLM) -> None:
    bin_file(folder, llm)
    (folder / "config.json").write_text("[]")


def wrong_type(folder: Path, llm: GPTNeoXForCausalLM) -> None:
    bin_file(folder, llm)
    (folder / "config.json").write_text(json.dumps({**llm.config.to_dict(), "hidden_size": "wide"}))


@pytest.mark.parametrize(
    ("write", "message", "audited"),
    [
        (cut, r"weights of step 5 .* are damaged", True),
        (text, r"weights of step 5 .* are damaged", False),
        (bomb, r"they hold objects of posix\.system; nothing was run", False),
        (
            shape,
            r"gpt_neox\.final_layer_norm\.weight of shape \(3,\), but by config\.json it is \(16,\)",
            False,
        ),
        (
            whole,
            r"has a tensor gpt_neox\.embed_in\.weight of (I64|torch\.int64); expected floating-point numbers",
            False,
        ),
        (whole_safetensors, r"has a tensor gpt_neox\.embed_in\.weight of I64; expected floating-point numbers", False),
        (packed, r"weights of step 5 .* are damaged \(it is packed, and would be larger than its file", True),
        (no_index, r"pytorch_model\.bin\.index\.json is damaged, or names no shards", True),
        (no_map, r"pytorch_model\.bin\.index\.json names no shards", True),
        (leads_out, r"lacks 1 of the 1 weight files .* \.\./other/pytorch_model\.bin", True),
        (unknown_type, r"has a config\.json that transformers .* does not know", True),
        (own_code, r"does not know .*set `trust_remote_code` of the .*, or SAETRACK_TRUST to the", True),
        (deep, r"has a config\.json that transformers .* does not know \(maximum recursion depth", True),
        (no_object, r"has a config\.json that transformers .* does not know", True),
        (wrong_type, r"has a config\.json that transformers .* does not know", True),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_bad_folder_is_named_in_one_line_and_nothing_in_it_is_run(
    tmp_path: Path, llm: GPTNeoXForCausalLM, write: Callable[..., None], message: str, audited: bool
) -> None:
    folder = tmp_path / "step5"
    write(folder, llm)
    checkpoint = LLMCheckpoint(str(folder), None, 5)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_llm(checkpoint)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (audit([checkpoint])[0].fault is not None) == audited
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("by", ["a list", "a folder", "the environment"])
def test_code_in_a_folder_runs_only_by_the_users_word(
    by: str, tmp_path: Path, llm: GPTNeoXForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saetrack.lm.trust._given", set())
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "step5"
    own_code(folder, llm)
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({**llm.config.to_dict(), "model_type": "nosuch", "auto_map": auto}))
    (folder / "evil.py").write_text(
        f"""
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
open({str(folder / "ran")!r}, "w").close()
class Config(GPTNeoXConfig):
    model_type = "nosuch"
class Model(GPTNeoXForCausalLM):
    config_class = Config
"""
    )
    checkpoint = LLMCheckpoint(str(folder), None, 5)
    ListSource([checkpoint])
    with pytest.raises(ValueError, match="does not know"):
        load_llm(checkpoint)
    assert not (folder / "ran").exists()
    monkeypatch.setenv("SAETRACK_TRUST", f",{tmp_path / 'other'}")  # nothing is not the folder one is in
    monkeypatch.chdir(tmp_path)
    FolderSource(tmp_path)
    with pytest.raises(ValueError, match="does not know"):
        load_llm(checkpoint)
    if by == "a list":
        ListSource([checkpoint], trust_remote_code=True)
    elif by == "a folder":
        FolderSource("../" + tmp_path.name, trust_remote_code=True)
    else:
        monkeypatch.setenv("SAETRACK_TRUST", f"some.factory,{tmp_path}")
    loaded = load_llm(checkpoint)
    assert (folder / "ran").exists()
    assert type(loaded).__name__ == "Model"
    assert torch.equal(loaded.get_input_embeddings().weight, llm.get_input_embeddings().weight)
