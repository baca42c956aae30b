import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from saetrack.lm import (
    LightningSource,
    LLMCheckpoint,
    audit,
    load_llm,
    read_activations,
    read_unembedding,
    release_memory,
    source_from_string,
    weight_hash,
)
from saetrack.lm.forward import edit_activations, next_token_losses
from saetrack.lm.local.recognise import format_from_record
from saetrack.lm.trust import VARIABLE

FACTORY = "llm_factory:build_plain"


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PYTHONPATH would have it; and no name is trusted before a test gives it."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setattr("saetrack.lm.trust._given", set())


def plain(form: str = "logits", seed: int = 0) -> nn.Module:
    from llm_factory import build_plain

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_plain(8, form)


def write(path: Path, module: nn.Module, step: int, prefix: str = "model.", **more: Any) -> Path:
    state = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    content = {"state_dict": {**state, "train_loss.total": torch.zeros(1)}, "global_step": step, "epoch": 0, **more}
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    return path


def source(folder: Path, factory: str = FACTORY, **changes: Any) -> LightningSource:
    return LightningSource(folder, factory, **{"init_args": {"width": 8}, **changes})


class Training(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"lr": 0.1})
        self.model = plain()

    def training_step(self, ids: Tensor) -> Tensor:
        return next_token_losses(self.model(ids), ids).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def test_what_lightning_itself_saved_is_a_series(tmp_path: Path, ids: Tensor) -> None:
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, save_last=True)
    training = Training()
    trainer = Trainer(
        max_steps=4,
        accelerator="cpu",
        callbacks=[keep],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(training, DataLoader(ids.repeat(3, 1), batch_size=2, num_workers=0))
    series = source(tmp_path).checkpoints()
    assert [(c.step, Path(c.model).name) for c in series] == [(2, "epoch=0-step=2.ckpt"), (4, "epoch=0-step=4.ckpt")]
    rows = audit(series)
    assert all(row.fault is None and row.equal_to is None for row in rows)
    llm = load_llm(series[-1])
    torch.testing.assert_close(llm(input_ids=ids).logits, training.model(ids).detach())
    before = load_llm(series[0])
    assert not torch.equal(before(input_ids=ids).logits, llm(input_ids=ids).logits)


@pytest.mark.parametrize("form", ["logits", "tuple", "object"])
def test_a_module_of_ones_own_is_an_llm(tmp_path: Path, ids: Tensor, form: str) -> None:
    theirs = plain(form, seed=3)
    write(tmp_path / "step=5.ckpt", theirs, 5)
    before = torch.get_rng_state()
    llm = load_llm(source(tmp_path, init_args={"width": 8, "form": form}).checkpoints()[0])
    assert torch.equal(torch.get_rng_state(), before)
    assert not llm.training
    expected = plain("logits", seed=3)(ids)
    torch.testing.assert_close(llm(input_ids=ids, use_cache=False).logits, expected)
    x = read_activations(llm, ids, ["layers.1"])["layers.1"]
    assert x.shape == (3, 24, 8)
    torch.testing.assert_close(edit_activations(llm, ids, "layers.1", lambda x: x), expected)
    assert llm.get_input_embeddings().weight.shape == (64, 8)
    assert llm.config.get_text_config().vocab_size == 64
    with pytest.raises(ValueError, match="no output embeddings"):
        read_unembedding(llm)
    with pytest.raises(ValueError, match=r"'layers\.7' is no module of BareLLM\. The closest names are layers"):
        read_activations(llm, ids, ["layers.7"])


def test_it_is_freed_when_it_is_dropped(tmp_path: Path) -> None:
    write(tmp_path / "step=5.ckpt", plain(), 5)
    llm = load_llm(source(tmp_path).checkpoints()[0])
    weights = [weakref.ref(parameter) for parameter in llm.parameters()]
    del llm
    release_memory()
    assert [weight() for weight in weights] == [None] * len(weights)


def test_its_dtype_changes_but_what_is_complex_stays(tmp_path: Path, ids: Tensor) -> None:
    write(tmp_path / "step=5.ckpt", plain(), 5)
    llm = load_llm(source(tmp_path).checkpoints()[0], "bfloat16")
    assert {parameter.dtype for parameter in llm.parameters()} == {torch.bfloat16}
    assert dict(llm.named_buffers())["turns"].dtype == torch.complex64
    assert llm(input_ids=ids).logits.dtype == torch.bfloat16


def test_a_module_that_keeps_the_last_position_only_is_told_so(tmp_path: Path, ids: Tensor) -> None:
    write(tmp_path / "step=5.ckpt", plain(), 5)
    llm = load_llm(source(tmp_path, init_args={"width": 8, "form": "last"}).checkpoints()[0])
    with pytest.raises(ValueError, match=r"forward of Plain gives shape \(3, 1, 64\) .* logits of every position"):
        llm(input_ids=ids)


def test_a_model_of_transformers_is_loaded_as_it_is(tmp_path: Path, ids: Tensor) -> None:
    from llm_factory import build_neox

    theirs = build_neox().eval()
    write(tmp_path / "last.ckpt", theirs, 9, prefix="net.llm._orig_mod.")
    (checkpoint,) = source(tmp_path, "llm_factory.build_neox", init_args=None, prefix="net.llm.").checkpoints()
    assert checkpoint.step == 9
    llm = load_llm(checkpoint)
    assert type(llm).__name__ == "GPTNeoXForCausalLM"
    torch.testing.assert_close(llm(ids).logits, theirs(ids).logits)


def test_a_class_with_a_nested_dataclass_and_a_tied_weight_saved_once(tmp_path: Path, ids: Tensor) -> None:
    theirs = plain()
    state = {f"model.{n}": t for n, t in theirs.state_dict().items() if n != "head.weight"}
    write(tmp_path / "step=5.ckpt", theirs, 5, state_dict=state)
    arguments = {"sizes": {"width": 8}, "form": "tuple"}
    llm = load_llm(source(tmp_path, "llm_factory.Plain", init_args=arguments).checkpoints()[0])
    torch.testing.assert_close(llm(input_ids=ids).logits, theirs(ids))


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        ("llm_factory:build_plain", {}, r"build_plain does not take the init_args \{\}: .*width"),
        ("llm_factory:build_plain", {"width": "wide"}, r"does not take the init_args .*width"),
        ("llm_factory:build_plain", {"widht": 8, "width": 8}, r"does not take the init_args .*widht"),
        ("llm_factory:no_such", {}, r"llm_factory has no function or class no_such"),
        ("no_such_package:build", {}, r"no_such_package:build cannot be imported .*PYTHONPATH"),
        ("build", {}, r"'build' is no name; expected package\.module:function"),
        ("llm_factory:build_nothing", {}, r"build_nothing made a str; expected the LLM, a torch\.nn\.Module"),
    ],
)
def test_a_factory_that_makes_no_llm_is_one_line(
    tmp_path: Path, factory: str, arguments: dict[str, Any], message: str
) -> None:
    write(tmp_path / "step=5.ckpt", plain(), 5)
    with pytest.raises(ValueError, match=message) as caught:
        load_llm(source(tmp_path, factory, init_args=arguments).checkpoints()[0])
    assert "\n" not in str(caught.value)


