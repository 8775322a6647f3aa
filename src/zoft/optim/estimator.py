"""Second axis: where does the left factor of each layer's estimate come from?

An estimator looks at the loss through a `Landscape` (forward passes only) and adds to an `Estimate`. Probes draw
the left factor at random and weigh it with a finite difference; an estimator that computes it fills
`Estimate.factors` itself.
"""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from zoft.optim.landscape import CENTRE, Landscape
from zoft.optim.noise import Key
from zoft.optim.probe import Direction

Shape = Literal["rank", "zscore"]


@dataclass
class Estimate:
    """A gradient estimate: ``C A^T`` for each linear map, and ``sum of c z`` for the dense parameters.

    `factors` holds C, float32 [d_out, r], by map name; `dense` the noise streams z with their c; `bases`, where bases
    are trained too, what was found for them, float32 [d_in, r], by the first map that has each. After `merge`, all are
    sums over `count` batches, and the gradient estimate is their mean. Of a single batch, `probed` holds the directions
    probed and what was found along each, float64 [] or [examples].
    """

    factors: dict[str, Tensor] = field(default_factory=dict)
    bases: dict[str, Tensor] = field(default_factory=dict)
    dense: list[tuple[Key, float]] = field(default_factory=list)
    count: int = 0
    probed: list[tuple[Direction, Tensor]] = field(default_factory=list)

    def add(
        self, direction: Direction, coefficient: Tensor, scale: float = 1.0, shared: Set[str] = frozenset()
    ) -> None:
        """Add ``coefficient * direction``, its low-rank part divided by `scale`.

        If every example has a direction of its own, so it has a coefficient, and what is added is their mean; maps in
        `shared` moved in the first example's direction with all of them.
        """
        mean = float(coefficient.mean())
        for name, factor in direction.factors.items():
            if factor.dim() == 2:
                add_to(self.factors, name, factor * (mean / scale))
            elif name in shared:
                add_to(self.factors, name, factor[0] * (mean / scale))
            else:
                weights = coefficient.to(factor.device, factor.dtype) / (len(coefficient) * scale)
                add_to(self.factors, name, torch.einsum("b,bor->or", weights, factor))
        self.dense.append((direction.key, mean))

    def merge(self, other: Estimate, scale: float = 1.0) -> None:
        """Add `other`, times `scale`, as one more estimate."""
        for sums, theirs in ((self.factors, other.factors), (self.bases, other.bases)):
            for name, found in theirs.items():
                add_to(sums, name, found if scale == 1 else found * scale)
        self.dense.extend((key, c * scale) for key, c in other.dense)
        self.count += 1


def add_to(sums: dict[str, Tensor], name: str, found: Tensor) -> None:
    """Add `found` to the one of `sums` with that `name`."""
    sums[name] = sums[name] + found if name in sums else found


class Estimator(Protocol):
    def __call__(self, landscape: Landscape, estimate: Estimate) -> tuple[float, list[float]]:
        """Add this batch's gradient estimate to `estimate`; return its loss and the projected gradients."""


