"""The optimizer's contract: estimate and step, accumulation, schedulers, counts and seeds."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import count, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from zoft.optim import AGZO, LOZO, Guided, Loss, MeZO, ZeroOrder, ZOAct, cross_entropy
from zoft.optim.noise import normal

from .models import closure_of, llama, mlp, snapshot, token_batch
from .table import METHODS, classifier

each_method = pytest.mark.parametrize("method", METHODS)


def tensors_of(optimizer: ZeroOrder) -> dict[str, Tensor]:
    """Everything that training moves: weights and coefficients."""
    optimizer.fold()
    coefficients = {f"{name}.coefficients": c.clone() for name, c in optimizer.coefficients.items()}
    return snapshot(optimizer.model) | coefficients


def assert_equal(first: ZeroOrder, second: ZeroOrder) -> None:
    a, b = tensors_of(first), tensors_of(second)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def trained(method: str, steps: int = 3, dtype: torch.dtype = torch.float32, **options: Any) -> ZeroOrder:
    model = llama().to(dtype)
    optimizer = METHODS[method](model, **{"lr": 1e-3, **options})
    for i in range(steps):
        optimizer.step(closure_of(model, token_batch(batch=4, length=6, seed=i)))
    return optimizer


@each_method
def test_step_with_a_closure_is_estimate_and_step(method: str) -> None:
    whole = trained(method)
    model = llama()
    parts = METHODS[method](model, lr=1e-3)
    for i in range(3):
        loss = parts.estimate(closure_of(model, token_batch(batch=4, length=6, seed=i)))
        assert parts.step() is None
    assert_equal(whole, parts)
    assert parts.loss == whole.loss == pytest.approx(float(loss))


@each_method
def test_the_logits_of_a_pass_are_gone_in_the_next(method: str) -> None:
    """They would be the largest thing in memory."""
    model, batch = llama(), token_batch(batch=4, length=6)
    optimizer, seen = METHODS[method](model, lr=1e-3), list[Callable[[], Any]]()

    def closure() -> Loss:
        assert all(logits() is None for logits in seen)
        logits = model(input_ids=batch["input_ids"]).logits
        seen.append(weakref.ref(logits))
        return cross_entropy(logits, batch["labels"])

    optimizer.step(closure)
    optimizer.step(closure)
    assert len(seen) >= 2


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_seeds_give_equal_runs_and_others_do_not(method: str, dtype: torch.dtype) -> None:
    first = trained(method, dtype=dtype, seed=5)
    assert_equal(first, trained(method, dtype=dtype, seed=5))
    with pytest.raises(AssertionError):
        assert_equal(first, trained(method, dtype=dtype, seed=6))


@each_method
def test_two_estimates_are_averaged_and_have_directions_of_their_own(method: str) -> None:
    problem = classifier()
    optimizer = METHODS[method](problem.model, lr=0.1)
    estimates = []
    for _ in range(2):
        optimizer.estimate(problem.closure)
        total = optimizer._estimate
        assert total is not None
        estimates.append(({k: v.clone() for k, v in total.factors.items()}, list(total.dense)))
    (first, one), (both, two) = estimates
    assert total.count == 2
    assert len(two) == 2 * len(one)
    assert len({key for key, _ in two}) == len(two)
    for name, factor in first.items():
        assert not torch.allclose(both[name], 2 * factor, rtol=0.01)

    before = tensors_of(optimizer)
    optimizer.step()
    for m in optimizer.maps:
        moved = tensors_of(optimizer)
        if m.name not in both or optimizer.keeps_coefficients or not optimizer.update.stateless:
            continue
        expected = -0.1 * both[m.name] / 2 @ optimizer.bases[m.name].t()
        name = f"{m.name}.weight"
        torch.testing.assert_close(moved[name] - before[name], expected, rtol=1e-3, atol=1e-6)


def test_a_seed_may_be_one_of_numpy() -> None:
    """Once it drew other noise than the number that it is."""
    found = []
    for seed in (7, np.int64(7)):
        problem = classifier()
        optimizer = AGZO(problem.model, seed=seed)
        optimizer.estimate(problem.closure)
        found.append(optimizer.projected_gradients)
    assert found[0] == found[1]


@pytest.fixture
def half_by_default() -> Iterator[None]:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(usual)


@pytest.mark.parametrize("method", [ZOAct, Guided])
@pytest.mark.usefixtures("half_by_default")
def test_the_state_is_in_float32_whatever_torch_s_default(method: Callable[..., ZeroOrder]) -> None:
    """Once Adam's count of steps took the default, of which bfloat16 can count 256, and so did coefficients."""
    model = llama().to(torch.bfloat16)
    optimizer = method(model)
    for _ in range(2):
        optimizer.step(closure_of(model, token_batch()))
    state = [*optimizer.coefficients.values(), *(value for own in optimizer.updates.values() for value in own.values())]
    assert {tensor.dtype for tensor in state} == {torch.float32}


