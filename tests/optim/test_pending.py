"""Updates summed beside the weights: the same training, with fewer writes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoft.optim import AGZO, LOZO, Guided, MeZO, ZeroOrder, ZOAct
from zoft.optim.layers import find_linear_maps
from zoft.optim.noise import normal
from zoft.optim.pending import Pending

from .models import changed, closure_of, gpt2, llama, snapshot, tied_llama, token_batch, token_losses

METHODS: dict[str, Callable[..., ZeroOrder]] = {
    "AGZO": AGZO,
    "AGZO rank 4": partial(AGZO, rank=4),
    "AGZO per example": partial(AGZO, per_example=True),
    "AGZO kept basis": partial(AGZO, renew_every=3),
    "AGZO batched": partial(AGZO, probe_batching=True),
    "LOZO": partial(LOZO, renew_every=3),
    "LOZO-M": partial(LOZO, renew_every=3, momentum=0.9),
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(12).view(2, 6)).logits


@pytest.mark.parametrize("build", [llama, tied_llama, gpt2])
@pytest.mark.parametrize("method", METHODS)
def test_the_training_is_the_same(method: str, build: Callable[[], Any]) -> None:
    ways = []
    for every in (1, 4):
        model = build().double()
        optimizer = METHODS[method](model, lr=1e-3, fold_every=every)
        batches = [token_batch(batch=3, length=5, seed=i) for i in range(10)]
        losses = torch.tensor([float(optimizer.step(partial(token_losses, model, batch))) for batch in batches])
        ways.append((losses, model.state_dict()))
    (losses, weights), (folded_losses, folded_weights) = ways
    start = build().double().state_dict()
    moved = {name: weight - start[name] for name, weight in weights.items()}
    assert max(float(move.abs().max()) for move in moved.values()) > 1e-3
    torch.testing.assert_close(folded_losses, losses, rtol=1e-4, atol=0)
    for name, move in moved.items():
        torch.testing.assert_close(folded_weights[name] - start[name], move, rtol=0, atol=1e-3 * float(move.norm()))


def test_weights_are_written_when_due_and_the_model_moves_every_step() -> None:
    model = llama()
    optimizer, before, seen = AGZO(model, lr=1e-2, fold_every=3), snapshot(model), [logits(model)]
    for step in range(1, 4):
        optimizer.step(closure_of(model, token_batch()))
        assert bool(changed(model, before)) == (step == 3)
        seen.append(logits(model))
        assert not torch.allclose(seen[-1], seen[-2])
    optimizer.branches.detach()
    torch.testing.assert_close(logits(model), seen[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("asked", ["model", "optimizer", "fold"])
def test_whoever_saves_gets_it_all(asked: str) -> None:
    model = llama()
    optimizer, before = AGZO(model, lr=1e-2, fold_every=10), snapshot(model)
    optimizer.step(closure_of(model, token_batch()))
    assert not changed(model, before)
    {"model": model.state_dict, "optimizer": optimizer.state_dict, "fold": optimizer.fold}[asked]()
    assert changed(model, before)
    assert not optimizer.pending.sums


def test_weights_that_are_loaded_are_what_the_model_has_then() -> None:
    model, other = llama(), llama(initializer_range=0.2)
    optimizer = AGZO(model, lr=1e-2, fold_every=10)
    optimizer.step(closure_of(model, token_batch()))
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model), logits(other))


def test_weights_shrink_as_they_are_written() -> None:
    model = llama()
    optimizer, before = AGZO(model, lr=0.1, weight_decay=0.5, fold_every=2), snapshot(model)
    for _ in range(2):
        optimizer.estimate(closure_of(model, token_batch()))
        assert optimizer._estimate is not None
        for factor in optimizer._estimate.factors.values():
            factor.zero_()
        optimizer.step()
    for layer in optimizer.maps:
        assert layer.weight is not None
        torch.testing.assert_close(layer.weight.data, 0.95**2 * before[f"{layer.name}.weight"])


def test_layers_with_one_input_share_their_sum_s_right_side() -> None:
    model = llama()
    optimizer = AGZO(model, fold_every=5)
    for _ in range(3):
        optimizer.step(closure_of(model, token_batch()))
    sums = optimizer.pending.sums
    query, key, output = (sums[f"model.layers.0.self_attn.{name}_proj"] for name in ("q", "k", "o"))
    assert query.right is key.right
    assert query.right is not output.right
    assert query.left.shape == (32, 3)


def test_a_kept_basis_adds_no_columns() -> None:
    model = llama()
    optimizer = AGZO(model, fold_every=5, renew_every=10)
    for _ in range(3):
        optimizer.step(closure_of(model, token_batch()))
    assert {known.left.shape[1] for known in optimizer.pending.sums.values()} == {1}


@pytest.mark.parametrize("every", [1, 16])
def test_what_rounding_adds_is_that_of_the_writes_made(every: int) -> None:
    """A write by a fraction f of a unit in the last place has variance f (1 - f): the sum's is below its terms'."""
    model, unit = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16(), 2**-8  # of bfloat16 between .5 and 1
    start = torch.linspace(0.55, 0.95, 4096).bfloat16().view(64, 64)
    model[0].weight.data.copy_(start)
    maps, pending, basis = find_linear_maps(model), Pending(), torch.ones(64, 1)
    moves = [1e-3 * normal((0, step), (64, 1)) for step in range(16)]
    for step, move in enumerate(moves):
        pending.add("0", move, basis, 1.0)
        pending.end_step()
        if pending.steps >= every:
            pending.write(maps, (0, step))
    intended = torch.stack(moves).sum(0)
    error = (model[0].weight.detach().float() - start.float() - intended).square().mean()
    shares = (torch.stack(moves) if every == 1 else intended.unsqueeze(0)).abs() / unit % 1
    expected = unit**2 * float((shares * (1 - shares)).sum(0).mean())
    assert float(error) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("method", [MeZO, ZOAct, Guided])
def test_what_cannot_be_held_back_is_refused(method: Callable[..., ZeroOrder]) -> None:
    with pytest.raises(ValueError, match="fold_every is for"):
        method(llama(), fold_every=2)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        AGZO(llama(), fold_every=0)
