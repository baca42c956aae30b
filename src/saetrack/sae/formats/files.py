"""Reading an SAE's files with errors that say which file, which tensor, what was found and what was expected."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saetrack.errors import first_line
from saetrack.pickles import checked_tensor, read_torch_file
from saetrack.sae.base import SAE

_HELD = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes whose every value is a float32, which is what an SAE's parameters are."""


@dataclass(frozen=True)
class Origin:
    """What an SAE reads; None where nobody says.

    Args:
        model: The LLM, a folder or a repository.
        revision: The LLM checkpoint, a branch of that repository.
        hookpoint: The module whose output is read, in the words of whoever wrote the file.
        context_size: Tokens in a row.
        prepend_bos: Whether rows begin with a BOS.
    """

    model: str | None = None
    revision: str | None = None
    hookpoint: str | None = None
    context_size: int | None = None
    prepend_bos: bool | None = None


@dataclass(frozen=True)
class ForeignSAE:
    """An SAE that was read from a file of another library.

    Args:
        sae: The SAE, in the units of the activations that the file's owner reads.
        origin: What the file says that it reads.
    """

    sae: SAE
    origin: Origin


class TensorFile:
    """The tensors of one file, taken with their shapes checked.

    Args:
        path: The file, for messages.
        tensors: What it holds, by name.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Any]) -> None:
        self.path = path
        self.tensors = tensors

    @classmethod
    def safetensors(cls, path: Path) -> TensorFile:
        """Read a safetensors file.

        Raises:
            FileNotFoundError: If it does not exist.
            ValueError: If it is no safetensors file.
        """
        if not path.is_file():
            found = ", ".join(sorted(p.name for p in path.parent.glob("*"))[:6]) or "nothing"
            raise FileNotFoundError(f"{path} does not exist; found {found}. Expected the weights in that file.")
        try:
            return cls(path, load_file(path))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a safetensors file ({error}); expected one. Fetch it again.") from error

    @classmethod
    def torch_save(cls, path: Path) -> TensorFile:
        """Read a dictionary of tensors that ``torch.save`` wrote; no object but tensors and plain values is made.

        Raises:
            FileNotFoundError: If it does not exist.
            ValueError: If it is damaged, or holds objects or no dictionary.
        """
        return cls(path, read_torch_file(path, "a dictionary of the SAE's tensors"))

    def take(self, name: str, *shape: int | None) -> Tensor:
        """One tensor as float32.

        Args:
            name: Its name in the file.
            shape: What its shape must be; None for a dimension that may be of any size.

        Raises:
            ValueError: If it is missing, of another shape, of a dtype that float32 cannot hold, or not finite.
        """
        expected = f"expected {name} {_shape(shape)}"
        tensor = self.tensors.get(name)
        if not isinstance(tensor, Tensor):
            found = ", ".join(map(str, self.tensors)) or "no tensors"
            raise ValueError(f"{self.path}: tensor {name} is missing; found {found}; {expected}.")
        if tensor.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, tensor.shape, strict=True)):
            raise ValueError(f"{self.path}: tensor {name} has shape {_shape(tensor.shape)}; {expected}.")
        # A double that stands alone is a threshold, which SAELens keeps so.
        if tensor.dtype not in _HELD and not (tensor.dtype == torch.float64 and tensor.ndim == 0):
            raise ValueError(
                f"{self.path}: tensor {name} is of {tensor.dtype}; expected one of {', '.join(map(str, _HELD))}, "
                "which float32 parameters can hold."
            )
        if not checked_tensor(self.path, name, tensor).isfinite().all():
            raise ValueError(f"{self.path}: tensor {name} holds NaN or infinities; expected finite numbers.")
        return tensor.float()

    def take_count(self, name: str) -> int:
        """A whole number that is stored as a tensor, such as the k of top-k.

        Raises:
            ValueError: If it is missing or no whole number above 0.
        """
        value = self.tensors.get(name)
        if not isinstance(value, Tensor) or value.numel() != 1 or value.is_floating_point() or int(value) < 1:
            found = "nothing" if value is None else value
            raise ValueError(f"{self.path}: tensor {name} is {found}; expected a whole number of at least 1.")
        return int(value)


def read_config(path: Path) -> dict[str, Any]:
    """A configuration in json.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not a json object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected the SAE's configuration in that file.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not json ({first_line(error)}); expected the SAE's configuration.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a json object.")
    return content


