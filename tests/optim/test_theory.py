"""What the papers prove: the mean of the estimate, its angle to the gradient, and its bias in eps."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zoft.optim import AGZO, MeZO, ZeroOrder
from zoft.optim.noise import normal

from .models import llama, mlp, token_batch

Closure = Callable[[], Tensor]


def estimates(optimizer: ZeroOrder, closure: Closure, count: int) -> list[dict[str, Tensor]]:
    """Independent gradient estimates at one point, by layer name, [d_out, d_in]."""
    found = []
    for _ in range(count):
        optimizer.estimate(closure)
        estimate, optimizer._estimate = optimizer._estimate, None  # the next draws other directions
        assert estimate is not None
        if optimizer.maps:
            found.append({m.name: estimate.factors[m.name] @ optimizer.bases[m.name].t() for m in optimizer.maps})
        else:
            ((key, c),) = estimate.dense
            found.append({name: c * normal((*key, name), p.shape) for name, p in optimizer.dense.items()})
    return found


def gradients(optimizer: ZeroOrder, closure: Closure) -> dict[str, Tensor]:
    """The true gradient, by the same names."""
    optimizer.model.zero_grad()
    with torch.enable_grad():
        closure().backward()
    if not optimizer.maps:
        return {name: p.grad for name, p in optimizer.dense.items() if p.grad is not None}
    return {m.name: m.weight.grad for m in optimizer.maps if m.weight is not None and m.weight.grad is not None}


def projected(optimizer: ZeroOrder, gradient: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient on the span of each layer's basis, ``G A A^T``; all of it without bases."""
    bases = optimizer.bases
    if not bases:
        return gradient
    return {name: g @ bases[name].to(g.dtype) @ bases[name].t().to(g.dtype) for name, g in gradient.items()}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def assert_mean_is(samples: list[dict[str, Tensor]], expected: Tensor) -> None:
    """Each coordinate within five standard errors, and their mean square within four of its own."""
    values = torch.stack([flat(sample) for sample in samples])
    error, variance = values.mean(0) - expected, values.var(0) / len(values)
    assert bool((error.abs() <= 5 * variance.sqrt() + 1e-6).all())
    assert float(values.mean(0).norm()) > 0
    # Under unbiasedness the sum of squared errors has mean sum(v) and variance at most 2 sum(v)^2.
    assert float(error.square().sum()) < (1 + 4 * math.sqrt(2)) * float(variance.sum())


def quadratic(d_in: int = 6, d_out: int = 3) -> tuple[nn.Module, Closure]:
    model = nn.Sequential(nn.Linear(d_in, d_out, bias=False)).double()
    model[0].weight.data = normal((0, "w"), (d_out, d_in)).double()
    x, y = normal((0, "x"), (12, d_in)).double() + 1, normal((0, "y"), (12, d_out)).double()
    return model, lambda: 0.5 * (model(x) - y).square().sum()


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (partial(AGZO, rank=2), 2_000),
        (partial(AGZO, rank=2, two_sided=True), 2_000),
        (MeZO, 2_000),
    ],
    ids=["AGZO one-sided", "AGZO two-sided", "MeZO"],
)
def test_the_mean_on_a_quadratic_is_the_projected_gradient(method: Any, count: int) -> None:
    """Smoothing a quadratic adds a constant, so the gradient of the smoothed loss is the gradient at any eps."""
    model, closure = quadratic()
    optimizer = method(model, eps=0.1)
    samples = estimates(optimizer, closure, count)
    assert_mean_is(samples, flat(projected(optimizer, gradients(optimizer, closure))))


def test_a_central_difference_of_a_quadratic_is_its_directional_derivative() -> None:
    model, closure = quadratic()
    optimizer = AGZO(model, eps=0.5, two_sided=True)
    (sample,) = estimates(optimizer, closure, 1)
    (slope,) = optimizer.projected_gradients
    direction = sample["0"] / slope
    assert slope == pytest.approx(float((gradients(optimizer, closure)["0"] * direction).sum()), rel=1e-4)


