"""What must never happen: a bad loss in the weights, a silent typo, a state in the wrong model."""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoft.optim import AGZO, LOZO, SGD, Activation, Adam, MeZO, NoLinearLayers, Probes, ZeroOrder, ZOAct

from .models import changed, closure_of, llama, mlp, snapshot, token_batch
from .table import METHODS

X = torch.linspace(-2, 2, 40).view(4, 10).sin()


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: model(X).square().mean()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_finite_never_reaches_the_weights(method: str, bad: float) -> None:
    model = mlp()
    optimizer = METHODS[method](model, lr=0.1)
    before = snapshot(model)
    with pytest.warns(UserWarning, match="not finite") as caught:
        for _ in range(3):
            optimizer.step(lambda: model(X).sum() * 0 + bad)
    assert len(caught) == 1
    assert changed(model, before) == set()
    assert (optimizer.counters.skipped, optimizer.counters.steps) == (3, 3)
    assert not any(values.any() for values in optimizer.coefficients.values())


@pytest.mark.parametrize("method", METHODS)
def test_a_method_learns_on_after_a_first_loss_that_is_not_finite(method: str) -> None:
    model = mlp()
    optimizer = METHODS[method](model, lr=0.1)
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step(lambda: model(X).sum() * math.nan)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        before = model(X)
        optimizer.step(loss_of(model))
        assert not torch.equal(model(X), before)
    assert (optimizer.counters.skipped, optimizer.counters.zero) == (1, 0)


def twice() -> nn.Sequential:
    layer = nn.Linear(10, 10)
    return nn.Sequential(layer, nn.Tanh(), layer)


@pytest.mark.parametrize("make, options", [(mlp, {"power_steps": None}), (twice, {})], ids=["exact", "called twice"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_activations_that_are_not_finite_are_skipped(
    make: Callable[[], nn.Module], options: dict[str, Any], bad: float
) -> None:
    """Once the decomposition that an exact basis takes, and that of a layer called twice, ended in LAPACK's error."""
    model = make()
    optimizer = AGZO(model, lr=0.1, **options)
    optimizer.step(loss_of(model))
    bases, before = dict(optimizer.bases), snapshot(model)
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step(lambda: model(X * bad).square().mean())
    assert changed(model, before) == set() and optimizer.counters.skipped == 1
    assert all(torch.equal(optimizer.bases[name], basis) for name, basis in bases.items())


def test_one_bad_probe_of_several_is_left_out() -> None:
    model, calls = mlp(), iter([1.0, math.nan, 2.0])  # the centre, then two probes
    optimizer = AGZO(model, lr=0.1, eps=1.0, probes=2)
    optimizer.estimate(lambda: model(X).sum() * 0 + next(calls))
    assert math.isnan(optimizer.projected_gradients[0])
    assert optimizer.projected_gradients[1] == 1.0
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_does_not_change_is_counted_and_nothing_is_written(method: str) -> None:
    model = mlp()
    optimizer = METHODS[method](model, lr=0.1, weight_decay=0.1)
    before = snapshot(model)
    with pytest.warns(UserWarning, match="did not change") as caught:
        for _ in range(3):
            optimizer.step(lambda: model(X).sum() * 0 + 1)
    assert len(caught) == 1
    assert changed(model, before) == set()
    assert (optimizer.counters.zero, optimizer.counters.skipped) == (3, 0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr": -0.5}, "lr .* -0.5"),
        ({"lr": math.nan}, "lr .* nan"),
        ({"lr": math.inf}, "lr .* inf"),
        ({"eps": 0.0}, "eps .* 0"),
        ({"eps": -1e-3}, "eps .* -0.001"),
        ({"eps": math.nan}, "eps .* nan"),
        ({"weight_decay": -0.1}, "weight_decay .* -0.1"),
        ({"rank": 0}, "rank .* 0"),
        ({"renew_every": 0}, "renew_every .* 0"),
        ({"power_steps": -1}, "power_steps .* -1"),
        ({"probes": 0}, "probes .* 0"),
        ({"clip": 0.0}, "clip .* 0"),
        ({"clip": math.nan}, "clip .* nan"),
        ({"others": "gausian"}, "others .* 'gausian'"),
        ({"include": "0.*"}, r"include .* \['0\.\*'\]"),
        ({"exclude": "0.*"}, r"exclude .* \['0"),
        ({"linear": "0.*"}, r"linear .* \['0"),
    ],
    ids=str,
)
def test_a_bad_argument_is_named_with_its_value(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        AGZO(mlp(), **options)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: SGD(momentum=1.0), "momentum .* 1"),
        (lambda: SGD(momentum=-0.1), "momentum .* -0.1"),
        (lambda: SGD(momentum=math.nan), "momentum .* nan"),
        (lambda: Adam(betas=(0.9, 1.0)), "betas .* 1"),
        (lambda: Probes(count=-2), "probes .* -2"),
    ],
    ids=["momentum one", "momentum negative", "momentum nan", "betas", "probes"],
)
def test_a_bad_part_is_refused_where_it_is_made(build: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build()


def test_coefficients_need_a_basis_that_stays() -> None:
    for subspace in (Activation(renew_every=1), Activation(renew_every=50)):
        with pytest.raises(ValueError, match="basis that stays"):
            ZeroOrder(mlp(), lr=0.1, subspace=subspace, update=Adam(into="coefficients"))


def test_coefficients_leave_other_parameters_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ZOAct(mlp(), others="gaussian")


def test_a_step_needs_an_estimate() -> None:
    optimizer = AGZO(mlp())
    with pytest.raises(RuntimeError, match="estimate"):
        optimizer.step()
    optimizer.step(loss_of(optimizer.model))
    with pytest.raises(RuntimeError, match="estimate"):
        optimizer.step()


@pytest.mark.parametrize("method", [MeZO, LOZO])
def test_only_activations_can_be_calibrated(method: type[ZeroOrder]) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=method.__name__):
        method(model).calibrate(loss_of(model))


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(NoLinearLayers, match="LayerNorm"):
        AGZO(nn.Sequential(nn.LayerNorm(3)))


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter"):
        MeZO(mlp().requires_grad_(False))


