"""In which dtype the large products of a step run, and what this machine's hardware has."""

from typing import Literal, get_args

import torch

Precision = Literal["auto", "float32", "bfloat16"]


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself; emulated, it would be slower than float32.

    Args:
        device: Where the SAE is.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    # PyTorch tells a CPU's instructions only under private names; one that is missing means "no"
    asks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, ask, bool)()) for ask in asks)


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """Turn the setting into a dtype.

    Args:
        precision: ``auto`` takes bfloat16 where the hardware has it, else float32.
        device: Where the SAE is.

    Returns:
        ``torch.bfloat16`` or ``torch.float32``.

    Raises:
        ValueError: If bfloat16 is asked for where the hardware has none, or the setting is none of the three.

    Example:
        >>> resolve_precision("float32", torch.device("cpu"))
        torch.float32
    """
    if precision not in get_args(Precision):
        raise ValueError(f"model.precision is {precision!r}; it must be one of {', '.join(get_args(Precision))}.")
    if precision == "float32" or (precision == "auto" and not has_bfloat16(device)):
        return torch.float32
    if not has_bfloat16(device):
        raise ValueError(
            f"model.precision is bfloat16, but this machine's {device.type} has no bfloat16 arithmetic; "
            "set `model.precision` to auto or float32."
        )
    return torch.bfloat16
