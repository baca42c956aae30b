"""The peers' own packages open what we write and compute the same, and we open theirs.

They live in an environment of their own, `.venv-bench`; anywhere else these tests are skipped. The shapes, the widths
of the numbers and the settings are drawn by hypothesis.
"""

import json
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

hypothesis = pytest.importorskip("hypothesis")
pytest.importorskip("sparsify")
from hypothesis import strategies as st  # noqa: E402

from saetrack.lm import load_llm, read_activations  # noqa: E402
from saetrack.sae import (  # noqa: E402
    SAE,
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    SAETrackSAE,
    StandardSAE,
    TopKSAE,
)
from saetrack.sae.formats import WRITERS, Origin, read_foreign  # noqa: E402
from saetrack.track import Track  # noqa: E402

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
QUICKSTART = Path("runs/quickstart")
ORIGIN = Origin("org/llm", "step64", "gpt_neox.layers.1", 128, True)
settings = hypothesis.settings(max_examples=12, deadline=None, derandomize=True, database=None)
Loaded = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""How a peer encodes and how it reconstructs."""


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@cache
def dictionary_learning() -> Any:
    # its utils import these for data that is not read here, and nnsight pins old releases of much else
    for name, attribute in {"nnsight": "LanguageModel", "zstandard": "ZstdDecompressor"}.items():
        if name not in sys.modules:
            stub = types.ModuleType(name)
            setattr(stub, attribute, object)
            sys.modules[name] = stub
    from dictionary_learning import utils

    return utils


def open_saelens(path: Path) -> Loaded:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sae_lens

        sae = sae_lens.SAE.load_from_disk(path)
    return sae.encode, sae


def open_sparsify(path: Path) -> Loaded:
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(path)

    def encode(x: Tensor) -> Tensor:
        values, indices, _ = sae.encode(x)
        return torch.zeros(len(x), sae.num_latents).scatter(1, indices, values)

    return encode, lambda x: sae(x).sae_out


def open_dictionary_learning(path: Path) -> Loaded:
    sae, _ = dictionary_learning().load_dictionary(str(path), "cpu")
    return sae.encode, sae


def open_llamascopium(path: Path) -> Loaded:
    from llamascopium.models.sae import SparseAutoEncoder

    sae = SparseAutoEncoder.from_pretrained(str(path))
    return sae.encode, lambda x: sae.decode(sae.encode(x))


OPEN = {
    "saelens": open_saelens,
    "sparsify": open_sparsify,
    "dictionary_learning": open_dictionary_learning,
    "llamascopium": open_llamascopium,
}
CLASSES = [StandardSAE, SAETrackSAE, TopKSAE, BatchTopKSAE, MatryoshkaSAE, JumpReLUSAE, GatedSAE]
THRESHOLDS = {BatchTopKSAE, MatryoshkaSAE, JumpReLUSAE}
REFUSED = {"sparsify": {*THRESHOLDS, GatedSAE}, "llamascopium": {GatedSAE}}
PAIRS = [(library, cls) for library in OPEN for cls in CLASSES if cls not in REFUSED.get(library, set())]


@st.composite
def saes(draw: st.DrawFn, cls: type[SAE]) -> tuple[SAE, Tensor]:
    """An SAE at random and activations for it: shape, input bias, decoder norms, scale, dtype of the weights."""
    d_in, factor = draw(st.integers(2, 12)), draw(st.integers(1, 5))
    arguments: dict[str, Any] = {}
    if "k" in cls.__init__.__code__.co_varnames:
        arguments["k"] = draw(st.integers(1, d_in * factor))
    sae = cls(d_in, factor, **arguments)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    for name, value in sae.state_dict().items():
        drawn = torch.randn(value.shape, generator=generator).to(dtype)
        value.copy_(drawn.abs() if name == "threshold" else drawn)
    if isinstance(sae, (BatchTopKSAE, MatryoshkaSAE)):
        sae.threshold.fill_(draw(st.sampled_from([0.0, 0.5])))
    if not draw(st.booleans()):
        sae.b_dec.data.zero_()
    if draw(st.booleans()):
        sae.normalise_decoder_()
    scale = draw(st.sampled_from([1.0, 0.25, 4.0]))
    x = (1 + torch.randn(30, d_in, generator=generator)) / scale
    return sae.folded(scale).requires_grad_(False), x


def assert_equal_functions(sae: SAE, opened: Loaded, x: Tensor, unit_rows: bool) -> None:
    encode, reconstruct = opened
    scale = sae.W_dec.norm(dim=1) if unit_rows else torch.ones(sae.d_sae)
    with torch.no_grad():
        latents, theirs, ours = sae.encode(x) * scale, encode(x), sae.encode(x)
        # A pre-activation at its threshold, or two that compete for the k-th place: float32 rounds either way.
        settled = (theirs > 0).eq(latents > 0).all(dim=1)
        assert settled.float().mean() > 0.9
        size = latents.abs().max().clamp_min(1.0)
        torch.testing.assert_close(theirs[settled] / size, latents[settled] / size, rtol=1e-5, atol=1e-5)
        size = max(1.0, float(x.abs().max()), float(ours.abs().max()))
        got, expected = reconstruct(x)[settled], sae(x)[settled]
        torch.testing.assert_close(got / size, expected / size, rtol=1e-5, atol=1e-5)


def scales_latents(library: str, cls: type[SAE]) -> bool:
    """dictionary_learning's loader makes the rows of a plain autoencoder unit rows."""
    return library == "dictionary_learning" and cls in (StandardSAE, SAETrackSAE)


