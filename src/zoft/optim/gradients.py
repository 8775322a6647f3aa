"""What a map learns from its inputs and the error at its outputs: the gradient in its coefficients, and in its basis.

With G the gradient in W of a map ``W + C A^T``, the sum of ``e x^T`` over tokens, that in C is ``G A``, and that in A
is ``G^T C``. Both are taken without G: ``e^T (x A)`` and ``x^T (e C)``. Training both is LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from zoft.optim.estimator import Estimate
from zoft.optim.placement import unrounded
from zoft.optim.probe import SideBranches


@dataclass(frozen=True)
class Gradients:
    """Adds to `estimate` what the maps of `branches` learn; with `bases`, these learn too."""

    branches: SideBranches
    estimate: Estimate
    bases: bool

    def keep(self, name: str, x: Tensor) -> Tensor | None:
        """What `add` takes of the inputs `x` [rows, d_in] of map `name`: these, or float32 [rows, r] of them.

        None if the map is not trained.
        """
        basis = self.branches.basis(name)
        if basis is None or self.bases:
            return None if basis is None else x
        with unrounded(basis.device):
            return x.to(basis.device).float() @ basis

    def add(self, name: str, kept: Tensor, error: Tensor) -> None:
        """Add what map `name` learns from what was `kept` and the `error` float32 [rows, d_out] at its outputs."""
        basis, factor = self.branches.basis(name), self.branches.factors.get(name)
        assert basis is not None
        with unrounded(basis.device):
            if not self.bases:
                self.estimate.add_factor(name, error.t() @ kept)
                return
            x = kept.to(basis.device).float()
            self.estimate.add_factor(name, error.t() @ (x @ basis))
            if factor is not None:
                self.estimate.add_basis(self.branches.owner(name), x.t() @ (error @ factor))
