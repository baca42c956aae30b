"""Superposition09m/SAE-Track, the paper's own code: a pickled ``SAEGroup``, and a map of those of a series."""

from pathlib import Path
from typing import Any

from torch import Tensor

from saetrack.sae.saetrack import SAETrackSAE

from .files import ForeignSAE, TensorFile, build, read_config, read_origin
from .unpickle import Stub, read_pickled


def read_reference(path: Path) -> ForeignSAE:
    """Read a pickled group with one SAE: ReLU, ``b_dec`` taken from the input, in the LLM's own units.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it is something else, holds several SAEs, or a tensor cannot be held.
    """
    group = read_pickled(path)
    members = _attribute(group, "autoencoders")
    saes = members if isinstance(members, list) else [group]
    if len(saes) != 1:
        raise ValueError(f"{path} holds {len(saes)} SAEs; expected 1. Save the one to import in a group of its own.")
    parameters, config = _attribute(saes[0], "_parameters"), _attribute(saes[0], "cfg")
    if isinstance(group, dict):  # what its SparseAutoencoder.save_model writes
        parameters, config = group.get("state_dict"), group.get("cfg")
    if not isinstance(parameters, dict):
        raise ValueError(f"{path} holds a {type(group).__name__.strip('_')}; expected a group of SAEs with weights.")
    file = TensorFile(path, {name: v.detach() for name, v in parameters.items() if isinstance(v, Tensor)})
    encoder = file.take("W_enc", None, None)
    d_in, d_sae = encoder.shape
    state = {
        "W_enc": encoder,
        "b_enc": file.take("b_enc", d_sae),
        "W_dec": file.take("W_dec", d_sae, d_in),
        "b_dec": file.take("b_dec", d_in),
    }
    coefficient = _attribute(config, "l1_coefficient")
    arguments = {"l1_coefficient": coefficient} if isinstance(coefficient, float) else {}
    sae = build(SAETrackSAE, state, path, **arguments)
    names = ("model_name", "hook_point", "context_size")
    model, hookpoint, context_size = (_attribute(config, name) for name in names)
    facts = {"model": model, "hookpoint": hookpoint, "context_size": context_size}
    return ForeignSAE(sae, read_origin(path, prepend_bos=True, **facts))


def read_reference_map(path: Path) -> dict[int, Path]:
    """The files of a series by the index of their LLM checkpoint, in its order.

    The map says where they lie, seen from the folder that holds it.

    Raises:
        FileNotFoundError: If the map or a file is missing.
        ValueError: If an index is no number, or a path leads out of the map's folder.
    """
    folder = path.parent.resolve()
    files: dict[int, Path] = {}
    for index, name in read_config(path).items():
        if not (index.isdecimal() and isinstance(name, str)):
            raise ValueError(f'{path}: found "{index}": {name!r}; expected the index of an LLM checkpoint and a path.')
        file = (folder / name).resolve()
        if not file.is_relative_to(folder):
            raise ValueError(f"{path}: {name} leads out of {folder}; expected a path in it. Move the map to the files.")
        if not file.is_file():
            raise FileNotFoundError(f"{path}: index {index} is {file}, which does not exist; put the file there.")
        files[int(index)] = file
    if not files:
        raise ValueError(f"{path} names no files; expected paths by the index of the LLM checkpoint.")
    return dict(sorted(files.items()))


def _attribute(thing: Any, name: str) -> Any:
    return vars(thing).get(name) if isinstance(thing, Stub) else None
