"""From activations to bases, inside the forward pass.

The gradient of a linear layer is ``Q H^T``: its rows lie in the span of the layer's input activations H
(AGZO, arXiv 2601.17261, section 3). A hook sees each input once, takes its leading directions, and lets it go,
so memory does not grow with the number of layers.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoft.optim.layers import LinearMap, input_of
from zoft.optim.placement import unrounded
from zoft.optim.shelf import Shelf

T = TypeVar("T")
Rows = Tensor | slice  # int64 indices in order, or all of them

ROUNDING = 2e-3  # of the largest singular value, a quarter of bfloat16's epsilon
ROWS = 8192  # activation rows converted to float32 at a time


class Basis(NamedTuple):
    """Orthonormal `vectors` float32 [d_in, r] and their singular values `sigma` float32 [r]."""

    vectors: Tensor
    sigma: Tensor


def leading_basis(
    rows: Tensor, omega: Tensor, power_steps: int | None, total: Callable[[Tensor], Tensor] = lambda part: part
) -> Basis:
    """Leading left singular vectors of ``H = rows^T``, where `rows` is [T, d_in] in any floating dtype.

    Randomised power iteration (AGZO, algorithm 1): ``Q = qr(H omega)``, then `power_steps` times
    ``Q = qr(H (H^T Q))``, with `omega` float32 [T, r], r at most T; the rank is at most d_in. ``power_steps=None``
    takes the exact singular value decomposition instead. Products are taken in float32, `ROWS` rows at a time. Where H
    lies in parts, `rows` and `omega` are those of one, and `total` sums a product over all.
    """
    rank = min(omega.shape[1], rows.shape[1])
    if len(rows) <= ROWS:
        rows = rows.float()  # once for all products
    if power_steps is None:
        _, sigma, vectors = _svd(rows.float())
        return Basis(vectors[:rank].t().contiguous(), sigma[:rank])
    parts = zip(rows.split(ROWS), omega[:, :rank].split(ROWS), strict=True)
    product = _sum(part.float().t() @ noise for part, noise in parts)
    q, triangle = torch.linalg.qr(total(product))
    for _ in range(power_steps):
        q, triangle = torch.linalg.qr(total(covariance_product(rows, q)))
    sigma = triangle.diagonal().abs()  # of H omega for no step at all, of H H^T = sigma^2 after some
    return Basis(q, sigma.sqrt() if power_steps else sigma)


def whitened(basis: Basis) -> Tensor:
    """Its vectors at such lengths, up to 1, that activations are as large along all as along the least.

    Directions along which there is nothing but the rounding of half precision keep their length.
    """
    sigma = basis.sigma
    if not len(sigma):
        return basis.vectors
    least = sigma.where(sigma > ROUNDING * sigma.max(), math.inf).min()
    return basis.vectors * (least / sigma).clamp(max=1.0)


def covariance_product(rows: Tensor, vectors: Tensor) -> Tensor:
    """``H H^T V`` in float32, for ``H = rows^T`` and V = `vectors` [d_in, r]."""
    return _sum(part.t() @ (part @ vectors) for part in map(Tensor.float, rows.split(ROWS)))


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)


def merge(first: Basis, second: Basis) -> Basis:
    """Leading directions of two sets of activations together, from the bases of each (as if stacked)."""
    rank = max(first.vectors.shape[1], second.vectors.shape[1])
    weighted = torch.cat((first.vectors * first.sigma, second.vectors * second.sigma), dim=1)
    u, sigma, _ = _svd(weighted)
    return Basis(u[:, :rank].contiguous(), sigma[:rank])


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin singular value decomposition; not a number where `matrix` is not finite, which LAPACK refuses."""
    finite = matrix.isfinite().all()
    u, sigma, vh = torch.linalg.svd(matrix.nan_to_num(0.0, 0.0, 0.0), full_matrices=False)
    return u.where(finite, torch.nan), sigma.where(finite, torch.nan), vh.where(finite, torch.nan)


