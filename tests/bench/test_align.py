"""`zoft.bench.align`: what is measured is what theory predicts, and the model is left as it was."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import zoft
from optim.models import changed, closure_of, gpt2, llama, snapshot, token_batch, token_losses
from zoft.bench import align, expected_cosine
from zoft.optim import ZeroOrder

METHODS: dict[str, Callable[..., ZeroOrder]] = {
    "agzo": partial(zoft.AGZO, lr=0.0, eps=1e-3),
    "agzo, rank 3": partial(zoft.AGZO, lr=0.0, eps=1e-3, rank=3),
    "agzo, others": partial(zoft.AGZO, lr=0.0, eps=1e-3, others="gaussian"),
    "lozo": partial(zoft.LOZO, lr=0.0, eps=1e-3, renew_every=1),
    "lozo, others frozen": partial(zoft.LOZO, lr=0.0, eps=1e-3, renew_every=1, others="frozen"),
    "mezo": partial(zoft.MeZO, lr=0.0, eps=1e-3),
    "zo-act": partial(zoft.ZOAct, lr=0.0, eps=1e-3),
}


def closures(model: PreTrainedModel, count: int = 2) -> list[Callable[[], torch.Tensor]]:
    return [closure_of(model, token_batch(4, 8, seed)) for seed in range(count)]


@pytest.mark.parametrize(
    "make, name",
    [
        (llama, "agzo"),
        (llama, "agzo, rank 3"),
        (llama, "agzo, others"),
        (llama, "lozo"),
        (llama, "mezo"),
        (gpt2, "agzo"),
        (gpt2, "mezo"),
    ],
)
def test_measured_is_predicted(make: Callable[[], PreTrainedModel], name: str) -> None:
    model = make()
    facts = align(model, closures(model), {name: METHODS[name]}, 200)[name].summary()
    assert facts["estimates"] == 200 and facts["cosine_mean"] > 4 * facts["cosine_sem"] > 0
    assert abs(facts["cosine_mean"] - facts["predicted_cosine"]) < 4 * facts["cosine_sem"]


def test_of_several_directions_there_is_no_prediction() -> None:
    model, batch = llama(), token_batch(8, 8)
    more = {"probes": {"probes": 3}, "examples": {"per_example": True}}
    methods = {name: partial(METHODS["agzo"], **options) for name, options in more.items()} | METHODS
    found = {
        name: align(model, [lambda: token_losses(model, batch)], {name: methods[name]}, 200)[name].summary()
        for name in ("agzo", *more)
    }
    assert found["probes"]["cosine_mean"] > found["agzo"]["cosine_mean"] + 3 * found["agzo"]["cosine_sem"]
    assert [math.isnan(facts["predicted_cosine"]) for facts in found.values()] == [False, True, True]


@pytest.mark.parametrize("name", ["agzo", "agzo, rank 3", "zo-act"])
def test_an_estimate_points_uphill(name: str) -> None:
    """Whatever the direction drawn, the loss difference turns it towards the gradient, if nothing else is probed."""
    model = llama()
    near = partial(METHODS[name], eps=1e-4)  # where a slope is tiny, curvature would turn it the other way
    assert min(align(model, closures(model), {name: near}, 20)[name].cosines) > -1e-4


def test_capture() -> None:
    model = llama()
    found = {name: alignment.summary() for name, alignment in align(model, closures(model), METHODS, 4).items()}
    assert found["mezo"]["capture"] == pytest.approx(1)
    assert 0 < found["agzo"]["capture"] < found["agzo, rank 3"]["capture"] < 1
    full = align(model, closures(model), {"agzo": partial(zoft.AGZO, lr=0.0, rank=48, power_steps=None)}, 2)["agzo"]
    assert full.summary()["capture"] == pytest.approx(1, abs=1e-3)  # of fewer tokens than that, all directions


def test_layers_and_forwards() -> None:
    model = llama()
    found = align(model, closures(model), {"agzo": METHODS["agzo"], "mezo": METHODS["mezo"]}, 5)
    for alignment in found.values():
        assert len(alignment.layers) == 15
        assert all(len(values) == 5 for values in alignment.layers.values())
        assert alignment.forwards == 10


def test_model_is_left_as_it_was() -> None:
    model = llama()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = snapshot(model)
    align(model, closures(model), METHODS, 4)
    assert changed(model, before) == set()
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())  # type: ignore[arg-type]
    assert all(not module._forward_hooks for module in model.modules())


def test_no_noise_recurs_on_the_next_batch() -> None:
    """The same batch twice gives other cosines the second time."""
    model = llama()
    [closure] = closures(model, 1)
    found = align(model, [closure, closure], METHODS, 4)
    for alignment in found.values():
        assert len({round(cosine, 9) for cosine in alignment.cosines}) == 4


@pytest.mark.parametrize("dimension", [1, 2, 5, 60])
def test_expected_cosine_against_chance(dimension: int) -> None:
    directions = torch.randn(20_000, dimension, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cosines = directions[:, 0].abs() / directions.norm(dim=1)
    error = float(cosines.std()) / math.sqrt(len(cosines))
    assert abs(float(cosines.mean()) - expected_cosine(dimension)) <= 4 * error + 1e-12


@pytest.mark.parametrize(
    "dimension, value", [(1, 1.0), (2, 2 / math.pi), (3, 0.5), (10**8, math.sqrt(2 / math.pi / 10**8))]
)
def test_expected_cosine_known_values(dimension: int, value: float) -> None:
    assert expected_cosine(dimension) == pytest.approx(value, rel=1e-6)


def test_summary_of_one_estimate() -> None:
    model = llama()
    facts: dict[str, Any] = align(model, closures(model, 1), {"mezo": METHODS["mezo"]}, 1)["mezo"].summary()
    assert math.isnan(facts["cosine_sem"])
