"""The true gradient, from one backward pass, and inner products with it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zoft.optim import Estimate, Loss, ZeroOrder
from zoft.optim.layers import LinearMap, find_linear_maps
from zoft.optim.noise import normal_chunks

Closure = Callable[[], Tensor | Loss]
Gradients = dict[int, Tensor]


def layers_with_gradients(model: nn.Module) -> list[LinearMap]:
    """The linear layers and experts of `model`.

    Raises:
        ValueError: there are none, or some are quantized: then the gradient is not that of the whole model.
    """
    maps = find_linear_maps(model, experts=True)
    if quantized := [m.name for m in maps if m.weight is None]:
        raise ValueError(f"{quantized[0]!r} has a quantized weight, which has no gradient: load it with dtype float32")
    return maps


def true_gradients(model: nn.Module, closure: Closure) -> Gradients:
    """The gradient of every parameter that has one, float32 on its device, by the parameter's identity.

    Raises:
        ValueError: the loss is not finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.enable_grad():
        loss = closure()
        values = loss.values if isinstance(loss, Loss) else loss
        if not bool(values.isfinite().all()):
            raise ValueError("the loss is not finite, and has no gradient")
        gradients = torch.autograd.grad(values.float().mean(), parameters, allow_unused=True)
    return {id(p): g.float() for p, g in zip(parameters, gradients, strict=True) if g is not None}


def gradient_of(layer: LinearMap, gradients: Gradients) -> Tensor | None:
    """The gradient [d_out, d_in] of a layer's weight; None if it has none."""
    found = gradients.get(id(layer.parameter))
    if found is None:
        return None
    found = found if layer.fused is None else found[layer.part]
    return found.t() if layer.transposed else found


def slope(optimizer: ZeroOrder, estimate: Estimate, gradients: Gradients) -> float:
    """``<E, G>`` of the optimizer's `estimate` over everything that it moves."""
    total = 0.0
    for layer in optimizer.maps:
        gradient = gradient_of(layer, gradients)
        if gradient is not None and layer.name in estimate.factors:
            total += float((estimate.factors[layer.name] * (gradient @ optimizer.bases[layer.name])).sum())
    for name, parameter in optimizer.dense.items():
        if id(parameter) in gradients:
            total += dense_products(estimate, name, gradients[id(parameter)])[0]
    return total


def dense_products(estimate: Estimate, name: str, gradient: Tensor, part: int = 0) -> tuple[float, float]:
    """<E, G> and ||E||^2 of a densely probed parameter, or of one `part` of it; the noise is replayed, not stored."""
    flat, product, square = gradient.reshape(-1), 0.0, 0.0
    size, device = flat.numel(), flat.device
    streams = [normal_chunks((*k, name), size, device=device, first=part * size) for k, _ in estimate.dense]
    weights = [coefficient for _, coefficient in estimate.dense]
    for parts in zip(*streams, strict=True):
        value = sum(c * z for (_, z), c in zip(parts, weights, strict=True))
        assert isinstance(value, Tensor)
        product += float(value @ flat[parts[0][0]])
        square += float(value.square().sum())
    return product, square
