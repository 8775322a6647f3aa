"""Steps taken again from what their estimates leave behind: the same weights bit for bit, without a forward."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoft.optim import LOZO, SGD, Maintained, MeZO, Probes, RandomLowRank, Trace, ZeroOrder, ZOAct, replay

from .models import changed, gpt2, llama, mlp, snapshot, token_batch
from .table import METHODS

FROM_NOISE: dict[str, Callable[..., ZeroOrder]] = {
    "MeZO": MeZO,
    "MeZO, three probes": partial(MeZO, probes=3, clip=1.5, weight_decay=0.1),
    "LOZO": partial(LOZO, renew_every=2),
    "LOZO-M": partial(LOZO, renew_every=2, momentum=0.9, normalise=True),
    "LOZO per example": partial(LOZO, per_example=True, probes=2),
    "leave one out": partial(
        ZeroOrder, subspace=RandomLowRank(2, 3), estimator=Probes(3, leave_one_out=True), update=SGD(0.5)
    ),
    "maintained": partial(  # once replayed along all columns of the basis, not those that a probe uses
        ZeroOrder, subspace=Maintained(4, renew_every=None, active=2, shared=1), estimator=Probes(2)
    ),
    "ZO-Act": partial(ZOAct, rank=2, weight_decay=0.1),
    "ZO-Act SGD": partial(ZOAct, adam=False, two_sided=True, probes=2),
    "ZO-Act per example": partial(ZOAct, per_example=True),
    "ZO-Act batched": partial(ZOAct, probes=2, probe_batching=True),
}


class Sometimes(nn.Module):
    """The second layer is called by every other batch, the third's weight is read without calling it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return (self.second(y) if x.sum() > 0 else y) @ self.third.weight


def per_example(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """One loss an example, not a number for the step marked so."""

    def losses() -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        found = torch.nn.functional.cross_entropy(logits[:, :-1].mT, batch["labels"][:, 1:], reduction="none")
        return found.mean(1)

    return losses


def train(optimizer: ZeroOrder, steps: int) -> list[tuple[int, float, list[Trace]]]:
    """Steps of two batches each, at a falling rate, one of them with a loss that is not finite; what they leave."""
    left, model = [], optimizer.model
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 / (1 + step)
        for i in range(2):
            closure = per_example(model, token_batch(batch=4, length=6, seed=2 * step + i))
            optimizer.estimate(closure if (step, i) != (3, 0) else lambda closure=closure: closure() * torch.nan)
        left.append((optimizer.counters.steps, optimizer.param_groups[0]["lr"], list(optimizer.traces)))
        optimizer.step()
    return left


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", [llama, gpt2])
@pytest.mark.parametrize("method", FROM_NOISE)
def test_bit_for_bit(method: str, model: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    trained, again = model().to(dtype), model().to(dtype)
    optimizer = FROM_NOISE[method](trained, lr=1.0, seed=3)
    left = train(optimizer, 6)
    other = FROM_NOISE[method](again, lr=1.0, seed=3)
    if optimizer.subspace.from_activations:
        other.set_bases({m.name: optimizer.bases[m.name] for m in optimizer.branches.active})
    start = snapshot(again)
    again.register_forward_pre_hook(lambda *_: pytest.fail("a forward"))
    for step in left:
        replay(other, *step)
    assert changed(again, snapshot(trained)) == set()
    assert changed(again, start) or other.keeps_coefficients
    assert optimizer.coefficients.keys() == other.coefficients.keys()
    for name, factor in optimizer.coefficients.items():
        assert torch.equal(other.coefficients[name], factor)
    assert bool(other.coefficients) == optimizer.keeps_coefficients
    assert other.counters.steps == optimizer.counters.steps == 6
    assert (other.counters.skipped, other.counters.zero) == (optimizer.counters.skipped, optimizer.counters.zero)
    assert optimizer.counters.skipped == 1
    assert other.pace.square == optimizer.pace.square or not (optimizer.pace.clip or optimizer.pace.normalise)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", [LOZO, MeZO, partial(LOZO, per_example=True)])
def test_layers_that_are_not_called(method: Callable[..., ZeroOrder]) -> None:
    trained, again = Sometimes(), Sometimes()
    optimizer, other = (method(model, lr=0.1) for model in (trained, again))
    stayed = []
    for sign in (1, -1, 1, -1):
        x = sign * torch.arange(12.0).view(3, 4)
        optimizer.estimate(lambda x=x: trained(x).square().mean(1))
        replay(other, optimizer.counters.steps, 0.1, optimizer.traces)
        stayed.append({*optimizer.traces[0].still[0], *optimizer.traces[0].unread})
        optimizer.step()
    assert changed(again, snapshot(trained)) == set()
    assert all(any("third" in name for name in names) for names in stayed)
    assert [any("second" in name for name in names) for names in stayed] == [False, True, False, True]


@pytest.mark.parametrize("method", ["AGZO", "AIM-ZO", "hybrid"])
def test_bases_from_every_batch_cannot_be_drawn_again(method: str) -> None:
    optimizer: Any = METHODS[method](mlp(), lr=0.1)
    with pytest.raises(ValueError, match="bases come from the activations"):
        replay(optimizer, 0, 0.1, [])


def test_updates_that_are_held_back_cannot_be_taken_again() -> None:
    """They are written whenever somebody asks for the weights, and rounded then."""
    with pytest.raises(ValueError, match="written together"):
        replay(LOZO(mlp(), lr=0.1, fold_every=2), 0, 0.1, [])
