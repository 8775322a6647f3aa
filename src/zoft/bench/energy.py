"""How much of the gradient's energy lies in the leading activation directions, by rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoft.bench.gradient import Closure, gradient_of, layers_with_gradients, true_gradients
from zoft.optim.capture import Basis, captured, leading_basis
from zoft.optim.layers import LinearMap


def captured_energy(model: nn.Module, closure: Closure, ranks: Sequence[int]) -> dict[int, float]:
    """``sum ||G A||^2 / sum ||G||^2`` over the linear layers, A the leading right singular vectors of each layer's
    input activations, by rank.

    Takes a forward and a backward pass, and as much memory for the gradient as the weights have.

    Raises:
        ValueError: the model has no linear layer, or one whose weight is quantized.
    """
    layers, gradients = layers_with_gradients(model), true_gradients(model, closure)
    maps = [m for m in layers if id(m.parameter) in gradients]

    def extract(layer: LinearMap, rows: Tensor) -> Basis:
        return leading_basis(rows, torch.empty(len(rows), max(ranks)), power_steps=None)

    with torch.no_grad(), captured(model, maps, extract) as bases:
        closure()
    total, caught = 0.0, dict.fromkeys(ranks, 0.0)
    for layer in maps:
        gradient = gradient_of(layer, gradients)
        assert gradient is not None
        total += float(gradient.square().sum())
        if layer.name in bases:
            squares = (gradient @ bases[layer.name].vectors).square().sum(0)
            for rank in ranks:
                caught[rank] += float(squares[:rank].sum())
    return {rank: energy / total for rank, energy in caught.items()}
