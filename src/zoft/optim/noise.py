"""Counter-based Gaussian noise: the same numbers on every device, in any order, in any chunking.

A stream is named by a tuple, such as ``(seed, step, probe, parameter name)``, and element ``i`` of a stream
is a pure function of that name and ``i``. Nothing is stored, nothing depends on what was drawn before, and no
global random state is read or written, so a perturbation can be replayed, in part or whole, at any time.

The generator is SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"):
``mix(start + i * gamma)``, with start and odd gamma taken from a hash of the name. One 64-bit output gives two
uniforms, and Box-Muller makes of them the normals ``2i`` and ``2i + 1``. The integers are identical everywhere;
logarithm and cosine may differ between devices in the last bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

Key = tuple[int | str, ...]

CHUNK = 1 << 17  # normals at a time: the working set (2 x 8 bytes each) stays within a core's cache


def _signed(value: int) -> int:
    """The 64-bit pattern of `value` as the signed integer that torch.int64 holds."""
    return (value & 0xFFFFFFFFFFFFFFFF) - ((value & 0x8000000000000000) << 1)


_MIX1, _MIX2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


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


def _pairs(key: Key, first: int, count: int, device: torch.device | str | None) -> Tensor:
    """Normals of the pairs `first` ... `first + count - 1`, as float32 [count, 2]."""
    start, gamma = stream(key)
    z = torch.arange(first + 1, first + count + 1, dtype=torch.int64, device=device)
    bits = _mix(z.mul_(gamma).add_(start)).view(torch.int32).view(count, 2)
    # Contiguous halves: strided tensors take another (scalar) code path whose last bit differs.
    uniform = bits.t().to(torch.float32, memory_format=torch.contiguous_format).mul_(2.0**-32).add_(0.5)
    radius = uniform[0].clamp_(min=2.0**-33).log_().mul_(-2.0).sqrt_()
    angle = uniform[1].mul_(2.0 * math.pi)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1)


def normal(
    key: Key, shape: tuple[int, ...] | torch.Size, *, device: torch.device | str | None = None, start: int = 0
) -> Tensor:
    """Standard normals of the stream `key`, float32, `shape`, from its element `start` on.

    ``normal(key, (n,))[a:b]`` equals ``normal(key, (b - a,), start=a)`` bit for bit.
    """
    count = math.prod(shape)
    first, last = start // 2, (start + count + 1) // 2
    out = _pairs(key, first, last - first, device).view(-1)
    return out[start - 2 * first :][:count].view(shape)


def normal_chunks(key: Key, count: int, *, device: torch.device | str | None = None) -> Iterator[tuple[slice, Tensor]]:
    """The first `count` normals of the stream, a slice and its values at a time, so that none is stored."""
    for start in range(0, count, CHUNK):
        stop = min(start + CHUNK, count)
        yield slice(start, stop), normal(key, (stop - start,), device=device, start=start)
