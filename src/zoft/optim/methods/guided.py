"""Guided: our own method, the left factor computed from the output error (zoft.optim.guided)."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from zoft.optim.guided import Guided as GuidedEstimator
from zoft.optim.methods.zoact import HEADS
from zoft.optim.optimizer import ZeroOrder
from zoft.optim.subspace import Activation
from zoft.optim.update import Adam


class Guided(ZeroOrder):
    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        *,
        rank: int = 16,
        power_steps: int | None = None,
        renew_every: int | None = None,
        feed_forward: bool = True,
        into: Literal["weights", "coefficients"] = "coefficients",
        exclude: tuple[str, ...] = HEADS,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            lr=lr,
            subspace=Activation(rank, power_steps, renew_every, read_only=True),
            estimator=GuidedEstimator(feed_forward),
            update=Adam(into=into),
            exclude=exclude,
            **options,
        )
