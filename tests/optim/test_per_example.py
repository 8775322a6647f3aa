"""Per-example probes: every example has a direction and a loss difference of its own, in the same forwards."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import MixtralConfig, PreTrainedModel

from zoft.optim import AGZO, LOZO, Loss, ZeroOrder, ZOAct
from zoft.optim.noise import normal

from .models import ARCHITECTURES, GROUPED, build, changed, llama, mlp, snapshot, token_batch, token_losses

METHODS: list[Callable[..., ZeroOrder]] = [AGZO, ZOAct, LOZO]


def factors_of(optimizer: ZeroOrder, closure: Callable[[], Any]) -> dict[str, Tensor]:
    optimizer.estimate(closure)
    estimate = optimizer.take_estimate()
    assert estimate is not None
    return estimate.factors


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma3"])
def test_an_example_is_probed_as_if_it_were_alone(architecture: str, two_sided: bool) -> None:
    """The estimate is the mean of those of the examples, each with its own part of the noise."""
    model, eps, rank = ARCHITECTURES[architecture][0](), 0.01, 2
    batch = token_batch(batch=3)
    optimizer = AGZO(model, eps=eps, rank=rank, two_sided=two_sided, per_example=True)
    found = factors_of(optimizer, lambda: token_losses(model, batch))
    expected: dict[str, Tensor] = {}
    for i in range(3):
        alone = {name: tensor[i : i + 1] for name, tensor in batch.items()}
        other = AGZO(model, eps=eps, rank=rank)
        other.set_bases(optimizer.bases)
        own = {m.name: normal((0, 0, 0, m.name), (3, m.d_out, rank))[i] for m in other.maps}
        losses = {}
        for sign in (1, 0, -1):
            other.branches.factors = {name: sign * eps * factor for name, factor in own.items()}
            with other.branches.attached(), torch.no_grad():
                losses[sign] = float(token_losses(model, alone))
        difference = (losses[1] - losses[-1]) / (2 * eps) if two_sided else (losses[1] - losses[0]) / eps
        for name, factor in own.items():
            expected[name] = expected.get(name, 0) + difference * factor / 3
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0.02, atol=0.02 * float(expected[name].std()))


@pytest.mark.parametrize("agree", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_it_is_unbiased_and_its_spread_is_that_of_theory(method: Callable[..., ZeroOrder], agree: bool) -> None:
    """Shared to per-example, variances are as B |mean G|^2 to mean |G_i|^2: a gain if examples agree, else a loss."""
    x, batch = normal((0, "x"), (16, 10)) + 2, 16
    target = torch.zeros(batch, dtype=torch.long) if agree else torch.arange(batch) % 3
    spread = {}
    for per_example in (False, True):
        model = mlp()
        optimizer = method(model, eps=1e-3, others="frozen", per_example=per_example)
        estimates = []
        for _ in range(800):
            estimates.append(factors_of(optimizer, lambda m=model: cross_entropy(m(x), target, reduction="none"))["0"])
            optimizer.renewed_at = optimizer.counters.steps  # the same basis throughout
        losses = cross_entropy(model(x), target, reduction="none")
        each = [gradients(optimizer, loss) for loss in losses]
        scale = getattr(optimizer.estimator, "scale", 1.0)
        stacked = torch.stack(estimates) * scale
        error = stacked.mean(0) - torch.stack([g["0"] for g in each]).mean(0)
        assert float((error / (stacked.std(0) / len(stacked) ** 0.5)).square().mean()) < 2  # 1 in expectation
        spread[per_example] = float(stacked.var(0).sum())
    mean = sum(float(torch.stack([g[name] for g in each]).mean(0).square().sum()) for name in each[0])
    own = sum(float(g[name].square().sum()) for g in each for name in g) / batch
    assert spread[False] / spread[True] == pytest.approx(batch * mean / own, rel=0.2)
    assert (spread[True] < 0.6 * spread[False]) == agree


def gradients(optimizer: ZeroOrder, loss: Tensor) -> dict[str, Tensor]:
    """The gradient's coefficients G A of each map."""
    found = torch.autograd.grad(loss, [m.weight for m in optimizer.maps], retain_graph=True)
    return {m.name: g @ optimizer.bases[m.name] for m, g in zip(optimizer.maps, found, strict=True)}


@pytest.mark.parametrize("method", METHODS)
def test_an_estimate_leaves_no_trace(method: Callable[..., ZeroOrder]) -> None:
    model, batch = llama(), token_batch()
    optimizer = method(model, eps=0.1, per_example=True)
    before = snapshot(model)
    for _ in range(2):
        optimizer.estimate(lambda: token_losses(model, batch))
    assert changed(model, before) == set()


