"""Many processes that take one step: what they exchange are losses and small factors, never weights or gradients.

All hold the same model, draw the same noise, and so make the same update once they know the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Parallel = Literal["data", "probes"] | int
T = TypeVar("T")


class Ranks:
    """The processes of ``torch.distributed``'s default group; one alone, if it is not initialised.

    They form groups of equal size. The ranks of a group have parts of one batch and evaluate the same points; the
    groups have the same batch, and each evaluates some of the points. `parallel` is the number of groups, or
    ``"data"``: all are one group, or ``"probes"``: each is a group of its own. `sent` counts the bytes that this
    process has put into collectives.

    Raises:
        ValueError: there is no such way.
    """

    def __init__(self, parallel: Parallel = "data") -> None:
        if parallel not in ("data", "probes") and not (type(parallel) is int and parallel >= 1):
            raise ValueError(f"parallel must be 'data', 'probes' or a number of groups, not {parallel!r}")
        self.parallel, self.sent = parallel, 0

    @property
    def count(self) -> int:
        """How many there are."""
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    @property
    def groups(self) -> int:
        """How many groups they form.

        Raises:
            ValueError: the groups would not be of equal size.
        """
        groups = self.parallel if isinstance(self.parallel, int) else self.count if self.parallel == "probes" else 1
        if self.count % groups:
            raise ValueError(f"{self.count} processes cannot form {groups} groups of one size: see `parallel`")
        return groups

    @property
    def parts(self) -> int:
        """Into how many parts each batch is divided: the size of a group."""
        count = self.count
        return count // self.groups if count > 1 else 1

    @property
    def part(self) -> int:
        """Which part of the batch is this rank's."""
        return self._rank % self.parts

    @property
    def group(self) -> int:
        """Which group this rank is in. Ranks of one group follow one another."""
        return self._rank // self.parts

    @property
    def _rank(self) -> int:
        return dist.get_rank() if self.count > 1 else 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on each; in the dtype and on the device of `tensor`.

        Raises:
            ConnectionError: another process has ended, or does not answer.
        """
        if self.count == 1:
            return tensor
        total = tensor.to(_device(tensor), copy=True)
        try:
            dist.all_reduce(total)
        except RuntimeError as error:
            raise ConnectionError("another process has ended, or does not answer") from error
        self.sent += total.nbytes
        return total.to(tensor.device)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        return bool(self.sum(torch.tensor(float(flag))))

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the parts of the batch; as the first group has it, so that no two ranks differ in a bit."""
        if self.parts == 1:
            return tensor
        return self.sum(tensor if self.group == 0 else torch.zeros_like(tensor))

    def means(self, found: Tensor, own: Sequence[int], centre: Sequence[bool]) -> Tensor:
        """The mean losses at all points, [points], over the examples of all parts.

        `found`, float64 [own, examples] or [own], is what this rank has at its `own` points, by number; at the `centre`
        the first group's counts.
        """
        examples = found.shape[1] if found.dim() > 1 else 1
        total = found.new_zeros(len(centre) + 1)
        mine = [at for at, i in enumerate(own) if self.group == 0 or not centre[i]]
        total[[own[at] for at in mine]] = found.view(len(found), -1).mean(1)[mine] * examples
        total[-1] = examples * (self.group == 0)
        total = self.sum(total)
        return total[:-1] / total[-1]

    def average(self, factors: dict[str, Tensor], examples: int) -> dict[str, Tensor]:
        """The mean over the examples of all parts, from each rank's mean over its own; in one collective."""
        if self.parts == 1 or not factors:
            return factors
        device = next(iter(factors.values())).device  # of the first layer: others may have another
        flat = torch.cat([factor.flatten().to(device) * examples for factor in factors.values()])
        total = self.total(torch.cat((flat, flat.new_tensor([examples]))))
        parts = (total[:-1] / total[-1]).split([factor.numel() for factor in factors.values()])
        return {
            name: part.view(factor.shape).to(factor.device)
            for (name, factor), part in zip(factors.items(), parts, strict=True)
        }

    def place(self, rows: int) -> tuple[int, int]:
        """Where this rank's `rows` begin among those of all parts, and how many there are."""
        if self.parts == 1:
            return 0, rows
        counts = torch.zeros(self.parts, dtype=torch.int64)
        counts[self.part] = rows
        counts = self.total(counts)
        return int(counts[: self.part].sum()), int(counts.sum())

    def share(self, batch: list[T]) -> list[T]:
        """This rank's part of `batch`, in its order; all of it, if there is not one for each part."""
        if len(batch) < self.parts:
            return batch
        return batch[len(batch) * self.part // self.parts : len(batch) * (self.part + 1) // self.parts]

    def own(self, centre: Sequence[bool]) -> list[int]:
        """The numbers of the points that this rank evaluates, of which those at the `centre` are everybody's."""
        return [i for i, everybody in enumerate(centre) if everybody or i % self.groups == self.group]


def _device(tensor: Tensor) -> torch.device:
    """Where the group's backend can reduce `tensor`."""
    if tensor.device.type != "cpu" or "gloo" in dist.get_backend() or "cpu" in dist.get_backend():
        return tensor.device
    return torch.device(torch.accelerator.current_accelerator() or "cpu")
