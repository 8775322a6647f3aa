"""First axis: in which directions may a layer move?

A subspace gives every linear map a basis A [d_in, r] and says when it is due for renewal. Bases are float32, by map
name; a map without one (an expert that saw no token) stays still.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zoft.optim.capture import Basis, leading_basis
from zoft.optim.layers import LinearMap
from zoft.optim.noise import Key, normal


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

    `renew_every` is a number of steps, or None for once (ZO-Act). `power_steps` is K of the power iteration, or
    None for the exact singular value decomposition. With `read_only`, activations count only at the positions whose
    logits the loss reads (`zoft.optim.capture.Tokens`).
    """

    rank: int = 1
    power_steps: int | None = 3
    renew_every: int | None = 1
    read_only: bool = False
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

    def extract(self, layer: LinearMap, rows: Tensor, key: Key) -> Basis:
        """The basis of input activations `rows` [T, d_in]; the test matrix comes from noise stream `key`."""
        omega = normal((*key, "omega", layer.name), (len(rows), self.rank), device=rows.device)
        return leading_basis(rows, omega, self.power_steps)

    def __str__(self) -> str:
        often = {None: "once", 1: "every step"}.get(self.renew_every, f"every {self.renew_every} steps")
        return f"activation rank {self.rank}, {often}"


Subspace = Full | RandomLowRank | Activation


def _check(rank: int, renew_every: int) -> None:
    if rank < 1 or renew_every < 1:
        raise ValueError(f"rank and renew_every must be at least 1, not {rank} and {renew_every}")


def change_of_basis(old: Tensor, new: Tensor) -> Tensor:
    """P [r_old, r_new] such that ``C P new^T`` is the orthogonal projection of ``C old^T`` on the span of `new`."""
    return torch.linalg.solve(new.t() @ new, new.t() @ old).t()