@pytest.mark.parametrize("method, lr", [(AGZO, 0.02), (ZOAct, 0.02), (LOZO, 2e-3)])
def test_the_loss_falls(method: Callable[..., ZeroOrder], lr: float) -> None:
    model, batch = llama(), token_batch(batch=4, length=6)
    batch["labels"] = torch.where(batch["labels"] < 0, -100, 7)
    optimizer = method(model, lr=lr, per_example=True)
    losses = [float(optimizer.step(lambda: token_losses(model, batch)) or 0) for _ in range(100)]
    assert losses[-1] < 0.75 * losses[0]


def test_an_example_may_be_several_sequences() -> None:
    """Sequences of one example share its direction: the estimate is that of the examples' losses."""
    model, batch, examples = llama(), token_batch(batch=4), torch.tensor([0, 0, 1, 1])
    seen: list[Tensor | None] = []

    def closure() -> Loss:
        each = token_losses(model, batch)
        return Loss(each.view(2, 2).sum(1), examples=examples)

    optimizer = AGZO(model, per_example=True)
    optimizer.branches.maps[0].modules[0].register_forward_hook(
        lambda *_: seen.append(optimizer.branches.factors.get("model.layers.0.mlp.down_proj"))
    )
    factors = factors_of(optimizer, closure)
    assert factors.keys() >= {"model.layers.0.mlp.down_proj"}
    _, probed = seen
    assert probed.shape[0] == 4
    assert torch.equal(probed[0], probed[1]) and torch.equal(probed[2], probed[3])
    assert not torch.equal(probed[0], probed[2])


def test_differences_that_cancel_are_an_estimate_and_equal_losses_are_none() -> None:
    """Once an estimate was dropped as "did not change" where the examples' differences added up to 0, as ranks do."""
    model, batch = llama(), token_batch(batch=2)
    optimizer = LOZO(model, per_example=True, shape="rank", others="frozen")
    cancelled = 0
    for _ in range(8):
        factors = factors_of(optimizer, lambda: token_losses(model, batch))
        cancelled += optimizer.projected_gradients == [0]
        assert any(bool(factor.any()) for factor in factors.values())
    assert cancelled > 0 and optimizer.counters.zero == 0
    with pytest.warns(UserWarning, match="did not change"):
        assert not factors_of(optimizer, lambda: token_losses(model, batch) * 0)
    assert optimizer.counters.zero == 1


def test_a_mean_loss_is_refused() -> None:
    model, batch = llama(), token_batch()
    with pytest.raises(ValueError, match="one loss per example"):
        AGZO(model, per_example=True).step(lambda: model(**batch).loss)


class Routed(nn.Module):
    """Sends some of the rows to one layer, and all to another."""

    def __init__(self) -> None:
        super().__init__()
        self.expert, self.all = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        chosen = (rows[:, 0] > 0).nonzero().squeeze(1)
        return self.all(x) + torch.zeros_like(rows).index_copy(0, chosen, self.expert(rows[chosen])).view(x.shape)


def test_where_rows_are_not_by_example_the_probe_is_shared() -> None:
    torch.manual_seed(0)
    model, x = Routed(), normal((0, "x"), (8, 3, 6))
    optimizer = AGZO(model, eps=1e-3, per_example=True)
    estimates = []
    for _ in range(500):
        estimates.append(factors_of(optimizer, lambda: model(x).square().sum(-1).mean(1))["expert"])
        optimizer.renewed_at = optimizer.counters.steps
    assert optimizer.branches.shared == {"expert"}
    (gradient,) = torch.autograd.grad(model(x).square().sum(-1).mean(), [model.expert.weight])
    stacked, expected = torch.stack(estimates), gradient @ optimizer.bases["expert"]
    deviations = (stacked.mean(0) - expected) / (stacked.std(0) / len(stacked) ** 0.5)
    assert float(deviations.square().mean()) < 2.5


class Pooled(nn.Module):
    """A layer that is called with the mean over each sequence, whose length tells whether it is by example."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean(1))


def test_a_batch_is_probed_by_example_whatever_those_before_were() -> None:
    """Once one batch for which the probe was shared made it so for all later ones, whose estimates were wrong."""
    torch.manual_seed(0)
    model, found = Pooled(), []
    for first in (3, 1):
        optimizer = AGZO(model, per_example=True)
        optimizer.set_bases({"head": normal((0, "basis"), (6, 2))})
        for length in (first, 1):
            x = normal((length, "x"), (8, length, 6))
            optimizer.renewed_at = optimizer.counters.steps  # the same basis throughout
            factors = factors_of(optimizer, lambda x=x: model(x).square().mean(1))
        found.append(factors["head"])
    assert torch.equal(*found)


def test_a_mixture_of_experts_runs() -> None:
    model: PreTrainedModel = build(MixtralConfig(**GROUPED, num_local_experts=2))
    batch = token_batch()
    assert factors_of(AGZO(model, per_example=True), lambda: token_losses(model, batch))
