"""Bases that are trained beside their coefficients: LoRA without backpropagation."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoft.optim import Guided, Loss
from zoft.optim.probe import SideBranches
from zoft.optim.update import Adam

from .guidance import BUILDERS, NEGLECTED, closure_of, detached, detached_attention, error, gradient
from .models import llama, token_batch
from .test_guided_attention import InParts


def moved(model: nn.Module, closure: Callable[[], Loss], **options: Any) -> Guided:
    """An optimizer whose coefficients are no longer zero, so that there is a gradient in the bases."""
    optimizer = Guided(model, rank=3, lr=0.05, train_bases=True, **options)
    for _ in range(2):
        optimizer.step(closure)
    return optimizer


def found_for_bases(optimizer: Guided, closure: Callable[[], Loss]) -> dict[str, Tensor]:
    optimizer.estimate(closure)
    estimate = optimizer.take_estimate()
    assert estimate is not None and estimate.bases.keys() == {optimizer.branches.owner(n) for n in estimate.factors}
    return estimate.bases


def expected_for_bases(optimizer: Guided, gradients: dict[str, Tensor], reached: Set[str]) -> dict[str, Tensor]:
    """The sum of ``G^T C`` over the maps that share each basis, by the first that has it."""
    sums: dict[str, Tensor] = {}
    for name in optimizer.bases:
        if name in reached:
            first = next(other for other in optimizer.bases if optimizer.bases[other] is optimizer.bases[name])
            sums[first] = sums.get(first, 0.0) + gradients[name].t() @ optimizer.coefficients[name]
    return sums


@pytest.mark.parametrize("name", sorted(BUILDERS.keys() - {"opt"}))  # in its ReLU many numbers lie near the kink
def test_what_is_found_for_bases_is_their_gradient(name: str) -> None:
    model = BUILDERS[name]()
    closure = closure_of(model, token_batch())
    optimizer = moved(model, closure, attention=True, energy=1.0)
    found = found_for_bases(optimizer, closure)
    with detached(model, NEGLECTED.get(name, ())):
        expected = gradient(optimizer, closure)
    assert found
    expected = expected_for_bases(optimizer, expected, optimizer.updates.keys())
    assert found.keys() == expected.keys()
    for layer, basis in found.items():
        assert error(basis, expected[layer]) < 2e-3, layer


@pytest.mark.parametrize("kept", [0, 3])
def test_without_attention_it_is_their_gradient_but_for_the_way_through_it(kept: int) -> None:
    """Whether many rows are read or few, of which more is kept."""
    model = llama()
    closure = closure_of(model, token_batch(), **({"logits_to_keep": kept} if kept else {}))
    optimizer = moved(model, closure)
    found = found_for_bases(optimizer, closure)
    with detached_attention():
        expected = gradient(optimizer, closure)
    expected = expected_for_bases(optimizer, expected, optimizer.updates.keys())
    assert found.keys() == expected.keys()
    for layer, basis in found.items():
        assert error(basis, expected[layer]) < 2e-3, layer


def test_two_passes_find_the_same_as_one() -> None:
    found = []
    for two_pass in (False, True):
        closure = closure_of(model := llama(), token_batch())
        optimizer = moved(model, closure, feed_forward=False, two_pass=two_pass)
        found.append(found_for_bases(optimizer, closure))
    for layer, basis in found[0].items():
        torch.testing.assert_close(found[1][layer], basis)


def test_steps_are_those_of_lora_by_autograd_and_torchs_adam() -> None:
    """From the same bases, one for all maps that read the same input, at twice the rate."""
    model, other, batch = llama(), llama(), token_batch()
    optimizer = Guided(model, rank=3, lr=0.02, attention=True, energy=1.0, train_bases=True)
    optimizer.update = Adam(into="coefficients")  # torch's holds every square
    closure = closure_of(model, batch)
    optimizer.estimate(closure)
    shared = {id(basis): basis.clone().requires_grad_() for basis in optimizer.bases.values()}
    bases = {name: shared[id(basis)] for name, basis in optimizer.bases.items()}
    factors = {name: torch.zeros_like(c).requires_grad_() for name, c in optimizer.coefficients.items()}
    assert len(shared) == 4 * len(model.model.layers) and len(bases) == 7 * len(model.model.layers)

    def beside(name: str) -> Callable[..., Tensor]:
        return lambda module, args, y: y + args[0] @ bases[name] @ factors[name].t()

    for name in bases:
        other.get_submodule(name).register_forward_hook(beside(name))
    groups = [{"params": [*shared.values()], "lr": 0.04}, {"params": [*factors.values()]}]
    adam = torch.optim.Adam(groups, lr=0.02)
    optimizer.step()
    for step in range(5):
        adam.zero_grad()
        closure_of(other, batch)().values.backward()
        adam.step()
        if step:
            optimizer.step(closure)
    for name, basis in bases.items():
        torch.testing.assert_close(optimizer.bases[name], basis.detach(), rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(optimizer.coefficients[name], factors[name].detach(), rtol=1e-2, atol=1e-3)
    assert len({id(basis) for basis in optimizer.bases.values()}) == len(shared)


def test_bases_that_are_not_trained_stay() -> None:
    model = llama()
    optimizer, closure = Guided(model, rank=3, lr=0.05, attention=True, energy=1.0), closure_of(model, token_batch())
    optimizer.step(closure)
    before = {name: basis.clone() for name, basis in optimizer.bases.items()}
    optimizer.step(closure)
    assert all(torch.equal(optimizer.bases[name], basis) for name, basis in before.items())
    assert not optimizer.basis_updates


def test_a_batch_in_parts_gives_the_same() -> None:
    model, batch = llama(), {name: tensor.flip(1) for name, tensor in token_batch(4).items()}
    batch["labels"][:, :-3] = -100
    optimizer = moved(model, closure_of(model, batch), attention=True, energy=1.0)
    whole = found_for_bases(optimizer, closure_of(model, batch))
    for name, basis in found_for_bases(optimizer, InParts(model, batch, 1)).items():
        torch.testing.assert_close(basis, whole[name])


def test_estimates_since_the_last_step_are_averaged() -> None:
    model = llama()
    closures = [closure_of(model, token_batch(seed=seed)) for seed in (1, 2)]
    optimizer = moved(model, closures[0], attention=True, energy=1.0)
    one, two = (found_for_bases(optimizer, closure) for closure in closures)
    for closure in closures:
        optimizer.estimate(closure)
    both = optimizer.take_estimate()
    assert both is not None and both.count == 2
    for name, basis in both.bases.items():
        torch.testing.assert_close(basis, one[name] + two[name])


def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_ended() -> None:
    model = llama()
    closure = closure_of(model, token_batch())
    optimizer = moved(model, closure, attention=True, energy=1.0)
    resumed = Guided(llama(), rank=3, lr=0.05, attention=True, energy=1.0, train_bases=True)
    resumed.load_state_dict(optimizer.state_dict())
    for each in (optimizer, resumed):
        each.step(closure_of(each.model, token_batch()))
    for name, basis in optimizer.bases.items():
        assert torch.equal(basis, resumed.bases[name]), name
        assert torch.equal(optimizer.coefficients[name], resumed.coefficients[name]), name


def test_products_with_a_basis_are_not_remembered_when_it_has_moved() -> None:
    """Of a model whose first layer is called with the same tensor in every step."""
    branches, x, basis = SideBranches([]), torch.randn(5, 8), torch.randn(8, 2)
    branches.bases["first"] = basis
    before = branches.project(x, basis)
    branches.move_bases(["first"], [torch.ones(8, 2)])
    after = branches.project(x, branches.bases["first"])
    torch.testing.assert_close(after, x @ basis)
    assert not torch.equal(after, before)


def test_what_is_written_into_the_weights_has_no_bases_to_train() -> None:
    with pytest.raises(ValueError, match="train_bases takes into='coefficients'"):
        Guided(llama(), train_bases=True, into="weights")


def test_bases_begin_whitened_and_shared_also_if_several_batches_give_them() -> None:
    model = llama()
    for number in (1, 2):
        optimizer = Guided(model, rank=3, attention=True, energy=1.0, train_bases=True)
        optimizer.calibrate(*(closure_of(model, token_batch(seed=seed)) for seed in range(number)))
        assert len({id(basis) for basis in optimizer.bases.values()}) == 4 * len(model.model.layers)
        lengths = torch.stack([basis.norm(dim=0).sort().values for basis in optimizer.bases.values()])
        assert float(lengths[:, 0].max()) < 0.999 and float((lengths[:, -1] - 1).abs().max()) < 1e-4


def test_new_bases_have_moments_of_their_own() -> None:
    """Also if their rank is another."""
    model = llama()
    closure = closure_of(model, token_batch())
    optimizer = moved(model, closure, attention=True, energy=1.0)
    optimizer.calibrate(closure_of(model, token_batch(batch=1, length=2)))
    assert {basis.shape[1] for basis in optimizer.bases.values()} == {2}
    for _ in range(2):
        optimizer.step(closure)
    assert {int(state["steps"]) for state in optimizer.basis_updates.values()} == {2}


def test_bases_from_a_closure_in_inference_mode_can_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they are not copied to a shelf, as on accelerators."""
    monkeypatch.setattr("zoft.optim.shelf.SMALL", 0)
    model, batch = llama(), token_batch()

    def closure() -> Loss:
        with torch.inference_mode():
            return closure_of(model, batch)()

    optimizer = moved(model, closure, attention=True, energy=1.0)
    assert optimizer.basis_updates


def test_under_autocast_two_passes_find_them_in_float32() -> None:
    model = llama()
    plain = closure_of(model, token_batch())

    def closure() -> Loss:
        with torch.autocast("cpu", torch.bfloat16):
            return plain()

    optimizer = moved(model, closure, feed_forward=False, two_pass=True)
    found = optimizer.updates | optimizer.basis_updates
    assert {state["mean"].dtype for state in found.values()} == {torch.float32}


def test_moments_begin_anew_where_attention_does() -> None:
    model = llama()
    closure = closure_of(model, token_batch())
    optimizer = Guided(model, rank=3, attention=True, energy=1.0, attention_after=3, train_bases=True)
    for _ in range(4):
        optimizer.step(closure)
    assert {int(state["steps"]) for state in optimizer.basis_updates.values()} == {1}