def test_the_same_batch_twice_is_two_probes() -> None:
    """Accumulating one batch over two estimates is the same step as one estimate with two probes."""
    for method in (MeZO, AGZO, LOZO):
        first, second = classifier(), classifier()
        twice = method(first.model, lr=0.1)
        twice.estimate(first.closure)
        twice.step(first.closure)
        probes = method(second.model, lr=0.1, probes=2)
        probes.step(second.closure)
        for (name, a), b in zip(snapshot(first.model).items(), snapshot(second.model).values(), strict=True):
            torch.testing.assert_close(a, b, msg=name)


@each_method
def test_losses_per_example_give_the_same_as_their_mean(method: str) -> None:
    def run(reduce: Callable[[Tensor], Tensor]) -> ZeroOrder:
        model, x = mlp(), torch.linspace(-2, 2, 40).view(4, 10).sin()
        optimizer = METHODS[method](model, lr=0.1, eps=0.01)
        for _ in range(3):
            optimizer.step(lambda: reduce(model(x).square().mean(1)))
        return optimizer

    each, mean = tensors_of(run(lambda loss: loss)), tensors_of(run(torch.mean))
    for name in each:
        torch.testing.assert_close(each[name], mean[name], rtol=1e-3, atol=1e-3)


FORWARDS = {
    "MeZO": [2, 2],
    "LOZO": [2, 2],
    "LOZO-M": [2, 2],
    "AGZO": [2, 2],
    "AGZO folded": [2, 2],
    "AIM-ZO": [5, 5],
    "AGZO two-sided": [3, 3],
    "AGZO rank 4": [2, 2],
    "AGZO gaussian": [2, 2],
    "AGZO clipped": [2, 2],
    "MeZO z-score": [4, 4],
    "AGZO ranks": [5, 5],
    "ZO-Act": [2, 2],
    "ZO-Act SGD": [2, 2],
    "hybrid": [3, 2],
}


@each_method
def test_a_step_takes_the_stated_number_of_forwards(method: str) -> None:
    problem, calls = classifier(), []
    optimizer = METHODS[method](problem.model, lr=1e-3)

    def closure() -> Tensor:
        calls.append(optimizer.counters.steps)
        return problem.closure()

    for _ in range(2):
        optimizer.step(closure)
    assert [calls.count(step) for step in range(2)] == FORWARDS[method]
    assert optimizer.counters.forwards == len(calls)


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [(MeZO, {}, 6), (LOZO, {}, 6), (AGZO, {}, 4), (AGZO, {"two_sided": True}, 7), (ZOAct, {"two_sided": True}, 7)],
    ids=str,
)
def test_three_probes_take_the_stated_number_of_forwards(
    method: Callable[..., ZeroOrder], options: dict[str, Any], expected: int
) -> None:
    problem = classifier()
    optimizer = method(problem.model, probes=3, **options)
    optimizer.step(problem.closure)
    assert optimizer.counters.forwards == expected
    assert len(optimizer.projected_gradients) == 3


def test_the_loss_returned_is_that_at_the_centre() -> None:
    problem = classifier()
    with torch.no_grad():
        expected = float(problem.closure())
    assert float(AGZO(problem.model, lr=0.0).step(problem.closure)) == pytest.approx(expected)
    assert float(MeZO(problem.model, lr=0.0).step(problem.closure)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 - step / 4), [1, 0.75, 0.5, 0.25]),
        (lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=4), [1, 0.853553, 0.5, 0.146447]),
    ],
    ids=["LambdaLR", "CosineAnnealingLR"],
)
def test_torch_schedulers_set_the_step_size(make: Callable[[ZeroOrder], Any], expected: list[float]) -> None:
    problem = classifier()
    optimizer = AGZO(problem.model, lr=0.1)
    scheduler = make(optimizer)
    ratios = []
    for step in range(4):
        before = snapshot(problem.model)["0.weight"]
        optimizer.step(problem.closure)
        (g,) = optimizer.projected_gradients
        moved = (snapshot(problem.model)["0.weight"] - before).norm()
        drawn = normal((0, step, 0, "0"), (16, 1)).norm()
        ratios.append(float(moved / (0.1 * abs(g) * drawn)))
        scheduler.step()
    assert ratios == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("method", [MeZO, AGZO])
