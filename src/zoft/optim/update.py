"""Third axis: what is done with the estimate?

An update rule turns estimates of layers' left factors C [d_out, r] (or of dense parameters) into steps of the same
shapes, and carries a layer's state along when its basis changes. `into` says where the steps go: ``"weights"`` writes
them into the weights, ``"coefficients"`` sums them beside the frozen weights (an adapter).

Rules take several layers at once, in torch's ``_foreach`` functions, as torch's own optimizers do: the arithmetic is
little, and the calls are what takes time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

State = dict[str, Tensor]
Tensors = list[Tensor] | tuple[Tensor, ...]
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

    def __call__(self, estimates: Tensors, states: Sequence[State]) -> Tensors:
        """The step for each of `estimates`; updates their `states` in place."""
        if self.stateless:
            return estimates
        for estimate, state in zip(estimates, states, strict=True):
            state.setdefault("mean", torch.zeros_like(estimate))
        means = [state["mean"] for state in states]
        torch._foreach_mul_(means, self.momentum)
        torch._foreach_add_(means, estimates, alpha=1 - self.momentum)
        return means

    def transport(self, state: State, change: Tensor) -> None:
        """Express `state` in a new basis: a factor C becomes ``C P``, P = `change` [r_old, r_new]."""
        if "mean" in state:
            state["mean"] = state["mean"] @ change

    def __str__(self) -> str:
        rule = "SGD" if self.stateless else f"SGD momentum {self.momentum:g}"
        return f"{rule}, into {self.into}"


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) with bias correction, on the left factor.

    With `factored`, a matrix has the means of its squares by row and by column, whose product over the mean of all
    stands for them, as in Adafactor (Shazeer and Stern 2018, arXiv 1804.04235, algorithm 1): half of the memory.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    into: Into = "weights"
    factored: bool = False
    stateless = False

    def __post_init__(self) -> None:
        for beta in self.betas:
            _check_unit("betas", beta)

    def __call__(self, estimates: Tensors, states: Sequence[State]) -> Tensors:
        """The step for each of `estimates`; updates their `states` in place."""
        for estimate, state in zip(estimates, states, strict=True):
            if not state:
                state["mean"] = torch.zeros_like(estimate)
                state.update((name, torch.zeros_like(part)) for name, part in self._held(estimate).items())
                state["steps"] = torch.zeros((), dtype=torch.float32)  # on the CPU: reading it waits for no device
        first, second = self.betas
        means = [state["mean"] for state in states]
        steps = [int(state["steps"].add_(1)) for state in states]
        torch._foreach_lerp_(means, estimates, 1 - first)
        held = [self._held(square) for square in torch._foreach_mul(estimates, estimates)]
        for name in held[0]:
            torch._foreach_lerp_([state[name] for state in states], [parts[name] for parts in held], 1 - second)
        moves = torch._foreach_div(means, [1 - first**step for step in steps])
        sizes = torch._foreach_div([self._squares(state) for state in states], [1 - second**step for step in steps])
        torch._foreach_sqrt_(sizes)
        torch._foreach_add_(sizes, self.eps)
        torch._foreach_div_(moves, sizes)
        return moves

    def transport(self, state: State, change: Tensor) -> None:
        """Express `state` in a new basis P = `change` [r_old, r_new]; squares as if coordinates were independent."""
        if state:
            state["mean"] = state["mean"] @ change
            state.update(self._held(self._squares(state) @ change.square()))

    def _held(self, squares: Tensor) -> State:
        """What is held of `squares`, by name."""
        if not self.factored:
            return {"square": squares}
        if squares.dim() == 1:
            return {"rows": squares, "columns": torch.ones_like(squares[:1])}
        return {"rows": squares.mean(-1, keepdim=True), "columns": squares.mean(-2, keepdim=True)}

    def _squares(self, state: State) -> Tensor:
        """What `state` holds of them, as a whole."""
        if not self.factored:
            return state["square"]
        rows, columns = state["rows"], state["columns"]
        mean = columns.mean(-1, keepdim=True).clamp(min=torch.finfo(columns.dtype).tiny)
        return rows * (columns / mean)  # in this order: the product of two small squares may be too small a number

    def __str__(self) -> str:
        return f"Adam, into {self.into}"


Update = SGD | Adam


def _check_unit(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), not {value}")
