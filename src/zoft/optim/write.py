"""Adding small updates to weights so that rounding loses nothing on average.

Half-precision weights swallow updates smaller than half a unit in the last place: at ``|w|`` around .02 a bfloat16
unit is 1.2e-4, larger than most steps of a zeroth-order method. So float16 and bfloat16 weights are rounded
stochastically: up or down with probabilities that make the expectation exact. The dither is a Weyl sequence, the same
for all writes, with a random start for each: uniform at every element, and read from a table instead of drawn.

Of a weight in shards, every process writes its own rows, with the dither and the noise that they have in the whole.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from zoft.optim.noise import Key, normal_chunks, stream
from zoft.optim.placement import own_rows

ELEMENTS = 1 << 19  # weight elements updated at a time
PERIOD, GOLDEN = 1 << 16, 40503  # of the dither; its step, the golden section of the period, is odd: all values occur
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of float32's mantissa


@torch.no_grad()
def add_low_rank_(weight: Tensor, left: Tensor, right: Tensor, key: Key, decay: float = 1.0) -> None:
    """``weight = decay weight + left right^T`` for `weight` [m, n], float32 `left` [m, r] and `right` [n, r]."""
    weight, first = own_rows(weight)
    left = left[first : first + len(weight)]
    if weight.dtype not in _DROPPED_BITS:
        weight.addmm_(left.to(weight.dtype), right.t().to(weight.dtype), beta=decay)
        return
    rows = max(1, ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows]
        exact, factors = _exact(part), (left[start : start + rows], right.t())
        if left.shape[1] == 1 and decay == 1:
            exact.addcmul_(*factors)
        else:
            exact.addmm_(*factors, beta=decay)
        part.copy_(_dithered(exact, weight.dtype, (first + start) * weight.shape[1], key))


@torch.no_grad()
def add_noise_(parameter: Tensor, terms: list[tuple[Key, float]], key: Key, decay: float = 1.0) -> None:
    """``parameter = decay parameter + sum of c z`` over `terms` (stream of z, c), a chunk at a time."""
    parameter, row = own_rows(parameter)
    first = row * math.prod(parameter.shape[1:])
    flat = parameter.view(-1) if parameter.is_contiguous() else parameter.reshape(-1)
    streams = [normal_chunks(name, flat.numel(), device=flat.device, first=first) for name, _ in terms]
    for parts in zip(*streams, strict=True):
        where = parts[0][0]
        exact = _exact(flat[where]).mul_(decay)
        for (_, z), (_, coefficient) in zip(parts, terms, strict=True):
            exact.add_(z, alpha=coefficient)
        flat[where] = _dithered(exact, flat.dtype, first + where.start, key)
    if not parameter.is_contiguous():
        parameter.copy_(flat.view(parameter.shape))


@torch.no_grad()
def add_dense_(parameter: Tensor, delta: Tensor, key: Key, decay: float = 1.0) -> None:
    """``parameter = decay parameter + delta``, `delta` float32 of the same shape."""
    parameter.copy_(_dithered(_exact(parameter).mul_(decay).add_(delta), parameter.dtype, 0, key))


def _exact(weight: Tensor) -> Tensor:
    """A contiguous copy of `weight` in which sums are taken: float32, or float64 for a float64 weight."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(wide, copy=True, memory_format=torch.contiguous_format)


@functools.cache
def _weyl(device: torch.device) -> Tensor:
    """``i * GOLDEN mod 2^16`` for as many i as a chunk and any start take, int32."""
    index = torch.arange(PERIOD + ELEMENTS, dtype=torch.int64, device=device)
    return index.mul_(GOLDEN).remainder_(PERIOD).int()


def _dithered(exact: Tensor, dtype: torch.dtype, offset: int, key: Key) -> Tensor:
    """Float32 `exact`, contiguous, rounded stochastically, in place, to values of `dtype`.

    `offset` is the index of its first element, which says where in the sequence it begins.
    """
    if dtype in _DROPPED_BITS:
        flat, table, start = exact.view(-1), _weyl(exact.device), offset + stream(key)[0]
        for place in range(0, len(flat), ELEMENTS):
            part, first = flat[place : place + ELEMENTS], (start + place) % PERIOD
            _round(part, dtype, table[first : first + len(part)])
    return exact


def _round(exact: Tensor, dtype: torch.dtype, dither: Tensor) -> None:
    low = (1 << _DROPPED_BITS[dtype]) - 1
    if dtype == torch.float16:  # its subnormal numbers, multiples of 2^-24, drop more bits: round those by hand
        dither = dither & low
        small = exact.abs() < 2**-14
        units = torch.where(small, exact, 0) * 2**24 + (dither + 0.5) / (low + 1)
        by_hand = units.floor() * 2**-24
        exact.view(torch.int32).add_(dither).bitwise_and_(~low)
        exact.copy_(torch.where(small, by_hand, exact))
    else:
        exact.view(torch.int32).add_(dither).bitwise_and_(~low)
