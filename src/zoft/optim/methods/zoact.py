"""ZO-Act: zeroth-order training of activation-space coefficients (Dong et al. 2026, arXiv 2607.01125)."""

from __future__ import annotations

from typing import Any

from torch import nn

from zoft.optim.estimator import Probes, Shape
from zoft.optim.optimizer import ZeroOrder
from zoft.optim.subspace import Activation
from zoft.optim.update import SGD, Adam

HEADS = ("lm_head", "*.lm_head", "embed_out", "*.embed_out")


class ZOAct(ZeroOrder):
    """Coefficients over a basis computed once, trained with Adam beside frozen weights.

    The first clean pass is the calibration: it gives each linear layer (but the output head) V [d_in, r], the
    leading directions of its input activations, and V stays. The layer computes ``x W^T + (x V) C^T`` with C
    [d_out, r] in float32, zero at first. Each step draws `probes` Gaussian directions Z in coefficient space, averages
    their finite differences ``g Z``, and hands the mean to Adam (or SGD with ``adam=False``). Weights are only read, so
    they may be quantized. One-sided by default: 1 + probes forwards; `two_sided`: 2 probes forwards.

    `calibrate` takes the basis from other batches than the first that is trained on.

    Departures: V comes from power iteration (``power_steps=None`` for the singular value decomposition that the paper
    uses). Sources disagree on which finite difference the paper takes; both are here.
    """

    paper = "arXiv 2607.01125"

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        eps: float = 3e-3,
        *,
        rank: int = 1,
        power_steps: int | None = 8,
        probes: int = 1,
        per_example: bool = False,
        leave_one_out: bool = False,
        shape: Shape | None = None,
        two_sided: bool = False,
        adam: bool = True,
        exclude: tuple[str, ...] = HEADS,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            lr=lr,
            eps=eps,
            subspace=Activation(rank, power_steps, renew_every=None),
            estimator=Probes(probes, two_sided, 1.0, per_example, leave_one_out, shape),
            update=Adam(into="coefficients") if adam else SGD(into="coefficients"),
            exclude=exclude,
            **options,
        )
