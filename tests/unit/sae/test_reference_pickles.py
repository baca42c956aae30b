"""The reference implementation's pickles: read without running anything that they name."""

import contextlib
import copyreg
import gzip
import io
import json
import os
import pickle
import sys
import types
import zipfile
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


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()  # SHORT_BINUNICODE


def crafted(command: str) -> dict[str, bytes]:
    """Pickles that run a command, each by another opcode."""
    system, line = b"cos\nsystem\n", b"S'" + command.encode() + b"'\n"
    argument, stub = text(command), b"csae_training.sae_group\nSAEGroup\n"
    return {
        "GLOBAL, REDUCE": system + b"(" + line + b"tR.",
        "INST": b"(" + line + b"ios\nsystem\n.",
        "OBJ": b"(" + system + line + b"o.",
        "STACK_GLOBAL": b"\x80\x04" + text("os") + text("system") + b"\x93" + argument + b"\x85R.",
        "a dotted name": b"\x80\x04" + text("os") + text("system.__call__") + b"\x93" + argument + b"\x85R.",
        "getattr": b"\x80\x04cbuiltins\ngetattr\n" + b"cbuiltins\n__import__\n" + text("os") + b"\x85R"
        + text("system") + b"\x86R" + argument + b"\x85R.",
        "the memo": system + b"p7\n0g7\n(" + line + b"tR.",
        "an extension": b"\x80\x02\x82\xf0" + b"(" + line + b"tR.",
        "the end of a good one": stub + b"(tR0" + system + b"(" + line + b"tR.",
        "__setstate__": stub + b")R}S'__setstate__'\n" + system + b"sb" + line + b"b.",
    }  # fmt: skip


def as_file(pickled: bytes, path: Path) -> Path:
    """A pickle as a file of its suffix; in the archive of a .pt it is data.pkl."""
    if path.suffix == ".pt":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little"}.items():
                archive.writestr(f"archive/{name}", content)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(pickled))
    else:
        path.write_bytes(pickled)
    return path


@pytest.mark.parametrize("name", ["final.pt", "final.pkl.gz", "final.pkl"])
@pytest.mark.parametrize("way", crafted(""))
@pytest.mark.usefixtures("reference")
def test_no_opcode_runs_anything(way: str, name: str, tmp_path: Path) -> None:
    copyreg.add_extension("os", "system", 0xF0)
    mark = tmp_path / "ran"
    pickled = crafted(f"touch {mark}")[way]
    with contextlib.suppress(Exception):
        pickle.loads(pickled)  # a plain one runs it, and keeps the extension from then on
    assert mark.exists()
    mark.unlink()
    try:
        with pytest.raises(ValueError, match="Nothing in it was run") as error:
            read_foreign(as_file(pickled, tmp_path / name))
    finally:
        copyreg.remove_extension("os", "system", 0xF0)
    assert not mark.exists()
    assert "\n" not in str(error.value)


def test_what_is_allowed_is_not_changed_for_the_rest_of_the_process(tmp_path: Path) -> None:
    function = b"ctorch._utils\n_rebuild_parameter\n"
    for name, thing in {"class": b"csae_training.sae_group\nSAEGroup\n", "function": function}.items():
        pickled = thing + b"(N}S'poisoned'\nI1\nstb."  # BUILD with a state for setattr
        with pytest.raises(ValueError, match="it changes a "):
            read_foreign(as_file(pickled, tmp_path / f"{name}.pkl"))
    assert not hasattr(torch._utils._rebuild_parameter, "poisoned")


def storage_of(tensor: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    torch.save(tensor.untyped_storage(), stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


class Tensor:
    """Pickled as a tensor of a shape of its own on the storage of another."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return torch._utils._rebuild_tensor_v2, self.arguments


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("name", ["final.pt", "final.pkl"])
def test_a_file_that_would_fill_the_memory_is_refused(name: str, tmp_path: Path) -> None:
    whole = SparseAutoencoder()
    state = {**whole.state_dict(), "W_enc": torch.zeros(1).expand(D_IN, 10**9)}
    path = save({"cfg": whole.cfg, "state_dict": state}, tmp_path / name)
    if name == "final.pkl":
        storage = torch.zeros(4)._typed_storage()
        for arguments in ((storage, 0, (D_IN, 10**9), (0, 0)), (storage, 0, (2**40,), (1,)), (storage, -9, (4,), (1,))):
            state["W_enc"] = Tensor(*arguments, False, OrderedDict())
            save({"cfg": whole.cfg, "state_dict": state}, path)
            with pytest.raises(ValueError, match="does not fit into 4 numbers"):
                read_foreign(path)
    else:
        with pytest.raises(ValueError, match=r"W_enc of shape \(4, 1000000000\) is larger than its data"):
            read_foreign(path)


@pytest.mark.parametrize(
    "pickled",
    [b"K\x01r\xff\xff\xff\x7f.", b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b".", b"\x80\x04\x95" + b"\xff" * 8],
    ids=["memo index", "bytes", "frame"],
)  # fmt: skip
def test_a_number_in_a_pickle_takes_no_memory(pickled: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Nothing in it was run|expected a group"):
        read_foreign(as_file(pickled, tmp_path / "final.pkl"))


def test_what_is_packed_is_refused(tmp_path: Path) -> None:
    zeros = b"\x80\x04\x8e" + (50_000_000).to_bytes(8, "little") + bytes(50_000_000) + b"."
    (tmp_path / "final.pkl.gz").write_bytes(gzip.compress(zeros, compresslevel=1))
    with pytest.raises(ValueError, match="it is a hundred times as large as its file"):
        read_foreign(tmp_path / "final.pkl.gz")
    with zipfile.ZipFile(tmp_path / "final.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", zeros)
    with pytest.raises(ValueError, match="it is packed, and would be larger than its file"):
        read_foreign(tmp_path / "final.pt")


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
