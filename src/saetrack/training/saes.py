"""Which SAE each hookpoint gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from saetrack.sae import SAE


class SAEsByHookpoint:
    """An autoencoder of its own for each hookpoint, all trained on one forward of the LLM.

    With lanes, ``gpt_neox.layers.2@small`` and ``gpt_neox.layers.2@large``, they may read the same module.

    Args:
        saes: By hookpoint, as ``data.hookpoints`` names them: its class and arguments without ``d_in``.
    """

    def __init__(self, saes: dict[str, Callable[[int], SAE]]) -> None:
        self.saes = saes


SAEChoice = Callable[[int], SAE] | SAEsByHookpoint


def build_sae(choice: SAEChoice, hookpoint: str, d_in: int) -> SAE:
    """The untrained SAE of a hookpoint.

    Args:
        choice: As ``model.sae``.
        hookpoint: Which.
        d_in: Width of its activations.
    """
    return choice.saes[hookpoint](d_in) if isinstance(choice, SAEsByHookpoint) else choice(d_in)


def setting_of(choice: SAEChoice, hookpoint: str) -> str:
    """The configuration key under which a hookpoint's SAE stands."""
    return f"model.sae.init_args.saes.{hookpoint}" if isinstance(choice, SAEsByHookpoint) else "model.sae"


def refuse_other_names(choice: SAEChoice, hookpoints: list[str]) -> None:
    """Raise ValueError unless every hookpoint has its SAE, and every SAE its hookpoint."""
    if not isinstance(choice, SAEsByHookpoint):
        return
    for hookpoint in hookpoints:
        if hookpoint not in choice.saes:
            raise ValueError(
                f"model.sae names an SAE for {', '.join(choice.saes) or 'no hookpoint'}, but none for {hookpoint} of "
                "data.hookpoints; add it to `model.sae.init_args.saes`."
            )
    for name in choice.saes:
        if name not in hookpoints:
            raise ValueError(
                f"model.sae names an SAE for {name}, which is not in data.hookpoints {hookpoints}; add it there, or "
                "take it out of `model.sae.init_args.saes`."
            )


def configured(sae: dict[str, Any], hookpoint: str) -> dict[str, Any]:
    """What a configuration's ``model.sae`` says for one hookpoint.

    Example:
        >>> configured({"class_path": "saetrack.TopKSAE"}, "layers.2")
        {'class_path': 'saetrack.TopKSAE'}
    """
    by_hookpoint = sae["class_path"].rpartition(".")[2] == SAEsByHookpoint.__name__
    own: dict[str, Any] = sae["init_args"]["saes"][hookpoint] if by_hookpoint else sae
    return own
