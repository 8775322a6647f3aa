"""Subspaces: when they renew, and what survives a change of basis."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from zoft.optim import AGZO, AIMZO, LOZO, SGD, Activation, Adam, Maintained, Probes, ZeroOrder
from zoft.optim.layers import find_linear_maps
from zoft.optim.noise import normal
from zoft.optim.subspace import change_of_basis

from .models import changed, llama, snapshot, token_batch
from .table import classifier


def orthonormal(d: int, rank: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal((seed, "q"), (d, rank))).Q


@pytest.mark.parametrize("ranks", [(3, 3), (2, 5), (5, 2)], ids=str)
@pytest.mark.parametrize("kind", ["orthonormal", "gaussian"])
def test_change_of_basis_is_the_least_squares_projection(kind: str, ranks: tuple[int, int]) -> None:
    draw = orthonormal if kind == "orthonormal" else lambda d, r, seed: normal((seed, "g"), (d, r))
    old, new, c = draw(9, ranks[0], 1), draw(9, ranks[1], 2), normal((3,), (4, ranks[0]))
    projected = c @ change_of_basis(old, new)
    least_squares = torch.linalg.lstsq(new, (c @ old.t()).t()).solution.t()
    torch.testing.assert_close(projected, least_squares, rtol=1e-3, atol=1e-4)


def test_changing_to_the_same_basis_changes_nothing() -> None:
    basis = normal((1,), (9, 3))
    torch.testing.assert_close(change_of_basis(basis, basis), torch.eye(3), rtol=0, atol=1e-5)


def test_momentum_keeps_its_meaning_within_one_span() -> None:
    """Rotating the basis inside its span changes C, but not ``C A^T``."""
    old = orthonormal(9, 3, 1)
    new = old @ orthonormal(3, 3, 2)
    state = {"mean": normal((3,), (4, 3))}
    before = state["mean"] @ old.t()
    SGD(momentum=0.9).transport(state, change_of_basis(old, new))
    torch.testing.assert_close(state["mean"] @ new.t(), before, rtol=0, atol=1e-5)


def test_adam_carries_both_moments_and_its_count() -> None:
    old, new = orthonormal(9, 3, 1), orthonormal(9, 2, 2)
    rule, state = Adam(), {}
    rule([normal((3,), (4, 3))], [state])
    mean = state["mean"] @ old.t() @ new
    rule.transport(state, change_of_basis(old, new))
    torch.testing.assert_close(state["mean"], mean, rtol=1e-4, atol=1e-5)
    assert state["square"].shape == (4, 2)
    assert bool((state["square"] >= 0).all())
    assert int(state["steps"]) == 1


def test_renewing_bases_transports_the_momentum_of_each_layer() -> None:
    problem = classifier()
    optimizer = ZeroOrder(
        problem.model, lr=0.1, subspace=Activation(2, renew_every=3), estimator=Probes(), update=SGD(momentum=0.9)
    )
    optimizer.step(problem.closure)
    old, mean = optimizer.bases["0"], optimizer.updates["0"]["mean"].clone()
    new = orthonormal(10, 2, 5)
    optimizer.set_bases({"0": new})
    torch.testing.assert_close(optimizer.updates["0"]["mean"], mean @ old.t() @ new, rtol=1e-3, atol=1e-5)
    assert [m.name for m in optimizer.branches.active] == ["0"]


@pytest.mark.parametrize(("renew_every", "expected"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (None, [0])], ids=str)
def test_activation_bases_are_renewed_on_schedule(renew_every: int | None, expected: list[int]) -> None:
    problem = classifier()
    optimizer = ZeroOrder(problem.model, lr=0.1, subspace=Activation(1, renew_every=renew_every))
    renewed, last = [], None
    for step in range(5):
        optimizer.step(problem.closure)
        if optimizer.bases["3"] is not last:
            renewed.append(step)
            last = optimizer.bases["3"]
    assert renewed == expected


def test_calibration_takes_the_basis_from_all_batches_and_the_first_step_keeps_it() -> None:
    problem = classifier()
    model, batches = problem.model, [normal((i, "x"), (6, 10)) + 2 for i in range(3)]
    optimizer = AGZO(model, power_steps=None, rank=10, renew_every=50)
    optimizer.calibrate(*(lambda x=x: model(x).mean() for x in batches))
    exact = torch.linalg.svd(torch.cat(batches), full_matrices=False).Vh[0]
    calibrated = optimizer.bases["0"]
    assert abs(float(calibrated[:, 0] @ exact)) == pytest.approx(1, abs=1e-3)
    optimizer.step(problem.closure)
    assert optimizer.bases["0"] is calibrated
    assert optimizer.counters.forwards == 3 + 2


@pytest.mark.parametrize(
    "method", [partial(LOZO, others="frozen"), partial(AGZO, renew_every=50)], ids=["LOZO", "AGZO"]
)
def test_a_layer_that_the_batch_does_not_reach_stays_still(method: Callable[..., ZeroOrder]) -> None:
    """As an expert to which no token is routed; what it would be given is noise."""
    experts, x = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), normal((0, "x"), (6, 4))
    optimizer = method(experts, lr=0.1)
    optimizer.step(lambda: experts[0](x).square().mean() + experts[1](x).square().mean())
    before = snapshot(experts)
    optimizer.step(lambda: experts[0](x).square().mean())
    assert changed(experts, before) == {"0.weight"}


def captured_fraction(rank: int) -> dict[str, float]:
    """By layer, the fraction of the norm of autograd's gradient that its activation basis holds."""
    model, batch = llama(), token_batch(2, 6)
    optimizer = AGZO(model, rank=rank, power_steps=None)
    optimizer.calibrate(lambda: model(**batch).loss)
    model(**batch).loss.backward()
    fractions = {}
    for m in find_linear_maps(model):
        assert m.weight is not None
        assert m.weight.grad is not None
        fractions[m.name] = float((m.weight.grad @ optimizer.bases[m.name]).norm() / m.weight.grad.norm())
    return fractions