@pytest.mark.parametrize("two_sided", [False, True])
def test_the_mean_on_a_transformer_is_the_projected_gradient(two_sided: bool) -> None:
    model = llama(num_hidden_layers=1, hidden_size=16, intermediate_size=16).double()
    ids = token_batch(2, 6)["input_ids"]
    optimizer = AGZO(model, eps=1e-3, rank=2, two_sided=two_sided, exclude=["lm_head"])

    def closure() -> Tensor:
        return cross_entropy(model(input_ids=ids).logits[:, -1], ids[:, 0])

    samples = estimates(optimizer, closure, 600)
    assert_mean_is(samples, flat(projected(optimizer, gradients(optimizer, closure))))


def test_several_probes_are_averaged() -> None:
    """The variance of the mean of four probes is a quarter of one's (ratio within 25%, about four standard errors)."""
    variances = []
    for probes in (1, 4):
        model, closure = quadratic()
        samples = estimates(AGZO(model, eps=1e-3, probes=probes, two_sided=True), closure, 800)
        variances.append(float(torch.stack([flat(sample) for sample in samples]).var(0).sum()))
    assert variances[0] / variances[1] == pytest.approx(4, rel=0.25)


def beta(dimensions: int) -> float:
    """``Gamma(D/2) / (sqrt(pi) Gamma((D+1)/2))``: the mean |cosine| of a random direction with a fixed one."""
    return math.exp(math.lgamma(dimensions / 2) - math.lgamma((dimensions + 1) / 2)) / math.sqrt(math.pi)


def classifier() -> tuple[nn.Module, Closure]:
    model, x = mlp(torch.float64), normal((0, "x"), (24, 10)).double() + 1
    targets = torch.arange(24) % 3
    return model, lambda: cross_entropy(model(x), targets)


@pytest.mark.parametrize("problem", [quadratic, classifier], ids=["one matrix", "several layers"])
@pytest.mark.parametrize("rank", [1, 3, None], ids=["rank 1", "rank 3", "MeZO"])
def test_the_mean_cosine_is_that_of_the_theorem(rank: int | None, problem: Callable[[], Any]) -> None:
    """AGZO, theorem 5.4. MeZO is the case A = I, with D the number of parameters."""
    model, closure = problem()
    method = MeZO(model, eps=1e-4) if rank is None else AGZO(model, eps=1e-4, rank=rank, two_sided=True)
    samples = [flat(sample) for sample in estimates(method, closure, 600)]
    gradient = gradients(method, closure)
    truth, supported = flat(gradient), flat(projected(method, gradient))
    cosines = torch.stack([sample @ truth / (sample.norm() * truth.norm()) for sample in samples])
    dimensions = len(truth) if rank is None else sum(m.d_out * method.bases[m.name].shape[1] for m in method.maps)
    expected = beta(dimensions) * float(supported.norm() / truth.norm())
    standard_error = float(cosines.std()) / math.sqrt(len(cosines))
    assert abs(float(cosines.mean()) - expected) < 4 * standard_error
    assert standard_error < 0.05 * expected


def slope_errors(two_sided: bool, distances: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    """Relative error of one probe's difference quotient against autograd's directional derivative, for each eps."""
    model, closure = classifier()
    errors = []
    for eps in distances:
        optimizer = AGZO(model, eps=eps, two_sided=two_sided, rank=2)
        (sample,) = estimates(optimizer, closure, 1)
        (slope,) = optimizer.projected_gradients
        derivative = flat(gradients(optimizer, closure)) @ flat(sample) / slope
        errors.append(abs(slope / float(derivative) - 1))
    return torch.tensor(errors, dtype=torch.float64)


@pytest.mark.parametrize(("two_sided", "order"), [(False, 1), (True, 2)], ids=["one-sided", "two-sided"])
def test_the_error_in_eps_is_linear_one_sided_and_quadratic_two_sided(two_sided: bool, order: int) -> None:
    distances = [10 ** (-1.5 - k / 4) for k in range(5)]
    logarithms = torch.tensor(distances, dtype=torch.float64).log()
    errors = slope_errors(two_sided, distances).log()
    centred = logarithms - logarithms.mean()
    fitted = float((centred * errors).sum() / centred.square().sum())
    assert fitted == pytest.approx(order, abs=0.15)


def test_a_float64_model_is_differentiated_in_float64() -> None:
    """At eps = 1e-5 float64 leaves an error near 1e-9; a loss rounded to float32 would leave about 1e-2."""
    assert float(slope_errors(two_sided=True, distances=[1e-5])) < 1e-6