def stepped(optimizer: ZeroOrder) -> ZeroOrder:
    optimizer.step(closure_of(optimizer.model, token_batch()))
    return optimizer


@pytest.mark.parametrize(
    "other", [{"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"hidden_size": 64}], ids=["deeper", "flat", "wider"]
)
@pytest.mark.parametrize("method", [LOZO, AGZO, ZOAct])
def test_the_state_of_another_model_is_refused(method: type[ZeroOrder], other: dict[str, int]) -> None:
    state = stepped(method(llama(**other))).state_dict()
    with pytest.raises(ValueError, match="another model"):
        method(llama()).load_state_dict(state)


def test_the_state_of_another_optimizer_is_refused() -> None:
    model = mlp()
    adam = torch.optim.Adam(model.parameters())
    loss_of(model)().backward()
    adam.step()
    with pytest.raises(ValueError, match="another model or method"):
        AGZO(model).load_state_dict(adam.state_dict())


def quantized() -> nn.Sequential:
    model = mlp()
    weight = torch.randint(-2, 3, (3, 16), dtype=torch.int8)
    model[3].weight = nn.Parameter(weight, requires_grad=False)
    model[3].forward = lambda x: nn.functional.linear(x, model[3].weight.float(), model[3].bias)
    return model


@pytest.mark.parametrize("method", [LOZO, AGZO])
def test_a_quantized_layer_cannot_be_written_and_is_named(method: type[ZeroOrder]) -> None:
    with pytest.raises(ValueError, match=r"'3'.*quantized"):
        method(quantized())
    method(quantized(), exclude=["3"])


@pytest.mark.parametrize("method", [MeZO, LOZO, partial(AGZO, others="gaussian")])
def test_an_excluded_layer_stays_as_it_is(method: Callable[..., ZeroOrder]) -> None:
    """Once methods that move other parameters by dense noise moved its weight with them."""
    model = mlp()
    before, optimizer = snapshot(model), method(model, lr=0.1, exclude=["0"])
    optimizer.step(loss_of(model))
    assert changed(model, before) == {"1.weight", "1.bias", "3.weight", "3.bias"}


def test_coefficients_train_beside_a_quantized_layer() -> None:
    model = quantized()
    before, optimizer = snapshot(model), ZOAct(model, lr=0.1)
    optimizer.step(loss_of(model))
    assert changed(model, before) == set()
    assert set(optimizer.coefficients) == {"0", "3"}
    assert all(bool(c.any()) for c in optimizer.coefficients.values())
