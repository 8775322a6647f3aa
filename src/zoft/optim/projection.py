"""How attention comes by queries, keys and values: heads of what a linear map gives, perhaps normed, perhaps rotated.

Found by looking at what flows, as the rest of a block is. A rotation by position (RoPE, arXiv 2104.09864) turns pairs
of a head's numbers, by angles that are the same for all heads; they are read off what goes in and comes out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from zoft.optim.layers import LinearMap
from zoft.optim.recording import Call, close, exact, same
from zoft.optim.transpose import Norm


@dataclass(frozen=True)
class Rotation:
    """Turns each number i of a head with number ``i + half`` of it, for ``i < half``; none, if `half` is 0.

    With `half` 1 all neighbours are paired.
    """

    half: int

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Rotation | None:
        """The one that makes heads `x` [n, H, d] to `y`."""
        x, y = exact(x), exact(y)
        size = x.shape[-1]
        found = (cls(half) for half in range(size // 2, size % 2, -1))  # an odd number of neighbours is no pairs
        return next((rotation for rotation in found if rotation._makes(x, y)), None)

    def _makes(self, x: Tensor, y: Tensor) -> bool:
        cos, sin = self.angles(x, y)
        sign = self._sign(x)
        length = (cos.square() + sin.square()).sqrt()[..., sign != 0]  # not 1 where positions are scaled (YaRN)
        constant = bool(((length - length.mean()).abs() < 0.05 * length.mean()).all())
        return constant and close(x * cos + self._partner(x) * sin * sign, y)

    def angles(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [n, 1, d], times one number, by which `x` [n, H, d] was turned to `y`."""
        partner = self._partner(x)
        size = (x.square() + partner.square()).sum(1, keepdim=True)
        size = size.clamp(min=torch.finfo(x.dtype).tiny)
        straight, across = x * y, partner * y
        cos = (straight + self._partner(straight)).sum(1, keepdim=True) / size
        return cos, self._sign(x) * (across - self._partner(across)).sum(1, keepdim=True) / size

    def pull(self, error: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The error at `x`, for that at `y` [n, H, d], all float32."""
        cos, sin = self.angles(x, y)
        return error * cos - self._partner(error) * sin * self._sign(x)

    def _partner(self, x: Tensor) -> Tensor:
        """Each number's partner, or itself, in its place: pieces of a head at a time, which gathering would not be."""
        if self.half == 1:
            return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        half, rest = self.half, x.shape[-1] - 2 * self.half
        first, second, alone = x.split((half, half, rest), -1)
        return torch.cat((second, first, alone), -1)

    def _sign(self, x: Tensor) -> Tensor:
        """Which way each number of a head turns, -1, 1 or, alone, 0."""
        place = torch.arange(x.shape[-1], device=x.device)
        if self.half == 1:
            return (2 * (place % 2) - 1).to(x.dtype)
        return (torch.where(place < self.half, -1, 1) * (place < 2 * self.half)).to(x.dtype)


@dataclass(frozen=True)
class Projection:
    """Heads ``rotation(norm(map(x)))``; `columns` int64 [H * d] says which of the norm's outputs they are, in order.

    Without `norm`, which of the map's; several heads may be the same ones. Where all come several times in a row, as
    keys do that heads share, H counts each once. The norm is of as many outputs at a time as it has gains.
    """

    map: LinearMap
    norm: Norm | None
    columns: Tensor
    rotation: Rotation

    def pull(self, error: Tensor, outputs: Tensor, heads: Tensor) -> Tensor:
        """The error at the map's `outputs` [n, d_out], float32, for that at the heads that came of them.

        `error` and `heads` [n, multiple of H, d] may have each head of the H several times in a row.
        """
        count = len(self.columns) // heads.shape[2]
        error, heads = error.unflatten(1, (count, -1)).sum(2), heads[:, :: heads.shape[1] // count]
        parts = outputs if self.norm is None else outputs.unflatten(1, (-1, len(self.norm.gain)))
        if self.rotation.half:
            normed = parts if self.norm is None else self.norm.module(parts).flatten(1)
            x = normed[:, self.columns].view(heads.shape)
            error = self.rotation.pull(error, x.float(), heads.float())
        at_normed = error.new_zeros(outputs.shape).index_add_(1, self.columns, error.flatten(1))
        if self.norm is None:
            return at_normed
        return self.norm.pull(parts.flatten(0, 1), at_normed.view(parts.shape).flatten(0, 1)).view(outputs.shape)


def projections(
    heads: Tensor, calls: list[Call], norms: list[Call], maps: dict[str, LinearMap]
) -> Iterator[tuple[Call, Projection]]:
    """How `heads` [n, H, d] may come of what `calls` of linear maps give, by one of `norms` or none; with the call."""
    for call in calls:
        if (found := _taken(heads, call.y)) is not None:
            yield call, Projection(maps[call.name], None, *found)
        for other in (other for other in norms if same(other.x, call.y)):
            found, norm = _taken(heads, other.y), _norm_of(other, heads.shape[2])
            if found is not None and norm is not None:
                yield call, Projection(maps[call.name], norm, *found)


def _norm_of(call: Call, size: int) -> Norm | None:
    """What was called, as a norm of its rows, or of so many numbers of them at a time."""
    return Norm.of(call.module, call.x) or Norm.of(call.module, call.x.reshape(-1, size))


def _taken(heads: Tensor, whole: Tensor) -> tuple[Tensor, Rotation] | None:
    """Which columns of `whole` [n, e] the `heads` [n, H, d] are, and how they were rotated."""
    size, columns = heads.shape[2], _columns(heads.flatten(1), whole)
    if columns is not None:
        return _once(columns.view(-1, size)), Rotation(0)
    if whole.shape[1] % size:
        return None
    there = exact(heads).norm(dim=-1).amin(1) > 0  # padding may be embedded as zeros
    if int(there.sum()) < 2:
        return None
    rows, pieces = exact(heads)[there], exact(whole.unflatten(1, (-1, size)))[there]
    ratios = rows.norm(dim=-1).unsqueeze(2) / pieces.norm(dim=-1).unsqueeze(1).clamp(min=1e-30)
    spread, places = (ratios / ratios.mean(0)).std(0, correction=0).min(1)  # [H]: a rotation keeps lengths
    rotation = Rotation.of(pieces[:, places], rows) if bool((spread < 0.05).all()) else None
    if rotation is None:
        return None
    columns = places.unsqueeze(1) * size + torch.arange(size)
    return _once(columns.to(whole.device)), rotation


def _once(columns: Tensor) -> Tensor:
    """Those of heads, [H, d], joined; each head once, if all come as many times in a row."""
    found, counts = columns.unique_consecutive(return_counts=True, dim=0)
    return (found if bool((counts == counts[0]).all()) else columns).flatten()


def _columns(part: Tensor, whole: Tensor) -> Tensor | None:
    """Which column of `whole` [n, d] each column of `part` [n, e] is, int64 [e]; None if one of them is none."""
    equal = torch.ones(part.shape[1], whole.shape[1], dtype=torch.bool, device=whole.device)
    for row, other in zip(part.to(whole.device), whole, strict=True):
        equal &= row.unsqueeze(1) == other
    return equal.int().argmax(1) if bool(equal.any(1).all()) else None
