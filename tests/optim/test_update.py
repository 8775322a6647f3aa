"""What an update rule makes of estimates."""

from typing import Any

import pytest
import torch
from torch import Tensor

from zoft.optim.update import Adam


def steps_of(rule: Adam, estimates: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    state: dict[str, Tensor] = {}
    return [rule([estimate], [state])[0].clone() for estimate in estimates], state


@pytest.mark.parametrize("shape", [(6, 3), (2, 6, 3), (5,)])
@pytest.mark.parametrize("scale", [1.0, 1e-11])
def test_factored_adam_is_adam_where_squares_have_rank_one(shape: tuple[int, ...], scale: float) -> None:
    """Of experts' matrices each; of numbers that belong to no matrix always. Small ones are none the less."""
    size = torch.rand(*shape[:-1], 1) * torch.rand(*shape[:-2], 1, shape[-1]) if len(shape) > 1 else torch.rand(shape)
    estimates = [torch.rand(shape).sub(0.5).sign() * size * scale for _ in range(4)]
    plain, _ = steps_of(Adam(eps=1e-30), estimates)
    factored, _ = steps_of(Adam(eps=1e-30, factored=True), estimates)
    for one, other in zip(plain, factored, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_factored_adam_holds_rows_and_columns() -> None:
    (first, second), state = steps_of(Adam(factored=True), [torch.randn(600, 8), torch.zeros(600, 8)])
    assert sum(tensor.numel() for tensor in state.values()) == 600 * 8 + 600 + 8 + 1
    assert bool(first.isfinite().all()) and bool(second.isfinite().all())
    assert 0.5 < first.square().mean().sqrt() < 2, "a step of about one"


def test_nothing_found_is_no_step() -> None:
    for rule in (Adam(), Adam(factored=True)):
        (found,), _ = steps_of(rule, [torch.zeros(4, 3)])
        assert torch.equal(found, torch.zeros(4, 3))


def test_factored_squares_move_to_another_basis_as_whole_ones_would() -> None:
    change, estimate = torch.randn(3, 2), torch.rand(5, 1) * torch.rand(1, 3)
    states: list[dict[str, Any]] = []
    for rule in (Adam(), Adam(factored=True)):
        _, state = steps_of(rule, [estimate])
        rule.transport(state, change)
        states.append(state)
    whole = states[0]["square"]
    torch.testing.assert_close(Adam(factored=True)._squares(states[1]), whole, rtol=1e-4, atol=1e-9)
