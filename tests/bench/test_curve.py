"""`zoft.bench.curve`: finite differences tend to the true slope, at the rate that theory predicts."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

import zoft
from optim.models import changed, closure_of, gpt2, llama, mlp, snapshot, tied_llama, token_batch
from zoft.bench import finite_difference_errors
from zoft.bench.gradient import slope, true_gradients
from zoft.optim import ZeroOrder
from zoft.optim.noise import normal
from zoft.train.diagnosis import Ladder

METHODS: dict[str, Callable[..., ZeroOrder]] = {
    "agzo": partial(zoft.AGZO, lr=0.0),
    "agzo, others": partial(zoft.AGZO, lr=0.0, others="gaussian"),
    "zo-act": partial(zoft.ZOAct, lr=0.0, rank=2),
    "lozo": partial(zoft.LOZO, lr=0.0),
    "mezo": partial(zoft.MeZO, lr=0.0),
}
DISTANCES = (4e-3, 2e-3, 1e-3)  # small beside the curvature of `classifier`, and large beside float64's rounding


def classifier() -> nn.Module:
    return mlp(torch.float64)


def closures(model: nn.Module, scale: float = 1.0) -> list[Callable[[], Tensor]]:
    """`scale` times the loss of `classifier` on each of two batches."""

    def loss(x: Tensor) -> Tensor:
        return scale * cross_entropy(model(x), torch.arange(len(x)) % 3)

    return [partial(loss, normal((i, "x"), (12, 10)).double() + 1) for i in range(2)]


@pytest.mark.parametrize("make", [llama, tied_llama, gpt2])
@pytest.mark.parametrize("method", METHODS)
def test_slope_is_the_central_difference(method: str, make: Callable[[], PreTrainedModel]) -> None:
    model, distance = make(), 3e-4
    closure = closure_of(model, token_batch())
    gradients, optimizer = true_gradients(model, closure), METHODS[method](model)
    ladder = optimizer.estimator = Ladder((distance,))
    for _ in range(3):
        optimizer.estimate(closure)
        estimate = optimizer.take_estimate()
        assert estimate is not None
        found = slope(optimizer, estimate, gradients)
        assert found == pytest.approx(ladder.difference(distance, two_sided=True), abs=5e-3)


@pytest.mark.parametrize("method", METHODS)
def test_errors_fall_with_the_distance_and_with_its_square(method: str) -> None:
    model = classifier()
    exact = copy.deepcopy(model)
    pairs = list(zip(closures(model), closures(exact), strict=True))
    errors = finite_difference_errors(model, exact, pairs, METHODS[method], DISTANCES, 5)
    for sides, order in (("one-sided", 1), ("two-sided", 2)):
        falls = [further / nearer for further, nearer in zip(errors[sides], errors[sides][1:], strict=False)]
        assert falls == pytest.approx([2**order] * 2, rel=0.05)
        assert 0 < errors[sides][0] < errors["slope"][0]


def test_the_reference_is_the_gradient_of_the_exact_model() -> None:
    """If its loss is twice the model's, every difference errs by half of its slope."""
    model = classifier()
    exact = copy.deepcopy(model)
    pairs = list(zip(closures(model), closures(exact, scale=2.0), strict=True))
    errors = finite_difference_errors(model, exact, pairs, METHODS["agzo"], DISTANCES, 4)
    assert errors["two-sided"] == pytest.approx([errors["slope"][0] / 2] * 3, rel=0.01)


def test_root_mean_square() -> None:
    """Along standard normal directions in all parameters, the slope's is the length of the gradient."""
    model = classifier()
    exact = copy.deepcopy(model)
    pair = (closures(model)[0], closures(exact)[0])
    errors = finite_difference_errors(model, exact, [pair], METHODS["mezo"], (1e-3,), 200)
    length = sum(float(g.square().sum()) for g in true_gradients(exact, pair[1]).values()) ** 0.5
    assert errors["slope"] == [pytest.approx(length, rel=0.15)]  # three standard errors


def test_directions_are_shared_out_over_the_batches() -> None:
    model, calls = classifier(), [0, 0]
    exact = copy.deepcopy(model)

    def counted(number: int, closure: Callable[[], Tensor]) -> Tensor:
        calls[number] += 1
        return closure()

    pairs = [
        (partial(counted, i, own), of_exact)
        for i, (own, of_exact) in enumerate(zip(closures(model), closures(exact), strict=True))
    ]
    finite_difference_errors(model, exact, pairs, METHODS["mezo"], DISTANCES, 5)
    assert calls == [3 * (1 + 2 * len(DISTANCES)), 2 * (1 + 2 * len(DISTANCES))]


@pytest.mark.parametrize("method", METHODS)
def test_model_is_left_as_it_was(method: str) -> None:
    model, batch = llama().bfloat16(), token_batch(4, 8)
    exact = copy.deepcopy(model).float()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = snapshot(model)
    finite_difference_errors(
        model, exact, [(closure_of(model, batch), closure_of(exact, batch))], METHODS[method], (1e-2,), 2
    )
    assert changed(model, before) == set()
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())  # type: ignore[arg-type]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*model.modules(), *exact.modules()))
