"""MeZO: fine-tuning with the memory of inference (Malladi et al. 2023, arXiv 2305.17333)."""

from __future__ import annotations

from typing import Any

from torch import nn

from zoft.optim.estimator import Probes, Shape
from zoft.optim.optimizer import ZeroOrder
from zoft.optim.subspace import Full
from zoft.optim.update import SGD


class MeZO(ZeroOrder):
    """Two-sided SPSA over all trainable parameters (MeZO, algorithm 1).

    ``z ~ N(0, I)``, ``g = (f(W + eps z) - f(W - eps z)) / (2 eps)``, ``W <- W - lr g z``; two forwards a step. z is
    replayed from its name and never stored. `probes` directions are averaged (the paper's n-SPSA).

    Departure: the paper perturbs the weights in place, three passes over them a step, and leaves their rounding
    behind; here each module computes with a perturbed copy of its own weights, so that they are restored exactly.
    Half-precision weights are written with stochastic rounding (`zoft.optim.write`), where the authors' code rounds
    to nearest.
    """

    paper = "arXiv 2305.17333"

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        probes: int = 1,
        shape: Shape | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            lr=lr,
            eps=eps,
            subspace=Full(),
            estimator=Probes(probes, two_sided=True, shape=shape),
            update=SGD(),
            **options,
        )
