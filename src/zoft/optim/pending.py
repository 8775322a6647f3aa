"""Updates of weights that are not written yet: a low-rank sum beside each, added in the forward pass.

A sum of some steps' rank-r updates is still of low rank: kept in float32, as a side branch, and written once in a
while, it is rounded once, and by less than all of its terms would be. A step costs about the same either way: the
branch is as dear as the pass over the weights that it saves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from zoft.optim.layers import LinearMap
from zoft.optim.noise import Key
from zoft.optim.write import add_low_rank_


@dataclass
class Sum:
    """``shrink W + left right^T`` is what weight W is to become; float32 [d_out, n] and [d_in, n]."""

    left: Tensor
    right: Tensor
    shrink: float


class Pending:
    """The sums by map name, over `steps` steps."""

    def __init__(self) -> None:
        self.sums: dict[str, Sum] = {}
        self.steps = 0
        self._latest: dict[str, Tensor] = {}  # bases, by map name
        self._joined: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def add(self, name: str, move: Tensor, basis: Tensor, shrink: float) -> None:
        """Let the weight of map `name` shrink, and add ``move basis^T``, [d_out, r] and [d_in, r]."""
        known = self.sums.get(name)
        if known is None:
            self.sums[name] = Sum(move, basis, shrink)
        else:
            known.left, known.shrink = known.left * shrink, known.shrink * shrink
            if self._latest[name] is basis:
                known.left[:, -move.shape[1] :] += move
            else:
                known.left, known.right = torch.cat((known.left, move), dim=1), self._join(known.right, basis)
        self._latest[name] = basis

    def _join(self, right: Tensor, basis: Tensor) -> Tensor:
        """Both side by side, one tensor for all maps that share them, so that they share their input's product too."""
        key = id(right), id(basis)
        if key not in self._joined:
            self._joined[key] = right, basis, torch.cat((right, basis), dim=1)  # held, so that the numbers stay theirs
        return self._joined[key][2]

    def end_step(self) -> None:
        """Count a step."""
        self.steps += 1
        self._joined.clear()

    def write(self, maps: Iterable[LinearMap], key: Key) -> None:
        """Write every sum into the weight of its map, and begin anew; `key` prefixes the streams of the rounding."""
        for layer in maps:
            known = self.sums.get(layer.name)
            if known is not None and layer.weight is not None:
                factors = (known.right, known.left) if layer.transposed else (known.left, known.right)
                add_low_rank_(layer.weight, *factors, (*key, layer.name), known.shrink)
        self.clear()

    def clear(self) -> None:
        """Forget every sum."""
        self.sums.clear()
        self._latest.clear()
        self._joined.clear()
        self.steps = 0
