"""Clipped and normalised estimates."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from zoft.optim import AGZO, Guided, MeZO, ZeroOrder
from zoft.optim.pace import MEMORY, Pace

from .models import llama, snapshot


def test_an_estimate_of_the_usual_size_is_left_alone() -> None:
    pace = Pace(clip=2.0)
    assert [pace([3.0]), pace([-4.0]), pace([0.0, 5.0])] == [1, 1, 1]


def test_a_large_estimate_is_cut_to_a_multiple_of_the_usual_size_and_does_not_spoil_it() -> None:
    pace = Pace(clip=2.0)
    pace([1.0, -1.0])
    assert pace([50.0, 0.0]) * 50 / math.sqrt(2) == pytest.approx(2)
    assert pace.square == pytest.approx(MEMORY + (1 - MEMORY) * 4)


def test_normalised_estimates_have_one_size_on_average() -> None:
    pace = Pace(normalise=True)
    assert pace([1e-4]) * 1e-4 == pytest.approx(1)
    generator = torch.Generator().manual_seed(0)
    drawn = (1e-4 * torch.randn(2000, generator=generator)).tolist()
    sizes = torch.tensor([g * pace([g]) for g in drawn])
    assert float(sizes.square().mean()) == pytest.approx(1, abs=0.15)


def linear(scale: float) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A layer whose loss is linear, times `scale`."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(4, 6)
    return model, lambda: scale * model(x).sum()


@pytest.mark.parametrize("method", [AGZO, MeZO])
def test_normalised_steps_do_not_depend_on_the_scale_of_the_loss(method: Callable[..., ZeroOrder]) -> None:
    moved = []
    for scale in (1.0, 1000.0):
        model, closure = linear(scale)
        before = snapshot(model)
        optimizer = method(model, lr=1e-2, normalise=True)
        for _ in range(3):
            optimizer.step(closure)
        moved.append(torch.cat([(after - before[name]).flatten() for name, after in snapshot(model).items()]))
    assert float(moved[0].norm()) > 1e-2
    assert torch.allclose(moved[0], moved[1], rtol=1e-2, atol=1e-4)


def test_a_spike_moves_no_further_than_the_clip() -> None:
    """The same directions with and without it; the last loss is far steeper than those before."""
    moves, clip = {}, 2.0
    for given in (None, clip):
        model, closure = linear(1.0)
        optimizer = AGZO(model, lr=1e-5, clip=given)
        for _ in range(10):
            optimizer.step(closure)
        usual, before = math.sqrt(optimizer.pace.square), snapshot(model)["0.weight"]
        optimizer.step(lambda closure=closure: 1e4 * closure())
        moves[given] = snapshot(model)["0.weight"] - before
        steepness = abs(optimizer.projected_gradients[0])
    assert steepness > 100 * usual
    assert float(moves[clip].norm() / moves[None].norm()) == pytest.approx(clip * usual / steepness, rel=1e-2)


def test_of_probes_of_each_example_the_size_is_that_of_the_examples_own_slopes() -> None:
    """Once it was that of their mean, which says nothing of them: it may be 0 by chance."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(4, 6)
    optimizer = AGZO(model, per_example=True, normalise=True)
    optimizer.estimate(lambda: model(x).sum(1))
    (slopes,) = optimizer.traces[0].gradients
    assert slopes.shape == (4,)
    assert optimizer.pace.square == pytest.approx(float(slopes.square().mean()))


def test_what_has_no_probes_has_no_pace() -> None:
    with pytest.raises(ValueError, match="clip, normalise and probe_batching"):
        Guided(llama(), clip=2.0)
