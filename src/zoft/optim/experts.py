"""Experts that share one three-dimensional weight, each as a linear map of its own.

transformers keeps the matrices of a layer's experts in one parameter [experts, d_out, d_in] (some models: [experts,
d_in, d_out]), and multiplies by one of them at a time or by all in a grouped product. While any expert is hooked, these
products are taken expert by expert, each through a module of its own, so that an expert is watched and perturbed as
every other linear layer is. While none is, the model runs as it was written.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

PRODUCTS = ("linear", "matmul", "__matmul__", "mm")  # by the matrix of one expert
GROUPED = ("_grouped_mm", "grouped_mm_fallback")  # of rows sorted by expert, by the matrices of all

Groups = dict[str, list["Expert"]]  # the experts of one module, by the name of the parameter that they share

_known: weakref.WeakKeyDictionary[nn.Module, Groups] = weakref.WeakKeyDictionary()


class Expert(nn.Module):
    """``y = x W^T`` with ``W = fused[index]``, or its transpose if that is how the matrices lie."""

    def __init__(self, owner: nn.Module, parameter: str, index: int, transposed: bool) -> None:
        super().__init__()
        self._owner, self._parameter = weakref.ref(owner), parameter  # a module of its own: not a part of this one
        self.index, self.transposed = index, transposed
        d_out, d_in = self.fused.shape[1:]
        self.d_out, self.d_in = (d_in, d_out) if transposed else (d_out, d_in)

    @property
    def owner(self) -> nn.Module:
        """The module that has the parameter."""
        owner = self._owner()
        assert owner is not None
        return owner

    @property
    def fused(self) -> Any:
        """The shared parameter, as it is now: one that is offloaded is another while its module runs."""
        return getattr(self.owner, self._parameter)

    @property
    def watched(self) -> bool:
        """Whether there is a hook on it."""
        return bool(self._forward_hooks or self._forward_pre_hooks)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.fused[self.index] if self.transposed else linear(x, self.fused[self.index])


def find_experts(model: nn.Module) -> Iterator[tuple[str, Expert]]:
    """The experts of `model` by name, ``MODULE.PARAMETER.INDEX``; the same modules every time.

    A three-dimensional parameter holds experts if its module says so, as transformers' decorator lets it do: by
    `num_experts`, the parameter's first size, and `is_transposed`, whether the matrices lie [d_in, d_out].
    """
    for name, module in model.named_modules():
        count, transposed = getattr(module, "num_experts", None), getattr(module, "is_transposed", None)
        fused = {n: p for n, p in module.named_parameters(recurse=False) if p.dim() == 3 and len(p) == count}
        if not fused or transposed is None:
            continue
        if module not in _known:
            _known[module] = {}
            _take_apart(module, _known[module])
        for own, parameter in fused.items():
            if own not in _known[module]:
                _known[module][own] = [Expert(module, own, i, transposed) for i in range(len(parameter))]
            for expert in _known[module][own]:
                yield ".".join(part for part in (name, own, str(expert.index)) if part), expert


def _take_apart(module: nn.Module, groups: Groups) -> None:
    """Whenever `module` runs while one of its experts is watched, let its products go through them."""
    opened: list[ExitStack] = []

    def enter(*_: Any) -> None:
        if opened:  # Ctrl-C interrupted the last call, and torch ran no hook after it
            leave()
        opened.append(ExitStack())
        if any(expert.watched for group in groups.values() for expert in group):
            opened[-1].enter_context(_one_by_one(module))
            opened[-1].enter_context(_Apart(groups))

    def leave(*_: Any) -> None:
        opened.pop().close()

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)


@contextmanager
def _one_by_one(module: nn.Module) -> Iterator[None]:
    """While open, `module` multiplies in a way that can be taken apart: transformers may have chosen another.

    On an accelerator it takes ``batched_mm``, which copies matrices, for tokens that are generated one by one.
    """
    config: Any = getattr(module, "config", None)
    way = getattr(config, "_experts_implementation", None)
    other = way not in (None, "eager", "grouped_mm")
    if other:
        config._experts_implementation = "grouped_mm"
    try:
        yield
    finally:
        if other:
            config._experts_implementation = way


class _Apart(TorchFunctionMode):
    """While open, every product by the experts' shared weights goes through the experts' modules.

    Raises:
        ValueError: the model gathers copies of the matrices, in which the experts cannot be told apart.
    """

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self._groups = groups

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "__getitem__" and isinstance(args[1], Tensor) and args[1].dim() and self._group(args[0]):
            raise ValueError("the experts' weights are gathered before they are used: exclude=['*experts*']")
        if len(args) > 1 and name in (*PRODUCTS, *GROUPED) and (group := self._group(args[1])):
            x, weight = args[:2]
            if name in GROUPED:
                return _grouped(x, group, args[2] if len(args) > 2 else kwargs["offs"])
            fused = group[0].fused
            place = (weight.data_ptr() - fused.data_ptr()) // (fused.stride(0) * fused.element_size())
            y = group[place](x)
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return y if bias is None else y + bias
        return func(*args, **kwargs)

    def _group(self, weight: Any) -> list[Expert] | None:
        """The experts that `weight` is of, or is all of."""
        if isinstance(weight, Tensor):
            for group in self._groups.values():
                fused = group[0].fused
                if not fused.is_meta and 0 <= weight.data_ptr() - fused.data_ptr() < fused.nbytes:
                    return group
        return None


def _grouped(x: Tensor, group: list[Expert], ends: Tensor) -> Tensor:
    """The product of rows sorted by expert, those of each up to its one of `ends`; zero for rows of none."""
    y, start = x.new_zeros(len(x), group[0].d_out), 0
    for expert, end in zip(group, ends.tolist(), strict=True):
        if end > start:
            y[start:end] = expert(x[start:end])
        start = end
    return y
