"""The weights in a file that ``torch.save`` wrote."""

from pathlib import Path
from typing import Any

import torch

from saetrack.pickles import checked_tensor


def tensors_in(path: Path, state: Any, prefix: str, what: str) -> dict[str, torch.Tensor]:
    """The tensors of a state dict whose names begin with a prefix, which is taken off as torch.compile's is.

    Raises:
        ValueError: If it is no state dict, no name begins so, or a tensor is larger than the file.
    """
    if not isinstance(state, dict):
        raise ValueError(f"{path} has a {type(state).__name__} where the weights should be; expected {what}.")
    plain = {str(n).replace("_orig_mod.", ""): t for n, t in state.items() if isinstance(t, torch.Tensor)}
    chosen = {name.removeprefix(prefix): tensor for name, tensor in plain.items() if name.startswith(prefix)}
    if not chosen:
        begins = sorted({name.split(".")[0] + "." for name in plain})
        raise ValueError(
            f"{path} has no tensor whose name begins with {prefix!r}; they begin with "
            f"{', '.join(begins[:6]) or 'nothing, for there are none'}. Name the right one as `prefix`."
        )
    return {name: checked_tensor(path, name, tensor) for name, tensor in chosen.items()}
