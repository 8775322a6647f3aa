"""Products with half-precision weights, computed in float32 where the processor is quicker at that.

A processor without instructions for bfloat16, as most laptops have, multiplies bfloat16 matrices several times slower
than float32 ones. So the weights stay as they are, and a few rows at a time are converted as they are multiplied: the
memory of half precision, the speed of float32. What is added up is in float32 either way.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoft.optim.placement import autocast_dtype

HALVES = (torch.bfloat16, torch.float16)
TOGETHER = 1 << 20  # numbers of a weight that are converted at a time: they stay in a cache
CLEARLY = 0.8  # of the time, at most: what is only a little quicker is not worth other roundings
ROUNDS = 6  # of timing, of which the quickest counts


class WideLinear(nn.Linear):
    """A linear layer of half-precision weights whose products are taken in float32, and rounded once, at the end.

    A quantized weight is made half-precision first, for each forward. Under autocast, or where autograd records, it is
    torch's own.
    """

    def forward(self, x: Tensor) -> Tensor:
        recorded = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if recorded or autocast_dtype(x.device) is not None:
            return super().forward(x)
        weight = self.weight if type(self.weight) is nn.Parameter else self.weight.dequantize()
        return wide_product(x, weight, self.bias)


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
            if offloaded:
                own["_old_forward"] = MethodType(WideLinear.forward, module)


def wide_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` in the dtype of `x`, for `x` [..., d_in] and `weight` [d_out, d_in]."""
    wide, y = x.float(), x.new_empty(*x.shape[:-1], len(weight))
    for rows in _parts(weight):
        own = None if bias is None else bias[rows].float()
        y[..., rows] = F.linear(wide, weight[rows].float(), own)
    return y


def wide_transposed(error: Tensor, weight: Tensor) -> Tensor:
    """``e W``, float32 [..., d_in], for `error` [..., d_out] and `weight` [d_out, d_in]."""
    parts = (error[..., rows].float() @ weight[rows].float() for rows in _parts(weight))
    return functools.reduce(torch.Tensor.add_, parts)


def _parts(weight: Tensor) -> Iterator[slice]:
    rows = max(1, TOGETHER // weight.shape[1])
    return (slice(start, start + rows) for start in range(0, len(weight), rows))


@functools.cache
def float32_is_quicker(dtype: torch.dtype) -> bool:
    """Whether the CPU clearly takes less time for `wide_product` than for the same product in `dtype`."""
    x, weight = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    own, wide = (min(_seconds(way, x, weight) for _ in range(ROUNDS)) for way in (F.linear, wide_product))
    return wide < CLEARLY * own


def _seconds(way: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> float:
    start = time.perf_counter()
    way(x, weight)
    return time.perf_counter() - start
