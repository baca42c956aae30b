"""Memory that is kept from step to step."""

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Workspace:
    """Buffers that are kept from step to step.

    The C library hands a freed buffer of this size back to the system, which zeroes it page by page when it is asked
    for again: filling a new 256 MB took four times as long as filling a kept one. A copy of an SAE begins with none.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._lent: dict[str, tuple[np.ndarray[Any, Any], int]] = {}

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor; the next call with the same name gives the same memory again."""
        size = torch.Size(shape).numel()
        kept = self._buffers.get(name)
        if kept is None or kept.numel() < size or (kept.dtype, kept.device) != (dtype, device):
            kept = self._buffers[name] = torch.empty(size, dtype=dtype, device=device)
        return kept[:size].view(shape)

    @property
    def buffers(self) -> list[Tensor]:
        """What is kept now, for who must hold on to it longer."""
        return list(self._buffers.values())

    def lend(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor; on a CPU in memory that was lent before, if nobody holds that any more.

        So it may go to others, as a gradient does: while any tensor on that memory lives, others get new memory.
        """
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)  # the allocator of a GPU keeps memory by itself
        size = torch.Size(shape).numel() * dtype.itemsize
        if name in self._lent:
            kept, alone = self._lent[name]
            # every storage on an array's memory holds a reference to it
            if kept.size == size and sys.getrefcount(kept) == alone:
                return torch.from_numpy(kept).view(dtype).view(shape)
        kept = np.empty(size, dtype=np.uint8)
        self._lent[name] = kept, 0
        alone = sys.getrefcount(kept)
        self._lent[name] = kept, alone
        return torch.from_numpy(kept).view(dtype).view(shape)

    def lend_like(self, name: str, tensor: Tensor) -> Tensor:
        """The same for a tensor of another's shape, dtype and device."""
        return self.lend(name, tuple(tensor.shape), tensor.dtype, tensor.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Workspace":
        return Workspace()

    def __getstate__(self) -> dict[str, Any]:
        return {"_buffers": {}, "_lent": {}}
