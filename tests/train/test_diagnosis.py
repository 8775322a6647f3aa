"""`zoft.train.diagnosis`: on a quadratic everything that it measures is known."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optim.models import changed, closure_of, llama, snapshot, token_batch
from zoft.optim import AGZO, Adam, Guided, MeZO, ZeroOrder, ZOAct
from zoft.optim.noise import normal
from zoft.train.diagnosis import diagnose


def quadratic(noise: float, batches: int = 8) -> tuple[nn.Linear, list[Callable[[], Tensor]]]:
    """``f = 1.5 |w|^2 + <w, target + noise of the batch>``: slopes agree as far as the target outweighs the noise."""
    model = nn.Linear(50, 4, bias=False).double()
    with torch.no_grad():
        model.weight.zero_()
    target = normal((0, "target"), (4, 50)).double()
    own = [noise * normal((0, "own", i), (4, 50)).double() for i in range(batches)]
    x = torch.eye(50, dtype=torch.float64)

    def loss(i: int) -> Tensor:
        w = model(x).t()
        return 1.5 * w.square().sum() + (w * (target + own[i])).sum()

    return model, [partial(loss, i) for i in range(batches)]


@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_slope_curvature_agreement_and_the_rate_they_give(noise: float) -> None:
    model, closures = quadratic(noise)
    found = diagnose(model, closures, partial(MeZO, lr=0.0), directions=400)
    entries = 200
    assert found.slope == pytest.approx(math.sqrt(entries * (1 + noise**2)), rel=0.1)
    assert found.curvature == pytest.approx(3 * entries, rel=0.05)  # E |z|^2 = the number of entries
    assert found.agreement == pytest.approx(1 / (1 + noise**2), abs=0.15)
    assert found.lr == pytest.approx(0.02 / found.curvature)
    assert found.largest_lr == pytest.approx(2 * found.agreement / found.curvature)
    assert found.two_sided and max(found.errors["two-sided"]) < 1e-6


def test_half_the_largest_rate_pays_most_and_the_largest_nothing() -> None:
    model, closures = quadratic(1.0, batches=40)
    found = diagnose(model, closures, partial(MeZO, lr=0.0, seed=4), directions=300)

    def after_a_step(lr: float) -> float:
        """The mean loss over other batches after a step on one, over many directions."""
        optimizer, total = MeZO(model, lr=lr, eps=1e-3, seed=4), 0.0
        before = model.weight.detach().clone()
        for i in range(300):
            optimizer.step(closures[i % 40])
            with torch.no_grad():
                total += float(closures[(i + 7) % 40]())
                model.weight.copy_(before)
        return total

    largest, still = found.largest_lr, after_a_step(0.0)
    best = still - after_a_step(largest / 2)
    assert best > 0
    assert abs(still - after_a_step(largest)) < 0.4 * best
    assert still - after_a_step(largest / 8) < 0.7 * best and still - after_a_step(2 * largest) < -best


def test_eps_lies_between_rounding_and_curvature() -> None:
    model, closures = quadratic(0.0)
    single = [lambda c=c: c().float() + 1000 for c in closures]  # coarse: 6e-5 is one unit in the last place
    found = diagnose(model, single, partial(AGZO, lr=0.0), directions=20)
    errors = dict(zip(found.distances, found.errors["one-sided"], strict=True))
    assert errors[found.eps] == min(errors.values())
    assert errors[1e-4] > 2 * errors[found.eps] and errors[1e-1] > 2 * errors[found.eps]


def test_adam_steps_by_lr_itself() -> None:
    model, closures = quadratic(0.0)
    found = diagnose(model, closures, partial(ZOAct, lr=0.0), directions=50)
    assert isinstance(ZOAct(model).update, Adam)
    assert found.lr == pytest.approx(0.02 * found.slope / found.curvature)


@pytest.mark.parametrize("options", [{"normalise": True}, {"shape": "zscore"}])
def test_a_step_that_does_not_know_the_slope_has_a_rate_that_does(options: dict[str, Any]) -> None:
    model, closures = quadratic(0.0)
    plain, evened = (diagnose(model, closures, partial(MeZO, lr=0.0, **given)) for given in ({}, options))
    assert plain.lr is not None
    assert evened.lr == pytest.approx(plain.lr * plain.slope)


@pytest.mark.parametrize("method", [AGZO, ZOAct, MeZO])
def test_nothing_is_changed(method: Callable[..., ZeroOrder]) -> None:
    model = llama()
    before = snapshot(model)
    closures = [closure_of(model, token_batch(seed=i)) for i in range(2)]
    found = diagnose(model, closures, partial(method, lr=0.0), directions=2)
    assert changed(model, before) == set()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert found.forwards == 2 * 2 * 15


def test_without_probes_there_is_nothing_to_measure() -> None:
    with pytest.raises(ValueError, match="guided"):
        diagnose(llama(), [lambda: 0.0, lambda: 0.0], partial(Guided, lr=0.0))


def test_a_loss_that_curves_downwards_has_no_step() -> None:
    model, closures = quadratic(0.0)
    found = diagnose(model, [lambda f=f: -f() for f in closures], partial(MeZO, lr=0.0), directions=20)
    assert found.curvature < 0 and found.lr is None and found.largest_lr is None
