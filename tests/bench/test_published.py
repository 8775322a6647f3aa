"""`zoft.bench.published`: MeZO's algorithm 1, step by step."""

import torch
from torch import nn

from optim.models import mlp
from zoft.bench.published import PublishedMeZO


def test_update_is_the_papers() -> None:
    model = mlp(torch.float64)
    x, target = torch.randn(8, 10, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return nn.functional.mse_loss(model(x), target)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = PublishedMeZO(model, lr=0.1, eps=1e-3, seed=4)
    gradient = optimizer.step(loss)
    after = {name: p.detach().clone() for name, p in model.named_parameters()}

    torch.manual_seed(5)
    noise = {name: torch.randn_like(p) for name, p in before.items()}

    @torch.no_grad()
    def loss_at(distance: float) -> float:
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name] + distance * noise[name])
        return float(loss())

    expected = (loss_at(1e-3) - loss_at(-1e-3)) / 2e-3
    assert abs(gradient - expected) < 1e-9
    for name, value in after.items():
        torch.testing.assert_close(value, before[name] - 0.1 * expected * noise[name], rtol=0, atol=1e-9)


def test_steps_draw_different_noise_and_frozen_parameters_stay() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    x, optimizer = torch.randn(8, 10), PublishedMeZO(model, lr=0.1)
    first, second = (optimizer.step(lambda: model(x).square().mean()) for _ in range(2))
    assert first != second
    assert torch.equal(model[0].weight, frozen)
