"""A run that is saved and resumed is the run that was never interrupted, bit for bit."""

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from zoft.optim import AGZO, SGD, Activation, Adam, MeZO, ZeroOrder, ZOAct

from .models import closure_of, llama, snapshot, token_batch
from .table import METHODS, classifier


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def train(optimizer: ZeroOrder, first: int, last: int) -> list[float]:
    model = optimizer.model
    return [
        float(optimizer.step(closure_of(model, token_batch(batch=4, length=6, seed=i)))) for i in range(first, last)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_continues_bit_for_bit(method: str, dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    optimizer = METHODS[method](model, lr=1e-3, seed=3)
    train(optimizer, 0, 4)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    expected = train(optimizer, 4, 8)

    resumed_model = llama().to(dtype)
    resumed_model.load_state_dict(saved["model"])
    resumed = METHODS[method](resumed_model, lr=0.5, seed=99)
    resumed.load_state_dict(saved["optimizer"])
    assert train(resumed, 4, 8) == expected
    before, after = snapshot(model), snapshot(resumed_model)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert vars(resumed.counters) == vars(optimizer.counters)
    for name, coefficients in optimizer.coefficients.items():
        assert torch.equal(resumed.coefficients[name], coefficients)


def leaves(nested: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of nested dictionaries, by path."""
    found: dict[str, torch.Tensor] = {}
    for name, value in nested.items():
        path = f"{prefix}/{name}"
        found |= leaves(value, path) if isinstance(value, dict) else {path: value}
    return found


@pytest.mark.parametrize("method", METHODS)
def test_loading_copies(method: str) -> None:
    """Training on after a load leaves the loaded state as it was."""
    problem = classifier()
    optimizer = METHODS[method](problem.model, lr=0.1)
    optimizer.step(problem.closure)
    state = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(state)
    optimizer.load_state_dict(state)
    for _ in range(3):
        optimizer.step(problem.closure)
    assert state.keys() == kept.keys()
    now = leaves(state["state"])
    assert [name for name, tensor in leaves(kept["state"]).items() if not torch.equal(now[name], tensor)] == []


def test_state_stays_in_float32_for_half_precision_weights() -> None:
    model = llama().to(torch.bfloat16)
    optimizer = ZOAct(model, lr=1e-3)
    train(optimizer, 0, 2)
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    tensors = leaves(optimizer.state_dict()["state"])
    assert len(tensors) == 14 * 5  # basis, coefficients, and Adam's two moments and its count, of each layer
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_mezo_has_nothing_to_save_but_its_place() -> None:
    problem = classifier()
    optimizer = MeZO(problem.model, seed=4)
    optimizer.step(problem.closure)
    state = optimizer.state_dict()
    assert leaves(state["state"]) == {}
    assert (state["seed"], state["counters"]["steps"]) == (4, 1)


def test_layers_that_shared_a_basis_share_it_again_after_loading() -> None:
    """Else q, k and v project one input three times from then on."""
    model = llama()
    optimizer = ZOAct(model, lr=1e-3)
    train(optimizer, 0, 1)
    q, k = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")
    assert optimizer.bases[q] is optimizer.bases[k]
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    assert optimizer.bases[q] is optimizer.bases[k]


@pytest.mark.parametrize("scheduler_steps", [1, 3])
def test_learning_rate_and_its_schedule_are_restored(scheduler_steps: int) -> None:
    problem = classifier()
    optimizer = AGZO(problem.model, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for _ in range(scheduler_steps):
        optimizer.step(problem.closure)
        scheduler.step()
    other = AGZO(problem.model, lr=0.7)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**scheduler_steps)


def test_an_estimate_that_was_not_stepped_on_is_dropped_by_loading() -> None:
    problem = classifier()
    optimizer = AGZO(problem.model)
    optimizer.step(problem.closure)
    state = optimizer.state_dict()
    optimizer.estimate(problem.closure)
    optimizer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="estimate"):
        optimizer.step()


@pytest.mark.parametrize("make", [ZOAct, partial(ZeroOrder, lr=0.1, subspace=Activation(), update=Adam())])
def test_the_state_of_another_method_is_refused(make: Callable[..., ZeroOrder]) -> None:
    """Once that of momentum went into Adam, whose next step ended in a traceback."""
    problem = classifier()
    optimizer = ZeroOrder(problem.model, lr=0.1, subspace=Activation(), update=SGD(momentum=0.9))
    optimizer.step(problem.closure)
    with pytest.raises(ValueError, match="method"):
        make(problem.model).load_state_dict(optimizer.state_dict())


def test_a_state_that_does_not_name_its_update_rule_is_loaded() -> None:
    """As those saved before rules were named."""
    problem = classifier()
    optimizer = ZOAct(problem.model)
    optimizer.step(problem.closure)
    state = optimizer.state_dict()
    del state["made_for"]["update"]
    again = ZOAct(classifier().model)
    again.load_state_dict(state)
    assert again.updates.keys() == optimizer.updates.keys()
