"""Counter-based Gaussian noise: the same numbers on every device, in any order, in any chunking.

A stream is named by a tuple, such as ``(seed, step, probe, parameter name)``, and element ``i`` of a stream
is a pure function of that name and ``i``. Nothing is stored, nothing depends on what was drawn before, and no
global random state is read or written, so a perturbation can be replayed, in part or whole, at any time.

The generator is SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"):
``mix(start + i * gamma)``, with start and odd gamma taken from a hash of the name. Each 16 bits of its output pick
one of 65,536 equally likely rows of eight normals: rows are independent, and the columns of the table have exactly
mean 0, variance 1 and no correlation (each ends at 3.8, with a fourth moment of 2.99 instead of 3). Integers and a
table, so the numbers are identical on every device, and take a tenth of the time of Box and Muller's logarithms.
"""

from __future__ import annotations

import functools
import hashlib
import math
import statistics
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

Key = tuple[int | str, ...]

WIDTH = 8  # of a row of normals
CHUNK = 1 << 18  # normals at a time: the working set stays within a core's cache


def _signed(value: int) -> int:
    """The 64-bit pattern of `value` as the signed integer that torch.int64 holds."""
    return (value & 0xFFFFFFFFFFFFFFFF) - ((value & 0x8000000000000000) << 1)


_MIX1, _MIX2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
_GAMMA = _signed(0x9E3779B97F4A7C15)


def stream(key: Key) -> tuple[int, int]:
    """Start and odd increment of the stream named `key`, as signed 64-bit integers."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    start, gamma = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
    return _signed(start), _signed(gamma | 1)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 `z`, in place. Masks make torch's arithmetic right shift a logical one."""
    z.bitwise_xor_((z >> 30).bitwise_and_((1 << 34) - 1)).mul_(_MIX1)
    z.bitwise_xor_((z >> 27).bitwise_and_((1 << 37) - 1)).mul_(_MIX2)
    return z.bitwise_xor_((z >> 31).bitwise_and_((1 << 33) - 1))


@functools.cache
def _rows(device: torch.device) -> Tensor:
    """The rows of normals, float32 [65536, WIDTH], by the 16 bits that pick one (as a signed number plus 32,768).

    A column holds the quantiles of the half-normal distribution in an order of its own, each with a random sign. Every
    row of them occurs times each row of a Hadamard matrix and the opposite of each, which cancels correlations and odd
    moments.
    """
    count = (1 << 16) // (2 * WIDTH)
    inverse = statistics.NormalDist().inv_cdf
    sizes = torch.tensor([inverse((1 + (i + 0.5) / count) / 2) for i in range(count)], dtype=torch.float64)
    sizes /= sizes.square().mean().sqrt()
    drawn = _mix(torch.arange(1, count * WIDTH + 1).mul_(_GAMMA)).view(count, WIDTH)
    normals = sizes[drawn.argsort(dim=0)] * (1 - 2 * (drawn & 1))
    hadamard = torch.tensor([[1 - (i & j).bit_count() % 2 * 2 for j in range(WIDTH)] for i in range(WIDTH)])
    rows = torch.cat((hadamard, -hadamard)).unsqueeze(1) * normals
    return rows.view(-1, WIDTH).float().to(device)


def normal(
    key: Key, shape: tuple[int, ...] | torch.Size, *, device: torch.device | str | None = None, start: int = 0
) -> Tensor:
    """Standard normals of the stream `key`, float32, `shape`, from its element `start` on.

    ``normal(key, (n,))[a:b]`` equals ``normal(key, (b - a,), start=a)`` bit for bit.
    """
    count, word = math.prod(shape), 4 * WIDTH  # normals that a word makes
    offset, gamma = stream(key)
    first, last = start // word, -(-(start + count) // word)
    words = torch.arange(first + 1, last + 1, dtype=torch.int64, device=device).mul_(gamma).add_(offset)
    return _picked(words)[start - word * first :][:count].view(shape)


def normals(
    keys: Sequence[Key], shapes: Sequence[tuple[int, ...]], *, device: torch.device | str | None = None
) -> list[Tensor]:
    """``normal(key, shape)`` of each key and shape, bit for bit; many small ones take less time together."""
    counts, word = [math.prod(shape) for shape in shapes], 4 * WIDTH
    words = [-(-count // word) for count in counts]
    before, total = accumulate(words[:-1], initial=0), sum(words)
    streams = [
        (_signed(offset - first * gamma), gamma)
        for first, (offset, gamma) in zip(before, map(stream, keys), strict=True)
    ]
    each, repeats = torch.tensor(streams, device=device), torch.tensor(words, device=device)
    offsets, gammas = each.repeat_interleave(repeats, dim=0, output_size=total).unbind(1)  # known: no device waits
    made = _picked(torch.arange(1, total + 1, device=device).mul_(gammas).add_(offsets))
    parts = made.split([count * word for count in words])
    return [part[:count].view(shape) for part, count, shape in zip(parts, counts, shapes, strict=True)]


def _picked(words: Tensor) -> Tensor:
    """The normals that int64 `words` come to, 4 `WIDTH` each; `words` is used up."""
    picked = _mix(words).view(torch.int16).to(torch.int32).add_(1 << 15)
    return _rows(picked.device).index_select(0, picked).view(-1)


def normal_chunks(
    key: Key, count: int, *, device: torch.device | str | None = None, first: int = 0
) -> Iterator[tuple[slice, Tensor]]:
    """`count` normals of the stream from element `first` on, a slice of them and its values at a time; none is kept."""
    for start in range(0, count, CHUNK):
        stop = min(start + CHUNK, count)
        yield slice(start, stop), normal(key, (stop - start,), device=device, start=first + start)
