"""Shaped populations: ranks and z-scores in the place of losses."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from zoft.optim import AGZO, MeZO, Probes, ZeroOrder
from zoft.optim.estimator import Shape, shaped

from .models import mlp, snapshot
from .table import classifier

SHAPES: tuple[Shape, ...] = ("rank", "zscore")
WHOLE = st.lists(st.integers(-50, 50), min_size=2, max_size=12)
POPULATIONS: dict[str, Callable[..., ZeroOrder]] = {
    "one-sided": partial(AGZO, probes=5, leave_one_out=True),
    "two-sided": partial(AGZO, probes=2, two_sided=True),
    "full": partial(MeZO, probes=3),
}


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_ranks_and_scores() -> None:
    root = math.sqrt(1.5)
    assert torch.allclose(shaped(vector(7, 900, 8), "rank"), vector(-root, root, 0))
    assert torch.allclose(shaped(vector(1, 3, 3, 5), "zscore"), vector(-1, 0, 0, 1) * math.sqrt(2))
    ties = shaped(vector(2, 9, 2, 4), "rank")
    assert ties[0] == ties[2] and torch.allclose((ties[1] - ties[3]) * 1.5, ties[3] - ties[0])


@given(WHOLE)
def test_ranks_know_the_order_alone(losses: list[int]) -> None:
    plain, curved = (shaped(vector(*values), "rank") for values in (losses, [math.exp(x / 9) - 3 for x in losses]))
    assert torch.equal(plain, curved)


@given(WHOLE, st.sampled_from([1e-3, 0.1, 7.0, 1e4]), st.floats(-100, 100))
def test_scores_do_not_depend_on_scale_and_shift(losses: list[int], scale: float, shift: float) -> None:
    plain, moved = (shaped(vector(*values), "zscore") for values in (losses, [scale * x + shift for x in losses]))
    assert torch.allclose(plain, moved, atol=1e-6)


@given(WHOLE, st.sampled_from(SHAPES))
def test_the_spread_is_one_or_nothing(losses: list[int], shape: Shape) -> None:
    found = shaped(vector(*losses), shape)
    assert float(found.mean()) == pytest.approx(0, abs=1e-12)
    assert float(found.square().mean()) == pytest.approx(float(len(set(losses)) > 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_losses_become_nothing(shape: Shape) -> None:
    """Also where rounding gives them a mean that none of them is."""
    losses = vector(0.1, 0.1, 0.1)
    assert losses.mean() != losses[0]
    assert not shaped(losses, shape).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_loss_that_is_not_finite_spoils_its_population_alone(shape: Shape, bad: float) -> None:
    found = shaped(torch.stack([vector(1, bad, 3), vector(1, 2, 4)], dim=1), shape)
    assert found[:, 0].isnan().all() and torch.equal(found[:, 1], shaped(vector(1, 2, 4), shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("population", POPULATIONS)
def test_training_does_not_depend_on_the_scale_of_the_objective(population: str, shape: Shape) -> None:
    """Nor, for ranks, on how it is curved."""
    ways: list[Callable[[Tensor], Tensor]] = [lambda x: x, lambda x: 1000 * x + 7]
    if shape == "rank":
        ways.append(lambda x: x.exp())
    moved = []
    for way in ways:
        problem = classifier()
        before = snapshot(problem.model)
        optimizer = POPULATIONS[population](problem.model, lr=1e-2, eps=1e-2, shape=shape)
        for _ in range(5):
            optimizer.step(lambda loss=problem.closure, way=way: way(loss().double()))
        moved.append(torch.cat([(t - before[name]).flatten() for name, t in snapshot(problem.model).items()]))
    assert float(moved[0].norm()) > 1e-2
    for other in moved[1:]:
        torch.testing.assert_close(other, moved[0], rtol=1e-3, atol=1e-6)


def kept(shape: Shape, count: int) -> float:
    """What a population of `count` normal variables keeps of its standard normal ones: mean of shaped(s) times s.

    Ranks: Gini's mean difference of a normal variable is 2 / sqrt(pi). Z-scores: the mean of a sample's own spread.
    """
    if shape == "rank":
        return math.sqrt(3 / math.pi * (count - 1) / (count + 1))
    return math.sqrt(2 / count) * math.exp(math.lgamma(count / 2) - math.lgamma((count - 1) / 2))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_expectation_is_the_gradients_direction(shape: Shape) -> None:
    """Of a linear loss, for which the losses of a population are normal: a known multiple of G / |G|."""
    torch.manual_seed(0)
    count, layer = 4, nn.Linear(3, 4, bias=False)
    slope = torch.randn(4, 3)
    eye = torch.eye(3)
    optimizer = AGZO(layer, eps=1e-2, rank=3, probes=count, leave_one_out=True, shape=shape, seed=1)
    estimates = []
    for _ in range(1500):
        optimizer.estimate(lambda: (layer(eye).t() * slope).sum())
        estimate = optimizer.take_estimate()
        assert estimate is not None
        (factor,) = estimate.factors.values()
        (basis,) = optimizer.bases.values()
        estimates.append(factor @ basis.t())
    found = torch.stack(estimates)
    expected = count / (count - 1) * kept(shape, count) * slope / slope.norm()  # leave-one-out has the factor
    error = (found.mean(0) - expected) / (found.std(0) / len(found) ** 0.5)
    assert float(error.square().mean()) < 2  # 1 in expectation
    assert float((found.mean(0) * expected).sum() / expected.square().sum()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_example_is_a_population_of_its_own(shape: Shape) -> None:
    """One example's loss a million times as large as the others' weighs no more than they do."""
    x, estimates = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)), []
    for weights in (torch.ones(4), torch.tensor([1e6, 1, 1e-3, 50])):
        model = mlp().double()
        optimizer = AGZO(model, probes=4, leave_one_out=True, per_example=True, shape=shape)
        optimizer.estimate(lambda model=model, weights=weights: weights * model(x.double()).square().mean(1))
        estimate = optimizer.take_estimate()
        assert estimate is not None
        estimates.append(estimate.factors)
    for name, factor in estimates[0].items():
        torch.testing.assert_close(estimates[1][name], factor, rtol=1e-3, atol=1e-4)


def test_two_points_leave_the_sign() -> None:
    model = mlp()
    optimizer = MeZO(model, shape="rank")
    optimizer.estimate(lambda: model(torch.ones(2, 10)).sum())
    assert [abs(g) for g in optimizer.projected_gradients] == [1]


@pytest.mark.parametrize(
    "options, said",
    [
        ({"shape": "rank"}, "not with f"),
        ({"shape": "median", "two_sided": True}, "one of rank, zscore, not 'median'"),
    ],
)
def test_mistakes(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Probes(**options)
