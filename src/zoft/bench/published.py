"""MeZO as published (Malladi et al. 2023, arXiv 2305.17333, algorithm 1): what the speed of others is held against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class PublishedMeZO:
    """Every trainable parameter is perturbed in place, by noise that torch's generator draws anew each time.

    ``z ~ N(0, I)`` in the parameters' dtype, ``g = (f(W + eps z) - f(W - eps z)) / (2 eps)``, ``W <- W - lr g z``: four
    passes over the weights a step, whose rounding stays behind. Sets torch's global seed, as the authors' code does.
    """

    def __init__(self, model: nn.Module, lr: float = 1e-6, eps: float = 1e-3, seed: int = 0) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.lr, self.eps, self.seed = lr, eps, seed

    @torch.no_grad()
    def step(self, loss: Callable[[], Tensor]) -> float:
        """Move once along `loss`, a forward pass that returns a scalar; returns the projected gradient g."""
        self.seed += 1
        self._add_noise(self.eps)
        ahead = float(loss())
        self._add_noise(-2 * self.eps)
        behind = float(loss())
        self._add_noise(self.eps)
        gradient = (ahead - behind) / (2 * self.eps)
        self._add_noise(-self.lr * gradient)
        return gradient

    def _add_noise(self, scale: float) -> None:
        """``W += scale z``, the same z for all calls of a step."""
        torch.manual_seed(self.seed)
        for parameter in self.parameters:
            parameter.add_(torch.randn_like(parameter), alpha=scale)
