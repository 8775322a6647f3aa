"""A step's size, measured: eps from how finite differences agree, lr from slope, curvature and noise.

Along a random direction D of a method, the loss of a batch is ``f(t) = f(0) + g t + c t^2 / 2 + ...``; a few distances
t show three things:

- **eps**: rounding of the loss spoils differences over short distances, curvature those over long ones. Where two
  neighbouring distances agree best, their mean is the slope g, against which the error of every distance is measured.
- **curvature** c, from the second difference, and **agreement** rho = E[g g'] / E[g^2], with g' the slope of another
  batch along the same direction: the part of a squared slope that is not the batch's own.
- **lr**: the step ``-lr g D`` changes the mean loss of other batches by ``(-lr rho + lr^2 c / 2) E[g^2]``. Above
  ``2 rho / c`` already the first step does harm. A smaller lr makes progress until rho, which falls as training goes
  on, has come down to ``lr c / 2``: the lr advised, ``2 ENDURING / c``, goes on until batches share one hundredth of a
  squared slope. A step of Adam, of a shaped population or a normalised one has the length of lr instead of lr g, so
  there the lr is rms(g) times as large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean

import torch
from torch import nn

from zoft.optim import Adam, Estimate, Probes, ZeroOrder
from zoft.optim.landscape import Closure, Landscape

ENDURING = 0.01  # the agreement down to which training is to go on; set so that SST-2's rates come out
DISTANCES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class Diagnosis:
    """What a method's directions look like on a model and task.

    `slope` is the root mean square of the slopes; `errors`, relative to it, are those of one- and two-sided differences
    over `distances`; `two_sided` says which of them the method takes. `lr` is for a whole training, `largest_lr` helps
    for one step at the start; both are None where the curvature measured is not positive.
    """

    eps: float
    lr: float | None
    largest_lr: float | None
    slope: float
    curvature: float
    agreement: float
    distances: list[float]
    errors: dict[str, list[float]]
    two_sided: bool
    forwards: int


@dataclass
class Ladder:
    """An estimator that evaluates the loss at plus and minus each of `distances` along one direction.

    `losses` holds them by signed distance, the centre at 0; the estimate is the direction itself.
    """

    distances: Sequence[float]
    losses: dict[float, float] = field(default_factory=dict)

    def __call__(self, landscape: Landscape, estimate: Estimate) -> tuple[float, list[float]]:
        self.losses = {0.0: landscape.clean()}
        direction = landscape.draw()
        for distance in self.distances:
            for signed in (distance, -distance):
                self.losses[signed] = float(landscape.evaluate([(direction, signed)])[0].mean())
        estimate.add(direction, torch.tensor(1.0))
        return self.losses[0.0], [1.0]

    def difference(self, distance: float, two_sided: bool) -> float:
        """The finite difference over `distance`."""
        ahead = self.losses[distance]
        if two_sided:
            return (ahead - self.losses[-distance]) / (2 * distance)
        return (ahead - self.losses[0.0]) / distance


@dataclass
class _Pair:
    """An estimator that walks the same ladder on two batches."""

    first: Ladder
    second: Ladder
    other: Closure

    def __call__(self, landscape: Landscape, estimate: Estimate) -> tuple[float, list[float]]:
        found = self.first(landscape, estimate)
        landscape.closure, own, landscape.drawn = self.other, landscape.closure, landscape.drawn - 1
        self.second(landscape, Estimate())
        landscape.closure = own
        return found


def diagnose(
    model: nn.Module,
    closures: Sequence[Closure],
    make: Callable[[nn.Module], ZeroOrder],
    directions: int = 8,
    distances: Sequence[float] = DISTANCES,
) -> Diagnosis:
    """Measure eps and lr for the method that `make` makes, over the batches of `closures` (at least two).

    Costs ``directions * (4 len(distances) + 2)`` forwards and changes nothing.

    Raises:
        ValueError: the method draws no directions, or a loss is not finite.
    """
    optimizer = make(model)
    probes = optimizer.estimator
    if not isinstance(probes, Probes):
        raise ValueError(f"{probes} draws no directions: there is no eps to measure")
    walks = []
    for number in range(directions):
        pair = _Pair(Ladder(distances), Ladder(distances), closures[(number + 1) % len(closures)])
        optimizer.estimator = pair
        optimizer.estimate(closures[number % len(closures)])
        optimizer.take_estimate()
        walks.append((pair.first, pair.second))
    optimizer.branches.detach()

    firsts = [first for first, _ in walks]
    if not all(math.isfinite(first.losses[0.0]) for first in firsts):
        raise ValueError("the loss is not finite: there is nothing to measure")
    short, steady = _steadiest(firsts, distances)

    def slope(walk: Ladder) -> float:
        return (walk.difference(short, True) + walk.difference(steady, True)) / 2

    true = [slope(first) for first in firsts]
    size = _rms(true)
    errors = {
        sides: [
            _rms([w.difference(d, sides == "two-sided") - g for w, g in zip(firsts, true, strict=True)])
            for d in distances
        ]
        for sides in ("one-sided", "two-sided")
    }
    own = errors["two-sided" if probes.two_sided else "one-sided"]
    eps = distances[own.index(min(own))]
    curvature = fmean(
        (w.losses[steady] + w.losses[-steady] - 2 * w.losses[0.0]) / steady**2 for pair in walks for w in pair
    )
    agreement = fmean(g * slope(second) for g, (_, second) in zip(true, walks, strict=True)) / size**2
    adam = isinstance(optimizer.update, Adam)
    unit = 1.0 if adam else probes.scale * probes.count  # of lr, for a step of g D
    if adam or probes.shape or optimizer.pace.normalise:
        unit *= size
    lr, largest = (2 * rho * unit / curvature if curvature > 0 else None for rho in (ENDURING, agreement))
    relative = {sides: [e / size for e in values] for sides, values in errors.items()}
    forwards = len(walks) * 2 * (2 * len(distances) + 1)
    return Diagnosis(eps, lr, largest, size, curvature, agreement, [*distances], relative, probes.two_sided, forwards)


def _steadiest(walks: Sequence[Ladder], distances: Sequence[float]) -> tuple[float, float]:
    """The two neighbouring distances whose two-sided differences agree best."""

    def disagreement(pair: tuple[float, float]) -> float:
        return _rms([walk.difference(pair[0], True) - walk.difference(pair[1], True) for walk in walks])

    return min(pairwise(distances), key=disagreement)


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(fmean(v * v for v in values))
