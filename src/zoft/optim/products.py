"""Products with half-precision weights, computed in float32 where the processor is quicker at that.

A processor without instructions for bfloat16, as most laptops have, multiplies bfloat16 matrices several times slower
than float32 ones. So the weights stay as they are, and a few rows at a time are converted as they are multiplied: the
memory of half precision, the speed of float32. What is added up is in float32 either way.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoft.optim.placement import autocast_dtype

HALVES = (torch.bfloat16, torch.float16)
TOGETHER = 1 << 20  # numbers of a weight, an input or an output that are in float32 at a time: they stay in a cache
FEW = 8  # rows of an input: with fewer, it is reading a weight that takes time, and converting it takes more
CLEARLY = 0.9  # of the time, at most: what is only a little quicker is not worth other roundings
ROUNDS = 10  # of timing, in turns; the quickest counts

# P [..., r] and F [d_out, r], or [n, T, r] and [n, d_out, r] for n parts of the rows: P F^T is added to an output.
Term = tuple[Tensor, Tensor]


class WideLinear(nn.Linear):
    """A linear layer of half-precision weights whose products are taken in float32, and rounded once, at the end.

    So are the terms that `branches` add for an input. A quantized weight is made half-precision first, for each
    forward. Under autocast, or where autograd records, the product is torch's own, and so it is of few rows.
    """

    branches: list[Callable[[Tensor], list[Term]]]

    def forward(self, x: Tensor) -> Tensor:
        terms = [term for branch in self.branches for term in branch(x)]
        recorded = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if recorded or autocast_dtype(x.device) is not None or x.numel() < FEW * self.in_features:
            y = super().forward(x)
            for left, right in terms:
                y = y + (left @ right.mT).to(y.dtype).view(y.shape)
            return y
        weight = self.weight if type(self.weight) is nn.Parameter else self.weight.dequantize()
        return wide_product(x, weight, self.bias, terms)


def widen(model: nn.Module) -> None:
    """Make every plain ``nn.Linear`` of half precision in `model` a `WideLinear`, with the same parameters.

    Other layers stay as they are: of another class, sharded, or with a forward that somebody has given them.
    """
    for module in model.modules():
        own, offloaded = vars(module), "_old_forward" in vars(module)  # accelerate's hooks keep it there
        if type(module) is not nn.Linear or ("forward" in own and not offloaded) or module.weight.dtype not in HALVES:
            continue
        kind = type(module.weight)
        if kind is nn.Parameter or kind.dequantize is not Tensor.dequantize:  # the latter is torchao's
            module.__class__ = WideLinear
            own["branches"] = []
            if offloaded:
                own["_old_forward"] = MethodType(WideLinear.forward, module)


def wide_product(x: Tensor, weight: Tensor, bias: Tensor | None = None, terms: Sequence[Term] = ()) -> Tensor:
    """``x W^T + b`` and the `terms`, in the dtype of `x`, for `x` [..., d_in] and `weight` [d_out, d_in]."""
    inputs = x.reshape(-1, x.shape[-1])
    y = torch.empty(len(inputs), len(weight), dtype=x.dtype, device=x.device)
    whole = max([len(inputs) // len(right) for _, right in terms if right.dim() == 3], default=1)  # one part's rows
    for columns in _parts(weight):
        own, shift = weight[columns].float(), None if bias is None else bias[columns].float()
        size = max(1, TOGETHER // (max(own.shape) * whole)) * whole
        for start in range(0, len(inputs), size):
            rows = slice(start, start + size)
            part = F.linear(inputs[rows].float(), own, shift)
            for left, right in terms:
                some = left.flatten(0, -2)[rows]
                if right.dim() == 3:
                    factors = right[start // whole : (start + size) // whole, columns]
                    some, sums = (each.view(len(factors), whole, -1) for each in (some, part))
                    sums.baddbmm_(some, factors.mT)
                else:
                    part.addmm_(some, right[columns].t())
            y[rows, columns] = part
    return y.view(*x.shape[:-1], -1)


def wide_transposed(error: Tensor, weight: Tensor) -> Tensor:
    """``e W``, float32 [..., d_in], for `error` [..., d_out] and `weight` [d_out, d_in]."""
    parts = (error[..., rows].float() @ weight[rows].float() for rows in _parts(weight))
    return functools.reduce(Tensor.add_, parts)


def _parts(weight: Tensor) -> Iterator[slice]:
    rows = max(1, TOGETHER // weight.shape[1])
    return (slice(start, start + rows) for start in range(0, len(weight), rows))


@functools.cache
def float32_is_quicker(dtype: torch.dtype) -> bool:
    """Whether the CPU clearly takes less time for `wide_product` than for the same product in `dtype`."""
    x, weight = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    rounds = [[_seconds(way, x, weight) for way in (F.linear, wide_product)] for _ in range(ROUNDS)]
    own, wide = map(min, zip(*rounds, strict=True))
    return wide < CLEARLY * own


def _seconds(way: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> float:
    start = time.perf_counter()
    way(x, weight)
    return time.perf_counter() - start
