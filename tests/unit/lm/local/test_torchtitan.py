import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata
from transformers import LlamaConfig

from saetrack.lm import TorchtitanSource, audit, load_llm, problems, read_activations, source_from_string
from saetrack.lm.local.dcp import read_tensors, tensor_shapes
from saetrack.lm.local.torchtitan import halves

Build = Callable[[int], nn.Module]
CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
}


class Progress:
    """What torchtitan keeps of itself: no tensor, so it is a pickle inside of the checkpoint."""


def save(folder: Path, module: nn.Module, prefix: str = "", **more: Any) -> Path:
    """As torchtitan does: the weights at the top, the optimizer's state and its own progress beside them."""
    state = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    moments = {f"optimizer.state.{name}.exp_avg": torch.zeros(2) for name in state}
    with warnings.catch_warnings(action="ignore"):
        dcp.save({**state, **moments, "train_state": Progress(), **more}, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture
def config(tmp_path: Path) -> str:
    LlamaConfig(**CONFIG).save_pretrained(tmp_path / "assets")
    return str(tmp_path / "assets")


@pytest.mark.parametrize("prefix", ["", "model."], ids=["as now", "as it was"])
def test_the_llama_computes_what_torchtitans_does(
    tmp_path: Path, config: str, llama: Build, ids: Tensor, prefix: str
) -> None:
    theirs = llama(0)
    save(tmp_path / "step-1000", theirs, prefix)
    (checkpoint,) = TorchtitanSource(tmp_path, config).checkpoints()
    assert checkpoint.step == 1000
    ours = load_llm(checkpoint)
    torch.testing.assert_close(ours(ids).logits, theirs(ids), rtol=1e-5, atol=1e-5)
    seen = {}
    theirs.layers["0"].register_forward_hook(lambda _m, _i, output: seen.update(x=output))
    theirs(ids)
    there = read_activations(ours, ids, ["model.layers.0"])["model.layers.0"]
    torch.testing.assert_close(there, seen["x"], rtol=1e-5, atol=1e-5)


def test_one_matrix_for_both_ends_may_be_saved_once(tmp_path: Path, llama: Build, ids: Tensor) -> None:
    theirs = llama(0)
    theirs.output.weight = theirs.tok_embeddings.weight
    state = theirs.state_dict()
    del state["output.weight"]
    LlamaConfig(**CONFIG, tie_word_embeddings=True).save_pretrained(tmp_path / "assets")
    with warnings.catch_warnings(action="ignore"):
        dcp.save(state, checkpoint_id=tmp_path / "step-1", no_dist=True)
    source = TorchtitanSource(tmp_path, str(tmp_path / "assets"))
    torch.testing.assert_close(load_llm(source.checkpoints()[0])(ids).logits, theirs(ids), rtol=1e-5, atol=1e-5)
    save(tmp_path / "step-2", llama(1))
    with pytest.raises(ValueError, match=r"step-2 has an output\.weight of its own.*tie_word_embeddings"):
        load_llm(source.checkpoints()[1])


def test_a_series_is_ordered_audited_and_has_its_tokenizer_beside_the_config(
    tmp_path: Path, config: str, llama: Build, tiny_tokenizer: Any
) -> None:
    for step, seed in ((10, 1), (2, 0), (1, 0)):
        save(tmp_path / f"step-{step}", llama(seed))
    (tmp_path / "step-20").mkdir()
    source = TorchtitanSource(tmp_path, config)
    assert [c.step for c in source.checkpoints()] == [1, 2, 10], "step-20 has no .metadata, so it is being written"
    rows = audit(source.checkpoints())
    assert [row.equal_to for row in rows] == [None, 1, None]
    assert len(problems(rows)) == 1
    with pytest.raises(FileNotFoundError, match="come without a tokenizer"):
        _ = source.tokenizer_name
    tiny_tokenizer.save_pretrained(config)
    assert TorchtitanSource(tmp_path, config).tokenizer_name == (config, None)
    with pytest.raises(ValueError, match=r"checkpoints of torchtitan.*`class_path: TorchtitanSource`.*`config`"):
        source_from_string(str(tmp_path))


def test_shards_are_put_together(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(6, 4)
    folder = save(tmp_path / "step-1", nn.Linear(1, 1), part_0=whole[:2].clone(), part_1=whole[2:].clone())
    path = folder / ".metadata"
    metadata: Metadata = pickle.loads(path.read_bytes())
    entries, stored = metadata.state_dict_metadata, metadata.storage_data
    first, second = entries.pop("part_0"), entries.pop("part_1")
    second.chunks[0].offsets = torch.Size([2, 0])
    first.size, first.chunks = whole.shape, [first.chunks[0], second.chunks[0]]
    entries["part"] = first
    for index, info in list(stored.items()):
        if index.fqn.startswith("part_"):
            offset = torch.Size([0, 0] if index.fqn == "part_0" else [2, 0])
            stored[type(index)("part", offset)] = info
            del stored[index]
    path.write_bytes(pickle.dumps(metadata))
    assert tensor_shapes(folder)["part"] == (6, 4)
    assert torch.equal(read_tensors(folder, ["part"])["part"], whole)
    first.chunks.pop()
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"the shards of part are not the whole tensor"):
        read_tensors(folder, ["part"])


def test_rows_of_each_head_change_from_pairs_to_halves() -> None:
    rows = torch.arange(8)[:, None].expand(8, 3)
    assert halves(rows, heads=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


# What would run


class Bomb:
    """Unpickling it would make a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.target}",)


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path, config: str, llama: Build) -> None:
    mark = tmp_path / "ran"
    folder = save(tmp_path / "step-1", llama(0), dataloader=Bomb(mark))
    (checkpoint,) = TorchtitanSource(tmp_path, config).checkpoints()
    load_llm(checkpoint)
    assert not mark.exists()

    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = Bomb(mark)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"it names posix\.system\); nothing in it was run.*format_utils") as caught:
        load_llm(checkpoint)
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert mark.exists(), "it is a real one: a plain unpickler runs it"


def test_a_tensor_that_is_a_pickle_is_not_unpickled(tmp_path: Path) -> None:
    """What is no tensor, torch's own reader unpickles without restriction."""
    mark = tmp_path / "ran"
    folder = save(tmp_path / "step-1", nn.Linear(1, 1), x=Bomb(mark))
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.state_dict_metadata["x"] = metadata.state_dict_metadata["weight"]
    metadata.storage_data = {
        (type(i)("x", torch.Size([0, 0])) if i.fqn == "x" else i): info for i, info in metadata.storage_data.items()
    }
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"step-1 is damaged \(Weights only load failed"):
        read_tensors(folder, ["x"])
    assert not mark.exists()


# Bad input


def edit(folder: Path, change: Callable[[Metadata], None]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def lead_out(metadata: Metadata) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "../step-2/__0_0.distcp"


def forget(metadata: Metadata) -> None:
    for index in [i for i in metadata.storage_data if i.fqn == "norm.weight"]:
        del metadata.storage_data[index]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without(module: nn.Module, name: str) -> nn.Module:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, None)
    return module


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: truncate(f / "__0_0.distcp"), r"step-1 is damaged"),
        (lambda f: truncate(f / ".metadata"), r"\.metadata is damaged, or no metadata"),
        (lambda f: (f / ".metadata").write_bytes(b""), r"\.metadata is damaged, or no metadata"),
        (lambda f: (f / ".metadata").write_bytes(pickle.dumps([1])), r"\.metadata is damaged, .*it holds a list"),
        (lambda f: (f / "__0_0.distcp").unlink(), r"lacks __0_0\.distcp, which its \.metadata names"),
        (lambda f: edit(f, lead_out), r"names the file \.\./step-2/__0_0\.distcp, which is outside of its folder"),
        (lambda f: edit(f, forget), r"the shards of norm\.weight are not the whole tensor"),
        (lambda f: save(f, nn.Linear(2, 2)), r"has no tensor layers\.0\.attention\.wk\.weight and \d+ more"),
    ],
    ids=["cut tensors", "cut metadata", "empty", "another pickle", "no file", "leads out", "forgotten", "another LLM"],
)
def test_a_bad_checkpoint_is_named_in_one_line(
    tmp_path: Path, config: str, llama: Build, spoil: Callable[[Path], Any], message: str
) -> None:
    save(tmp_path / "step-2", llama(0))
    folder = save(tmp_path / "step-1", llama(0))
    spoil(folder)
    checkpoint = TorchtitanSource(tmp_path, config).checkpoints()[0]
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_llm(checkpoint)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert audit([checkpoint])[0].fault == str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, r"has no tensor layers\.2\.attention\.wk\.weight"),
        ({"num_hidden_layers": 1}, r"has a tensor layers\.1\.attention\.wk\.weight and 8 more that the LLM of"),
        (
            {"intermediate_size": 40},
            r"w1\.weight has shape \(48, 32\), but by the config\.json .* \(40, 32\)",
        ),
        (
            {"attention_bias": True},
            r"config\.json of .* has model\.layers\.0\.self_attn\.q_proj\.bias, which",
        ),
        ({"model_type": "gpt2"}, r"config\.json of .* is of a gpt2; expected one of a llama"),
        (None, r"There is no config\.json of a Llama in"),
    ],
)
def test_a_config_of_another_llm_is_named(
    tmp_path: Path, config: str, llama: Build, change: dict[str, Any] | None, message: str
) -> None:
    save(tmp_path / "step-1", llama(0))
    path = Path(config, "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}) if change else "{")
    with pytest.raises(ValueError, match=message) as caught:
        load_llm(TorchtitanSource(tmp_path, config).checkpoints()[0])
    assert "\n" not in str(caught.value)
