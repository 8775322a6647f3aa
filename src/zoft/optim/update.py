"""Third axis: what is done with the estimate?

An update rule turns the estimate of one layer's left factor C [d_out, r] (or of a dense parameter) into a step of
the same shape, and carries its state along when the layer's basis changes. `into` says where the steps go:
``"weights"`` writes them into the weights, ``"coefficients"`` sums them beside the frozen weights (an adapter).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

State = dict[str, Tensor]
Into = Literal["weights", "coefficients"]


@dataclass(frozen=True)
class SGD:
    """The estimate itself, or with `momentum` b its running mean ``m = b m + (1 - b) C`` (LOZO-M's form)."""

    momentum: float = 0.0
    into: Into = "weights"

    def __post_init__(self) -> None:
        _check_unit("momentum", self.momentum)

    @property
    def stateless(self) -> bool:
        return self.momentum == 0.0

    def __call__(self, estimate: Tensor, state: State) -> Tensor:
        """The step for `estimate`; updates `state` in place."""
        if self.stateless:
            return estimate
        mean = state.setdefault("mean", estimate.new_zeros(estimate.shape))
        return mean.mul_(self.momentum).add_(estimate, alpha=1 - self.momentum)

    def transport(self, state: State, change: Tensor) -> None:
        """Express `state` in a new basis: a factor C becomes ``C P``, P = `change` [r_old, r_new]."""
        if "mean" in state:
            state["mean"] = state["mean"] @ change

    def __str__(self) -> str:
        rule = "SGD" if self.stateless else f"SGD momentum {self.momentum:g}"
        return f"{rule}, into {self.into}"


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) with bias correction, on the left factor."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    into: Into = "weights"
    stateless = False

    def __post_init__(self) -> None:
        for beta in self.betas:
            _check_unit("betas", beta)

    def __call__(self, estimate: Tensor, state: State) -> Tensor:
        """The step for `estimate`; updates `state` in place."""
        if not state:
            state.update(
                mean=estimate.new_zeros(estimate.shape),
                square=estimate.new_zeros(estimate.shape),
                steps=torch.zeros(()),  # on the CPU: reading it waits for no device
            )
        first, second = self.betas
        steps = int(state["steps"].add_(1))
        mean = state["mean"].lerp_(estimate, 1 - first) / (1 - first**steps)
        square = state["square"].lerp_(estimate.square(), 1 - second) / (1 - second**steps)
        return mean.div_(square.sqrt_().add_(self.eps))

    def transport(self, state: State, change: Tensor) -> None:
        """Express `state` in a new basis P = `change` [r_old, r_new]; squares as if coordinates were independent."""
        if state:
            state["mean"] = state["mean"] @ change
            state["square"] = state["square"] @ change.square()

    def __str__(self) -> str:
        return f"Adam, into {self.into}"


Update = SGD | Adam


def _check_unit(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), not {value}")
