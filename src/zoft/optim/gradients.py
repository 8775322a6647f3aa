"""What a map learns from its inputs and the error at its outputs: the gradient in its coefficients, and in its basis.

With G the gradient in W of a map ``W + C A^T``, the sum of ``e x^T`` over tokens, that in C is ``G A``, and that in A
is ``G^T C``. Both are taken without G: ``e^T (x A)`` and ``x^T (e C)``. Training both is LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from zoft.optim.capture import OfLastInput
from zoft.optim.estimator import Estimate, add_to
from zoft.optim.placement import unrounded
from zoft.optim.probe import SideBranches


@dataclass(frozen=True)
class Gradients:
    """Adds to `estimate` what the maps of `branches` learn; with `bases`, these learn too."""

    branches: SideBranches
    estimate: Estimate
    bases: bool
    _by_basis: OfLastInput[dict[int, tuple[Tensor, Tensor]]] = field(default_factory=OfLastInput, repr=False)
    _by_factor: OfLastInput[dict[str, Tensor]] = field(default_factory=OfLastInput, repr=False)

    def keep(self, name: str, x: Tensor) -> Tensor | None:
        """What `add` takes of the inputs `x` [rows, d_in] of map `name`: these, or float32 [rows, r] of them.

        None if the map is not trained.
        """
        basis = self.branches.basis(name)
        if basis is None:
            return None
        return x if self.bases else self._coordinates(x, basis)

    def add(self, name: str, kept: Tensor, error: Tensor) -> None:
        """Add what map `name` learns from what was `kept` and the `error` float32 [rows, d_out] at its outputs."""
        basis = self.branches.basis(name)
        assert basis is not None
        coordinates = self._coordinates(kept, basis) if self.bases else kept
        with unrounded(basis.device):
            add_to(self.estimate.factors, name, error.t() @ coordinates)
            at_coordinates = self.by_factor(name, error) if self.bases else None
            if at_coordinates is not None:
                x = kept.to(basis.device).float()
                add_to(self.estimate.bases, self.branches.owner(name), x.t() @ at_coordinates)

    def by_factor(self, name: str, error: Tensor) -> Tensor | None:
        """``e C`` [rows, r], the `error` at map `name`'s coordinates; None while it has no coefficients."""
        factor, known = self.branches.factors.get(name), self._by_factor.get(error, dict)
        if factor is not None and name not in known:
            known[name] = error @ factor
        return known.get(name)

    def _coordinates(self, x: Tensor, basis: Tensor) -> Tensor:
        """``x A``, float32 [rows, r], computed once for maps that share both."""
        known = self._by_basis.get(x, dict)
        if id(basis) not in known:
            with unrounded(basis.device):
                known[id(basis)] = basis, x.to(basis.device).float() @ basis  # while it is held, its number is its own
        return known[id(basis)][1]
