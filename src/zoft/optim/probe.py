"""Perturb the forward, not the weights.

A low-rank perturbation ``W + s R A^T`` of a linear map is a side branch on its output, ``y + s (x A) R^T``: no
weight is written, restoring is exact by construction, and any layer that maps x to y can be probed, whatever the
format of its weight. A dense perturbation ``p + s z`` is lent to the module that owns the parameter while this
module runs: the original tensor is put aside and put back, never written, and the noise lives one module at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoft.optim.capture import OfLastInput, Tokens
from zoft.optim.layers import LinearMap, input_of, owners_of
from zoft.optim.noise import Key, normal, normal_chunks


@dataclass(frozen=True)
class Direction:
    """One random direction: ``R A^T`` for each linear map, replayed Gaussian noise for each dense parameter.

    `key` names the noise; `factors` holds R, float32 [d_out, r], by map name, or [batch, d_out, r] if every example of
    the batch has a direction of its own.
    """

    key: Key
    factors: dict[str, Tensor] = field(default_factory=dict)


def draw(key: Key, maps: Sequence[LinearMap], bases: dict[str, Tensor], examples: int | None = None) -> Direction:
    """The direction named `key`, R standard normal for every map that has a basis; one for each of `examples`."""
    leading = () if examples is None else (examples,)
    return Direction(
        key,
        {
            m.name: normal((*key, m.name), (*leading, m.d_out, bases[m.name].shape[1]), device=bases[m.name].device)
            for m in maps
            if m.name in bases
        },
    )


class SideBranches:
    """Adds ``(x A) F^T`` to the output of every map that has a basis A [d_in, r] and a factor F [d_out, r].

    Set `factors` (float32, by map name) and run the model inside ``with branches.attached():``, or `attach` them
    for good. The branch is computed in the output's dtype. `active` are the maps that the latest bases are for.

    A factor [batch, d_out, r] acts on each example by itself. Where a map's rows do not lie example by example (routed
    tokens, an embedding), its first example's factor acts on all, and the map is in `shared`.
    """

    def __init__(self, maps: Sequence[LinearMap]) -> None:
        self.maps = maps
        self.active: list[LinearMap] = []
        self.bases: dict[str, Tensor] = {}
        self.factors: dict[str, Tensor] = {}
        self.used: set[str] = set()
        self.shared: set[str] = set()
        self.tokens = Tokens()
        self._handles: list[Any] = []
        self._projected = OfLastInput[tuple[Tensor, Tensor]]()

    def attach(self) -> None:
        """Hook the branches into the model; does nothing if they are attached already."""
        if not self._handles:
            for layer in self.maps:
                for module in (*layer.modules, *layer.lookups):
                    self._handles.append(module.register_forward_hook(self._hook(layer.name, module), with_kwargs=True))

    def detach(self) -> None:
        """Take the branches out of the model."""
        while self._handles:
            self._handles.pop().remove()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach for the duration of the block, and leave it as it was found."""
        already = bool(self._handles)
        self.attach()
        try:
            yield
        finally:
            if not already:
                self.detach()

    def _hook(self, name: str, module: nn.Module) -> Callable[..., Tensor | None]:
        add = self._lookup if isinstance(module, nn.Embedding) else self._linear

        def branch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
            factor = self.factors.get(name)
            if factor is None:
                return None
            self.used.add(name)
            return y + add(name, input_of(args, kwargs), factor, y)

        return branch

    def _lookup(self, name: str, index: Tensor, factor: Tensor, y: Tensor) -> Tensor:
        return (self._one(name, factor)[index] @ self.bases[name].t()).to(y.dtype)

    def _linear(self, name: str, x: Tensor, factor: Tensor, y: Tensor) -> Tensor:
        projected = self._project(x, self.bases[name]).to(y.dtype)
        each = self.tokens.by_example(projected) if factor.dim() == 3 else None
        if each is not None:
            return torch.bmm(each, factor.transpose(1, 2).to(y.dtype)).view(y.shape)
        return projected @ self._one(name, factor).t().to(y.dtype)

    def _one(self, name: str, factor: Tensor) -> Tensor:
        if factor.dim() == 2:
            return factor
        self.shared.add(name)
        return factor[0]

    def _project(self, x: Tensor, basis: Tensor) -> Tensor:
        """``x A``, computed once for layers that share both."""
        known, value = self._projected.get(x, lambda: (basis, x @ basis.to(x.dtype)))
        return value if known is basis else x @ basis.to(x.dtype)


@contextmanager
def lent(model: nn.Module, parameters: dict[str, nn.Parameter], scale: float, key: Key) -> Iterator[set[str]]:
    """While open, each of `parameters` is ``p + scale z`` whenever the module that owns it runs.

    z is the noise of stream ``(*key, name)``, the same for every owner of a tied parameter. Yields the names of
    the parameters whose owners have been called so far.
    """
    used: set[str] = set()
    lent_out: set[str] = set()
    with ExitStack() as handles:
        for module, names in owners_of(model, parameters):
            loan = _Loan({name: parameters[name] for name in names}, scale, key, used, lent_out)
            # The hook that puts back runs even when the forward raises.
            handles.callback(module.register_forward_hook(loan.give_back, always_call=True).remove)
            handles.callback(module.register_forward_pre_hook(loan.take).remove)
        yield used


class _Loan:
    def __init__(
        self, parameters: dict[str, nn.Parameter], scale: float, key: Key, used: set[str], lent: set[str]
    ) -> None:
        self.parameters, self.scale, self.key, self.used, self.lent = parameters, scale, key, used, lent
        self.originals: list[dict[str, Tensor]] = []  # one entry a call: modules nest

    def take(self, *_: Any) -> None:
        self.originals.append({})
        for name, parameter in self.parameters.items():
            self.used.add(name)
            if name not in self.lent:  # else an enclosing module holds it too, and has it on loan
                self.lent.add(name)
                self.originals[-1][name] = parameter.data
                parameter.data = shifted(parameter.data, self.scale, (*self.key, name))

    def give_back(self, *_: Any) -> None:
        for name, original in self.originals.pop().items():
            self.parameters[name].data = original
            self.lent.remove(name)


def shifted(tensor: Tensor, scale: float, key: Key) -> Tensor:
    """``tensor + scale z`` in `tensor`'s dtype, z the noise of stream `key`, without a float32 copy of it all."""
    out = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    source, target = tensor.reshape(-1), out.view(-1)
    for part, z in normal_chunks(key, tensor.numel(), device=tensor.device):
        target[part] = torch.add(source[part], z, alpha=scale)  # in float32 or better
    return out