def changed(content: str) -> dict[str, Any]:
    state = {f"model.{name}": tensor for name, tensor in plain().state_dict().items()}
    return {
        "missing": {"state_dict": {n: t for n, t in state.items() if n != "model.layers.1.bias"}},
        "shape": {"state_dict": {**state, "model.layers.1.bias": torch.zeros(3)}},
        "extra": {"state_dict": {**state, "model.layers.9.bias": torch.zeros(3)}},
        "prefix": {"state_dict": {f"net.{n}": t for n, t in state.items()}},
        "no state": {"state_dict": None},
        "an object": {"hyper_parameters": {"settings": Training}},
    }[content]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("missing", r"has no tensor layers\.1\.bias, which llm_factory:build_plain asks for"),
        ("shape", r"layers\.1\.bias has shape \(3,\), but by llm_factory:build_plain it is \(8,\)"),
        ("extra", r"has a tensor layers\.9\.bias that the LLM of llm_factory:build_plain does not have"),
        ("prefix", r"no tensor whose name begins with 'model\.'; they begin with net\.\. .* `prefix`"),
        ("no state", r"has a NoneType where the weights should be"),
        ("an object", r"holds objects of .*Training.*nothing in it was run"),
    ],
)
def test_a_bad_file_is_named_with_its_tensor(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path / "step=5.ckpt", plain(), 5, **changed(content))
    (checkpoint,) = source(tmp_path).checkpoints()
    with pytest.raises(ValueError, match=message) as caught:
        load_llm(checkpoint)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_a_fault_of_the_audit(tmp_path: Path) -> None:
    path = write(tmp_path / "step=5.ckpt", plain(), 5)
    path.write_bytes(path.read_bytes()[:-200])
    (row,) = audit(source(tmp_path).checkpoints())
    assert row.fault is not None
    assert row.fault.startswith(f"{path} is truncated")
    assert weight_hash(row.checkpoint) is None


def test_a_sharded_checkpoint_says_how_to_make_it_one_file(tmp_path: Path) -> None:
    (tmp_path / "step=5.ckpt").mkdir()
    with pytest.raises(ValueError, match=r"is a sharded checkpoint\. .*consolidate_checkpoint"):
        source(tmp_path).checkpoints()


def test_two_files_of_one_step_are_refused(tmp_path: Path) -> None:
    for name in ("epoch=0-step=5.ckpt", "step=5.ckpt"):
        write(tmp_path / name, plain(), 5)
    with pytest.raises(ValueError, match=r"epoch=0-step=5\.ckpt and step=5\.ckpt are both .* step 5"):
        source(tmp_path).checkpoints()


def test_a_word_alone_says_what_to_write_in_a_config(tmp_path: Path) -> None:
    write(tmp_path / "step=5.ckpt", plain(), 5)
    with pytest.raises(ValueError, match=r"checkpoints of lightning.*`class_path: LightningSource`.*`factory`"):
        source_from_string(str(tmp_path))


@pytest.fixture
def from_a_track(tmp_path: Path) -> Callable[[str], LLMCheckpoint]:
    """A checkpoint as a track records it, which names a factory."""

    def checkpoint(factory: str) -> LLMCheckpoint:
        path = write(tmp_path / "step=5.ckpt", plain(), 5)
        record = {"kind": "lightning", "factory": factory, "init_args": json.dumps({"width": 8}), "prefix": "model."}
        return LLMCheckpoint(str(path), None, 5, format=format_from_record(record))

    return checkpoint


def test_what_a_track_names_is_not_called_without_the_users_word(
    from_a_track: Callable[[str], LLMCheckpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=rf"says that llm_factory:refuse builds its LLM.* set {VARIABLE}="):
        load_llm(from_a_track("llm_factory:refuse"))
    monkeypatch.setenv(VARIABLE, f"other,{FACTORY}")
    with pytest.raises(ValueError, match="llm_factory:refuse builds its LLM"):
        load_llm(from_a_track("llm_factory:refuse"))
    assert load_llm(from_a_track(FACTORY)).get_input_embeddings().weight.shape == (64, 8)
    with pytest.raises(ValueError, match=r"in the format 'safe'; expected one of nanogpt, lightning, torchtitan"):
        format_from_record({"kind": "safe"})
