"""What flows through a model in one forward pass: last rows of what goes in and out of modules, and of attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoft.optim.attention import Attended, Pattern, attended
from zoft.optim.capture import Tokens
from zoft.optim.shelf import Shelf

ROWS = 8  # of tokens that the loss reads


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a module, equal to itself alone."""

    name: str
    module: nn.Module
    x: Tensor  # rows [n, d_in], where the module computes
    y: Tensor  # rows [n, d_out], there too


@dataclass(frozen=True)
class Heads:
    """A call of attention, as `zoft.optim.attention` computes it: rows [n, H, d] of what goes in and out."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor


@dataclass(frozen=True)
class Recording:
    """The calls of modules and of attention, and the names of all modules called, each in the order they end.

    Calls with no rows of the tokens that went into the model are left out. Those that take the heads of attention one
    by one, [batch, tokens, H, d] or [batch, H, tokens, d], are apart, their rows [n, H * d].
    """

    calls: list[Call] = field(default_factory=list)
    by_head: list[Call] = field(default_factory=list)
    heads: list[Heads] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def within(self, name: str) -> Recording:
        """The calls inside the module of this `name`, and those of attention, which know no module."""
        inside = [[call for call in calls if call.name.startswith(f"{name}.")] for calls in (self.calls, self.by_head)]
        return Recording(inside[0], inside[1], self.heads)


@contextmanager
def recorded(model: nn.Module) -> Iterator[Recording]:
    """While open, a forward pass of `model` leaves in the recording the last rows of what goes in and out."""
    recording = Recording()
    tokens, shelf = Tokens(ROWS), Shelf()

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            given, made = first_tensor((*args, *kwargs.values())), first_tensor(output)
            recording.names.append(name)
            if given is not None and made is not None and given.dim() == 4 and given.shape == made.shape:
                for order in ((0, 1, 2, 3), (0, 2, 1, 3)):
                    x, y = (tokens.read(tensor.permute(order).flatten(2)) for tensor in (given, made))
                    if x is not None and y is not None:
                        recording.by_head.append(Call(name, module, shelf.put(x), shelf.put(y)))
                return
            x, y = tokens.read(given), tokens.read(made)
            if y is not None and (x is not None or not name):
                x = y[:0] if x is None else x.to(y.device)
                recording.calls.append(Call(name, module, shelf.put(x), shelf.put(y)))

        return see

    def see_attention(call: Attended) -> None:
        pattern = Pattern.of(call, tokens)
        if pattern is None:
            return
        output = pattern.rows(call.output)
        if close(pattern.output(), output):  # else something else was done to the weights
            query, key, value = (shelf.put(pattern.rows(x)) for x in (call.query, call.key, call.value))
            recording.heads.append(Heads(query, key, value, shelf.put(output)))

    with ExitStack() as handles:
        handles.callback(model.register_forward_pre_hook(tokens.see, with_kwargs=True).remove)
        handles.enter_context(attended(see_attention))
        for name, module in model.named_modules():
            handles.callback(module.register_forward_hook(hook(name), with_kwargs=True).remove)
        yield recording


def first_tensor(values: Any) -> Tensor | None:
    """The first floating-point tensor of a module's arguments or output that has rows."""
    if isinstance(values, Tensor):
        values = (values,)
    values = values.values() if isinstance(values, dict) else values if isinstance(values, (tuple, list)) else ()
    return next((v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1), None)


def close(one: Tensor, other: Tensor) -> bool:
    """Equal but for rounding in half precision."""
    one, other = exact(one), exact(other)
    return bool(((one - other).abs() <= 0.01 * (other.abs() + other.std())).all())


def exact(tensor: Tensor) -> Tensor:
    return tensor.cpu().double()  # on the CPU: not every device has float64


def same(one: Tensor, other: Tensor) -> bool:
    """Equal, but for a change to a coarser dtype between them."""
    coarser = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return one.shape == other.shape and torch.equal(one.to(coarser), other.to(one.device, coarser))


def is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None
