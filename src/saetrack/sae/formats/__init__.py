"""SAEs in the files of other libraries: written for them, and read from them."""

from collections.abc import Callable
from pathlib import Path

from saetrack.sae.base import SAE

from .dictionary_learning import read_dictionary_learning, write_dictionary_learning
from .files import ForeignSAE, Origin, read_config
from .llamascopium import read_llamascopium, write_llamascopium
from .reference import read_reference, read_reference_map
from .saelens import read_saelens, save_saelens, write_saelens
from .sparsify import read_sparsify, write_sparsify

__all__ = [
    "CONFIGURATIONS",
    "FILES",
    "WRITERS",
    "ForeignSAE",
    "Origin",
    "detect_format",
    "read_foreign",
    "read_reference_map",
    "save_saelens",
]

WRITERS: dict[str, Callable[[SAE, Path, Origin], None]] = {
    "saelens": write_saelens,
    "sparsify": write_sparsify,
    "dictionary_learning": write_dictionary_learning,
    "llamascopium": write_llamascopium,
}
"""How an SAE is written into an empty folder, by the name of the library that reads it."""

READERS: dict[str, Callable[[Path], ForeignSAE]] = {
    "saelens": read_saelens,
    "sparsify": read_sparsify,
    "dictionary_learning": read_dictionary_learning,
    "llamascopium": read_llamascopium,
    "reference": read_reference,
}


CONFIGURATIONS = ("cfg.json", "config.json")
"""Names of the files that say what SAE a folder holds."""

FILES = (*CONFIGURATIONS, "sae_weights.safetensors", "sae.safetensors", "ae.pt", "activation_scaler.json")
"""Names of all files in a folder that is read."""


def detect_format(path: Path) -> str:
    """The library that wrote a folder or a file, told by its configuration.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is of none of them.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected the folder or the file of an SAE.")
    if path.is_file():
        near = (path.parent / "config.json", path.parent.parent / "config.json")
        if path.suffix == ".pt" and any("trainer" in read_config(config) for config in near if config.is_file()):
            return "dictionary_learning"
        if path.suffix in (".pt", ".pkl") or path.name.endswith(".pkl.gz"):
            return "reference"
    elif (path / "cfg.json").is_file():
        return "sparsify" if "num_latents" in read_config(path / "cfg.json") else "saelens"
    elif (path / "config.json").is_file():
        config = read_config(path / "config.json")
        if "trainer" in config:
            return "dictionary_learning"
        if "sae_type" in config:
            return "llamascopium"
    raise ValueError(
        f"{path} is no SAE that saetrack reads: expected a folder with cfg.json (SAELens, sparsify) or config.json "
        "(dictionary_learning, llamascopium), or a .pt, .pkl or .pkl.gz of the reference implementation."
    )


def read_foreign(path: Path) -> ForeignSAE:
    """Read an SAE of any library; :func:`detect_format` says whose it is."""
    return READERS[detect_format(path)](path)
