"""Where small tensors lie that stay while large ones come and go.

A pass leaves some rows of every layer behind. Laid between activations that are soon gone, each keeps the allocator
from using their room again: with what such rows hold, a few megabytes, the process grew by hundreds.
"""

from __future__ import annotations

import torch
from torch import Tensor

SLAB = 1 << 22  # bytes
SMALL = SLAB // 8
ALIGNED = 64


class Shelf:
    """Copies of small tensors, side by side in slabs; a slab is freed with the last of them.

    For the CPU: allocators of accelerators keep small tensors apart themselves.
    """

    def __init__(self) -> None:
        self._room = torch.empty(0, dtype=torch.uint8)

    def put(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor`; `tensor` itself, if it is not small or not on the CPU."""
        size = tensor.numel() * tensor.element_size()
        if tensor.device.type != "cpu" or not 0 < size <= SMALL:
            return tensor
        if size > len(self._room):
            with torch.inference_mode(False):  # so that it can be written to in either mode
                self._room = torch.empty(SLAB, dtype=torch.uint8)
        place = self._room[:size].view(tensor.dtype).view(tensor.shape)
        self._room = self._room[-(-size // ALIGNED) * ALIGNED :]
        return place.copy_(tensor)
