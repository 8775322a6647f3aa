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
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zoft.optim.capture import Basis, OfLastInput, Tokens
from zoft.optim.layers import LinearMap, input_of, owners_of
from zoft.optim.noise import Key, normal_chunks, normals
from zoft.optim.pending import Sum
from zoft.optim.products import Term, WideLinear

LARGE = 1 << 17  # elements of an activation: below, products in half precision take longer to set up than to compute


@dataclass(frozen=True)
class Direction:
    """One random direction: ``R A^T`` for each linear map, replayed Gaussian noise for each dense parameter.

    `key` names the noise. R is standard normal, one for each of `examples` if there are several, and `confine` may
    restrict it to some of its columns. `factors` holds what of it has been asked for.
    """

    key: Key
    examples: int | None = None
    confine: Callable[[Tensor, Key], Tensor] | None = None
    factors: dict[str, Tensor] = field(default_factory=dict)
    _drawn: dict[str, Tensor] = field(default_factory=dict)

    def left(self, layer: LinearMap, basis: Tensor) -> Tensor:
        """R of `layer`, float32 [d_out, r] or [examples, d_out, r], for its `basis` [d_in, r]."""
        if layer.name not in self.factors:
            drawn = self._drawn.get(layer.name)
            if drawn is None or drawn.shape != self._shape(layer, basis):  # drawn for the basis before this one
                self._draw([layer], {layer.name: basis})
            self.factors[layer.name] = self._drawn[layer.name]
        return self.factors[layer.name]

    def draw(self, layers: Sequence[LinearMap], bases: dict[str, Tensor]) -> None:
        """Draw R of all these layers for their `bases`, together: what `left` would draw one by one, in less time."""
        self._draw([layer for layer in layers if layer.name not in self._drawn], bases)

    def _draw(self, layers: Sequence[LinearMap], bases: dict[str, Tensor]) -> None:
        by_device = groupby(layers, lambda layer: bases[layer.name].device)
        for device, some in ((device, list(some)) for device, some in by_device):
            keys = [(*self.key, layer.name) for layer in some]
            shapes = [self._shape(layer, bases[layer.name]) for layer in some]
            for layer, key, left in zip(some, keys, normals(keys, shapes, device=device), strict=True):
                self._drawn[layer.name] = left if self.confine is None else self.confine(left, key)

    def _shape(self, layer: LinearMap, basis: Tensor) -> tuple[int, ...]:
        each = (layer.d_out, basis.shape[1])
        return each if self.examples is None else (self.examples, *each)


class Factors(Protocol):
    """The factors F of side branches by map name: a dictionary, or what makes them as they are asked for."""

    def get(self, name: str, /) -> Tensor | None: ...


