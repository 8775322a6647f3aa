"""The blocks before the first that moves: they give the same at every point of a step, and run once.

Where only later layers are trained (``include``), what a probe costs is the blocks from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, takewhile
from typing import Any

import torch
from torch import Tensor, nn

from zoft.optim.calls import replaced_forward, same_tensor
from zoft.optim.experts import Expert
from zoft.optim.layers import LinearMap


def blocks_before(model: nn.Module, maps: Collection[LinearMap], dense: Collection[nn.Parameter]) -> list[nn.Module]:
    """The entries of a list of `model`'s before the first entry that holds one of `maps` or of `dense`.

    Of several lists with such an entry, the outermost and first; empty if it is its first entry, or there is none.
    """
    modules = chain.from_iterable((*layer.modules, *layer.lookups) for layer in maps)
    moving = {id(module.owner if isinstance(module, Expert) else module) for module in modules}
    moving |= {id(parameter) for parameter in dense}

    def stays(block: nn.Module) -> bool:
        return moving.isdisjoint(map(id, chain(block.modules(), block.parameters())))

    for layers in model.modules():
        if isinstance(layers, nn.ModuleList | nn.Sequential) and not stays(layers):
            return list(takewhile(stays, layers))
    return []


@dataclass
class LeadingBlocks:
    """What `blocks`, called one after the other, return for the batch of an estimate.

    Within `one_batch`, passes made within `one_pass` compute it once for equal arguments. Nothing is taken from an
    earlier call if an argument could carry more than its value (a cache of keys), if a block is in train mode (its
    dropout), or unless two passes at the same point have shown (`prove`) that the model's loss stays what it is: it
    may do more between blocks than hand on what they return.
    """

    blocks: Sequence[nn.Module]
    sound: bool | None = None  # whether the loss stays what it is; None: not known yet
    _calls: dict[int, tuple[Any, Any]] = field(default_factory=dict)  # arguments and output of the n-th of a pass
    _number: int = -1  # of the running call
    _given: Any = None  # arguments of the running call that are to be kept with its output
    _output: Any = None  # of the running call, if it is known

    def __post_init__(self) -> None:
        if not self.blocks:
            self.sound = False

    @contextmanager
    def one_batch(self) -> Iterator[None]:
        """While open, what is known is of use, and kept."""
        try:
            yield
        finally:
            self._calls.clear()
            self._given, self._output = None, None

    def prove(self, losses: Callable[[], Tensor]) -> None:
        """See by two passes of `losses` whether they stay equal, and something is saved.

        It stays unknown while a block is in train mode, or the losses are not finite.
        """
        if self._training:
            return
        with self._reusing():
            first = losses()
        if not bool(first.isfinite().all()):
            self._calls.clear()
            return
        with self._reusing():
            self.sound = torch.equal(losses(), first) and bool(self._calls)

    def one_pass(self) -> AbstractContextManager[None]:
        """While open, for one pass of the closure, the blocks return what is known for their arguments, if sound."""
        return self._reusing() if self.sound and not self._training else nullcontext()

    @property
    def _training(self) -> bool:
        return any(module.training for block in self.blocks for module in block.modules())

    @contextmanager
    def _reusing(self) -> Iterator[None]:
        self._number, self._given, self._output = -1, None, None
        with ExitStack() as stack:
            for place, block in enumerate(self.blocks):
                stack.enter_context(replaced_forward(block, self._forward(place, block.forward)))
            yield

    def _forward(self, place: int, run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if place == 0:
                self._begin((args, tuple(sorted(kwargs.items()))))
            if self._output is not None:
                return self._output
            output = run(*args, **kwargs)
            if place == len(self.blocks) - 1 and self._given is not None:
                self._calls[self._number] = self._given, output
                self._given = None
            return output

        return forward

    def _begin(self, given: Any) -> None:
        self._number += 1
        known = self._calls.get(self._number)
        self._output = known[1] if known and _same(given, known[0]) else None
        self._given = given if known is None and _is_plain(given) else None


def _is_plain(value: Any) -> bool:
    """Whether `value` is tensors and what cannot be changed."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, Tensor | bool | int | float | str)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return same_tensor(one, other)
    return type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other)
