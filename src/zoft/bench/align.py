"""How well do estimates point along the true gradient?

The gradient G of all linear layers' weights comes from one backward pass; a method's estimate E, restricted to the same
weights, from its forward passes. For a probe that moves those weights along ``R A^T`` with standard normal R (and other
parameters along noise z), the loss difference weighs the direction with ``<R, G A> + <z, G_other>``, so that

    E cos(E, G) = beta_D sqrt(D / E||R A^T||^2) ||G A||^2 / (||G|| sqrt(||G A||^2 + ||G_other||^2)),
    beta_D = Gamma(D / 2) / (sqrt(pi) Gamma((D + 1) / 2)),   D = sum of d_out r.

For an orthonormal A and frozen others this is ``beta_D ||G A|| / ||G||``, theorem 5.4 of AGZO (arXiv 2601.17261);
MeZO is the case A = I. Of several directions, of probes or of examples, there is no prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn

from zoft.bench.gradient import (
    Closure,
    Gradients,
    dense_products,
    gradient_of,
    layers_with_gradients,
    true_gradients,
)
from zoft.optim import Estimate, LinearMap, ZeroOrder


@dataclass
class Alignment:
    """What was measured of one method; lists have one entry an estimate, `layers` one list a layer."""

    cosines: list[float] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)
    captures: list[float] = field(default_factory=list)
    layers: dict[str, list[float]] = field(default_factory=dict)
    forwards: int = 0

    def summary(self) -> dict[str, Any]:
        """Means over the estimates, and the standard error of the cosine."""
        return {
            "cosine_mean": fmean(self.cosines),
            "cosine_sem": stdev(self.cosines) / math.sqrt(len(self.cosines)) if len(self.cosines) > 1 else math.nan,
            "predicted_cosine": fmean(self.predicted),
            "capture": fmean(self.captures),
            "estimates": len(self.cosines),
            "forwards": self.forwards,
        }


def align(
    model: nn.Module,
    closures: Sequence[Closure],
    methods: Mapping[str, Callable[[nn.Module], ZeroOrder]],
    estimates: int,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Alignment]:
    """Compare `estimates` estimates of each method with the true gradient, spread over the batches of `closures`.

    The model, its gradients included, is not changed. `closures` return the losses of their batch; `methods` make
    an optimizer for the model. The gradient takes as much memory as the model's weights.

    Raises:
        ValueError: the model has no linear layer, or one whose weight is quantized.
    """
    maps = layers_with_gradients(model)
    found = {name: Alignment() for name in methods}
    optimizers = {name: make(model) for name, make in methods.items()}  # for all batches, so that no noise recurs
    for optimizer in optimizers.values():
        optimizer.branches.detach()  # its coefficients are 0 and stay so
    for number, closure in enumerate(closures):
        progress(f"batch {number + 1} of {len(closures)}: backward")
        gradients = true_gradients(model, closure)
        for name, optimizer in optimizers.items():
            share = estimates // len(closures) + (number < estimates % len(closures))
            progress(f"batch {number + 1} of {len(closures)}: {name}")
            before = optimizer.counters.forwards
            for _ in range(share):
                optimizer.estimate(closure)
                estimate = optimizer.take_estimate()
                assert estimate is not None
                _compare(found[name], optimizer, estimate, maps, gradients)
            found[name].forwards += optimizer.counters.forwards - before
    return found


def _compare(
    found: Alignment, optimizer: ZeroOrder, estimate: Estimate, maps: list[LinearMap], gradients: Gradients
) -> None:
    own = {m.name: m for m in optimizer.maps}
    names = {id(p): name for name, p in optimizer.dense.items()}
    inner: dict[str, float] = {}  # <E, G> of each layer
    squares: dict[str, tuple[float, float]] = {}  # ||E||^2 and ||G||^2 of each layer
    moved, spread, caught, probed = 0.0, 0.0, 0.0, 0.0  # ||G A||^2, E||R A^T||^2, ||G Q||^2 with Q = orth(A)
    for layer in maps:
        gradient = gradient_of(layer, gradients)
        if gradient is None:
            continue
        total = float(gradient.square().sum())
        if layer.name in own and layer.name in estimate.factors:
            basis, factor = optimizer.bases[layer.name], estimate.factors[layer.name]
            seen, gram = gradient @ basis, basis.t() @ basis
            inner[layer.name] = float((factor * seen).sum())
            squares[layer.name] = float(((factor.t() @ factor) * gram).sum()), total
            moved += float(seen.square().sum())
            spread += layer.d_out * float(gram.trace())
            caught += float((seen.t() @ seen * torch.linalg.inv(gram)).sum())
            probed += layer.d_out * basis.shape[1]
        elif id(layer.parameter) in names:
            stored = gradient.t() if layer.transposed else gradient  # as the noise lies
            inner[layer.name], square = dense_products(estimate, names[id(layer.parameter)], stored, layer.part)
            squares[layer.name] = square, total
            moved, caught = moved + total, caught + total
            spread, probed = spread + gradient.numel(), probed + gradient.numel()
        else:
            inner[layer.name], squares[layer.name] = 0.0, (0.0, total)

    others = names.keys() - {id(layer.parameter) for layer in maps}
    other = sum(float(gradients[i].square().sum()) for i in others if i in gradients)
    norm = math.sqrt(sum(total for _, total in squares.values()))
    length = math.sqrt(sum(square for square, _ in squares.values()))
    found.cosines.append(sum(inner.values()) / (length * norm) if length else 0.0)
    found.captures.append(math.sqrt(caught) / norm)
    shape = math.sqrt(probed / spread) * moved / (norm * math.sqrt(moved + other)) if moved else 0.0
    single = len(optimizer.projected_gradients) == 1 and not getattr(optimizer.estimator, "per_example", False)
    found.predicted.append(expected_cosine(probed) * shape if probed and single else 0.0 if single else math.nan)
    for name, (square, total) in squares.items():
        cosine = inner[name] / math.sqrt(square * total) if square and total else 0.0
        found.layers.setdefault(name, []).append(cosine)


def expected_cosine(dimension: float) -> float:
    """beta_D: the expected absolute cosine between a fixed and an isotropic random direction in D dimensions."""
    return math.exp(math.lgamma(dimension / 2) - math.lgamma((dimension + 1) / 2)) / math.sqrt(math.pi)
