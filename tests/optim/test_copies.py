"""A step's points in one forward, on copies of the batch: the same estimate, in one run of the model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import MixtralConfig

from zoft.optim import AGZO, AIMZO, LOZO, Guided, MeZO, ZeroOrder, ZOAct
from zoft.optim.noise import normal

from .models import ARCHITECTURES, GROUPED, build, closure_of, llama, mlp, token_batch, token_losses

METHODS: dict[str, Callable[..., ZeroOrder]] = {
    "AGZO": AGZO,
    "AGZO two-sided": partial(AGZO, rank=2, two_sided=True),
    "AGZO per example": partial(AGZO, two_sided=True, per_example=True),
    "AIM-ZO": partial(AIMZO, rank=8, active=3, shared=1, probes=3),
    "ZO-Act": ZOAct,
    "LOZO": partial(LOZO, others="frozen"),
}


def runs_of(model: nn.Module) -> list[Tensor]:
    """Grows by the first input of every forward of `model` that really runs."""
    inputs: list[Tensor] = []
    run = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        inputs.append(next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))
        return run(*args, **kwargs)

    model.forward = forward
    return inputs


# GPT-2 looks its positions up once for all sequences: LOZO, which perturbs them, is refused there, see below.
PAIRS = [(a, m) for a in ("llama", "gpt2", "opt", "gemma3") for m in METHODS if (a, m) != ("gpt2", "LOZO")]


@pytest.mark.parametrize(("architecture", "method"), PAIRS)
def test_the_same_training_in_one_run_a_step(architecture: str, method: str) -> None:
    batch, trained, losses, forwards = token_batch(batch=3), [], [], []
    for batching in (False, True):
        model = ARCHITECTURES[architecture][0]().double()
        optimizer = METHODS[method](model, lr=1e-3, eps=1e-3, probe_batching=batching)
        runs = runs_of(model)
        losses.append([float(optimizer.step(lambda model=model: token_losses(model, batch)) or 0) for _ in range(3)])
        forwards.append(optimizer.counters.forwards)
        trained.append({m.name: m.weight.clone() for m in optimizer.maps if m.weight is not None})
        trained[-1] |= {f"{name} C": factor for name, factor in optimizer.coefficients.items()}
    assert forwards[0] == forwards[1] > len(runs)
    assert max(map(len, runs)) >= 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    start = {m.name: m.weight for m in METHODS[method](ARCHITECTURES[architecture][0]()).maps}
    for name, expected in trained[0].items():
        before = start[name].double() if name in start else torch.zeros_like(expected)
        assert torch.allclose(trained[1][name] - before, expected - before, rtol=1e-2, atol=1e-6), name


def test_what_is_not_a_language_model() -> None:
    """A plain module called with one tensor; its rows are the examples."""
    x, classes = normal((0, "x"), (6, 10)), torch.arange(6) % 3
    weights = []
    for batching in (False, True):
        model = mlp(torch.float64)
        optimizer = AGZO(model, lr=0.1, two_sided=True, probe_batching=batching)
        optimizer.step(lambda model=model: cross_entropy(model(x.double()), classes))
        weights.append(model[0].weight.clone())
    assert torch.allclose(weights[0], weights[1], atol=1e-5)
    assert not torch.equal(weights[0], mlp(torch.float64)[0].weight)


def test_a_rank_that_grows_from_batch_to_batch() -> None:
    """Few tokens have a basis of few directions: what is drawn for it does not fit the next one, found on the way."""
    batches = token_batch(batch=1, length=4), token_batch(batch=2, length=10)
    weights, ranks = [[m.weight.clone() for m in AGZO(llama().double(), lr=1e-3).maps]], []
    for batching in (False, True):
        model = llama().double()
        optimizer = AGZO(model, lr=1e-3, rank=6, probe_batching=batching)
        for batch in batches:
            optimizer.step(partial(token_losses, model, batch))
            ranks.append({basis.shape[1] for basis in optimizer.bases.values()})
        weights.append([m.weight for m in optimizer.maps])
    assert ranks == [{3}, {6}] * 2
    for before, expected, found in zip(*weights, strict=True):
        assert not torch.equal(expected, before)
        assert torch.allclose(found - before, expected - before, rtol=1e-2, atol=1e-6)


class Twice(nn.Module):
    """Calls one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


