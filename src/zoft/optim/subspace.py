"""First axis: in which directions may a layer move?

A subspace gives every linear map a basis A [d_in, r] and says when it is due for renewal. Bases are float32, by map
name; a map without one (an expert that saw no token) stays still.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zoft.optim.capture import Basis, covariance_product, leading_basis, whitened
from zoft.optim.layers import LinearMap
from zoft.optim.noise import Key, normal
from zoft.optim.ranks import Ranks
from zoft.optim.shelf import Shelf


@dataclass(frozen=True)
class Full:
    """Every direction: dense Gaussian noise on each parameter, no basis (MeZO)."""

    from_activations: ClassVar[bool] = False
    embeddings: ClassVar[bool] = False

    def __str__(self) -> str:
        return "full"


@dataclass(frozen=True)
class RandomLowRank:
    """Standard normal A [d_in, rank], redrawn every `renew_every` steps (LOZO). Holds for embeddings too."""

    rank: int = 1
    renew_every: int = 100
    from_activations: ClassVar[bool] = False
    embeddings: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.rank, self.renew_every)

    def due(self, step: int, renewed_at: int | None) -> bool:
        """Whether the bases of step `renewed_at` (None: there are none yet) are to be replaced at `step`."""
        return renewed_at is None or step // self.renew_every != renewed_at // self.renew_every

    def draw(self, maps: Sequence[LinearMap], key: Key) -> dict[str, Tensor]:
        """New bases, keyed by noise stream `key`."""
        return {
            m.name: normal((*key, "basis", m.name), (m.d_in, min(self.rank, m.d_in)), device=m.device) for m in maps
        }

    def __str__(self) -> str:
        return f"random rank {self.rank}, every {self.renew_every} steps"


@dataclass(frozen=True)
class Activation:
    """Leading directions of the layer's input activations, orthonormal, from a clean forward pass (AGZO).

    There are `rank` of them, or as many as the layer has inputs or the batch that makes the basis has tokens, if those
    are fewer.
    `renew_every` is a number of steps, or None for once (ZO-Act). `power_steps` is K of the power iteration, or
    None for the exact singular value decomposition. With `read_only`, activations count only at the positions whose
    logits the loss reads (`zoft.optim.capture.Tokens`). With `whiten`, directions are no longer of length 1: the larger
    the activations along one, the shorter it is.
    """

    rank: int = 1
    power_steps: int | None = 3
    renew_every: int | None = 1
    read_only: bool = False
    whiten: bool = False
    from_activations: ClassVar[bool] = True
    embeddings: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check(self.rank, 1 if self.renew_every is None else self.renew_every)
        if self.power_steps is not None and self.power_steps < 0:
            raise ValueError(f"power_steps must be None or at least 0, not {self.power_steps}")

    def due(self, step: int, renewed_at: int | None) -> bool:
        """Whether the bases of step `renewed_at` (None: there are none yet) are to be replaced at `step`."""
        if renewed_at is None or self.renew_every is None:
            return renewed_at is None
        return step // self.renew_every != renewed_at // self.renew_every

    def extract(self, rows: Tensor, key: Key, previous: Tensor | None = None, ranks: Ranks | None = None) -> Basis:
        """The basis of input activations `rows` [T, d_in]; the test matrix, of noise stream `key`, is every layer's.

        Where `ranks` have parts of the batch, it is that of the activations of all.
        """
        ranks = ranks or Ranks()
        start, count = ranks.place(len(rows))
        if ranks.parts > 1 and self.power_steps is None:  # the exact decomposition needs them in one place
            whole = torch.zeros(count, rows.shape[1], dtype=torch.float32, device=rows.device)
            whole[start : start + len(rows)] = rows
            return leading_basis(ranks.total(whole), whole[:, : min(self.rank, count)], None)
        omega = _test_matrix(key, start, len(rows), min(self.rank, count), rows.device)
        return leading_basis(rows, omega, self.power_steps, ranks.total)

    def bases(self, found: Mapping[str, Basis]) -> dict[str, Tensor]:
        """A [d_in, r] by map name, of what was `found` by map name; maps for which it is the same have one A."""
        if not self.whiten:
            return {name: basis.vectors for name, basis in found.items()}
        shelf, distinct = Shelf(), {id(basis): basis for basis in found.values()}
        made = {number: shelf.put(whitened(basis)) for number, basis in distinct.items()}
        return {name: made[id(basis)] for name, basis in found.items()}

    def __str__(self) -> str:
        often = {None: "once", 1: "every step"}.get(self.renew_every, f"every {self.renew_every} steps")
        return f"activation rank {self.rank}, {often}"


@dataclass(frozen=True)
class Maintained(Activation):
    """A wide activation basis kept across steps, of which each probe uses a part (AIM-ZO).

    Oja's rule on every clean pass, ``A <- qr(A + rate H H^T A / lambda)``, with lambda the largest eigenvalue seen of
    ``H H^T``, columns in the order of their energy. A probe moves along `active` of the `rank` columns: the first
    `shared`, and others drawn for it; its R [d_out, rank] is zero elsewhere, and scaled to the norm sqrt(active d_out).
    The rank stays that of the first basis: a first batch of fewer tokens than `rank` gives no more for good.
    """

    rank: int = 128
    active: int = 16
    shared: int = 8
    rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.shared <= self.active <= self.rank or self.active < 1:
            raise ValueError(
                f"of {self.rank} columns some are active, some of those shared: not {self.active} and {self.shared}"
            )
        if not self.rate > 0:
            raise ValueError(f"rate must be above 0, not {self.rate}")

    def extract(self, rows: Tensor, key: Key, previous: Tensor | None = None, ranks: Ranks | None = None) -> Basis:
        """The basis `previous` [d_in, r] after one step of Oja's rule on `rows` [T, d_in], of all `ranks`."""
        if previous is None:
            return super().extract(rows, key, None, ranks)
        pulled = (ranks or Ranks()).total(covariance_product(rows, previous))
        energy = pulled.norm(dim=0)
        order = energy.argsort(descending=True)
        largest = energy.max().clamp(min=torch.finfo(energy.dtype).tiny)  # above 0, though all inputs may be zeros
        vectors, _ = torch.linalg.qr((previous + self.rate * pulled / largest)[:, order])
        return Basis(vectors, energy[order].sqrt())

    def confine(self, left: Tensor, key: Key) -> Tensor:
        """The random left factor [..., d_out, r] on the columns that probe `key` uses."""
        rank, active = left.shape[-1], min(self.active, left.shape[-1])
        shared = min(self.shared, active)
        values = normal((*key, "columns"), (rank - shared,), device=left.device)  # some are equal
        drawn = values.argsort(stable=True)[: active - shared] + shared
        kept = torch.zeros_like(left)
        kept[..., :shared] = left[..., :shared]
        kept[..., drawn] = left[..., drawn]
        size = (active * left.shape[-2]) ** 0.5
        return kept * (size / kept.norm(dim=(-2, -1), keepdim=True))

    def __str__(self) -> str:
        return f"maintained rank {self.rank}, {self.active} active"


@functools.lru_cache(maxsize=1)
def _test_matrix(key: Key, start: int, rows: int, rank: int, device: torch.device) -> Tensor:
    return normal((*key, "omega"), (rows, rank), device=device, start=start * rank)


Subspace = Full | RandomLowRank | Activation


def _check(rank: int, renew_every: int) -> None:
    if rank < 1 or renew_every < 1:
        raise ValueError(f"rank and renew_every must be at least 1, not {rank} and {renew_every}")


def change_of_basis(old: Tensor, new: Tensor) -> Tensor:
    """P [r_old, r_new] such that ``C P new^T`` is the orthogonal projection of ``C old^T`` on the span of `new`."""
    return torch.linalg.solve(new.t() @ new, new.t() @ old).t()