def test_autocast_around_steps_is_autocast_in_the_closure(method: Callable[..., ZeroOrder]) -> None:
    """Once autocast around it all computed with the weights of the first pass, which it remembers in half precision."""
    batch, found = token_batch(), []
    for around in (True, False):
        model = llama()
        optimizer = method(model, lr=1e-3, eps=0.1)
        halved, closure = torch.autocast("cpu", torch.bfloat16), closure_of(model, batch)
        with halved if around else nullcontext():
            for _ in range(3):
                found.append(float(optimizer.step(closure if around else halved(closure)) or 0))
                found += optimizer.projected_gradients
    assert found[:6] == found[6:]
    assert len(set(found)) == 6


def test_eps_can_be_changed_in_the_parameter_group() -> None:
    problem = classifier()
    optimizer = AGZO(problem.model, eps=1e-3)
    gradients = []
    for eps in (1e-2, 1.0):
        optimizer.param_groups[0]["eps"] = eps
        optimizer.estimate(problem.closure)
        gradients += optimizer.projected_gradients
        optimizer._estimate, optimizer._drawn = None, 0
    assert gradients[0] != pytest.approx(gradients[1], rel=1e-3)


@pytest.mark.parametrize("method", ["MeZO", "LOZO", "AGZO"])
def test_weight_decay_shrinks_matrices_besides_the_step(method: str) -> None:
    plain, decayed = (trained(method, steps=1, weight_decay=decay, lr=0.01) for decay in (0.0, 0.5))
    start = snapshot(llama())
    name = "model.layers.0.mlp.up_proj.weight"
    difference = tensors_of(decayed)[name] - tensors_of(plain)[name]
    torch.testing.assert_close(difference, -0.01 * 0.5 * start[name], rtol=1e-3, atol=1e-6)


def test_weight_decay_shrinks_coefficients() -> None:
    plain, decayed = (trained("ZO-Act SGD", steps=2, weight_decay=decay, lr=1e-3) for decay in (0.0, 0.5))
    once = trained("ZO-Act SGD", steps=1, lr=1e-3)
    for name, c in once.coefficients.items():
        difference = decayed.coefficients[name] - plain.coefficients[name]
        torch.testing.assert_close(difference, -1e-3 * 0.5 * c, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("method", ["MeZO", "AGZO"])
def test_weight_decay_far_below_one_unit_survives_in_bfloat16(method: str) -> None:
    """A decay of 1e-5 a step shrinks the weights by 1% in 1000 steps; 15% of that are over five standard errors."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    before = snapshot(model)["0.weight"].double()
    x, calls = torch.eye(64, dtype=torch.bfloat16), count()

    def nearly_flat() -> float:
        model(x)
        return 1e-6 * next(calls)

    optimizer = METHODS[method](model, lr=1e-5, eps=1.0, weight_decay=1.0)
    for _ in range(1000):
        optimizer.step(nearly_flat)
    after = snapshot(model)["0.weight"].double()
    shrunk = 1 - float((before * after).sum() / before.square().sum())
    assert shrunk == pytest.approx(0.01, rel=0.15)


def test_losses_keep_falling_or_staying_on_a_convex_problem_with_small_steps() -> None:
    problem = classifier()
    optimizer = AGZO(problem.model, lr=1e-3, two_sided=True)
    losses = [float(optimizer.step(problem.closure)) for _ in range(30)]
    assert all(after <= before + 1e-6 for before, after in pairwise(losses))


class ByName(nn.Module):
    """Calls its layers by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(input=torch.tanh(self.first(input=x)))


@pytest.mark.parametrize("method", [AGZO, LOZO, MeZO, ZOAct])
def test_layers_may_be_called_by_keyword(method: Callable[..., ZeroOrder]) -> None:
    model, x = ByName(), normal((0, "x"), (8, 10))
    optimizer = method(model, lr=0.1)
    before = tensors_of(optimizer)
    for _ in range(2):
        optimizer.step(lambda: model(x).square().mean())
    after = tensors_of(optimizer)
    name = "first.coefficients" if optimizer.keeps_coefficients else "first.weight"
    assert name not in before or not torch.equal(before[name], after[name])
    assert float(after[name].abs().max()) > 0