def section(config: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    """A part of a configuration; empty where it is missing or null.

    Raises:
        ValueError: If it is no json object.
    """
    value = config.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {name} is {brief(value)}; expected a json object.")
    return value


def choice_in(config: Mapping[str, Any], name: str, path: Path, allowed: Iterable[str]) -> str:
    """A word of a configuration.

    Raises:
        ValueError: If it is none of those that are allowed.
    """
    value, words = config.get(name), list(allowed)
    if value not in words:
        raise ValueError(f"{path}: {name} is {brief(value)}; expected one of {', '.join(words)}.")
    return str(value)


def read_origin(path: Path, **facts: Any) -> Origin:
    """What a file says that its SAE reads.

    Args:
        path: The file, for messages.
        facts: Fields of ``Origin``; None where the file says nothing.

    Raises:
        ValueError: If one is of another type.
    """
    types = {"context_size": int, "prepend_bos": bool}
    for name, value in facts.items():
        expected = types.get(name, str)
        if value is not None and type(value) is not expected:
            raise ValueError(f"{path}: {name} is {brief(value)}; expected a {expected.__name__} or nothing.")
    return Origin(**facts)


def factor_in(value: Any, name: str, path: Path) -> float:
    """A number that activations were multiplied or divided by.

    Raises:
        ValueError: If it is no finite number above 0.
    """
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
        raise ValueError(f"{path}: {name} is {brief(value)}; expected a number above 0.")
    return float(number)


def brief(value: object) -> str:
    """A value as a message shows it."""
    shown = repr(value)
    return f"{shown[:60]}..." if len(shown) > 60 else shown


def count_in(config: Mapping[str, Any], name: str, path: Path) -> int:
    """A whole number of at least 1 in a configuration.

    Raises:
        ValueError: If it is missing or something else.
    """
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{path}: {name} is {brief(value)}; expected a whole number of at least 1.")
    return value


def require(config: Mapping[str, Any], path: Path, reason: str, **needed: Any) -> None:
    """Refuse a configuration that says anything else than is needed.

    Args:
        config: The configuration; a key that is missing says what is needed.
        path: Its file.
        reason: Why nothing else can be held.
        needed: Values, or tuples of values of which one is needed, by key.

    Raises:
        ValueError: If one of them differs.
    """
    for key, value in needed.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if config.get(key, allowed[0]) not in allowed:
            words = " or ".join(map(repr, allowed))
            raise ValueError(f"{path}: {key} is {brief(config[key])}; expected {words}, for {reason}.")


def build(cls: Callable[..., SAE], state: Mapping[str, Tensor], path: Path, **arguments: Any) -> SAE:
    """An SAE of a class with these tensors.

    Args:
        cls: The class.
        state: Its parameters and buffers by name, shapes checked.
        path: The file they come from.
        arguments: The class's arguments but for the sizes.

    Raises:
        ValueError: If the number of latents is no multiple of the width, or an argument does not fit.
    """
    d_sae, d_in = state["W_dec"].shape
    if d_sae % d_in:
        raise ValueError(
            f"{path}: W_dec has {d_sae} latents for activations of width {d_in}; expected a multiple of the width, "
            "for saetrack counts latents by expansion_factor."
        )
    try:
        sae = cls(d_in, d_sae // d_in, **arguments)
    except ValueError as error:
        raise ValueError(f"{path} with its configuration is no {getattr(cls, '__name__', 'SAE')}: {error}") from error
    sae.load_state_dict(dict(state))
    return sae.eval().requires_grad_(False)


def refuse(sae: SAE, library: str, reason: str) -> ValueError:
    """The error that says why a library cannot hold an SAE."""
    return ValueError(f"{library} cannot hold a {type(sae).__name__}: {reason}.")


def _shape(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('any' if n is None else str(n) for n in shape)}]"