class SideBranches:
    """Adds ``(x A) F^T`` to the output of every map that has a basis A [d_in, r] and a factor F [d_out, r].

    Set `factors` (float32, by map name) and run the model inside ``with branches.attached():``, or `attach` them
    for good. The branch is computed in the output's dtype, or by the layer itself (`zoft.optim.products.WideLinear`).
    `active` are the maps that the latest bases are for; while bases are being renewed, `fresh` holds those seen so far.
    What is `pending` of a map's weight is added as well.

    A factor [n, d_out, r] acts on the n parts of the batch by themselves: its examples, or with `copies` the copies of
    a batch in it. Where a map's rows do not lie example by example (routed tokens), its first example's factor acts on
    all, and the map is in `shared`.

    Raises:
        ValueError: copies of a batch cannot be told apart in a map's rows.
    """

    def __init__(self, maps: Sequence[LinearMap]) -> None:
        self.maps, self.named = maps, {layer.name: layer for layer in maps}
        self.active: list[LinearMap] = []
        self.bases: dict[str, Tensor] = {}
        self.fresh: dict[str, Basis] = {}
        self.factors: Factors = {}
        self.pending: dict[str, Sum] = {}
        self.copies = 1
        self.shared: set[str] = set()
        self.tokens = Tokens()
        self._removals: list[Callable[[], None]] = []
        self._projected = OfLastInput[dict[int, tuple[Tensor, Tensor]]]()

    def attach(self) -> None:
        """Hook the branches into the model; does nothing if they are attached already."""
        if not self._removals:
            for layer in self.maps:
                for module in (*layer.modules, *layer.lookups):
                    self._removals.append(self._put(layer.name, module))

    def _put(self, name: str, module: nn.Module) -> Callable[[], None]:
        """Put the branch of map `name` into `module`; return what takes it out."""
        if not isinstance(module, WideLinear):
            return module.register_forward_hook(self._hook(name, module), with_kwargs=True).remove
        branch = partial(self._terms, name)
        module.branches.append(branch)
        return partial(module.branches.remove, branch)

    def detach(self) -> None:
        """Take the branches out of the model."""
        while self._removals:
            self._removals.pop()()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach for the duration of the block, and leave it as it was found."""
        already = bool(self._removals)
        self.attach()
        try:
            yield
        finally:
            if not already:
                self.detach()

    def basis(self, name: str) -> Tensor | None:
        """The basis of map `name`: as soon as the map has been called, that of the pass which renews it."""
        fresh = self.fresh.get(name)
        return fresh.vectors if fresh is not None else self.bases.get(name)

    def owner(self, name: str) -> str:
        """The first map that has the basis of map `name`, which several may share."""
        return next(other for other, basis in self.bases.items() if basis is self.bases[name])

    def move_bases(self, names: Sequence[str], moves: list[Tensor] | tuple[Tensor, ...]) -> None:
        """Add `moves` [d_in, r] to the bases of maps `names`, in place."""
        torch._foreach_add_([self.bases[name] for name in names], moves)
        self._projected = OfLastInput()  # products with what they were

    def _hook(self, name: str, module: nn.Module) -> Callable[..., Tensor | None]:
        add = self._lookup if isinstance(module, nn.Embedding) else self._linear
        # Others may return a tensor that they keep, or a view, which is not to be changed in place.
        fresh = isinstance(module, nn.Embedding) or type(module).forward is nn.Linear.forward

        def branch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
            terms = self._factors_of(name)
            if terms and (y.requires_grad or not fresh):  # a backward pass of someone else may read y
                y = y.clone(memory_format=torch.contiguous_format)
            for left, right in terms:
                y = add(name, input_of(args, kwargs), left, right, y)
            return y if terms else None

        return branch

    def _factors_of(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """Left and right factors of what is to be added to map `name` now."""
        factor, basis, pending = self.factors.get(name), self.basis(name), self.pending.get(name)
        found = [] if pending is None else [(pending.left, pending.right)]
        return found if factor is None or basis is None else [*found, (factor, basis)]

    def _lookup(self, name: str, index: Tensor, factor: Tensor, basis: Tensor, y: Tensor) -> Tensor:
        index = index.to(y.device)
        if factor.dim() == 3 and self._by_parts(name, index.unsqueeze(-1)):
            parts = torch.arange(len(factor), device=index.device).unsqueeze(1)
            rows = factor[parts, index.reshape(len(factor), -1)]
        else:
            rows = self._one(factor)[index]
        return y + (rows @ basis.t()).to(y.dtype).view(y.shape)

    def _linear(self, name: str, x: Tensor, factor: Tensor, basis: Tensor, y: Tensor) -> Tensor:
        projected, left = self._term(name, x.to(y.device), factor, basis, y.dtype)
        if left.dim() == 3:
            return _add_product(y.view(len(left), -1, y.shape[-1]), projected, left.mT.to(y.dtype)).view(y.shape)
        return _add_product(y, projected, left.t().to(y.dtype))

    def _terms(self, name: str, x: Tensor) -> list[Term]:
        """What is to be added to the output of map `name` for its input `x`."""
        return [self._term(name, x, *factors, torch.float32) for factors in self._factors_of(name)]

    def _term(self, name: str, x: Tensor, factor: Tensor, basis: Tensor, dtype: torch.dtype) -> Term:
        projected = self.project(x, basis, dtype).to(dtype)
        if factor.dim() == 3 and self._by_parts(name, projected):
            return projected.reshape(len(factor), -1, projected.shape[-1]), factor
        return projected, self._one(factor)

    def _by_parts(self, name: str, x: Tensor) -> bool:
        """Whether the rows of `x` lie example by example."""
        if self.tokens.by_example(x) is not None:
            return True
        if self.copies > 1:
            raise ValueError(f"copies of a batch cannot be told apart in layer {name!r}: run the probes apart")
        self.shared.add(name)
        return False

    def _one(self, factor: Tensor) -> Tensor:
        return factor if factor.dim() == 2 else factor[0]

    def project(self, x: Tensor, basis: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``x A``, in `dtype` or more precisely, computed once for layers that share both."""
        known = self._projected.get(x, dict)
        if id(basis) not in known:
            least = torch.float32 if x.numel() < LARGE else dtype or x.dtype
            exact = torch.promote_types(x.dtype, least)
            known[id(basis)] = basis, x.to(exact) @ basis.to(exact)  # while the basis is held, its number is its own
        return known[id(basis)][1]


