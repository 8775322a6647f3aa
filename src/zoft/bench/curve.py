"""How far finite differences of the loss are from the true slope along random directions.

A difference over a distance eps errs twice: rounding of the loss weighs 1 / eps, curvature eps (one-sided) or eps^2
(two-sided). The best eps lies between, and depends on the dtype and on how long the method's directions are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import nn

from zoft.bench.gradient import Closure, slope, true_gradients
from zoft.optim import ZeroOrder
from zoft.train.diagnosis import Ladder


def finite_difference_errors(
    model: nn.Module,
    exact: nn.Module,
    closures: Sequence[tuple[Closure, Closure]],
    make: Callable[[nn.Module], ZeroOrder],
    distances: Sequence[float],
    directions: int,
) -> dict[str, list[float]]:
    """Root mean square over `directions` of the error of one- and two-sided differences, by distance.

    `exact` is a float32 copy of `model`, whose gradient is the reference; each of `closures` gives the loss of one
    batch by `model` and by `exact`. ``"slope"`` in the result is the root mean square of the true slope.
    """
    optimizer = make(model)
    ladder = optimizer.estimator = Ladder(distances)
    squares = {"slope": [0.0], "one-sided": [0.0] * len(distances), "two-sided": [0.0] * len(distances)}
    for number, (closure, exact_closure) in enumerate(closures):
        of_exact = true_gradients(exact, exact_closure)
        pairs = zip(model.parameters(), exact.parameters(), strict=True)
        gradients = {id(p): of_exact[id(twin)] for p, twin in pairs if id(twin) in of_exact}
        for _ in range(directions // len(closures) + (number < directions % len(closures))):
            optimizer.estimate(closure)
            estimate = optimizer.take_estimate()
            assert estimate is not None
            true = slope(optimizer, estimate, gradients)
            squares["slope"][0] += true**2
            for sides in ("one-sided", "two-sided"):
                for i, distance in enumerate(distances):
                    squares[sides][i] += (ladder.difference(distance, sides == "two-sided") - true) ** 2
    optimizer.branches.detach()
    return {name: [math.sqrt(value / directions) for value in values] for name, values in squares.items()}
