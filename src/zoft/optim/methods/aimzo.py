"""AIM-ZO: a maintained activation subspace probed by a population (Xie et al. 2026)."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from zoft.optim.estimator import Probes, Shape
from zoft.optim.optimizer import ZeroOrder
from zoft.optim.subspace import Maintained
from zoft.optim.update import SGD


class AIMZO(ZeroOrder):
    """`probes` one-sided probes around one centre, each along a part of a wide activation basis kept across steps.

    The clean pass moves each layer's basis A [d_in, rank] by one step of Oja's rule; each probe draws R [d_out, rank]
    on `active` columns, `shared` of which are the same for all, scaled to the norm sqrt(active d_out); the estimate is
    ``1 / ((N - 1) eps) sum of (f_i - mean f) R_i A^T`` over the N probes; SGD writes it into the weights. 1 + probes
    forwards a step.

    Departures: the paper's rate of Oja's rule, `active`, `shared` and step sizes are not known to us; ours are ours
    (see `zoft doctor` for lr and eps).
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-4,
        eps: float = 3e-3,
        *,
        rank: int = 128,
        active: int = 16,
        shared: int = 8,
        rate: float = 1.0,
        power_steps: int | None = 3,
        probes: int = 4,
        per_example: bool = False,
        shape: Shape | None = None,
        others: Literal["frozen", "gaussian"] = "frozen",
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            lr=lr,
            eps=eps,
            subspace=Maintained(rank, power_steps, active=active, shared=shared, rate=rate),
            estimator=Probes(probes, per_example=per_example, leave_one_out=True, shape=shape),
            update=SGD(),
            others=others,
            **options,
        )
