"""Memory that outlives its tensors: what a step receives into, or sums gradients in, is used again by a later one as
soon as nobody holds it any more.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Spares:
    """As many buffers as were ever in use at once."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def take(self, shape: torch.Size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised; it comes back by itself when its last user drops it."""
        for buffer in self._buffers:
            if buffer.shape == shape and buffer.dtype == dtype and _is_held_by_none_but(buffer):
                return buffer.detach()
        self._buffers.append(torch.empty(shape, dtype=dtype, device=device))
        return self._buffers[-1].detach()


def _is_held_by_none_but(buffer: Tensor) -> bool:
    """Whether no other tensor shares the memory: `buffer` and the handle by which it is asked count two."""
    return torch._C._storage_Use_Count(buffer.untyped_storage()._cdata) == 2
