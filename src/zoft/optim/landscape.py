"""The loss around the current weights, as an estimator sees it: forward passes and nothing else."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from zoft.optim.capture import Basis
from zoft.optim.copies import repeated
from zoft.optim.layers import LinearMap
from zoft.optim.leading import LeadingBlocks
from zoft.optim.loss import Loss
from zoft.optim.noise import Key
from zoft.optim.placement import devices_of
from zoft.optim.probe import Direction, Factors, SideBranches, lent
from zoft.optim.ranks import Ranks

Closure = Callable[[], Tensor | Loss | float]
Point = tuple[Direction | None, float]  # how far along a direction
CENTRE: Point = (None, 0.0)


@runtime_checkable
class Divisible(Protocol):
    """A closure whose batch can be taken in parts."""

    def __call__(self) -> Tensor | Loss | float: ...

    @property
    def tokens(self) -> int:
        """Of the batch, padding included."""

    def divide(self, number: int) -> Sequence[Closure]:
        """Closures of at least so many parts with as many examples each, or of one example each."""


@dataclass
class Landscape:
    """The closure's loss around the current weights. Every evaluation is one forward pass of `model`.

    `key` prefixes the noise of the directions drawn, numbered from `drawn` on; `confine` may restrict left factors to
    some of their columns. If `capture` is given, the bases are due for renewal: the next pass at the centre runs inside
    it, and what it yields is handed to `renew`, or that part of it which is of the maps `reached`. With `batching`, the
    points asked for together are evaluated in one pass, on as many copies of the batch; `capture` gets their number.
    Else the `leading` blocks, which no point moves, run in the first of them alone. The losses that `evaluate` gives
    are those of all `ranks`.

    `forwards` counts the passes, a copy as one, `used` collects the dense parameters that a perturbed pass has read.
    `losses` holds what the closure returned last, float64 [batch] or [], `error` its slope, if it returned a `Loss`
    that has one, which `sloped` says.
    """

    model: nn.Module
    closure: Closure
    eps: float
    branches: SideBranches
    dense: dict[str, nn.Parameter]
    key: Key
    drawn: int
    capture: Callable[[int], AbstractContextManager[dict[str, Basis]]] | None
    renew: Callable[[dict[str, Basis]], None]
    confine: Callable[[Tensor, Key], Tensor] | None = None
    batching: bool = False
    leading: LeadingBlocks = field(default_factory=lambda: LeadingBlocks([]))
    ranks: Ranks = field(default_factory=Ranks)
    reached: Set[str] | None = None
    forwards: int = 0
    used: set[str] = field(default_factory=set)
    losses: Tensor = field(default_factory=lambda: torch.tensor(math.nan))
    error: Callable[[], Tensor | Iterable[Tensor]] | None = None
    sloped: bool = False
    examples: Tensor | None = None  # of each sequence of the model's batch, where they are not the same

    def __post_init__(self) -> None:
        accelerated = torch.accelerator.is_available()  # else a look at every parameter is saved
        # Every forward is to have the same: one dropout mask.
        self._randomness = Randomness(devices_of(self.model) if accelerated else set())

    @property
    def needs_clean(self) -> bool:
        """Whether bases are due for renewal from the activations of a clean pass."""
        return self.capture is not None

    def draw(self, per_example: bool = False) -> Direction:
        """A fresh random direction, or one for each example of the latest pass.

        Raises:
            ValueError: the closure does not return one loss per example.
        """
        if per_example and self.losses.dim() == 0:
            raise ValueError("per-example probes need one loss per example from the closure, not their mean")
        self.drawn += 1
        return Direction((*self.key, self.drawn - 1), len(self.losses) if per_example else None, self.confine)

    def clean(self) -> float:
        """The mean loss at the centre. Renews the bases if they are due (and the loss is finite)."""
        return float(self.evaluate([CENTRE])[0])

    def evaluate(self, points: Sequence[Point], per_example: bool = False) -> Tensor:
        """The mean losses at each of `points`, float64 [points], or those of each example, [points, batch].

        The centre, which renews due bases, comes first.

        Raises:
            ValueError: with `batching`, the points cannot share a pass.
        """
        if self.leading.sound is None and not self.batching:
            self.leading.prove(self.look)
        centre = [direction is None for direction, _ in points]
        own = self.ranks.own(centre)
        passes = [[points[i] for i in own]] if self.batching else [[points[i]] for i in own]
        found = torch.stack([losses for together in passes for losses in self._pass(together)])
        return found if per_example else self.ranks.means(found, own, centre)

    def complete(self, directions: Sequence[Direction]) -> None:
        """Draw what of `directions` other processes have evaluated."""
        for direction in directions if self.ranks.groups > 1 else ():
            direction.draw(self.branches.active, self.branches.bases)
            for layer in self.branches.active:
                direction.left(layer, self.branches.bases[layer.name])

    def _pass(self, points: Sequence[Point]) -> list[Tensor]:
        (direction, distance), copies, capture = points[0], len(points), None
        fresh: dict[str, Basis] = {}
        used: set[str] = set()
        for moved, _ in points:
            if moved is not None:  # if the bases are renewed in this pass, theirs most likely have the same rank
                moved.draw(self.branches.active, self.branches.bases)
        with ExitStack() as stack:
            if direction is None and self.capture is not None:
                capture, self.capture = self.capture, None
                fresh = stack.enter_context(capture(copies))
                self._set(stack, fresh=fresh)
            if copies > 1:
                stack.enter_context(repeated(self.model, copies))
                self._set(stack, copies=copies)
            else:
                stack.enter_context(self.leading.one_pass())
            if copies > 1 or direction is not None:
                moving = fresh.keys() if capture else {layer.name for layer in self.branches.active}
                self._set(stack, factors=_Moved(self, points, moving, self.branches.factors))
                stack.callback(self.model.register_forward_pre_hook(self.branches.tokens.see, with_kwargs=True).remove)
                stack.enter_context(self.branches.attached())
            if direction is not None and self.dense:
                used = stack.enter_context(lent(self.model, self.dense, distance, direction.key))
            found = [self.forward() for _ in points]
        self.used |= used
        if capture is not None and math.isfinite(self.ranks.means(found[0].unsqueeze(0), [0], [True])):
            reached = fresh.keys() if self.reached is None else fresh.keys() & self.reached
            self.renew({name: basis for name, basis in fresh.items() if name in reached})
        elif capture is not None:
            self.capture = capture
        return found

    def _set(self, stack: ExitStack, **values: Any) -> None:
        """Give the branches attributes that last until `stack` closes."""
        for name, value in values.items():
            stack.callback(setattr, self.branches, name, getattr(self.branches, name))
            setattr(self.branches, name, value)

    def forward(self) -> Tensor:
        """What the closure returns in one more pass, as `losses` has it."""
        self._randomness.rewind()
        self.forwards += 1
        self.error = None  # it holds the logits of the pass before
        torch.clear_autocast_cache()  # it holds the weights of the pass before, if autocast is around all passes
        with uncompiled():
            loss = self.closure()
        loss = loss if isinstance(loss, Loss) else Loss(torch.as_tensor(loss))
        self.error, self.sloped, self.examples = loss.error, loss.error is not None, loss.examples
        self.losses = loss.values.detach().cpu().double()  # on the CPU: not every device has float64
        return self.losses

    def look(self) -> Tensor:
        """One more pass, to see how the model is made: not counted, since a resumed run takes it again."""
        losses = self.forward()
        self.forwards -= 1
        self.error = None  # it may hold logits
        return losses


def uncompiled() -> AbstractContextManager[Any]:
    """While open, compiled modules run as they were written, since compiled code may miss perturbations."""
    compiling = "torch._dynamo" in sys.modules  # else nothing is compiled, and a second of imports is saved
    return torch.compiler.set_stance("force_eager") if compiling else nullcontext()


@dataclass
class _Moved:
    """The factors of side branches at `points`: those of the `centre`, for the maps `moving` the directions' too."""

    landscape: Landscape
    points: Sequence[Point]
    moving: Set[str]
    centre: Factors

    def get(self, name: str, /) -> Tensor | None:
        """The factor of map `name` [d_out, r], or where the points or their examples differ one for each of them."""
        centre, basis = self.centre.get(name), self.landscape.branches.basis(name)
        if name not in self.moving or basis is None:
            return centre
        layer = self.landscape.branches.named[name]
        if centre is None and len(self.points) > 1:
            centre = basis.new_zeros(layer.d_out, basis.shape[1])
        factors = [self._at(point, layer, basis, centre) for point in self.points]
        if len(factors) == 1:
            return factors[0]
        sequences = [len(factor) for factor in factors if factor.dim() == 3]
        if not sequences:
            return torch.stack(factors)
        return torch.cat([factor.expand(sequences[0], -1, -1) for factor in factors])

    def _at(self, point: Point, layer: LinearMap, basis: Tensor, centre: Tensor | None) -> Tensor:
        direction, distance = point
        if direction is None:
            assert centre is not None  # alone, the centre has the branches that it has
            return centre
        left, examples = direction.left(layer, basis), self.landscape.examples
        if left.dim() == 3 and examples is not None:
            left = left[examples.to(left.device)]
        return left * distance if centre is None else torch.add(centre, left, alpha=distance)


class Randomness:
    """The global random state, on the CPU and on `devices`: that of the first `rewind` is there after every other."""

    def __init__(self, devices: Set[torch.device]) -> None:
        self._generators: list[tuple[Any, tuple[torch.device, ...]]] = [(torch.random, ())]
        for device in devices:
            if device.type not in ("cpu", "meta"):
                module = torch.get_device_module(device)
                self._generators.append((module, (device,) if module.device_count() > 1 else ()))
        self._start: list[Tensor] | None = None

    def rewind(self) -> None:
        if self._start is None:
            self._start = [generator.get_rng_state(*which) for generator, which in self._generators]
            return
        for (generator, which), state in zip(self._generators, self._start, strict=True):
            generator.set_rng_state(state, *which)
