"""The reference implementation's pickles: read without running anything that they name."""

import gzip
import json
import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from saetrack.sae import SAETrackSAE
from saetrack.sae.formats import detect_format, read_foreign, read_reference_map

D_IN, D_SAE = 4, 12


class HookPoint(nn.Module):
    """What transformer_lens hangs between the parts of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.fwd_hooks: list[Any] = []
        self.ctx: dict[str, Any] = {}


class LanguageModelSAERunnerConfig:
    def __init__(self) -> None:
        self.model_name, self.hook_point = "pythia-410m-deduped", "blocks.4.hook_resid_pre"
        self.context_size, self.l1_coefficient = 128, 8e-5
        self.dtype, self.device = torch.float32, torch.device("cpu")


class SparseAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.cfg = LanguageModelSAERunnerConfig()
        for name, shape in {
            "W_enc": (D_IN, D_SAE),
            "b_enc": (D_SAE,),
            "W_dec": (D_SAE, D_IN),
            "b_dec": (D_IN,),
        }.items():
            setattr(self, name, nn.Parameter(torch.randn(*shape, generator=generator)))
        self.hook_sae_in = HookPoint()
        self.hook_dict = {"hook_sae_in": self.hook_sae_in}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x - self.b_dec) @ self.W_enc + self.b_enc).relu() @ self.W_dec + self.b_dec


class SAEGroup:
    def __init__(self, members: int = 1) -> None:
        self.cfg = LanguageModelSAERunnerConfig()
        self.autoencoders = [SparseAutoencoder() for _ in range(members)]


MODULES = {
    "sae_training.sae_group": SAEGroup,
    "sae_training.sparse_autoencoder": SparseAutoencoder,
    "sae_training.config": LanguageModelSAERunnerConfig,
    "transformer_lens.hook_points": HookPoint,
}


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes under the names that the reference's files carry, while a test writes one."""
    for name, cls in MODULES.items():
        module = types.ModuleType(name)
        setattr(module, cls.__name__, cls)
        monkeypatch.setattr(cls, "__module__", name)
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(sys.modules, name.split(".")[0], types.ModuleType(name.split(".")[0]))


def save(thing: Any, path: Path) -> Path:
    """As the reference's ``save_model`` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt":
        torch.save(thing, path)
    else:
        with gzip.open(path, "wb") if path.suffix == ".gz" else path.open("wb") as file:
            pickle.dump(thing, file)
    return path


@pytest.mark.parametrize("name", ["final.pt", "final.pkl.gz", "final.pkl"])
@pytest.mark.parametrize("form", ["group", "state dict"])
@pytest.mark.usefixtures("reference")
def test_a_pickled_group_is_read_and_computes_what_the_reference_did(name: str, form: str, tmp_path: Path) -> None:
    theirs = SparseAutoencoder()
    content = SAEGroup() if form == "group" else {"cfg": theirs.cfg, "state_dict": theirs.state_dict()}
    path = save(content, tmp_path / name)
    for module in MODULES:
        del sys.modules[module]  # so nothing of theirs can be found
    again = read_foreign(path)
    x = torch.randn(20, D_IN, generator=torch.Generator().manual_seed(1))
    assert detect_format(path) == "reference"
    assert isinstance(again.sae, SAETrackSAE)
    assert again.sae.l1_coefficient == 8e-5
    torch.testing.assert_close(again.sae(x), theirs(x).detach(), rtol=1e-5, atol=1e-5)
    assert (again.origin.model, again.origin.hookpoint) == ("pythia-410m-deduped", "blocks.4.hook_resid_pre")


class Bomb:
    """Unpickling it would make a file."""

    def __init__(self, target: Path, call: Any = os.system) -> None:
        self.target, self.call = target, call

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        python = f"__import__('pathlib').Path({str(self.target)!r}).touch()"
        return self.call, (f"touch {self.target}" if self.call is os.system else python,)


@pytest.mark.parametrize("name", ["final.pt", "final.pkl.gz", "final.pkl"])
@pytest.mark.parametrize("call", [os.system, eval], ids=["os.system", "eval"])
def test_a_crafted_pickle_is_refused_and_nothing_ran(name: str, call: Any, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = save({"cfg": Bomb(mark, call), "state_dict": OrderedDict()}, tmp_path / name)
    with pytest.raises(ValueError, match="Nothing in it was run") as error:
        read_foreign(path)
    assert not mark.exists()
    assert "\n" not in str(error.value)
    with gzip.open(path) if name.endswith(".gz") else path.open("rb") as file:
        torch.load(path, weights_only=False) if name == "final.pt" else pickle.load(file)
    assert mark.exists()  # it is a real one: a plain unpickler runs it


def test_a_crafted_storage_inside_a_tensor_is_refused_too(tmp_path: Path) -> None:
    # torch.storage._load_from_bytes would unpickle the bytes that it is given without any list.
    mark = tmp_path / "ran"
    inner = save(Bomb(mark), tmp_path / "inner.pt").read_bytes()

    class Storage:
        def __reduce__(self) -> tuple[Any, tuple[bytes]]:
            return torch.storage._load_from_bytes, (inner,)

    with pytest.raises(ValueError, match="Nothing in it was run"):
        read_foreign(save(Storage(), tmp_path / "final.pkl"))
    assert not mark.exists()


@pytest.mark.usefixtures("reference")
def test_a_group_of_several_and_a_file_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds 2 SAEs; expected 1"):
        read_foreign(save(SAEGroup(members=2), tmp_path / "two.pt"))
    with pytest.raises(ValueError, match="expected a group of SAEs with weights"):
        read_foreign(save([1, 2], tmp_path / "list.pkl"))
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(ValueError, match="or is damaged"):
        read_foreign(tmp_path / "damaged.pt")


def test_a_map_gives_the_files_by_index_in_numerical_order(tmp_path: Path) -> None:
    names = {"133": "pipe/a/final.pt", "13": "pipe/b/final.pt"}
    for name in names.values():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    path = tmp_path / "model_save_map20240101-000000.json"
    path.write_text(json.dumps(names))
    assert list(read_reference_map(path).items()) == [(13, tmp_path / names["13"]), (133, tmp_path / names["133"])]


@pytest.mark.parametrize("name", ["../outside.pt", "/etc/passwd", "link/outside.pt"])
def test_paths_in_a_map_never_leave_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "outside.pt").touch()
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(tmp_path)
    (inside / "model_save_map.json").write_text(json.dumps({"0": name}))
    with pytest.raises(ValueError, match="leads out of"):
        read_reference_map(inside / "model_save_map.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"step1": "a.pt"}, "expected the index"),
        ({"1": 2}, "expected the index"),
        ({}, "names no files"),
        ({"7": "a.pt"}, "index 7 is .* which does not exist"),
    ],
)
def test_a_map_of_something_else_is_refused(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "model_save_map.json").write_text(json.dumps(content))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_reference_map(tmp_path / "model_save_map.json")
