"""Many processes that take one step: what they exchange are losses and small factors, never weights or gradients.

All hold the same model, draw the same noise, and so make the same update once they know the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Parallel = Literal["data", "probes"]


class Ranks:
    """The processes of ``torch.distributed``'s default group; one alone, if it is not initialised.

    In ``"data"`` every rank has a part of the batch, and all evaluate the same points; in ``"probes"`` all have the
    same batch, and each evaluates some of the points. `sent` counts the bytes that this process has put into
    collectives.

    Raises:
        ValueError: there is no such way.
    """

    def __init__(self, parallel: Parallel = "data") -> None:
        if parallel not in ("data", "probes"):
            raise ValueError(f"parallel must be 'data' or 'probes', not {parallel!r}")
        self.parallel, self.sent = parallel, 0

    @property
    def count(self) -> int:
        """How many there are."""
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    @property
    def share_data(self) -> bool:
        """Whether the batch lies in parts on several ranks."""
        return self.parallel == "data" and self.count > 1

    @property
    def share_probes(self) -> bool:
        """Whether several ranks evaluate different points."""
        return self.parallel == "probes" and self.count > 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on each; in the dtype and on the device of `tensor`."""
        total = tensor.to(_device(tensor), copy=True)
        dist.all_reduce(total)
        self.sent += total.nbytes
        return total.to(tensor.device)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the parts of the batch: over all ranks, if they share it."""
        return self.sum(tensor) if self.share_data else tensor

    def mean(self, losses: Tensor) -> Tensor:
        """The mean of `losses`, float64 [points, examples] or [points], over the examples of all ranks: [points]."""
        examples = losses.shape[1] if losses.dim() > 1 else 1
        own = losses.view(len(losses), -1).mean(1)
        total = self.total(torch.cat((own * examples, own.new_tensor([examples]))))
        return total[:-1] / total[-1]

    def average(self, factors: dict[str, Tensor], examples: int) -> dict[str, Tensor]:
        """The mean over the examples of all ranks, from each rank's mean over its own; in one collective."""
        if not self.share_data or not factors:
            return factors
        device = next(iter(factors.values())).device  # of the first layer: others may have another
        flat = torch.cat([factor.flatten().to(device) * examples for factor in factors.values()])
        total = self.sum(torch.cat((flat, flat.new_tensor([examples]))))
        parts = (total[:-1] / total[-1]).split([factor.numel() for factor in factors.values()])
        return {
            name: part.view(factor.shape).to(factor.device)
            for (name, factor), part in zip(factors.items(), parts, strict=True)
        }

    def place(self, rows: int) -> tuple[int, int]:
        """Where this rank's `rows` begin among those of all ranks, and how many there are."""
        if not self.share_data:
            return 0, rows
        counts = torch.zeros(self.count, dtype=torch.int64)
        counts[dist.get_rank()] = rows
        counts = self.sum(counts)
        return int(counts[: dist.get_rank()].sum()), int(counts.sum())

    def own(self, centre: Sequence[bool]) -> list[int]:
        """The numbers of the points that this rank evaluates, of which those at the `centre` are everybody's.

        Raises:
            ValueError: there are fewer points than ranks.
        """
        if not self.share_probes:
            return list(range(len(centre)))
        if len(centre) - sum(centre) < self.count:
            raise ValueError(f"{self.count} processes share {len(centre) - sum(centre)} points: raise `probes`")
        return [i for i, all_evaluate in enumerate(centre) if all_evaluate or i % self.count == dist.get_rank()]

    def spread(self, found: Tensor, own: Sequence[int], centre: Sequence[bool]) -> Tensor:
        """The losses at all points, from those `found` at this rank's `own`; at the centre the first rank's count."""
        if not self.share_probes:
            return found
        mine = [at for at, i in enumerate(own) if not centre[i] or dist.get_rank() == 0]
        losses = found.new_zeros(len(centre), *found.shape[1:])
        losses[[own[at] for at in mine]] = found[mine]
        return self.sum(losses)


def _device(tensor: Tensor) -> torch.device:
    """Where the group's backend can reduce `tensor`."""
    if tensor.device.type != "cpu" or "gloo" in dist.get_backend() or "cpu" in dist.get_backend():
        return tensor.device
    return torch.device(torch.accelerator.current_accelerator() or "cpu")
