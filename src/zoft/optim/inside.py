"""How a writer of the residual stream comes by its input: a feed-forward part, or attention, known in closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoft.optim.layers import LinearMap
from zoft.optim.projection import Projection, projections
from zoft.optim.recording import Call, Recording, close, exact, is_leaf, same
from zoft.optim.transpose import FeedForward, Norm

# Activation functions that are called without a module of their own.
Function = Callable[[Tensor], Tensor]
FUNCTIONS: list[Function] = [F.silu, F.gelu, partial(F.gelu, approximate="tanh"), F.relu, lambda z: F.relu(z).square()]


@dataclass(frozen=True)
class Attention:
    """Attention over heads that linear maps make of ``norm(h)``, or of h without `norm`.

    Where it is not known how it comes by its `queries` and `keys`, these are None.
    """

    norm: Norm | None
    values: Projection
    queries: Projection | None
    keys: Projection | None

    @property
    def reader(self) -> nn.Module:
        """The module that is called with h."""
        return self.norm.module if self.norm is not None else self.values.map.modules[0]

    @property
    def maps(self) -> dict[str, LinearMap]:
        """By name; one may make several of the heads."""
        parts = (self.values, self.queries, self.keys)
        return {part.map.name: part.map for part in parts if part is not None}


def feed_forward_of(
    down: Call, calls: list[Call], maps: dict[str, LinearMap], states: list[Tensor]
) -> FeedForward | None:
    """How the input of `down` is computed, if it is an activation function of linear maps of the stream or its norm.

    `states` holds the stream's values in this block before `down` joins it.
    """
    for gate in (call for call in calls if call.name in maps):
        for opening, up, factor, halves in _openings(gate, calls, maps, down.x.shape[1]):
            acts: list[Function] = [c.module for c in calls if not _weights(c.module) and same(c.x, opening)]
            act = next((act for act in acts + FUNCTIONS if close(act(opening) * factor, down.x)), None)
            if act is None or not all(readable(call, maps) for call in (gate, up, down) if call is not None):
                continue
            as_it_is = any(close(gate.x, state) for state in states)
            norm = None if as_it_is else norm_before(gate.x, calls)[0]
            if as_it_is or norm is not None:
                over = None if up is None else maps[up.name]
                return FeedForward(norm, maps[gate.name], over, act, maps[down.name], halves)
    return None


def _openings(
    gate: Call, calls: list[Call], maps: dict[str, LinearMap], width: int
) -> Iterator[tuple[Tensor, Call | None, Tensor | float, tuple[slice, slice] | None]]:
    """What of `gate` a function may be called with, and what of which map its value may be multiplied by."""
    if gate.y.shape[1] == width:
        yield gate.y, None, 1.0, None
        for up in calls:
            if up.name in maps and up is not gate and same(up.x, gate.x) and up.y.shape == gate.y.shape:
                yield gate.y, up, up.y, None
    if gate.y.shape[1] == 2 * width:
        first, second = slice(0, width), slice(width, 2 * width)
        for halves in ((first, second), (second, first)):
            yield gate.y[:, halves[0]], None, gate.y[:, halves[1]], halves


def attention_of(out: Call, seen: Recording, maps: dict[str, LinearMap], states: list[Tensor]) -> Attention | None:
    """How the input of `out` is computed, if it is attention over outputs of linear maps of the stream or its norm."""
    heads = next((heads for heads in seen.heads if same(heads.output.flatten(1), out.x)), None)
    if heads is None or not readable(out, maps):
        return None
    mapped = [call for call in seen.calls if call.name in maps]
    norms = [call for call in (*seen.calls, *seen.by_head) if call.name not in maps and is_leaf(call.module)]

    def made(part: Tensor, calls: list[Call]) -> Iterator[tuple[Call, Projection]]:
        found = projections(part, calls, norms, maps)
        return ((call, projection) for call, projection in found if readable(call, maps))

    for call, values in made(heads.value, mapped):
        as_it_is = any(close(call.x, state) for state in states)
        norm = None if as_it_is else norm_before(call.x, seen.calls)[0]
        if as_it_is or norm is not None:
            beside = [other for other in mapped if same(other.x, call.x)]
            others = (next(made(part, beside), None) for part in (heads.query, heads.key))
            return Attention(norm, values, *(None if other is None else other[1] for other in others))
    return None


def readable(call: Call, maps: dict[str, LinearMap]) -> bool:
    """Whether the map's weight can be read, and does to the rows of `call` what the map itself does."""
    weight = maps[call.name].dense_weight()
    if weight is None or weight.is_meta:
        return False
    if maps[call.name].wide:  # its own forward has the branches in it
        return True
    x = call.x.to(weight.dtype)  # under autocast it may be of another
    own = exact(call.module.forward(x)) - exact(call.module.forward(torch.zeros_like(x)))
    return bool((exact(x @ weight.t()) - own).norm() <= 0.1 * own.norm())


def norm_before(x: Tensor, calls: list[Call]) -> tuple[Norm | None, Tensor]:
    """The norm whose output is `x`, and its input."""
    for call in calls:
        if is_leaf(call.module) and same(call.y, x) and (norm := Norm.of(call.module, call.x)):
            return norm, call.x
    return None, x


def _weights(module: nn.Module) -> bool:
    """Whether it has parameters other than single numbers."""
    return any(parameter.numel() > 1 for parameter in module.parameters())
