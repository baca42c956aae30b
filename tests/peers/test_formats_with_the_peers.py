"""The peers' own packages open what we write and compute the same, and we open theirs.

They live in an environment of their own, `.venv-bench`; anywhere else these tests are skipped. In both directions the
shapes, the widths of the numbers and the settings are drawn by hypothesis, and the real activations are of an LLM that
was pretrained for it, read by SAEs that were trained on them.
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
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

hypothesis = pytest.importorskip("hypothesis")
pytest.importorskip("sparsify")
from hypothesis import strategies as st  # noqa: E402

from saetrack.lm import FolderSource, TextCorpus, load_llm, read_activations  # noqa: E402
from saetrack.lm.pretrain import PretrainConfig, pretrain  # noqa: E402
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

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
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


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """Activations of a pretrained LLM, which lie far from zero and differ in size: ``[1024, 16]``."""
    folder = tmp_path_factory.mktemp("llm") / "series"
    sizes = {"n_layers": 2, "d_model": 16, "n_heads": 2, "vocab_size": 300, "context_size": 32, "batch_size": 8}
    corpus = TextCorpus([str(Path(__file__).parents[2] / "docs" / "*.md")])
    pretrain(folder, PretrainConfig(**sizes, steps=40, warmup_steps=4, corpus=corpus))
    last = FolderSource(folder).checkpoints()[-1]
    tokens = torch.randint(1, 300, (32, 32), generator=torch.Generator().manual_seed(0))
    return read_activations(load_llm(last), tokens, ["gpt_neox.layers.1"])["gpt_neox.layers.1"].flatten(0, 1)


def trained(cls: type[SAE], x: Tensor) -> SAE:
    """An SAE that was trained a little on activations, in their own units."""
    sae = cls(16, 4, **({"k": 8} if "k" in cls.__init__.__code__.co_varnames else {}))  # type: ignore[arg-type]
    scale = float(4 / x.norm(dim=1).mean())
    sae.initialise(scale * x, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for _ in range(60):
        said = sae.loss(scale * x)
        optimizer.zero_grad()
        said.loss.backward()
        optimizer.step()
        with torch.no_grad():
            sae.after_step_(said.smallest_kept)
    return sae.folded(scale).requires_grad_(False)


@pytest.mark.parametrize(("library", "cls"), PAIRS, ids=lambda p: getattr(p, "__name__", p))
def test_a_peer_computes_the_same_on_real_activations(library: str, cls: type[SAE], real: Tensor) -> None:
    sae = trained(cls, real)
    error, spread = (sae(real) - real).square().sum(), (real - real.mean(0)).square().sum()
    assert error < 0.5 * spread, "it has learned something"
    with folder() as path:
        WRITERS[library](sae, path, ORIGIN)
        assert_equal_functions(sae, OPEN[library](path), real, scales_latents(library, cls))
        again = read_foreign(path).sae
        assert_equal_functions(sae, (again.encode, again), real, scales_latents(library, cls))


class Theirs(NamedTuple):
    """An SAE of a peer that was saved into a folder: what it computes, in the units in which we read its latents."""

    latents: Callable[[Tensor], Tensor]
    reconstruct: Callable[[Tensor], Tensor]


def randomised(module: torch.nn.Module, draw: st.DataObject) -> None:
    """Fill a module of a peer: a decoder with unit rows or not, an input bias or none, narrow numbers or not."""
    generator = torch.Generator().manual_seed(draw.draw(st.integers(0, 2**31)))
    dtype = draw.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    with_bias, unit = draw.draw(st.booleans()), draw.draw(st.booleans())
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if name in ("b_dec", "b_D", "bias", "decoder_bias", "decoder.bias") and not with_bias:
            drawn.zero_()
        if unit and name in ("W_dec", "W_D", "decoder.weight"):
            drawn /= drawn.norm(dim=0 if name == "decoder.weight" else 1, keepdim=True)
        parameter.data.copy_((drawn.abs() if name.endswith("threshold") else drawn).to(dtype))


def sparsify_saves(draw: st.DataObject, path: Path, d_in: int, d_sae: int) -> Theirs:
    from sparsify import SparseCoder, SparseCoderConfig

    k, normalize = draw.draw(st.integers(1, d_sae)), draw.draw(st.booleans())
    theirs = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k, normalize_decoder=normalize))
    randomised(theirs, draw)
    theirs.save_to_disk(path)
    opened = open_sparsify(path)
    return Theirs(*opened)


def dictionary_learning_saves(draw: st.DataObject, path: Path, d_in: int, d_sae: int) -> Theirs:
    names = ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK"]
    name = draw.draw(st.sampled_from([*names, "BatchTopKSAE", "MatryoshkaBatchTopKSAE"]))
    more: dict[str, Any] = {"k": draw.draw(st.integers(1, d_sae))} if "TopK" in name else {}
    if name.startswith("Matryoshka"):
        first = draw.draw(st.integers(1, d_sae - 1))
        more["group_sizes"] = [first, d_sae - first]
    theirs = getattr(dictionary_learning(), name)(d_in, d_sae, **more)
    randomised(theirs, draw)
    if "TopK" in name:
        theirs.threshold.fill_(draw.draw(st.sampled_from([-1.0, 0.5])))
    factor = draw.draw(st.sampled_from([None, 2.5, 0.3]))
    if factor is None or not hasattr(theirs, "scale_biases"):
        torch.save(theirs.state_dict(), path / "ae.pt")
    else:  # what a killed run leaves, whose biases its own training would still have scaled
        state = {key: value.clone() for key, value in theirs.state_dict().items()}
        torch.save({"step": 1, "ae": state, "optimizer": {}, "config": {}, "norm_factor": factor}, path / "ae.pt")
        theirs.scale_biases(factor)
    (path / "config.json").write_text(json.dumps({"trainer": {"dict_class": name, **more}}))
    return Theirs(theirs.encode, theirs)


def llamascopium_saves(draw: st.DataObject, path: Path, d_in: int, d_sae: int) -> Theirs:
    from llamascopium.models.sae import SAEConfig, SparseAutoEncoder

    act_fn, by_norm = draw.draw(st.sampled_from(["relu", "topk", "jumprelu"])), draw.draw(st.booleans())
    normaliser = draw.draw(st.sampled_from(["inference", "dataset-wise"]))
    hook = {"hook_point_in": "blocks.1", "hook_point_out": "blocks.1"}
    config = SAEConfig(
        **hook,
        d_model=d_in,
        expansion_factor=d_sae / d_in,
        act_fn=act_fn,
        top_k=draw.draw(st.integers(1, d_sae)),
        norm_activation=normaliser,
        sparsity_include_decoder_norm=by_norm,
        use_decoder_bias=draw.draw(st.booleans()),
    )
    theirs = SparseAutoEncoder(config)
    randomised(theirs, draw)
    factor = 1.0
    if normaliser == "dataset-wise":
        average = draw.draw(st.sampled_from([0.5, 12.0]))
        theirs.set_dataset_average_activation_norm({"blocks.1": average})
        factor = d_in**0.5 / average
    theirs.save_pretrained(path)
    config.save_hyperparameters(path)
    scale = theirs.decoder_norm() if by_norm and act_fn == "topk" else 1.0  # those come with unit rows

    def latents(x: Tensor) -> Tensor:
        # as in training: its standardize_parameters_of_dataset_norm leaves the threshold of a jumprelu behind
        return theirs.encode(factor * x)

    return Theirs(lambda x: latents(x) * scale, lambda x: theirs.decode(latents(x)) / factor)


def saelens_saves(draw: st.DataObject, path: Path, d_in: int, d_sae: int) -> Theirs:
    import sae_lens

    kind = draw.draw(st.sampled_from(["Standard", "TopK", "JumpReLU", "Gated", "BatchTopK", "MatryoshkaBatchTopK"]))
    training = draw.draw(st.booleans()) or "Batch" in kind
    normaliser = draw.draw(st.sampled_from(["none", "expected_average_only_in"])) if training else "none"
    more: dict[str, Any] = {"k": draw.draw(st.integers(1, d_sae))} if "TopK" in kind else {}
    if "TopK" in kind:
        more["rescale_acts_by_decoder_norm"] = draw.draw(st.booleans())
    if kind == "MatryoshkaBatchTopK":
        more["matryoshka_widths"] = [draw.draw(st.integers(1, d_sae - 1)), d_sae]
    name = f"{kind}{'Training' if training else ''}SAE"
    more |= {"apply_b_dec_to_input": draw.draw(st.booleans()), "normalize_activations": normaliser}
    theirs = getattr(sae_lens, name)(getattr(sae_lens, f"{name}Config")(d_in=d_in, d_sae=d_sae, **more))
    randomised(theirs, draw)
    if "Batch" in kind:
        theirs.topk_threshold.fill_(draw.draw(st.sampled_from([0.0, 0.5])))
    inference = draw.draw(st.booleans())
    if not inference:
        theirs.save_model(path)
    scale = 1.0
    if normaliser != "none":
        factor = draw.draw(st.sampled_from([0.25, 3.0]))
        (path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))
        theirs.fold_activation_norm_scaling_factor(factor)
        if more.get("rescale_acts_by_decoder_norm") and not inference:
            scale = factor  # the fold changes the norms that latents are rescaled by; ours stay in units of training
    with folder() as saved:
        (theirs.save_inference_model if training else theirs.save_model)(path if inference else saved)
        encode, reconstruct = open_saelens(path if inference else saved)
        return Theirs(lambda x: scale * encode(x), reconstruct)


SAVE = {
    "saelens": saelens_saves,
    "sparsify": sparsify_saves,
    "dictionary_learning": dictionary_learning_saves,
    "llamascopium": llamascopium_saves,
}


@pytest.mark.parametrize("library", SAVE)
def test_we_open_what_a_peer_saves_and_compute_the_same(library: str) -> None:
    @hypothesis.settings(settings, max_examples=60)
    @hypothesis.given(st.data(), st.integers(2, 10), st.integers(1, 5), st.sampled_from([0.2, 1.0, 5.0]))
    def check(draw: st.DataObject, d_in: int, factor: int, size: float) -> None:
        with folder() as path, torch.no_grad():
            theirs = SAVE[library](draw, path, d_in, d_in * factor)
            x = size * (1 + torch.randn(40, d_in, generator=torch.Generator().manual_seed(3)))
            assert_ours_equals(path, theirs, x)

    check()


@pytest.mark.parametrize("library", SAVE)
def test_we_compute_what_a_peer_does_on_real_activations(library: str, real: Tensor) -> None:
    @hypothesis.settings(settings, max_examples=15)
    @hypothesis.given(st.data())
    def check(draw: st.DataObject) -> None:
        with folder() as path, torch.no_grad():
            assert_ours_equals(path, SAVE[library](draw, path, 16, 64), real)

    check()


def assert_ours_equals(path: Path, theirs: Theirs, x: Tensor) -> None:
    again = read_foreign(path).sae
    ours, expected = again(x), theirs.reconstruct(x)
    # A pre-activation at its threshold, or two that compete for the k-th place: float32 rounds either way.
    latents, others = again.encode(x), theirs.latents(x)
    settled = (latents > 0).eq(others > 0).all(dim=1)
    size = others.abs().max().clamp_min(1.0)
    torch.testing.assert_close(latents[settled] / size, others[settled] / size, rtol=1e-5, atol=1e-5)
    assert settled.float().mean() > 0.9
    size = max(1.0, float(x.abs().max()), float(expected.abs().max()))
    torch.testing.assert_close(ours[settled] / size, expected[settled] / size, rtol=1e-5, atol=1e-5)


def test_the_loader_of_saelens_for_sparsify_transposes_a_decoder_that_is_right_already() -> None:
    """Why a sparsify folder is exported for sparsify and a SAELens folder for SAELens: its own way between is wrong."""
    import sae_lens.loading.pretrained_sae_loaders as loaders

    sae = trained(TopKSAE, torch.randn(64, 16))
    with folder() as run:
        (path := run / "layers.1").mkdir()
        WRITERS["sparsify"](sae, path, ORIGIN)
        _, tensors = loaders.sparsify_disk_loader(path)
        transposed = tensors["W_dec"].T
        assert torch.equal(transposed, sae.W_dec.to(transposed.dtype)), "it has been mended: drop this test"
        assert torch.equal(read_foreign(path).sae.W_dec, sae.W_dec)
