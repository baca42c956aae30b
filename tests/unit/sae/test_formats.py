"""Every format, without the libraries that own it: files, identities, round trips and what is refused.

tests/peers asks the libraries themselves.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saetrack.sae import (
    SAE,
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    SAETrackSAE,
    StandardSAE,
    TopKSAE,
)
from saetrack.sae.formats import WRITERS, Origin, detect_format, read_foreign

D_IN, D_SAE = 6, 24
ORIGIN = Origin("org/llm", "step64", "gpt_neox.layers.1", 128, True)
MAKERS: dict[str, Callable[[], SAE]] = {
    "StandardSAE": lambda: StandardSAE(D_IN, 4),
    "SAETrackSAE": lambda: SAETrackSAE(D_IN, 4),
    "TopKSAE": lambda: TopKSAE(D_IN, 4, k=5),
    "BatchTopKSAE": lambda: BatchTopKSAE(D_IN, 4, k=5),
    "MatryoshkaSAE": lambda: MatryoshkaSAE(D_IN, 4, k=5, prefixes=[3, 10, 24]),
    "JumpReLUSAE": lambda: JumpReLUSAE(D_IN, 4),
    "GatedSAE": lambda: GatedSAE(D_IN, 4),
}
REFUSED = {
    "sparsify": {"BatchTopKSAE", "MatryoshkaSAE", "JumpReLUSAE", "GatedSAE"},
    "llamascopium": {"GatedSAE"},
}
HELD = [(f, name) for f in WRITERS for name in MAKERS if name not in REFUSED.get(f, set())]


def random_sae(name: str, seed: int = 0) -> SAE:
    """Weights of every kind at random: rows of different norms, biases, thresholds."""
    sae = MAKERS[name]()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in sae.state_dict().values():
            value.copy_(torch.randn(value.shape, generator=generator))
        if isinstance(sae, JumpReLUSAE):
            sae.threshold.abs_()
        elif hasattr(sae, "threshold"):
            sae.threshold.fill_(0.75)
    return sae.requires_grad_(False)


def activations(n: int = 40) -> Tensor:
    return 1 + 2 * torch.randn(n, D_IN, generator=torch.Generator().manual_seed(1))


def latents_one_by_one(sae: SAE, x: Tensor) -> Tensor:
    """The latents by their definition, one activation and one latent at a time, in doubles."""
    w_enc, b_dec = sae.W_enc.double(), sae.b_dec.double()
    out = torch.zeros(len(x), sae.d_sae, dtype=torch.float64)
    for row, activation in enumerate(x.double()):
        pre = torch.stack([(activation - b_dec) @ w_enc[:, i] for i in range(sae.d_sae)])
        for i in range(sae.d_sae):
            if isinstance(sae, GatedSAE):
                magnitude = pre[i] * sae.r_mag[i].double().exp() + sae.b_mag[i]
                out[row, i] = max(magnitude, 0) if pre[i] + sae.b_gate[i] > 0 else 0
                continue
            value = pre[i] + sae.b_enc[i]
            bar = float(sae.threshold[i]) if hasattr(sae, "threshold") else 0.0
            if isinstance(sae, TopKSAE):
                bar = max(0.0, float((pre + sae.b_enc.double()).sort(descending=True).values[sae.k]))
            out[row, i] = value if value > bar else 0
    return out


def assert_same(ours: SAE, other: SAE, latent_scale: Tensor | float = 1.0) -> None:
    x = activations()
    expected = latents_one_by_one(ours, x) * latent_scale
    torch.testing.assert_close(other.encode(x).double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(other(x), ours(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("library", "name"), HELD)
def test_what_is_written_for_a_library_reads_back_as_the_same_function(library: str, name: str, tmp_path: Path) -> None:
    sae = random_sae(name)
    WRITERS[library](sae, tmp_path, ORIGIN)
    assert detect_format(tmp_path) == library
    again = read_foreign(tmp_path)
    unit_rows = library == "dictionary_learning" and name in ("StandardSAE", "SAETrackSAE")
    assert_same(sae, again.sae, sae.W_dec.norm(dim=1).double() if unit_rows else 1.0)
    assert again.origin.hookpoint in (ORIGIN.hookpoint, tmp_path.name)


@pytest.mark.parametrize(("library", "name"), [(f, name) for f, names in REFUSED.items() for name in sorted(names)])
def test_what_a_library_cannot_hold_is_refused_with_the_reason(library: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{library} cannot hold a {name}: it") as error:
        WRITERS[library](random_sae(name), tmp_path, ORIGIN)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_dictionary_learning_has_one_threshold_so_different_ones_are_refused(tmp_path: Path) -> None:
    sae = random_sae("BatchTopKSAE")
    sae.threshold[3] = 0.9
    with pytest.raises(ValueError, match="one threshold for all latents"):
        WRITERS["dictionary_learning"](sae, tmp_path, ORIGIN)


def test_sparsify_files_have_its_names_orientation_and_settings(tmp_path: Path) -> None:
    sae = random_sae("TopKSAE")
    WRITERS["sparsify"](sae, tmp_path, ORIGIN)
    tensors = load_file(tmp_path / "sae.safetensors")
    assert {k: tuple(v.shape) for k, v in tensors.items()} == {
        "encoder.weight": (D_SAE, D_IN),
        "encoder.bias": (D_SAE,),
        "W_dec": (D_SAE, D_IN),
        "b_dec": (D_IN,),
    }
    assert torch.equal(tensors["W_dec"], sae.W_dec)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["k"] == 5
    assert config["num_latents"] == D_SAE
    assert config["normalize_decoder"] is False  # these rows have other norms, and it would change them
    assert config["transcode"] is False


def test_saelens_transposed_sparsify_loader_is_not_repeated(tmp_path: Path) -> None:
    # SAELens transposes a W_dec that is [latents, d_in] already; with d_sae = d_in no shape would tell.
    square = {"encoder.weight": torch.eye(4), "encoder.bias": torch.zeros(4), "b_dec": torch.zeros(4)}
    decoder = torch.arange(16.0).view(4, 4)
    save_file({**square, "W_dec": decoder}, tmp_path / "sae.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"activation": "topk", "num_latents": 4, "k": 4, "d_in": 4}))
    assert torch.equal(read_foreign(tmp_path).sae.W_dec, decoder)


@pytest.mark.parametrize("normalize_decoder", [True, False])
def test_sparsify_takes_b_dec_from_the_input_whatever_normalize_decoder_says(
    normalize_decoder: bool, tmp_path: Path
) -> None:
    # SAELens derives apply_b_dec_to_input from a setting that has nothing to do with it.
    sae = random_sae("TopKSAE")
    WRITERS["sparsify"](sae, tmp_path, ORIGIN)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "normalize_decoder": normalize_decoder}))
    assert_same(sae, read_foreign(tmp_path).sae)


def test_num_latents_0_of_sparsify_means_the_expansion_factor(tmp_path: Path) -> None:
    WRITERS["sparsify"](random_sae("TopKSAE"), tmp_path, ORIGIN)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "num_latents": 0, "signed": False}))
    assert read_foreign(tmp_path).sae.d_sae == D_SAE


def saved_by_dictionary_learning(folder: Path, dict_class: str, content: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": dict_class, "lm_name": "org/llm"}}))
    return folder


def test_a_backup_ae_pt_is_told_from_a_finished_one_and_its_norm_factor_folded(tmp_path: Path) -> None:
    # both have the same name, and only the finished one has its biases in the LLM's units.
    sae, factor = random_sae("BatchTopKSAE"), 3.5
    WRITERS["dictionary_learning"](sae, tmp_path, ORIGIN)
    trained = torch.load(tmp_path / "ae.pt", weights_only=True)
    backup = {"step": 7, "ae": trained, "optimizer": {}, "config": {}, "norm_factor": factor}
    again = read_foreign(saved_by_dictionary_learning(tmp_path / "backup", "BatchTopKSAE", backup)).sae
    x = activations()
    torch.testing.assert_close(again(x), factor * sae(x / factor), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(again.encode(x), factor * sae.encode(x / factor), rtol=1e-5, atol=1e-4)


def test_the_threshold_of_batchtopk_is_read_and_not_taken_for_plain_relu(tmp_path: Path) -> None:
    # SAELens's loader drops it.
    WRITERS["dictionary_learning"](random_sae("BatchTopKSAE"), tmp_path, ORIGIN)
    again = read_foreign(tmp_path).sae
    latents = again.encode(activations())
    assert isinstance(again, BatchTopKSAE)
    assert again.k == 5
    assert latents[latents > 0].min() > 0.75
    assert not torch.equal(latents, again.preactivations(activations()).relu())


def test_a_threshold_that_was_never_measured_lets_every_positive_latent_through(tmp_path: Path) -> None:
    WRITERS["dictionary_learning"](random_sae("BatchTopKSAE"), tmp_path, ORIGIN)
    tensors = torch.load(tmp_path / "ae.pt", weights_only=True)
    tensors["threshold"] = torch.tensor(-1.0)
    again = read_foreign(saved_by_dictionary_learning(tmp_path, "BatchTopKSAE", tensors)).sae
    torch.testing.assert_close(again.encode(activations()), again.preactivations(activations()).relu())


def test_a_checkpoint_of_dictionary_learning_is_read_with_the_configuration_above_it(tmp_path: Path) -> None:
    WRITERS["dictionary_learning"](random_sae("TopKSAE"), tmp_path, ORIGIN)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "ae.pt").rename(tmp_path / "checkpoints" / "ae_500.pt")
    assert_same(random_sae("TopKSAE"), read_foreign(tmp_path / "checkpoints" / "ae_500.pt").sae)


def test_an_ae_pt_with_objects_in_it_is_refused_and_not_unpickled(tmp_path: Path) -> None:
    folder = saved_by_dictionary_learning(tmp_path, "AutoEncoder", {"bias": Path("x")})
    with pytest.raises(ValueError, match=r"ae\.pt holds objects of pathlib.* nothing in it was run"):
        read_foreign(folder)


def test_llamascopium_has_no_input_bias_so_it_is_folded_into_b_e(tmp_path: Path) -> None:
    sae = random_sae("JumpReLUSAE")
    WRITERS["llamascopium"](sae, tmp_path, ORIGIN)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    assert set(tensors) == {"W_E", "b_E", "W_D", "b_D", "activation_function.log_jumprelu_threshold"}
    x = activations().double()
    pre = x @ tensors["W_E"].double() + tensors["b_E"].double()
    threshold = tensors["activation_function.log_jumprelu_threshold"].double().exp()
    torch.testing.assert_close(pre * (pre > threshold), latents_one_by_one(sae, activations()), rtol=1e-5, atol=1e-4)


def test_a_threshold_of_zero_has_a_finite_logarithm(tmp_path: Path) -> None:
    sae = random_sae("JumpReLUSAE")
    sae.load_state_dict({**sae.state_dict(), "threshold": torch.zeros(D_SAE)})
    WRITERS["llamascopium"](sae, tmp_path, ORIGIN)
    assert all(v.isfinite().all() for v in load_file(tmp_path / "sae_weights.safetensors").values())
    assert_same(sae, read_foreign(tmp_path).sae)


def test_the_data_set_norm_of_llamascopium_is_folded_with_the_threshold(tmp_path: Path) -> None:
    sae, average = random_sae("JumpReLUSAE"), 12.0
    WRITERS["llamascopium"](sae, tmp_path, ORIGIN)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    name = f"dataset_average_activation_norm.{ORIGIN.hookpoint}"
    save_file({**tensors, name: torch.tensor(average)}, tmp_path / "sae_weights.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "norm_activation": "dataset-wise"}))
    again, scale, x = read_foreign(tmp_path).sae, D_IN**0.5 / average, activations()
    torch.testing.assert_close(again.encode(x), sae.encode(x * scale), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(again(x), sae(x * scale) / scale, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["JumpReLUSAE", "TopKSAE"])
def test_llamascopium_choosing_by_decoder_norm_is_folded(name: str, tmp_path: Path) -> None:
    sae = random_sae(name)
    WRITERS["llamascopium"](sae, tmp_path, ORIGIN)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "sparsity_include_decoder_norm": True}))
    x = activations()
    norms = sae.W_dec.norm(dim=1)
    theirs = sae.activate(sae.preactivations(x) * norms) / norms  # as its encode does
    torch.testing.assert_close(read_foreign(tmp_path).sae(x), sae.decode(theirs), rtol=1e-5, atol=1e-4)


def saelens_folder(folder: Path, name: str, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    """A snapshot for SAELens with other settings, and tensors added (None: taken out)."""
    WRITERS["saelens"](random_sae(name), folder, ORIGIN)
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, **changes}))
    if tensors is not None:
        changed = {**load_file(folder / "sae_weights.safetensors"), **tensors}
        save_file({k: v.contiguous() for k, v in changed.items() if v is not None}, folder / "sae_weights.safetensors")
    return folder


@pytest.mark.parametrize("name", ["StandardSAE", "TopKSAE", "JumpReLUSAE", "GatedSAE"])
def test_saelens_without_an_input_bias_is_folded(name: str, tmp_path: Path) -> None:
    sae, x = random_sae(name), activations()
    again = read_foreign(saelens_folder(tmp_path, name, apply_b_dec_to_input=False)).sae
    # without the subtraction, x is to ours what x + b_dec would be
    torch.testing.assert_close(again.encode(x), sae.encode(x + sae.b_dec), rtol=1e-5, atol=1e-4)


def test_saelens_top_k_that_is_rescaled_chooses_by_the_rescaled_latents(tmp_path: Path) -> None:
    sae, x = random_sae("TopKSAE"), activations()
    again = read_foreign(saelens_folder(tmp_path, "TopKSAE", rescale_acts_by_decoder_norm=True)).sae
    rescaled = sae.activate(sae.preactivations(x) * sae.W_dec.norm(dim=1))
    torch.testing.assert_close(again.encode(x), rescaled, rtol=1e-5, atol=1e-4)
    assert ((sae.encode(x) > 0) != (rescaled > 0)).any()  # the test could tell


def test_a_saelens_training_checkpoint_of_batchtopk_keeps_its_class_and_its_threshold_follows_the_fold(
    tmp_path: Path,
) -> None:
    # its inference form is a jumprelu. SAELens #764: the normaliser left the threshold behind.
    changes = {"architecture": "batchtopk", "k": 5.0, "normalize_activations": "expected_average_only_in"}
    scalar = {"threshold": None, "topk_threshold": torch.tensor(0.75, dtype=torch.float64)}
    folder = saelens_folder(tmp_path, "BatchTopKSAE", scalar, rescale_acts_by_decoder_norm=True, **changes)
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.3}')
    again, sae, x = read_foreign(folder).sae, random_sae("BatchTopKSAE"), activations()
    assert isinstance(again, BatchTopKSAE)
    pre = sae.preactivations(0.3 * x) * sae.W_dec.norm(dim=1)
    torch.testing.assert_close(again.encode(x), pre * (pre > 0.75), rtol=1e-5, atol=1e-4)
    expected = ((pre * (pre > 0.75)) @ (sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)) + sae.b_dec) / 0.3
    torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=1e-4)


def test_a_log_threshold_from_before_saelens_6_48_is_read(tmp_path: Path) -> None:
    sae = random_sae("JumpReLUSAE")
    tensors = {"threshold": None, "log_threshold": sae.threshold.detach().log()}
    assert_same(sae, read_foreign(saelens_folder(tmp_path, "JumpReLUSAE", tensors)).sae)


def test_a_negative_threshold_counts_as_zero_as_in_saelens_6_48(tmp_path: Path) -> None:
    again = read_foreign(saelens_folder(tmp_path, "JumpReLUSAE", {"threshold": -torch.ones(D_SAE)})).sae
    torch.testing.assert_close(again.encode(activations()), again.preactivations(activations()).relu())


def test_what_we_write_has_a_sae_lens_version_of_6_or_saelens_would_rewrite_it(tmp_path: Path) -> None:
    config = json.loads((saelens_folder(tmp_path, "TopKSAE") / "cfg.json").read_text())
    assert int(config["metadata"]["sae_lens_version"].split(".")[0]) >= 6


def test_a_configuration_from_before_saelens_6_is_read(tmp_path: Path) -> None:
    folder = saelens_folder(tmp_path, "TopKSAE")
    old = {"d_in": D_IN, "d_sae": D_SAE, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}}
    names = {"model_name": "org/llm", "hook_point": "blocks.1.hook_resid_post", "normalize_activations": False}
    (folder / "cfg.json").write_text(json.dumps({**old, **names}))
    again = read_foreign(folder)
    assert_same(random_sae("TopKSAE"), again.sae)
    assert (again.origin.model, again.origin.hookpoint) == ("org/llm", "blocks.1.hook_resid_post")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_are_held_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {k: v.to(dtype) for k, v in random_sae("TopKSAE").state_dict().items()}
    again = read_foreign(saelens_folder(tmp_path, "TopKSAE", tensors)).sae
    assert all(torch.equal(again.state_dict()[k], v.float()) for k, v in tensors.items())


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({"architecture": "temporal"}, None, r"cfg\.json: architecture is 'temporal'; expected one of standard, topk"),
        ({"normalize_activations": "layer_norm"}, None, r"cfg\.json: normalize_activations is 'layer_norm'; expected"),
        ({"reshape_activations": "hook_z"}, None, "reshape_activations is 'hook_z'; expected 'none'"),
        ({"normalize_activations": "expected_average_only_in"}, None, "activation_scaler.json does not exist"),
        ({"d_sae": "24"}, None, "d_sae is '24'; expected a whole number"),
        ({"k": None}, None, "k is None; expected a whole number"),
        ({}, {"b_dec": None}, r"tensor b_dec is missing; found W_dec, W_enc, b_enc; expected b_dec \[6\]"),
        ({}, {"W_dec": torch.zeros(6, 24)}, r"tensor W_dec has shape \[6, 24\]; expected W_dec \[24, 6\]"),
        ({}, {"b_enc": torch.zeros(24, 1)}, r"tensor b_enc has shape \[24, 1\]; expected b_enc \[24\]"),
        ({}, {"b_enc": torch.zeros(24, dtype=torch.int8)}, "tensor b_enc is of torch.int8; expected one of"),
        ({}, {"W_enc": torch.zeros(6, 24, dtype=torch.float64)}, "tensor W_enc is of torch.float64"),
        ({}, {"b_dec": torch.full((6,), torch.nan)}, "tensor b_dec holds NaN or infinities"),
    ],
)
def test_bad_input_is_one_line_that_names_file_tensor_found_and_expected(
    changes: dict[str, Any], tensors: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    folder = saelens_folder(tmp_path, "TopKSAE", tensors, **changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        read_foreign(folder)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_width_that_does_not_divide_the_latents_is_refused(tmp_path: Path) -> None:
    WRITERS["sparsify"](random_sae("TopKSAE"), tmp_path, ORIGIN)
    tensors = load_file(tmp_path / "sae.safetensors")
    shorter = {k: v[:23].clone() if len(v) == 24 else v for k, v in tensors.items()}
    save_file(shorter, tmp_path / "sae.safetensors")
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "num_latents": 23}))
    with pytest.raises(ValueError, match="23 latents for activations of width 6; expected a multiple"):
        read_foreign(tmp_path)


def test_a_file_that_is_no_safetensors_and_one_that_is_missing_are_named(tmp_path: Path) -> None:
    folder = saelens_folder(tmp_path, "TopKSAE")
    (folder / "sae_weights.safetensors").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"sae_weights\.safetensors is not a safetensors file"):
        read_foreign(folder)
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"sae_weights\.safetensors does not exist; found cfg\.json"):
        read_foreign(folder)


@pytest.mark.parametrize(
    ("library", "changes", "message"),
    [
        ("sparsify", {"activation": "groupmax"}, "activation is 'groupmax'; expected 'topk'"),
        ("sparsify", {"transcode": True}, "transcode is True; expected False"),
        ("sparsify", {"skip_connection": True}, "skip_connection is True"),
        ("llamascopium", {"act_fn": "batchtopk"}, "act_fn is 'batchtopk'; expected 'relu' or 'topk' or 'jumprelu'"),
        ("llamascopium", {"use_glu_encoder": True}, "use_glu_encoder is True"),
        ("llamascopium", {"hook_point_out": "other"}, "hook_point_out is 'other'; expected 'gpt_neox.layers.1'"),
        ("llamascopium", {"norm_activation": "token-wise"}, "norm_activation is 'token-wise'"),
        ("llamascopium", {"sae_type": "crosscoder"}, "sae_type is 'crosscoder'"),
        ("dictionary_learning", {"trainer": {"dict_class": "CrossCoder"}}, "dict_class is 'CrossCoder'; expected one"),
    ],
)
def test_settings_that_ours_cannot_hold_are_refused(
    library: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    WRITERS[library](random_sae("TopKSAE"), tmp_path, ORIGIN)
    path = tmp_path / ("cfg.json" if library == "sparsify" else "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        read_foreign(tmp_path)


HOSTILE: list[Any] = [None, True, -1, 1.5, float("nan"), 10**30, "x", "\0", [], [3.5], [-5, 24], {}, {"a": 1}]


@pytest.mark.parametrize(("library", "name"), [(f, "MatryoshkaSAE" if f != "sparsify" else "TopKSAE") for f in WRITERS])
def test_a_configuration_of_wrong_types_is_read_or_refused_in_one_line(library: str, name: str, tmp_path: Path) -> None:
    WRITERS[library](random_sae(name), tmp_path, ORIGIN)
    (path,) = tmp_path.glob("c*fg.json" if library in ("saelens", "sparsify") else "config.json")
    config = json.loads(path.read_text())
    said: list[str] = []
    inner = [(part, key) for part, values in config.items() if isinstance(values, dict) for key in values]
    for keys in [*((key,) for key in config), *inner, ("matryoshka_widths",), ("activation_fn_kwargs",)]:
        for value in HOSTILE:
            changed = json.loads(json.dumps(config))
            part = changed if len(keys) == 1 else changed[keys[0]]
            part[keys[-1]] = value
            path.write_text(json.dumps(changed))
            try:
                json.dumps(vars(read_foreign(tmp_path).origin), allow_nan=False)
            except (ValueError, FileNotFoundError) as error:
                said.append(str(error))
    assert len(said) > 20
    assert all(str(tmp_path) in line and "\n" not in line for line in said)


def test_json_that_is_too_deep_is_no_json(tmp_path: Path) -> None:
    WRITERS["saelens"](random_sae("TopKSAE"), tmp_path, ORIGIN)
    (tmp_path / "cfg.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"cfg\.json is not json"):
        read_foreign(tmp_path)


def test_a_tensor_that_is_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    WRITERS["dictionary_learning"](random_sae("TopKSAE"), tmp_path, ORIGIN)
    tensors = torch.load(tmp_path / "ae.pt", weights_only=True)
    tensors["encoder.weight"] = torch.zeros(1).expand(10**9, D_IN)
    torch.save(tensors, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match=r"encoder\.weight of shape \(1000000000, 6\) is larger than its data"):
        read_foreign(tmp_path)


@pytest.mark.parametrize(
    ("norm", "ae"), [("x", {}), (-1.0, {}), (float("nan"), {}), (True, {}), (torch.ones(2), {}), (2.0, 5)]
)
def test_a_backup_with_no_number_as_its_norm_is_refused(norm: object, ae: object, tmp_path: Path) -> None:
    WRITERS["dictionary_learning"](random_sae("TopKSAE"), tmp_path, ORIGIN)
    content = torch.load(tmp_path / "ae.pt", weights_only=True) if ae == {} else ae
    torch.save({"ae": content, "norm_factor": norm}, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match=r"ae\.pt: (norm_factor is .*expected a number above 0|ae is a int)"):
        read_foreign(tmp_path)


def test_a_folder_of_nothing_known_says_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no SAE that saetrack reads: expected a folder with"):
        detect_format(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        detect_format(tmp_path / "none")
