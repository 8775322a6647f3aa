"""The loss around the current weights, as an estimator sees it: forward passes and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Set
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoft.optim.capture import Basis
from zoft.optim.layers import device_of
from zoft.optim.loss import Loss
from zoft.optim.noise import Key
from zoft.optim.probe import Direction, SideBranches, draw, lent

Closure = Callable[[], Tensor | Loss | float]


@dataclass
class Landscape:
    """The closure's loss around the current weights. Every evaluation is one forward pass of `model`.

    `key` prefixes the noise of the directions drawn, numbered from `drawn` on; `confine` may restrict left factors to
    some of their columns. If `capture` is given, the bases are due for renewal: the next clean pass runs inside it, and
    what it yields is handed to `renew`, or that part of it which is of the maps `reached`. `forwards` counts the
    passes, `used` collects the maps and dense parameters that a perturbed pass has read. `losses` holds what the
    closure returned in the latest pass, float64 [batch] or [], `error` its slope, if it returned a `Loss` that has one.
    """

    model: nn.Module
    closure: Closure
    eps: float
    branches: SideBranches
    dense: dict[str, nn.Parameter]
    key: Key
    drawn: int
    capture: Callable[[], AbstractContextManager[dict[str, Basis]]] | None
    renew: Callable[[dict[str, Tensor]], None]
    confine: Callable[[Tensor, Key], Tensor] | None = None
    reached: Set[str] | None = None
    forwards: int = 0
    used: set[str] = field(default_factory=set)
    losses: Tensor = field(default_factory=lambda: torch.tensor(math.nan))
    error: Callable[[], Tensor] | None = None
    _examples: Tensor | None = None
    _fresh: dict[str, Basis] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._randomness = _Randomness(device_of(self.model))

    @property
    def needs_clean(self) -> bool:
        """Whether bases are due for renewal from the activations of a clean pass."""
        return self.capture is not None

    def clean(self) -> float:
        """The loss at the centre. Renews the bases if they are due (and the loss is finite)."""
        if self.capture is None:
            return self.forward()
        with self.capture() as self._fresh:
            loss = self.forward()
        if math.isfinite(loss):
            if self.reached is not None:
                self._fresh = {name: basis for name, basis in self._fresh.items() if name in self.reached}
            self.renew({name: basis.vectors for name, basis in self._fresh.items()})
            self.capture = None
        return loss

    def basis(self, name: str) -> Tensor | None:
        """The basis of map `name`: as soon as the map has been called, that of the clean pass which renews it."""
        fresh = self._fresh.get(name)
        return fresh.vectors if fresh is not None else self.branches.bases.get(name)

    def draw(self, per_example: bool = False) -> Direction:
        """A fresh random direction, or one for each example of the latest pass.

        Raises:
            ValueError: the closure does not return one loss per example.
        """
        if per_example and self.losses.dim() == 0:
            raise ValueError("per-example probes need one loss per example from the closure, not their mean")
        self.drawn += 1
        examples = len(self.losses) if per_example else None
        direction = draw((*self.key, self.drawn - 1), self.branches.active, self.branches.bases, examples)
        if self.confine is not None:
            for name, factor in direction.factors.items():
                direction.factors[name] = self.confine(factor, (*direction.key, name))
        return direction

    def at(self, direction: Direction, distance: float) -> float:
        """The loss at ``distance * direction`` from the centre."""
        branches, centre = self.branches, self.branches.factors
        moved = {name: self._by_sequence(factor) * distance for name, factor in direction.factors.items()}
        moved = {name: centre[name] + factor if name in centre else factor for name, factor in moved.items()}
        with ExitStack() as stack:
            stack.callback(setattr, branches, "factors", centre)
            branches.factors = centre | moved
            stack.enter_context(branches.attached())
            used = stack.enter_context(lent(self.model, self.dense, distance, direction.key))
            if any(factor.dim() == 3 for factor in moved.values()):
                stack.callback(self.model.register_forward_pre_hook(branches.tokens.see, with_kwargs=True).remove)
            branches.used.clear()
            loss = self.forward()
        self.used |= used | branches.used
        return loss

    @property
    def unused(self) -> set[str]:
        """Maps and dense parameters that no perturbed pass has read: the loss says nothing about them."""
        return (self.dense.keys() | {m.name for m in self.branches.active}) - self.used

    def _by_sequence(self, factor: Tensor) -> Tensor:
        """A factor [examples, d_out, r] as the sequences of the model's batch need it."""
        return factor if factor.dim() == 2 or self._examples is None else factor[self._examples.to(factor.device)]

    def forward(self) -> float:
        """The loss of one pass over the model as it is."""
        self._randomness.rewind()
        self.forwards += 1
        loss = self.closure()
        loss = loss if isinstance(loss, Loss) else Loss(torch.as_tensor(loss))
        self.error, self._examples = loss.error, loss.examples
        self.losses = loss.values.detach().cpu().double()  # on the CPU: not every device has float64
        return float(self.losses.mean())


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