def test_the_row_space_of_the_gradient_lies_in_the_span_of_the_activations() -> None:
    tokens = int(token_batch(2, 6)["attention_mask"].sum())
    fractions = captured_fraction(rank=tokens)
    assert len(fractions) == 15
    assert min(fractions.values()) > 1 - 1e-4


def test_a_higher_rank_captures_more() -> None:
    by_rank = [captured_fraction(rank) for rank in (1, 2, 4, 8)]
    for lower, higher in pairwise(by_rank):
        assert all(higher[name] >= lower[name] - 1e-5 for name in lower)
    assert sum(by_rank[0].values()) < 0.8 * sum(by_rank[3].values())


def test_a_random_basis_captures_less() -> None:
    """Random bases hold a fraction near ``sqrt(r / d)``, here .35."""
    model, batch = llama(), token_batch(2, 6)
    model(**batch).loss.backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad
    random = (gradient @ orthonormal(32, 4, 1)).norm() / gradient.norm()
    assert float(random) < 0.6 < captured_fraction(4)["model.layers.0.self_attn.q_proj"]


def test_bases_point_along_the_mean_activation_when_it_dominates() -> None:
    problem = classifier()
    x = normal((0, "x"), (48, 10)) * 0.1 + 3
    optimizer = AGZO(problem.model)
    optimizer.estimate(lambda: problem.model(x).mean())
    assert abs(float(cosine_similarity(optimizer.bases["0"][:, 0], x.mean(0), dim=0))) > 0.999


def covariance_rows(seed: int, sigma: Tensor) -> Tensor:
    """64 rows whose covariance has the variances `sigma` squared along the axes."""
    return normal((seed, "rows"), (64, len(sigma))) * sigma


def test_a_maintained_basis_finds_the_leading_directions_of_a_stream() -> None:
    """Oja's rule over many noisy batches agrees with the axes of their common covariance, one batch does not."""
    sigma = torch.tensor([3.0, 2.5, 2.0, *[1.0] * 17])
    subspace = Maintained(rank=3, active=2, shared=1, rate=0.1)
    first = basis = subspace.extract(covariance_rows(0, sigma), (0,))
    for seed in range(1, 200):
        basis = subspace.extract(covariance_rows(seed, sigma), (seed,), basis.vectors)

    def inside(vectors: Tensor) -> float:
        return float(vectors[:3].square().sum()) / 3  # of the leading three axes in the span

    torch.testing.assert_close(basis.vectors.t() @ basis.vectors, torch.eye(3), rtol=0, atol=1e-5)
    assert inside(basis.vectors) > 0.99 > inside(first.vectors)


def test_inputs_that_are_all_zero_leave_a_maintained_basis_as_it_is() -> None:
    """Once one batch on which a layer saw nothing but zeros made its basis not a number, for ever."""
    first = orthonormal(6, 3, 0)
    basis = Maintained(rank=3, active=2, shared=1).extract(torch.zeros(8, 6), (0,), first)
    torch.testing.assert_close(basis.vectors @ basis.vectors.t(), first @ first.t())


def test_a_probe_uses_its_part_of_the_columns() -> None:
    subspace = Maintained(rank=10, active=4, shared=1)
    used = []
    for probe in range(20):
        left = subspace.confine(normal((0, probe), (5, 10)), (0, probe))
        columns = left.abs().sum(0) > 0
        assert int(columns.sum()) == 4 and bool(columns[0])
        assert float(left.norm()) == pytest.approx((4 * 5) ** 0.5)
        used.append(columns)
    assert torch.stack(used).any(0).all()


def test_of_columns_with_equal_numbers_a_probe_uses_the_first() -> None:
    """Once it depended on the sorting, which may differ from device to device."""
    subspace, ties = Maintained(rank=256, active=128, shared=0), 0
    for probe in range(500):
        values = normal((0, probe, "columns"), (256,)).tolist()
        order = sorted(range(256), key=values.__getitem__)
        ties += values[order[127]] == values[order[128]]
        used = subspace.confine(torch.ones(1, 256), (0, probe)).squeeze(0).nonzero().squeeze(1)
        assert used.tolist() == sorted(order[:128])
    assert ties == 9


def test_the_basis_carries_over_from_step_to_step() -> None:
    problem = classifier()
    optimizer = AIMZO(problem.model, lr=0.0, rank=4, active=2, shared=1, rate=1e-6)
    optimizer.step(problem.closure)
    before = {name: basis.clone() for name, basis in optimizer.bases.items()}
    optimizer.step(problem.closure)
    for name, basis in optimizer.bases.items():
        torch.testing.assert_close(basis @ basis.t(), before[name] @ before[name].t(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("options", [{"active": 0}, {"active": 5, "shared": 6}, {"rank": 4}, {"rate": 0.0}])
def test_parts_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Maintained(**options)