@dataclass(frozen=True)
class Probes:
    """Finite differences along `count` random directions, averaged.

    One-sided: ``g = (f(+eps) - f(0)) / eps``, 1 + count forwards, bias linear in eps. Two-sided:
    ``g = (f(+eps) - f(-eps)) / (2 eps)``, 2 count forwards (one more when a basis must be renewed from a clean
    pass), bias quadratic in eps. The estimate of one direction D is ``g D``, its low-rank part divided by `scale`.

    With `per_example`, every example of the batch is probed along a direction of its own, in the same forwards (and one
    at the centre, also of two-sided and leave-one-out probes, which shows how many examples there are): the estimate
    is the mean of ``g_i D_i`` over the examples i with their own loss differences g_i, as unbiased as before.
    Its variance is ``mean |G_i|^2 / (B |mean G|^2)`` of a shared direction's, G_i the B examples' gradients on the
    subspace: down to 1 / B while they agree, but above 1 where they mostly cancel. It needs one loss per example
    from the closure.

    With `leave_one_out`, one-sided probes are compared with the mean of the others instead of with f(0), as AIM-ZO's
    population does: ``g = (f_i - mean of the other f_j) / eps``, count forwards (one more for a due basis), and
    unbiased too.

    With `shape`, the probes' losses are first replaced by what they are among one another (`shaped`), as evolution
    strategies shape fitness (arXiv 1703.03864), and g is not divided by eps: the estimate, and with it what lr means,
    depends neither on the objective's scale nor, for ``"rank"``, on more than the order of its values. It keeps the
    gradient's direction, not its length. With per-example probes each example's losses are a population of their own.

    A probe whose losses are not finite adds nothing; its projected gradient is returned as it is.
    """

    count: int = 1
    two_sided: bool = False
    scale: float = 1.0
    per_example: bool = False
    leave_one_out: bool = False
    shape: Shape | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"the number of probes must be at least 1, not {self.count}")
        if self.leave_one_out and (self.two_sided or self.count < 2):
            raise ValueError("leave-one-out compares one-sided probes with one another: it takes two or more of them")
        if self.shape not in (None, *get_args(Shape)):
            raise ValueError(f"shape must be None or one of {', '.join(get_args(Shape))}, not {self.shape!r}")
        if self.shape and not (self.two_sided or self.leave_one_out):
            raise ValueError("shape compares probes with one another, not with f(0): set two_sided or leave_one_out")

    @property
    def points(self) -> int:
        """How many points beside the centre an estimate looks at."""
        return self.count * (2 if self.two_sided else 1)

    def __call__(self, landscape: Landscape, estimate: Estimate) -> tuple[float, list[float]]:
        signs = (1, -1) if self.two_sided else (1,)
        wanted = landscape.needs_clean or self.per_example or not (self.two_sided or self.leave_one_out)
        each = self.per_example
        first = landscape.evaluate([CENTRE], each) if each else None  # shows how many examples there are
        directions = [landscape.draw(self.per_example) for _ in range(self.count)]
        points = [(direction, sign * landscape.eps) for direction in directions for sign in signs]
        losses = landscape.evaluate([CENTRE, *points] if wanted and first is None else points, each)
        losses = losses if first is None else torch.cat((first, losses))
        landscape.complete(directions)
        centre, moved = (losses[0], losses[1:]) if wanted else (None, losses)
        values, unit = (shaped(moved, self.shape), 1.0) if self.shape else (moved, landscape.eps)
        gradients = self._differences(values.unflatten(0, (-1, len(signs))), centre) / unit
        estimate.probed = list(zip(directions, gradients, strict=True))
        self.weigh(estimate, landscape.branches.shared)
        return float((moved if centre is None else centre).mean()), [float(gradient.mean()) for gradient in gradients]

    def weigh(self, estimate: Estimate, shared: Set[str]) -> None:
        """Add the directions that `estimate` has probed, each times what was found along it, averaged."""
        for direction, gradient in estimate.probed:
            if math.isfinite(gradient.mean()):
                estimate.add(direction, gradient / self.count, self.scale, shared)

    def _differences(self, moved: Tensor, centre: Tensor | None) -> Tensor:
        """eps g of each direction (g, if shaped), from its one side or two: `moved` is [directions, sides, ...]."""
        ahead = moved[:, 0]
        if self.two_sided:
            return (ahead - moved[:, 1]) / 2
        if self.leave_one_out:
            return (ahead - ahead.mean(0)) * (self.count / (self.count - 1))
        assert centre is not None
        return ahead - centre

    def __str__(self) -> str:
        sides = "two-sided" if self.two_sided else "leave-one-out" if self.leave_one_out else "one-sided"
        each = " per example" if self.per_example else ""
        shape = f", {self.shape}" if self.shape else ""
        return f"{sides}, {self.count} probe{'s' if self.count > 1 else ''}{each}{shape}"


def shaped(losses: Tensor, shape: Shape) -> Tensor:
    """The `losses` of a population, float64 [points, ...], or their ranks, brought to mean 0 and variance 1.

    Both are over the points. Equal losses share a rank. If all are equal, all become 0; if one is not finite, nan.
    """
    if shape == "rank":
        other = losses.unsqueeze(1)
        ranks = ((other > losses) + (other == losses) / 2).sum(1, dtype=losses.dtype)
        losses = ranks.where(losses.isfinite(), math.nan)
    centred = losses - losses.mean(0)
    alike = losses.amax(0) - losses.amin(0) == 0  # rounding may give equal numbers a mean that is not theirs
    return (centred / centred.square().mean(0).sqrt()).where(~alike, 0.0)