@pytest.mark.parametrize(("library", "cls"), PAIRS, ids=lambda p: getattr(p, "__name__", p))
def test_a_peer_opens_what_we_write_and_computes_the_same(library: str, cls: type[SAE]) -> None:
    @settings
    @hypothesis.given(saes(cls))
    def check(drawn: tuple[SAE, Tensor]) -> None:
        sae, x = drawn
        with folder() as path:
            WRITERS[library](sae, path, ORIGIN)
            assert_equal_functions(sae, OPEN[library](path), x, scales_latents(library, cls))

    check()


@pytest.mark.parametrize("library", OPEN)
def test_a_peer_computes_the_same_on_real_activations(library: str) -> None:
    if not QUICKSTART.is_dir():
        pytest.skip(f"{QUICKSTART} is not there; `make quickstart` makes it")
    track = Track.open(QUICKSTART)
    snapshot = track.at(64)
    tokens = torch.from_numpy(track.tokens("evaluation").tokens[:4].astype("int64"))
    hookpoint = track.facts["hookpoint"]
    x = read_activations(load_llm(snapshot.llm), tokens, [hookpoint])[hookpoint].flatten(0, 1)
    with folder() as path:
        WRITERS[library](snapshot.sae(), path, ORIGIN)
        assert_equal_functions(snapshot.sae(), OPEN[library](path), x, False)


def randomise(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(drawn.abs() if name.endswith("threshold") else drawn)


def assert_ours_equals(path: Path, theirs: Loaded, x: Tensor) -> None:
    again = read_foreign(path).sae
    with torch.no_grad():
        torch.testing.assert_close(again.encode(x), theirs[0](x), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(again(x), theirs[1](x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
def test_we_open_what_sparsify_saves(normalize: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    config = SparseCoderConfig(num_latents=32, k=4, normalize_decoder=normalize)
    theirs = SparseCoder(8, config, dtype=dtype)
    randomise(theirs)
    theirs.save_to_disk(tmp_path)
    wide = theirs.float()

    def encode(x: Tensor) -> Tensor:
        values, indices, _ = wide.encode(x)
        return torch.zeros(len(x), 32).scatter(1, indices, values)

    assert_ours_equals(tmp_path, (encode, lambda x: wide(x).sae_out), torch.randn(30, 8))


@pytest.mark.parametrize("name", ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder"])
def test_we_open_what_dictionary_learning_saves(name: str, tmp_path: Path) -> None:
    theirs = getattr(dictionary_learning(), name)(8, 32)
    randomise(theirs)
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": name}}))
    assert_ours_equals(tmp_path, (theirs.encode, theirs), torch.randn(30, 8))


@pytest.mark.parametrize("name", ["AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_we_open_the_top_k_classes_of_dictionary_learning_and_its_backups(name: str, tmp_path: Path) -> None:
    more = {"group_sizes": [8, 24]} if name.startswith("Matryoshka") else {}
    theirs = getattr(dictionary_learning(), name)(8, 32, k=4, **more)
    randomise(theirs)
    theirs.threshold.fill_(0.7)
    backup = {"step": 1, "ae": theirs.state_dict(), "optimizer": {}, "config": {}, "norm_factor": 2.5}
    torch.save(backup, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": name, "k": 4}}))
    wanted = torch.randn(30, 8)
    theirs = getattr(dictionary_learning(), name)(8, 32, k=4, **more)
    theirs.load_state_dict(backup["ae"])
    theirs.scale_biases(2.5)  # what its own training does before a finished ae.pt is saved
    assert_ours_equals(tmp_path, (theirs.encode, theirs), wanted)


@pytest.mark.parametrize("act_fn", ["relu", "topk", "jumprelu"])
@pytest.mark.parametrize("by_norm", [True, False])
def test_we_open_what_llamascopium_saves(act_fn: str, by_norm: bool, tmp_path: Path) -> None:
    from llamascopium.models.sae import SAEConfig, SparseAutoEncoder

    config = SAEConfig(
        hook_point_in="blocks.1",
        hook_point_out="blocks.1",
        d_model=8,
        expansion_factor=4,
        act_fn=act_fn,
        top_k=4,
        norm_activation="inference",
        sparsity_include_decoder_norm=by_norm,
    )
    theirs = SparseAutoEncoder(config)
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    config.save_hyperparameters(tmp_path)
    scale = theirs.decoder_norm() if by_norm and act_fn == "topk" else 1.0  # those come with unit rows
    pair = (lambda x: theirs.encode(x) * scale, lambda x: theirs.decode(theirs.encode(x)))
    assert_ours_equals(tmp_path, pair, torch.randn(30, 8))


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated", "batchtopk"])
def test_we_open_what_saelens_saves(architecture: str, subtract: bool, tmp_path: Path) -> None:
    import sae_lens

    kind = {"standard": "Standard", "topk": "TopK", "jumprelu": "JumpReLU", "gated": "Gated", "batchtopk": "BatchTopK"}
    name = kind[architecture] + ("TrainingSAE" if architecture == "batchtopk" else "SAE")
    more = {"k": 4} if "topk" in architecture else {}
    config = getattr(sae_lens, f"{name}Config")(d_in=8, d_sae=32, apply_b_dec_to_input=subtract, **more)
    theirs = getattr(sae_lens, name)(config)
    randomise(theirs)
    if architecture == "batchtopk":
        theirs.topk_threshold.fill_(0.7)
        theirs.save_inference_model(tmp_path)
        theirs = sae_lens.SAE.load_from_disk(tmp_path)
    else:
        theirs.save_model(tmp_path)
    assert_ours_equals(tmp_path, (theirs.encode, theirs), torch.randn(30, 8))
