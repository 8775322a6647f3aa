"""The loss around the current weights, as an estimator sees it: forward passes and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoft.optim.capture import Basis, captured
from zoft.optim.layers import LinearMap
from zoft.optim.noise import Key
from zoft.optim.probe import Direction, SideBranches, draw, lent

Closure = Callable[[], Tensor | float]


@dataclass
class Landscape:
    """The closure's loss around the current weights. Every evaluation is one forward pass of `model`.

    `key` prefixes the noise of the directions drawn, numbered from `drawn` on. If `extract` is given, the bases are
    due for renewal: the next clean pass takes them from the activations and hands them to `renew`. `forwards` counts
    the passes, `used` collects the maps and dense parameters that a perturbed pass has read.
    """

    model: nn.Module
    closure: Closure
    eps: float
    branches: SideBranches
    dense: dict[str, nn.Parameter]
    key: Key
    drawn: int
    extract: Callable[[LinearMap, Tensor], Basis] | None
    renew: Callable[[dict[str, Tensor]], None]
    forwards: int = 0
    used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._randomness = _Randomness(next(self.model.parameters()).device)

    @property
    def needs_clean(self) -> bool:
        """Whether bases are due for renewal from the activations of a clean pass."""
        return self.extract is not None

    def clean(self) -> float:
        """The loss at the centre. Renews the bases if they are due (and the loss is finite)."""
        if self.extract is None:
            return self._forward()
        with captured(self.model, self.branches.maps, self.extract) as bases:
            loss = self._forward()
        if math.isfinite(loss):
            self.renew({name: basis.vectors for name, basis in bases.items()})
            self.extract = None
        return loss

    def draw(self) -> Direction:
        """A fresh random direction."""
        self.drawn += 1
        return draw((*self.key, self.drawn - 1), self.branches.active, self.branches.bases)

    def at(self, direction: Direction, distance: float) -> float:
        """The loss at ``distance * direction`` from the centre."""
        branches, centre = self.branches, self.branches.factors
        moved = {name: factor * distance for name, factor in direction.factors.items()}
        moved = {name: centre[name] + factor if name in centre else factor for name, factor in moved.items()}
        with ExitStack() as stack:
            stack.callback(setattr, branches, "factors", centre)
            branches.factors = centre | moved
            stack.enter_context(branches.attached())
            used = stack.enter_context(lent(self.model, self.dense, distance, direction.key))
            branches.used.clear()
            loss = self._forward()
        self.used |= used | branches.used
        return loss

    @property
    def unused(self) -> set[str]:
        """Maps and dense parameters that no perturbed pass has read: the loss says nothing about them."""
        return (self.dense.keys() | {m.name for m in self.branches.active}) - self.used

    def _forward(self) -> float:
        self._randomness.rewind()
        self.forwards += 1
        loss = self.closure()
        if not isinstance(loss, Tensor):
            return float(loss)
        return float(loss.detach().cpu().double().mean())  # on the CPU: not every device has float64


class _Randomness:
    """Gives every forward the same global random state (one dropout mask), on the CPU and on the model's device."""

    def __init__(self, device: torch.device) -> None:
        self._generators: list[Any] = [torch.random]
        if device.type not in ("cpu", "meta"):
            self._generators.append(torch.get_device_module(device))
        self._start: list[Tensor] | None = None

    def rewind(self) -> None:
        if self._start is None:
            self._start = [generator.get_rng_state() for generator in self._generators]
            return
        for generator, state in zip(self._generators, self._start, strict=True):
            generator.set_rng_state(state)
