"""Which files of an LLM checkpoint hold its weights, whether they are whole, and what tells them from others."""

import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from saetrack.errors import first_line
from saetrack.lm import hub_cache
from saetrack.pickles import is_archive, load_weights_only

_SHORTEST = 16
"""Bytes that no file of weights is shorter than; of fewer it cannot be told what they begin."""

# In the order in which transformers prefers them; in shards, beside an index.
_FORMATS = ("model.safetensors", "pytorch_model.bin")


def names_of_weights(names: Iterable[str], read: Callable[[str], str], where: str) -> list[str]:
    """Names of the weight files among ``names``, safetensors before ``.bin``, shards by their index.

    Args:
        names: All that there are.
        read: Gives the text of one of them, the index.
        where: What holds them, for messages.

    Raises:
        FileNotFoundError: If there are none, or a shard is missing.
        ValueError: If an index is damaged or names no shards.
    """
    present = set(names)
    single = preferred_format(present)
    if single is None:
        raise FileNotFoundError(
            f"{where} has no weights: expected {' or '.join(_FORMATS)}, whole or in shards with an index, but found "
            f"{', '.join(sorted(present)[:6]) or 'nothing'}. Fetch them, or leave this checkpoint out of the series."
        )
    if single in present:
        return [single]
    shards = _shards(read(_index(single)), f"{where}: {_index(single)}")
    missing = [shard for shard in shards if shard not in present]
    if missing:
        raise FileNotFoundError(
            f"{where} lacks {len(missing)} of the {len(shards)} weight files in {_index(single)}, the first is "
            f"{missing[0]}. Fetch it again, or leave this checkpoint out of the series."
        )
    return shards


def preferred_format(names: Iterable[str]) -> str | None:
    """The format that is loaded, ``model.safetensors`` or ``pytorch_model.bin``; None where there is neither."""
    present = set(names)
    return next((single for single in _FORMATS if not present.isdisjoint({single, _index(single)})), None)


def whole_formats(names: Iterable[str]) -> dict[str, list[str]]:
    """The weight files among ``names`` by format, where the names alone tell that all of them are there.

    Of shards they tell it when they are those that transformers gives, ``model-00001-of-00006.safetensors``.
    """
    present = set(names)
    found = {}
    for single in _FORMATS:
        stem, _, suffix = single.partition(".")
        numbered = re.compile(rf"{stem}-\d{{5}}-of-(\d{{5}})\.{suffix}", re.ASCII)
        shards = [match for match in map(numbered.fullmatch, sorted(present)) if match is not None]
        if single in present:
            found[single] = [single]
        elif _index(single) in present and {int(m[1]) for m in shards} == {len(shards)}:
            found[single] = [m[0] for m in shards]
    return found


def weight_names(folder: Path) -> list[str]:
    """Names of the weight files in a folder, as ``names_of_weights`` finds them."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    return names_of_weights(names, lambda name: (folder / name).read_text(encoding="utf-8"), str(folder))


def fingerprint_of(digests: Mapping[str, str]) -> str:
    """One string for the weights of a checkpoint; equal strings are equal weights.

    Args:
        digests: SHA-256 of each file by its name, in the order of the names.
    """
    if len(digests) == 1:
        return f"sha256:{next(iter(digests.values()))}"
    joined = hashlib.sha256("".join(digests.values()).encode()).hexdigest()
    return f"sha256-of-{len(digests)}-shards:{joined}"


def file_digest(path: Path) -> str:
    """SHA-256 of a weight file; the Hub's cache names its files by it.

    Raises:
        ValueError: If the file is truncated.
    """
    if (fault := damage(path)) is not None:
        raise ValueError(f"{path} is truncated or damaged ({fault}). Write or fetch it again.")
    return hub_cache.digest_in_name(path) or hub_cache.sha256(path)


def damage(path: Path) -> str | None:
    """Why a weight file is not whole, in a few words; None when it is as long as it should be.

    A safetensors file says its length in its header, and torch's zip archives have a directory at their end; those of
    torch before 1.6 are no archives, and nothing tells.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return None
        except SafetensorError as error:
            return first_line(error)
    if (size := path.stat().st_size) < _SHORTEST:
        return f"it has {size} bytes"
    try:
        is_archive(path)
    except (ValueError, zipfile.BadZipFile) as error:
        return first_line(error)
    return None


def stored_dtypes(path: Path) -> dict[str, str]:
    """The data types of the tensors in a weight file, by name, as the file calls them: ``F32``, ``torch.int8``.

    No weights are read. Of a ``.bin`` from before torch 1.6, which is no archive, nothing is known without reading it.
    """
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    content = load_weights_only(path, mmap=True) if is_archive(path) else {}
    return {name: str(tensor.dtype) for name, tensor in content.items() if hasattr(tensor, "dtype")}


def _index(single: str) -> str:
    return f"{single}.index.json"


def _shards(index: str, where: str) -> list[str]:
    try:
        shards = sorted(set(json.loads(index)["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{where} is damaged, or names no shards by tensor. Write or fetch it again.") from error
    if not shards:
        raise ValueError(f"{where} names no shards. Write or fetch it again.")
    return shards