def _add_product(y: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """``y + x factor``, in place; [..., n, r] times [r, d] or as many of them as x has leading ones."""
    if factor.shape[-2] == 1 and y.numel() < LARGE:
        return y.addcmul_(x, factor)
    if factor.dim() == 3:
        return y.baddbmm_(x, factor)
    return y.flatten(0, -2).addmm_(x.flatten(0, -2), factor).view(y.shape)


@contextmanager
def lent(model: nn.Module, parameters: dict[str, nn.Parameter], scale: float, key: Key) -> Iterator[set[str]]:
    """While open, each of `parameters` is ``p + scale z`` whenever the module that owns it runs.

    z is the noise of stream ``(*key, name)``, the same for every owner of a tied parameter. Of a parameter in shards,
    it is what has been gathered of them for the forward. Yields the names of the parameters whose owners have been
    called so far.
    """
    used: set[str] = set()
    lent_out: set[str] = set()
    with ExitStack() as handles:
        for module, places in owners_of(model, parameters):
            loan = _Loan(places, scale, key, used, lent_out)
            # The hook that puts back runs even when the forward raises, but not when Ctrl-C interrupts it.
            handles.callback(loan.end)
            handles.callback(module.register_forward_hook(loan.give_back, always_call=True).remove)
            handles.callback(module.register_forward_pre_hook(loan.take).remove)
        yield used


class _Loan:
    def __init__(
        self, places: dict[str, tuple[nn.Module, str]], scale: float, key: Key, used: set[str], lent: set[str]
    ) -> None:
        self.places, self.scale, self.key, self.used, self.lent = places, scale, key, used, lent
        self.originals: list[dict[str, tuple[Tensor, Tensor]]] = []  # one entry a call: modules nest

    def take(self, *_: Any) -> None:
        self.originals.append({})
        for name, (holder, own) in self.places.items():
            self.used.add(name)
            if name not in self.lent:  # else an enclosing module holds it too, and has it on loan
                self.lent.add(name)
                parameter = holder._parameters[own]
                assert parameter is not None
                self.originals[-1][name] = parameter, parameter.data
                parameter.data = shifted(parameter.data, self.scale, (*self.key, name))

    def give_back(self, *_: Any) -> None:
        for name, (parameter, original) in self.originals.pop().items():
            parameter.data = original
            self.lent.remove(name)

    def end(self) -> None:
        while self.originals:
            self.give_back()


def shifted(tensor: Tensor, scale: float, key: Key) -> Tensor:
    """``tensor + scale z`` in `tensor`'s dtype, z the noise of stream `key`, without a float32 copy of it all."""
    out = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    source, target = tensor.reshape(-1), out.view(-1)
    for part, z in normal_chunks(key, tensor.numel(), device=tensor.device):
        target[part] = torch.add(source[part], z, alpha=scale)  # in float32 or better
    return out
