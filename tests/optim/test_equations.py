"""One step of each method is the equation of its docstring, written out here once more."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoft.optim import AGZO, LOZO, MeZO, ZeroOrder, ZOAct
from zoft.optim.noise import normal

from .models import snapshot
from .table import classifier

LR = 0.05


def model_and_moves(method: type[ZeroOrder], steps: int = 1, **options: Any) -> tuple[ZeroOrder, dict[str, Tensor]]:
    """The optimizer after `steps` and how far its last step moved every parameter."""
    problem = classifier()
    optimizer = method(problem.model, lr=LR, **options)
    for _ in range(steps):
        before = snapshot(problem.model)
        optimizer.step(problem.closure)
    return optimizer, {name: tensor - before[name] for name, tensor in snapshot(problem.model).items()}


def left(optimizer: ZeroOrder, layer: str, step: int = 0, probe: int = 0) -> Tensor:
    """The random left factor that `step` drew for `layer`."""
    (found,) = (m for m in optimizer.maps if m.name == layer)
    return normal((0, step, probe, layer), (found.d_out, optimizer.bases[layer].shape[1]))


def assert_moved(moved: Tensor, expected: Tensor) -> None:
    assert float(expected.norm()) > 0
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)


def test_mezo() -> None:
    optimizer, moves = model_and_moves(MeZO)
    (g,) = optimizer.projected_gradients
    assert len(moves) == 6
    for name, moved in moves.items():
        assert_moved(moved, -LR * g * normal((0, 0, 0, name), moved.shape))


def test_several_probes_are_averaged_in_one_step() -> None:
    optimizer, moves = model_and_moves(MeZO, probes=3)
    name, moved = "0.weight", moves["0.weight"]
    expected = sum(g * normal((0, 0, i, name), moved.shape) for i, g in enumerate(optimizer.projected_gradients))
    assert_moved(moved, -LR / 3 * expected)


@pytest.mark.parametrize("rank", [1, 2])
def test_lozo_divides_matrices_by_the_rank_and_nothing_else(rank: int) -> None:
    optimizer, moves = model_and_moves(LOZO, rank=rank)
    (g,) = optimizer.projected_gradients
    for layer in ("0", "3"):
        v = normal((0, 0, "basis", layer), optimizer.bases[layer].shape)
        assert_moved(moves[f"{layer}.weight"], -LR * g * left(optimizer, layer) @ v.t() / rank)
        bias = f"{layer}.bias"
        assert_moved(moves[bias], -LR * g * normal((0, 0, 0, bias), moves[bias].shape))


def test_lozo_keeps_its_right_factor_for_the_stated_steps() -> None:
    problem = classifier()
    optimizer, seen = LOZO(problem.model, lr=1e-3, renew_every=3), []
    for _ in range(7):
        optimizer.step(problem.closure)
        seen.append(optimizer.bases["0"].clone())
    same = [torch.equal(seen[i], seen[i + 1]) for i in range(6)]
    assert same == [True, True, False, True, True, False]


def test_lozo_m_averages_left_factors() -> None:
    problem = classifier()
    optimizer, b = LOZO(problem.model, lr=LR, rank=1, momentum=0.8), 0.8
    mean = torch.zeros(16, 1)
    for step in range(3):
        before = snapshot(problem.model)
        optimizer.step(problem.closure)
        (g,) = optimizer.projected_gradients
        mean = b * mean + (1 - b) * g * left(optimizer, "0", step)
    assert_moved(snapshot(problem.model)["0.weight"] - before["0.weight"], -LR * mean @ optimizer.bases["0"].t())


def test_lozo_m_projects_its_momentum_when_the_right_factor_changes() -> None:
    problem = classifier()
    optimizer, b = LOZO(problem.model, lr=LR, rank=2, momentum=0.8, renew_every=1), 0.8
    optimizer.step(problem.closure)
    old, (g,) = optimizer.bases["0"], optimizer.projected_gradients
    first = (1 - b) * g / 2 * left(optimizer, "0", 0)
    before = snapshot(problem.model)
    optimizer.step(problem.closure)
    new, (g,) = optimizer.bases["0"], optimizer.projected_gradients
    carried = first @ old.t() @ torch.linalg.pinv(new.t())
    second = b * carried + (1 - b) * g / 2 * left(optimizer, "0", 1)
    assert_moved(snapshot(problem.model)["0.weight"] - before["0.weight"], -LR * second @ new.t())


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("rank", [1, 3])
def test_agzo_moves_linear_layers_only(rank: int, two_sided: bool) -> None:
    optimizer, moves = model_and_moves(AGZO, steps=2, rank=rank, two_sided=two_sided)
    (g,) = optimizer.projected_gradients
    for layer in ("0", "3"):
        basis = optimizer.bases[layer]
        torch.testing.assert_close(basis.t() @ basis, torch.eye(rank), rtol=0, atol=1e-5)
        assert_moved(moves.pop(f"{layer}.weight"), -LR * g * left(optimizer, layer, step=1) @ basis.t())
    assert not any(moved.any() for moved in moves.values())


def test_agzo_gaussian_moves_other_parameters_along_dense_noise() -> None:
    optimizer, moves = model_and_moves(AGZO, others="gaussian")
    (g,) = optimizer.projected_gradients
    assert_moved(moves["0.weight"], -LR * g * left(optimizer, "0") @ optimizer.bases["0"].t())
    for name in ("0.bias", "1.weight", "1.bias", "3.bias"):
        assert_moved(moves[name], -LR * g * normal((0, 0, 0, name), moves[name].shape))


@pytest.mark.parametrize("adam", [False, True])
def test_zo_act_hands_the_estimate_of_its_coefficients_to_the_optimizer(adam: bool) -> None:
    problem = classifier()
    optimizer = ZOAct(problem.model, lr=LR, adam=adam)
    expected = nn.Parameter(torch.zeros(16, 1))
    reference = torch.optim.Adam([expected], lr=LR) if adam else torch.optim.SGD([expected], lr=LR)
    for step in range(5):
        optimizer.step(problem.closure)
        (g,) = optimizer.projected_gradients
        expected.grad = g * left(optimizer, "0", step)
        reference.step()
        torch.testing.assert_close(optimizer.coefficients["0"], expected.detach(), rtol=1e-4, atol=1e-6)


def test_zo_act_computes_the_layer_with_its_coefficients_beside_it() -> None:
    """``y = x W^T + b + (x V) C^T``, and the weights are bit for bit what they were after 20 steps."""
    problem = classifier()
    before, optimizer = snapshot(problem.model), ZOAct(problem.model, lr=LR, rank=2)
    for _ in range(20):
        optimizer.step(problem.closure)
    after = snapshot(problem.model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    x, layer = normal((1, "x"), (5, 10)), problem.model[0]
    v, c = optimizer.bases["0"], optimizer.coefficients["0"]
    with torch.no_grad():
        base = x @ layer.weight.t() + layer.bias
        assert float(c.norm()) > 0
        torch.testing.assert_close(layer(x), base + (x @ v) @ c.t())
        optimizer.branches.detach()
        torch.testing.assert_close(layer(x), base)


def test_leave_one_out_compares_each_probe_with_the_others() -> None:
    problem, eps, count = classifier(), 1e-3, 4
    optimizer = AGZO(problem.model, eps=eps, probes=count, leave_one_out=True)
    optimizer.estimate(problem.closure)
    estimate = optimizer.take_estimate()
    assert estimate is not None and optimizer.counters.forwards == count + 1
    losses = []
    for i in range(count):
        optimizer.branches.factors = {m.name: eps * left(optimizer, m.name, probe=i) for m in optimizer.maps}
        with optimizer.branches.attached(), torch.no_grad():
            losses.append(float(problem.closure()))
    differences = [(losses[i] - (sum(losses) - losses[i]) / (count - 1)) / eps for i in range(count)]
    assert optimizer.projected_gradients == pytest.approx(differences, rel=0.02)
    for m in optimizer.maps:
        expected = sum(g * left(optimizer, m.name, probe=i) for i, g in enumerate(optimizer.projected_gradients))
        assert_moved(estimate.factors[m.name], expected / count)


@pytest.mark.parametrize("options", [{"probes": 1}, {"probes": 2, "two_sided": True}])
def test_leave_one_out_needs_others_to_compare_with(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="two or more"):
        AGZO(classifier().model, leave_one_out=True, **options)


def test_leave_one_out_is_unbiased() -> None:
    problem = classifier()
    optimizer = AGZO(problem.model, eps=1e-3, probes=3, leave_one_out=True)
    estimates = []
    for _ in range(600):
        optimizer.estimate(problem.closure)
        estimate = optimizer.take_estimate()
        assert estimate is not None
        estimates.append(estimate.factors["0"])
        optimizer.renewed_at = optimizer.counters.steps  # the same basis throughout
    (gradient,) = torch.autograd.grad(problem.closure(), [problem.model[0].weight])
    stacked = torch.stack(estimates)
    error = (stacked.mean(0) - gradient @ optimizer.bases["0"]) / (stacked.std(0) / len(stacked) ** 0.5)
    assert float(error.square().mean()) < 2.5  # 1 in expectation