class OfLastInput(Generic[T]):
    """Remembers one function value per input tensor: q, k and v are called with the same one, gate and up too."""

    def __init__(self) -> None:
        self._input: Callable[[], Tensor | None] = lambda: None
        self._version = 0
        self._value: T | None = None

    def get(self, x: Tensor, compute: Callable[[], T]) -> T:
        version = 0 if x.is_inference() else x._version  # counts changes in place
        if self._input() is not x or self._version != version or self._value is None:
            self._input, self._version, self._value = weakref.ref(x), version, compute()
        return self._value


class Tokens:
    """Knows which rows of an activation are tokens, and which of them the loss reads.

    From the keyword arguments that the root module was called with: ``attention_mask`` [batch, tokens], zero at
    padding, and ``logits_to_keep``, the number of final positions whose logits are computed (all without it).
    Activations of another leading shape (tokens already selected, routed or flattened differently) are taken whole.

    With `most`, the loss counts as reading no more than so many of them, those at the last places, of whatever example;
    with `everywhere`, as reading all.
    """

    def __init__(self, most: int | None = None, everywhere: bool = False) -> None:
        self._most, self._everywhere = most, everywhere
        self._shape: tuple[int, int] | None = None
        self._kept = 0  # final places whose logits are computed
        self._first = 0  # the first place that the loss reads, in any example
        self._tokens: Tensor | None = None  # indices into the flattened [batch * tokens], None for all
        self._read: Tensor | None = None  # int64 [rows, 2], example and place of the tokens that the loss reads

    def see(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask, keep = kwargs.get("attention_mask"), kwargs.get("logits_to_keep")
        self._shape = self._tokens = self._read = None
        given = (v for v in (*args, *kwargs.values()) if v is not mask)
        inputs = next((v for v in given if isinstance(v, Tensor) and v.dim() >= 2), None)
        if inputs is None:
            return
        features = inputs.is_floating_point() and inputs.dim() == 2
        batch, length = self._shape = (inputs.shape[0], 1 if features else inputs.shape[1])
        if isinstance(mask, Tensor) and mask.shape == self._shape:
            read = mask.bool()
            if not bool(read.all()):
                self._tokens = read.reshape(-1).nonzero().squeeze(1)
        else:
            read = torch.ones(batch, length, dtype=torch.bool, device=inputs.device)
        self._kept = keep if isinstance(keep, int) and keep else length
        if not self._everywhere:
            read = read & (torch.arange(length, device=read.device) >= length - self._kept)
        places = read.nonzero()
        if self._most is not None:
            latest = places[:, 1].argsort(descending=True, stable=True)[: self._most]
            places = places[latest.sort().values]
        self._read = places
        self._first = int(self._read[:, 1].min()) if len(self._read) else 0

    def rows(self, x: Tensor) -> Tensor:
        """`x` [..., d] as [rows, d] without padding."""
        flat = x.detach().reshape(-1, x.shape[-1])
        if self._shape is None or self._tokens is None:
            return flat
        same = x.shape[:-1] == self._shape or (x.dim() == 2 and len(x) == self._shape[0] * self._shape[1])
        return flat.index_select(0, self._tokens.to(x.device)) if same else flat

    def by_example(self, x: Tensor) -> Tensor | None:
        """`x` as [batch, rows, d], without copying; None if its rows do not lie example by example."""
        if self._shape is None:
            return None
        batch, length = self._shape
        if x.dim() == 2:
            return x.view(batch, length, -1) if len(x) == batch * length else None
        return x.flatten(1, -2) if len(x) == batch else None

    def read(self, x: Tensor | None) -> Tensor | None:
        """The rows of `x` that the loss reads, [rows, d]; `x` is [batch, tokens, d], or has its final tokens only.

        None if `x` is of another shape.
        """
        places = None if x is None else self.places(x.shape)
        if x is None or places is None:
            return None
        return x.detach().flatten(0, -2).index_select(0, places.to(x.device))

    def places(self, shape: torch.Size) -> Tensor | None:
        """Where in ``x.flatten(0, -2)``, for an x of this `shape`, the rows are that `read` gives; None if it does."""
        if self._shape is None or self._read is None or len(shape) not in (2, 3):
            return None
        batch, length = self._shape
        if len(shape) == 2 and shape[0] == batch * length:
            shape = torch.Size((batch, length, shape[1]))
        if len(shape) == 2 or shape[0] != batch or not length - self._first <= shape[1] <= length:
            return None
        return self._read[:, 0] * shape[1] + self._read[:, 1] - (length - shape[1])

    def some(self, rows: Rows) -> Tokens:
        """Itself for all, else what it knows now, as if the loss read only `rows` of the tokens that it reads."""
        if isinstance(rows, slice):
            return self
        found = copy(self)
        if self._read is not None:
            found._read = self._read[rows.to(self._read.device)]
        return found

    def spread(self, x: Tensor) -> Tensor:
        """`x` [batch, K, d] of the K final tokens whose logits are computed, with zeros for those before them."""
        if self._shape is None or x.shape[:-1] != (self._shape[0], self._kept):
            return x
        return F.pad(x, (0, 0, self._shape[1] - self._kept, 0))

    @property
    def count(self) -> int:
        """How many tokens the loss reads."""
        return 0 if self._read is None else len(self._read)

    def window(self, batch: int, length: int) -> tuple[Tensor, int] | None:
        """The examples and places that the loss reads, int64 [rows, 2], and how many final places hold them all.

        Places are counted from the first of those. None if the tokens are not `batch` times `length`.
        """
        if self._read is None or self._shape != (batch, length):
            return None
        return self._read - self._read.new_tensor([0, self._first]), length - self._first


@contextmanager
def captured(
    model: nn.Module,
    maps: Sequence[LinearMap],
    extract: Callable[[LinearMap, Tensor], Basis],
    read_only: bool = False,
    copies: int = 1,
) -> Iterator[dict[str, Basis]]:
    """While open, a forward of `model` fills the yielded dictionary with the basis of each map that was used.

    `extract` gets a map and its input rows [T, d_in], with `read_only` those that the loss reads; maps called with the
    same tensor share one result, and several calls of one map are merged. With `copies`, the model runs on that many
    copies of the batch (`zoft.optim.copies.repeated`, opened later than this), and the first counts.

    Raises:
        ValueError: copies cannot be told apart in a map's input, or a map is called twice on them.
    """
    bases: dict[str, Basis] = {}
    merged: list[Basis] = []  # the last two and what they came to, which several maps share
    tokens, last, shelf = Tokens(), OfLastInput[Basis](), Shelf()

    def rows(layer: LinearMap, x: Tensor) -> Tensor:
        if copies > 1:
            x = x[: len(x) // copies]
            if tokens.by_example(x) is None:
                raise ValueError(
                    f"copies of a batch cannot be told apart in layer {layer.name!r}: run the probes apart"
                )
        read = tokens.read(x) if read_only else None
        return tokens.rows(x) if read is None else read

    def extracted(layer: LinearMap, x: Tensor) -> Basis:
        device = layer.device  # a hook of the module's own may move x there only after this
        with unrounded(device):
            vectors, sigma = extract(layer, rows(layer, x).to(device))
        return Basis(shelf.put(vectors), sigma)

    def hook(layer: LinearMap) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = input_of(args, kwargs)
            if x.numel():  # an expert may be called with no token at all
                basis = last.get(x, lambda: extracted(layer, x))
                seen = bases.get(layer.name)
                if seen is not None and copies > 1:
                    raise ValueError(f"layer {layer.name!r} is called twice, with one basis each: run the probes apart")
                if seen is not None and not (merged and merged[0] is seen and merged[1] is basis):
                    merged[:] = seen, basis, merge(seen, basis)
                bases[layer.name] = basis if seen is None else merged[2]

        return see

    with ExitStack() as handles:
        handles.callback(model.register_forward_pre_hook(tokens.see, with_kwargs=True).remove)
        for layer in maps:
            for module in layer.modules:
                handles.callback(module.register_forward_pre_hook(hook(layer), with_kwargs=True).remove)
        yield bases