FEATURES = normal((0, "x"), (2, 3, 4))


def refused(closure: Callable[[], Any], optimizer: ZeroOrder, named: str) -> None:
    """A step says what is wrong, and leaves the model as it was."""
    model = optimizer.model
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=named):
        optimizer.step(closure)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert "forward" not in model.__dict__
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_a_loss_taken_by_the_model_is_refused() -> None:
    model = llama()
    refused(closure_of(model, token_batch()), AGZO(model, probe_batching=True), "take the loss from the logits")


def test_other_inputs_each_time_are_refused() -> None:
    model, batches = nn.Sequential(nn.Linear(4, 4)), iter([FEATURES, FEATURES + 1])
    refused(lambda: model(next(batches)).mean(), AGZO(model, probe_batching=True), "other inputs each time")


def test_a_second_call_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    closure = lambda: (model(FEATURES) * model(FEATURES)).mean()  # noqa: E731
    refused(closure, AGZO(model, probe_batching=True), "call the model once")


def test_a_layer_called_twice_is_refused() -> None:
    model = Twice()
    refused(lambda: model(FEATURES).mean(), AGZO(model, probe_batching=True), "'layer' is called twice")


def test_positions_looked_up_once_are_refused() -> None:
    model, batch = ARCHITECTURES["gpt2"][0](), token_batch(batch=3)
    optimizer = LOZO(model, others="frozen", probe_batching=True)
    refused(lambda: token_losses(model, batch), optimizer, "'transformer.wpe'")


def test_routed_tokens_are_refused_where_a_layer_is_theirs() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert = layer

        def forward(self, x: Tensor) -> Tensor:
            rows = x.flatten(0, 1)
            return self.expert(rows[rows[:, 0] > 0]).mean() + torch.zeros(len(x))

    model = Routed()
    refused(lambda: model(FEATURES).mean(), AGZO(model, probe_batching=True), "'expert'")


def test_an_active_dropout_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    refused(lambda: model(FEATURES).mean(), AGZO(model, probe_batching=True), "dropout")
    AGZO(model.eval(), probe_batching=True).step(lambda: model(FEATURES).mean())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", [AGZO, ZOAct])
def test_a_loss_that_is_not_finite_is_skipped(method: Callable[..., ZeroOrder], bad: float) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    before, optimizer = model[0].weight.clone(), method(model, lr=0.1, probe_batching=True)
    optimizer.step(lambda: model(FEATURES).mean() * bad)
    assert optimizer.counters.skipped == 1 and torch.equal(model[0].weight, before)
    optimizer.step(lambda: model(FEATURES).square().mean())
    assert optimizer.counters.skipped == 1 and bool(model(FEATURES).isfinite().all())


def test_a_mixture_of_experts_runs_where_its_experts_are_one_weight() -> None:
    model, batch = build(MixtralConfig(**GROUPED, num_local_experts=2)), token_batch(batch=3)
    AGZO(model, probe_batching=True).step(lambda: token_losses(model, batch))


def test_a_forward_of_ones_own_is_put_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    runs_of(model)
    own = model.forward
    AGZO(model, probe_batching=True).step(lambda: model(FEATURES).mean())
    assert model.forward is own


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: MeZO(mlp(), probe_batching=True), "low-rank"),
        (lambda: AGZO(mlp(), others="gaussian", probe_batching=True), "low-rank"),
        (lambda: Guided(llama(), probe_batching=True), "for probes"),
    ],
)
def test_what_it_does_not_fit(make: Callable[[], ZeroOrder], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()
