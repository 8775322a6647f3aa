"""AGZO: activation-guided zeroth-order optimization (Lin et al. 2026, arXiv 2601.17261)."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from zoft.optim.estimator import Probes, Shape
from zoft.optim.optimizer import ZeroOrder
from zoft.optim.subspace import Activation
from zoft.optim.update import SGD


class AGZO(ZeroOrder):
    """Probes confined, each step, to the leading directions of every linear layer's input activations.

    The clean pass gives f(W) and, inside a hook, an orthonormal A [d_in, r] for each layer by `power_steps` power
    iterations; ``Delta = R A^T`` with R [d_out, r] standard normal; ``g = (f(W + eps Delta) - f(W)) / eps`` on the
    same batch; ``W <- W - lr g Delta`` (AGZO, algorithm 1). Two forwards a step. `two_sided` replaces f(W) in the
    difference by ``f(W - eps Delta)``, three forwards. The expectation of ``g Delta`` is ``grad f_eps(W) A A^T``, the
    gradient of the loss smoothed over the subspace, projected on it.

    Departures: parameters that are no linear layer stay frozen unless ``others="gaussian"``, where the paper perturbs
    them with dense noise; see docs/results.md.
    The default eps suits bfloat16 losses; the paper's 1e-7 drowns in rounding. As for every method, the
    activations of padding are left out, and half-precision weights are written with stochastic rounding.
    """

    paper = "arXiv 2601.17261"

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-4,
        eps: float = 3e-3,
        *,
        rank: int = 1,
        power_steps: int | None = 3,
        two_sided: bool = False,
        renew_every: int = 1,
        probes: int = 1,
        per_example: bool = False,
        leave_one_out: bool = False,
        shape: Shape | None = None,
        others: Literal["frozen", "gaussian"] = "frozen",
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            lr=lr,
            eps=eps,
            subspace=Activation(rank, power_steps, renew_every),
            estimator=Probes(probes, two_sided, 1.0, per_example, leave_one_out, shape),
            update=SGD(),
            others=others,
            **options,
        )
