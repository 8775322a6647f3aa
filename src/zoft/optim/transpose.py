"""Transposed Jacobians in closed form: how an error at a module's output reads at its input, row by row.

No autograd: what is needed of a module is found by evaluating it, and checked against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoft.optim.layers import LinearMap
from zoft.optim.products import wide_transposed

# Rows: for half precision the CPU's library compiles a product for each number of them, and keeps hundreds of these,
# a fifth of a megabyte each. Batches of texts have a different number each.
ALIKE = 64


@dataclass(frozen=True)
class Norm:
    """``y = gain * x / rms(x) + b`` (RMSNorm), or with x - mean(x) in place of x (LayerNorm); `gain` float32 [d]."""

    module: nn.Module
    gain: Tensor
    centred: bool

    @classmethod
    def of(cls, module: nn.Module, like: Tensor) -> Norm | None:
        """`module` as a norm of rows such as `like` [n, d], if it behaves as one."""
        signs = torch.ones(like.shape[-1], device=like.device)
        signs[1::2] = -1
        signs -= signs.mean()
        vectors = torch.stack((torch.zeros_like(signs), signs / signs.square().mean().sqrt(), torch.ones_like(signs)))
        try:
            found = module(vectors.to(like.dtype))
        except Exception:  # whatever it raises, it takes more than rows, or others
            return None
        if not isinstance(found, Tensor) or found.shape != vectors.shape:
            return None
        offset, alternating, constant = found.float()
        norm = cls(module, (alternating - offset) / vectors[1], bool((constant - offset).abs().max() < 1e-3))
        standard, _ = norm._standard(like)
        expected, found = standard * norm.gain + offset, module(like).float()
        return norm if torch.allclose(expected, found, rtol=0.03, atol=0.03 * float(found.std())) else None

    def pull(self, x: Tensor, error: Tensor) -> Tensor:
        """``J(x)^T error`` for rows `x` [n, d] and `error` float32 [n, d]."""
        standard, scale = self._standard(x)
        error = error * self.gain
        pulled = error - standard * (error * standard).mean(-1, keepdim=True)
        if self.centred:
            pulled = pulled - error.mean(-1, keepdim=True)
        return pulled * scale

    def _standard(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float()
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        eps = getattr(self.module, "variance_epsilon", getattr(self.module, "eps", 0.0)) or 0.0
        scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        return x * scale, scale


@dataclass(frozen=True)
class FeedForward:
    """``down(act(gate(x)) * up(x))``, or ``down(act(gate(x)))`` without `up`, with ``x = norm(h)`` or ``x = h``.

    With `halves` the map `gate` gives both: these columns of its output are what `act` is called with, and what that is
    multiplied by.
    """

    norm: Norm | None
    gate: LinearMap
    up: LinearMap | None
    act: Callable[[Tensor], Tensor]
    down: LinearMap
    halves: tuple[slice, slice] | None = None

    @property
    def reader(self) -> nn.Module:
        """The module that is called with h."""
        return self.norm.module if self.norm is not None else self.gate.modules[0]

    @property
    def inner(self) -> tuple[LinearMap, ...]:
        """The maps of x."""
        return (self.gate,) if self.up is None else (self.gate, self.up)

    def pull(self, outputs: Mapping[str, Tensor], error: Tensor, transposed: Transposed) -> Tensor:
        """``J(x)^T error`` [n, d], for the `outputs` of `inner`, by name.

        `error` is at the output of `down`; `transposed` is given the error at each map's, and multiplies by its weight.
        """
        hidden = transposed(self.down, error)
        if self.halves is not None:
            opening, factor = (outputs[self.gate.name][:, half] for half in self.halves)
            at_opening = hidden * slope_of(self.act, opening) * factor.float()
            both = at_opening, hidden * self.act(opening).float()
            return transposed(self.gate, torch.cat(both if self.halves[0].start == 0 else both[::-1], dim=1))
        opening = outputs[self.gate.name]
        at_gate = hidden * slope_of(self.act, opening)
        if self.up is None:
            return transposed(self.gate, at_gate)
        at_gate *= outputs[self.up.name].float()
        return transposed(self.gate, at_gate) + transposed(self.up, hidden * self.act(opening).float())


Transposed = Callable[[LinearMap, Tensor], Tensor]


def transposed_product(layer: LinearMap, error: Tensor) -> Tensor:
    """``error W`` [n, d_in], float32, for `error` float32 [n, d_out]; computed in what the layer computes in."""
    weight = layer.dense_weight()
    assert weight is not None
    if layer.wide:
        return wide_transposed(error, weight)
    if weight.dtype != torch.float16:
        return _product(error.to(weight.dtype), weight)
    largest = torch.linalg.vector_norm(error, math.inf).clamp(min=torch.finfo(torch.float32).tiny)
    return _product(torch.div(error, largest).half(), weight) * largest  # float16 has little range


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows @ weight``, float32; many `rows` are first filled up to a multiple of `ALIKE`."""
    count = rows.shape[-2]
    if count > ALIKE and count % ALIKE:
        rows = F.pad(rows, (0, 0, 0, -count % ALIKE))
    return (rows @ weight)[..., :count, :].float()


def slope_of(act: Callable[[Tensor], Tensor], z: Tensor, step: float = 1e-3) -> Tensor:
    """The derivative of the elementwise function `act` at `z`, float32, by central differences."""
    z = z.float()
    return (act(z + step) - act(z - step)) / (2 * step)
