"""Calling what builds the user's own LLM: a function or class by its name, its arguments checked by its types."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import nn

from saetrack.lm.trust import VARIABLE, is_trusted
from saetrack.pickles import reason


def call_factory(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The module that a function or class makes; the state of torch's random numbers stays as it was.

    Args:
        name: ``package.module:function`` or ``package.module.Class``.
        arguments: By their names, as in a config; nested classes by ``class_path``.

    Raises:
        ValueError: If the name was not given by the user, cannot be imported, does not take the arguments, or makes no
            module.
    """
    if not is_trusted(name):
        raise ValueError(
            f"The track says that {name} builds its LLM; it would be imported and called. If you trust it, set "
            f"{VARIABLE}={name} and type the command again."
        )
    target = _imported(name)
    parser = ArgumentParser(exit_on_error=False)
    try:
        if inspect.isclass(target):
            parser.add_class_arguments(target, as_group=False, fail_untyped=False)
        else:
            parser.add_function_arguments(target, as_group=False, fail_untyped=False)
        parsed = parser.instantiate(parser.parse_object(dict(arguments))).as_dict()
    except (ArgumentError, ValueError, TypeError) as error:
        raise ValueError(f"{name} does not take the init_args {dict(arguments)}: {reason(error)}") from error
    with torch.random.fork_rng(devices=[]):
        module = target(**parsed)
    if not isinstance(module, nn.Module):
        raise ValueError(f"{name} made a {type(module).__name__}; expected the LLM, a torch.nn.Module.")
    return module


def _imported(name: str) -> Callable[..., Any]:
    separator = ":" if ":" in name else "."
    module, _, attribute = name.rpartition(separator)
    if not (module and attribute.isidentifier()):
        raise ValueError(f"The factory {name!r} is no name; expected package.module:function or package.module.Class.")
    try:
        target = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise ValueError(
            f"The factory {name} cannot be imported ({reason(error)}). Install its package, or set PYTHONPATH to the "
            f"folder that it lies in."
        ) from error
    if not callable(target):
        raise ValueError(f"{module} has no function or class {attribute}, which the factory {name} names.")
    return target  # type: ignore[no-any-return]
