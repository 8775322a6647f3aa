"""LOZO: low-rank zeroth-order fine-tuning (Chen et al. 2024, arXiv 2410.07698)."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from zoft.optim.estimator import Probes, Shape
from zoft.optim.optimizer import ZeroOrder
from zoft.optim.subspace import RandomLowRank
from zoft.optim.update import SGD


class LOZO(ZeroOrder):
    """Two-sided probes along random low-rank directions whose right factor is kept for some steps.

    For each matrix ``Delta = U V^T`` with U [d_out, r] drawn every step and V [d_in, r] every `renew_every` steps,
    both standard normal; ``g = (f(W + eps Delta) - f(W - eps Delta)) / (2 eps)``; ``W <- W - lr g Delta / r``. The
    division by the rank is the paper's (its definition of the estimator); the authors' code leaves it to lr.
    Embeddings are matrices too; norms and biases get dense Gaussian noise. With `momentum` b (LOZO-M) the left
    factor is averaged over steps, ``M <- b M + (1 - b) g U``, and projected onto the new V when V changes.

    Departures: dense noise enters the step without the division by r, and as for every method half-precision weights
    are written with stochastic rounding.
    """

    paper = "arXiv 2410.07698"

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        rank: int = 2,
        renew_every: int = 100,
        momentum: float = 0.0,
        probes: int = 1,
        per_example: bool = False,
        shape: Shape | None = None,
        others: Literal["frozen", "gaussian"] = "gaussian",
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            lr=lr,
            eps=eps,
            subspace=RandomLowRank(rank, renew_every),
            estimator=Probes(probes, two_sided=True, scale=rank, per_example=per_example, shape=shape),
            update=SGD(momentum),
            others=others,
            **options,
        )
