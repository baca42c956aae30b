import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saetrack.lm import (
    FolderSource,
    NanoGPTSource,
    audit,
    load_llm,
    problems,
    read_activations,
    release_memory,
    source_from_string,
)
from saetrack.lm.local.nanogpt import NanoGPTFormat

Write = Callable[..., torch.nn.Module]


def compiled(module: torch.nn.Module) -> dict[str, Tensor]:
    return {f"_orig_mod.{name}": tensor for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("form", ["plain", "compiled", "with masks", "head left out"])
def test_the_gpt2_computes_what_nanogpt_does(
    tmp_path: Path, nanogpt: Write, ids: Tensor, bias: bool, form: str
) -> None:
    theirs = nanogpt(tmp_path / "ckpt_100.pt", 100, bias=bias)
    state = compiled(theirs) if form == "compiled" else dict(theirs.state_dict())
    if form == "with masks":
        state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    if form == "head left out":
        del state["lm_head.weight"]
    nanogpt(tmp_path / "ckpt_100.pt", 100, bias=bias, model=state)
    (checkpoint,) = NanoGPTSource(tmp_path).checkpoints()
    ours = load_llm(checkpoint)
    torch.testing.assert_close(ours(ids).logits, theirs(ids), rtol=1e-5, atol=1e-5)
    seen = {}
    theirs.transformer["h"][0].register_forward_hook(lambda _m, _i, output: seen.update(x=output))
    theirs(ids)
    there = read_activations(ours, ids, ["transformer.h.0"])["transformer.h.0"]
    torch.testing.assert_close(there, seen["x"], rtol=1e-5, atol=1e-5)


def test_it_is_frozen_and_in_the_dtype_that_was_asked_for(tmp_path: Path, nanogpt: Write) -> None:
    nanogpt(tmp_path / "ckpt_1.pt", 1)
    before = torch.get_rng_state()
    ours = load_llm(NanoGPTSource(tmp_path).checkpoints()[0], "bfloat16")
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_it_is_freed_when_it_is_dropped(tmp_path: Path, nanogpt: Write) -> None:
    nanogpt(tmp_path / "ckpt_1.pt", 1)
    llm = load_llm(NanoGPTSource(tmp_path).checkpoints()[0])
    weights = [weakref.ref(parameter) for parameter in llm.parameters()]
    (tmp_path / "ckpt_1.pt").write_bytes(b"")  # as a run that goes on does: what is loaded is no longer of the file
    assert llm(torch.zeros(1, 2, dtype=torch.long)).logits.isfinite().all()
    del llm
    release_memory()
    assert [weight() for weight in weights] == [None] * len(weights)


def test_a_head_of_its_own_stays_one(tmp_path: Path, nanogpt: Write, ids: Tensor) -> None:
    theirs = nanogpt(tmp_path / "ckpt_1.pt", 1)
    state = {**theirs.state_dict(), "lm_head.weight": torch.randn(64, 16)}
    nanogpt(tmp_path / "ckpt_1.pt", 1, model=state)
    theirs.lm_head.weight = torch.nn.Parameter(state["lm_head.weight"])
    ours = load_llm(NanoGPTSource(tmp_path).checkpoints()[0])
    torch.testing.assert_close(ours(ids).logits, theirs(ids), rtol=1e-5, atol=1e-5)


def test_the_step_is_that_in_the_file_and_the_copy_is_left_out(tmp_path: Path, nanogpt: Write) -> None:
    for name, step in (("ckpt_2.pt", 2000), ("ckpt_1.pt", 1000), ("ckpt.pt", 2000), ("final.pt", 2500)):
        nanogpt(tmp_path / name, step)
    series = NanoGPTSource(tmp_path).checkpoints()
    assert [(c.step, Path(c.model).name, c.tokens) for c in series] == [
        (1000, "ckpt_1.pt", 1000 * 3 * 5 * 32),
        (2000, "ckpt_2.pt", 2000 * 3 * 5 * 32),
        (2500, "final.pt", 2500 * 3 * 5 * 32),
    ]
    assert isinstance(source_from_string(str(tmp_path)), NanoGPTSource)


def test_two_files_of_one_step_are_refused(tmp_path: Path, nanogpt: Write) -> None:
    nanogpt(tmp_path / "ckpt_1000.pt", 1000)
    nanogpt(tmp_path / "iter_1000.pt", 1000)
    with pytest.raises(ValueError, match=r"ckpt_1000\.pt and iter_1000\.pt are both .* step 1000\. Move one"):
        NanoGPTSource(tmp_path).checkpoints()


def test_equal_weights_have_one_fingerprint_whatever_the_optimizer_says(tmp_path: Path, nanogpt: Write) -> None:
    nanogpt(tmp_path / "ckpt_1.pt", 1, seed=0)
    nanogpt(tmp_path / "ckpt_2.pt", 2, seed=0, optimizer={"state": {}}, best_val_loss=None)
    nanogpt(tmp_path / "ckpt_3.pt", 3, seed=1)
    rows = audit(NanoGPTSource(tmp_path).checkpoints())
    assert [row.equal_to for row in rows] == [None, 1, None]
    assert {row.commit for row in rows} == {None}
    assert "same weights as that of step 1" in problems(rows)[0]


class Bomb:
    """Unpickling it would make a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.target}",)


def spoil(content: str) -> Callable[[Path, Write], None]:
    def write(path: Path, nanogpt: Write) -> None:
        theirs = nanogpt(path, 7)
        state, whole = dict(theirs.state_dict()), path.read_bytes()
        name = "transformer.h.1.mlp.c_fc.weight"
        arguments = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "vocab_size": 64, "bias": True}
        changes: dict[str, dict[str, Any]] = {
            "missing": {"model": {n: t for n, t in state.items() if n != name}},
            "shape": {"model": {**state, name: torch.zeros(5, 16)}},
            "larger than its data": {"model": {**state, name: torch.zeros(1).expand(64, 10**9)}},
            "extra": {"model": {**state, "transformer.h.0.attn.rope": torch.zeros(2)}},
            "no model": {"model": None},
            "model is a list": {"model": [1, 2]},
            "no model_args": {"model_args": None},
            "a fork": {"model_args": {**arguments, "use_rmsnorm": True}},
            "odd heads": {"model_args": {**arguments, "n_head": 3}},
            "a negative size": {"model_args": {**arguments, "n_layer": -1}},
            "an object": {"config": Bomb(path.with_suffix(".ran"))},
        }
        if content in changes:
            nanogpt(path, 7, **changes[content])
        else:
            path.write_bytes({"truncated": whole[:-300], "empty": b"", "text": b"hello\n" * 99}[content])

    return write


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("missing", r"has no tensor transformer\.h\.1\.mlp\.c_fc\.weight, which its model_args asks for"),
        ("shape", r"transformer\.h\.1\.mlp\.c_fc\.weight has shape \(5, 16\), but by its model_args it is \(64, 16\)"),
        ("larger than its data", r"tensor transformer\.h\.1\.mlp\.c_fc\.weight .* is larger than its data"),
        ("extra", r"has a tensor transformer\.h\.0\.attn\.rope that the LLM of its model_args does not have"),
        ("no model", r"has a NoneType where the weights should be"),
        ("model is a list", r"has a list where the weights should be"),
        ("no model_args", r"has no model_args, only model, optimizer"),
        ("a fork", r"model_args has use_rmsnorm, which nanoGPT's GPT-2 does not know"),
        ("odd heads", r"n_embd in model_args is 16"),
        ("a negative size", r"n_layer in model_args is -1"),
        ("an object", r"holds objects of posix\.system.*nothing in it was run"),
        ("truncated", r"is truncated, damaged or no file of torch\.save"),
        ("empty", r"is truncated, damaged or no file of torch\.save"),
        ("text", r"is truncated, damaged or no file of torch\.save"),
    ],
)
def test_a_bad_file_is_listed_and_named_in_one_line(tmp_path: Path, nanogpt: Write, content: str, message: str) -> None:
    path = tmp_path / "ckpt_7.pt"
    spoil(content)(path, nanogpt)
    (checkpoint,) = NanoGPTSource(tmp_path).checkpoints()
    assert checkpoint.step == 7
    (row,) = audit([checkpoint])
    assert row.fault is not None
    with pytest.raises(ValueError, match=message) as caught:
        load_llm(checkpoint)
    for said in (row.fault, str(caught.value)):
        assert said.startswith(str(path))
        assert "\n" not in said
    assert not path.with_suffix(".ran").exists()


def test_a_file_that_says_no_step_at_all_stops_the_series(tmp_path: Path, nanogpt: Write) -> None:
    nanogpt(tmp_path / "best.pt", 7, iter_num=None)
    with pytest.raises(ValueError, match=r"best\.pt says no step, neither in itself nor by its name"):
        NanoGPTSource(tmp_path).checkpoints()
    (tmp_path / "best.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"best\.pt is truncated"):
        NanoGPTSource(tmp_path).checkpoints()


def test_folders_with_something_else_say_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"expected nanoGPT's ckpt_1000\.pt.*found notes\.txt"):
        NanoGPTSource(tmp_path).checkpoints()
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder"):
        NanoGPTSource(tmp_path / "nowhere").checkpoints()
    assert isinstance(source_from_string(str(tmp_path)), FolderSource)


# Tokenizers


def test_the_tokenizer_is_named_or_lies_in_the_folder(tmp_path: Path, nanogpt: Write, tiny_tokenizer: Any) -> None:
    nanogpt(tmp_path / "ckpt_1.pt", 1)
    with pytest.raises(FileNotFoundError, match=r"come without a tokenizer\. .* `tokenizer`, such as gpt2"):
        _ = NanoGPTSource(tmp_path).tokenizer_name
    assert NanoGPTSource(tmp_path, tokenizer="gpt2").tokenizer_name == ("gpt2", None)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert len(NanoGPTSource(tmp_path).tokenizer()) == 64


def test_a_tokenizer_that_the_llm_does_not_know_is_refused(tmp_path: Path, nanogpt: Write, tiny_tokenizer: Any) -> None:
    small = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "vocab_size": 20}
    nanogpt(tmp_path / "ckpt_1.pt", 1, model_args=small)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has 64 tokens, but the LLM in .*ckpt_1\.pt knows 20"):
        NanoGPTSource(tmp_path).tokenizer()


@pytest.mark.parametrize("name", ["data/meta.pkl", "data"])
def test_a_table_of_characters_is_not_unpickled(tmp_path: Path, nanogpt: Write, name: str) -> None:
    nanogpt(tmp_path / "ckpt_1.pt", 1)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "meta.pkl").write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"meta\.pkl is a pickle, which is not opened\. .*tokenizer\.json"):
        _ = NanoGPTSource(tmp_path, tokenizer=str(tmp_path / name)).tokenizer_name


def test_a_format_is_a_plain_value() -> None:
    assert NanoGPTFormat() == NanoGPTFormat()
    assert hash(NanoGPTFormat()) == hash(NanoGPTFormat())
