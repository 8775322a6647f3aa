"""The residual stream of a transformer, found by looking at what flows through one forward pass.

``h_end = h_0 + sum of what the blocks add``. For every block, the change of the stream over it is regressed on the
outputs of its modules: those that carry it are its writers. No module names are assumed, except that blocks are
entries of a list (``nn.ModuleList`` or ``nn.Sequential``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoft.optim.layers import LinearMap, as_linear_map
from zoft.optim.placement import device_of
from zoft.optim.recording import Call, Heads, close, exact, recorded
from zoft.optim.transpose import FeedForward, Norm

# Activation functions that are called without a module of their own.
Function = Callable[[Tensor], Tensor]
FUNCTIONS: list[Function] = [F.silu, F.gelu, partial(F.gelu, approximate="tanh"), F.relu, lambda z: F.relu(z).square()]


class NoStream(ValueError):
    """The model has no residual stream that ends in a norm and a linear head; the message says what is missing."""


@dataclass(frozen=True)
class Attention:
    """Averages of `values` over positions, head by head; ``values(norm(h))``, or ``values(h)`` without `norm`.

    `columns` int64 [H * d]: which of the outputs of `values` are averaged, in the order of the heads.
    """

    norm: Norm | None
    values: LinearMap
    columns: Tensor

    @property
    def reader(self) -> nn.Module:
        """The module that is called with h."""
        return self.norm.module if self.norm is not None else self.values.modules[0]


@dataclass(frozen=True)
class Writer:
    """A linear map whose output joins the stream times `gain`, after `norm` if there is one."""

    map: LinearMap
    gain: float
    norm: Norm | None
    feed_forward: FeedForward | None  # what computes the map's input, if it is this and known in closed form
    attention: Attention | None = None  # or this


@dataclass(frozen=True)
class Block:
    """`writers` in the order they are called; in a `parallel` block the feed-forward part reads the stream before the
    other writers have joined it."""

    module: nn.Module
    writers: list[Writer]
    parallel: bool

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return device_of(*(module for writer in self.writers for module in writer.map.modules))


@dataclass(frozen=True)
class Stream:
    """The stream runs through `blocks` and ends in ``logits = scale * head(norm(h_end))``.

    `token_bytes` is its size at a token.
    """

    head: LinearMap
    scale: float
    norm: Norm
    blocks: list[Block]
    token_bytes: int

    @property
    def writers(self) -> list[Writer]:
        """Of all blocks."""
        return [writer for block in self.blocks for writer in block.writers]

    def reached(self, feed_forward: bool, attention: bool) -> set[str]:
        """The names of the writers, and with `feed_forward` and `attention` of other maps in the parts they end."""
        inner = [w.feed_forward for w in self.writers if w.feed_forward and feed_forward]
        maps = [w.map for w in self.writers] + [layer for part in inner for layer in part.inner]
        maps += [w.attention.values for w in self.writers if w.attention and attention]
        return {m.name for m in maps}


def find_stream(model: nn.Module, forward: Callable[[], Any]) -> Stream | None:
    """The residual stream of `model`, by one call of `forward`, which runs it on some batch.

    None if the output there is not finite, which shows nothing.

    Raises:
        NoStream: there is none, or the model's last steps are not a norm and a linear map.
    """
    with recorded(model) as (calls, heads):
        forward()
    if not calls or calls[-1].name:
        raise NoStream(f"{type(model).__name__} does not return logits at the positions of its tokens")
    if not bool(calls[-1].y.isfinite().all()):
        return None
    inner = [call for call in calls if call.name]
    maps = {call.name: layer for call in inner if (layer := as_linear_map(call.name, call.module)) is not None}
    head = next((call for call in reversed(inner) if call.name in maps), None)
    scale = _ratio(calls[-1].y, head.y) if head is not None else None
    if head is None or scale is None:
        raise NoStream(f"the output of {type(model).__name__} does not come straight from a linear head")
    if not _readable(head, maps):
        raise NoStream(f"the weight of the head {head.name!r} cannot be read")
    norm, stream = _norm_before(head.x, inner)
    if norm is None:
        raise NoStream(f"no norm feeds the head {head.name!r}")

    blocks: list[Block] = []
    while block := next((c for c in inner if _is_entry(c.name) and _same(c.y, stream) and not _same(c.x, c.y)), None):
        inside = [call for call in inner if call.name.startswith(f"{block.name}.")]
        writers = _writers(block, inside, maps, heads)
        readers = {writer.feed_forward.reader for writer in writers if writer.feed_forward}
        parallel = any(call.module in readers and _same(call.x, block.x) for call in inside)
        blocks.insert(0, Block(block.module, writers, parallel))
        stream = block.x
    if not any(block.writers for block in blocks):
        raise NoStream(f"no block of {type(model).__name__} adds the output of a linear map to its input")
    return Stream(maps[head.name], scale, norm, blocks, stream.shape[1] * stream.element_size())


def _writers(block: Call, inside: list[Call], maps: dict[str, LinearMap], heads: list[Heads]) -> list[Writer]:
    """The linear maps whose outputs, times something, add up to what `block` adds to the stream."""
    states = [exact(block.x)]  # of the stream, as the writers join it
    writers = []
    for joining, gain in _parts(block, inside, maps):
        source: Call | None = joining
        norm: Norm | None = None
        if joining.name not in maps:  # perhaps a norm between the writer and the stream
            norm = Norm.of(joining.module, joining.x) if _is_leaf(joining.module) else None
            source = next((c for c in inside if c.name in maps and norm is not None and _same(c.y, joining.x)), None)
        if source is not None:
            attention = _attention(source, inside, maps, states, heads)
            feed_forward = None if attention else _feed_forward(source, inside, maps, states)
            writers.append(Writer(maps[source.name], gain, norm, feed_forward, attention))
        states.append(states[-1] + gain * exact(joining.y))
    return writers


def _parts(block: Call, inside: list[Call], maps: dict[str, LinearMap]) -> list[tuple[Call, float]]:
    """Calls and gains such that the outputs times the gains are what `block` adds; none, if there are no such."""
    distinct: list[Call] = []
    for call in sorted(inside, key=lambda call: call.name not in maps):  # of equal outputs, a linear map's is taken
        if call.y.shape == block.y.shape and not any(_same(call.y, other.y) for other in distinct):
            distinct.append(call)
    # An outer module may add up inner ones: which of them a regression on all takes is left to rounding.
    inmost = [call for call in distinct if not any(other.name.startswith(f"{call.name}.") for other in distinct)]
    parts = _summands(block, inmost) or _summands(block, distinct)
    return sorted(parts, key=lambda part: inside.index(part[0]))


def _summands(block: Call, calls: list[Call]) -> list[tuple[Call, float]]:
    """As few of `calls` as add up to what `block` adds, with their gains."""
    if not calls:
        return []
    added = (exact(block.y) - exact(block.x)).flatten()
    outputs = torch.stack([exact(call.y).flatten() for call in calls], dim=1)
    sizes = _least_squares(outputs, added).abs() * outputs.norm(dim=0)
    finest, coarsest = (torch.finfo(dtype).eps for dtype in (block.y.dtype, calls[0].y.dtype))  # under autocast
    rounding = 2 * (finest * exact(block.y).norm() + max(finest, coarsest) * added.norm())
    order = sizes.argsort(descending=True)
    for count in range(max(1, int((sizes > 0.02 * added.norm()).sum())), len(calls) + 1):
        chosen = order[:count]
        gains = _least_squares(outputs[:, chosen], added)
        if (added - outputs[:, chosen] @ gains).norm() <= rounding:
            # Rounding is the batch's, and a resumed run sees another.
            gains = torch.where((gains - 1).abs() < 0.02, 1.0, gains)
            return [(calls[i], gain) for i, gain in zip(chosen.tolist(), gains.tolist(), strict=True)]
    return []


def _feed_forward(
    down: Call, calls: list[Call], maps: dict[str, LinearMap], states: list[Tensor]
) -> FeedForward | None:
    """How the input of `down` is computed, if it is an activation function of linear maps of the stream or its norm.

    `states` holds the stream's values in this block before `down` joins it.
    """
    for gate in (call for call in calls if call.name in maps):
        for opening, up, factor, halves in _openings(gate, calls, maps, down.x.shape[1]):
            acts: list[Function] = [c.module for c in calls if not _weights(c.module) and _same(c.x, opening)]
            act = next((act for act in acts + FUNCTIONS if close(act(opening) * factor, down.x)), None)
            if act is None or not all(_readable(call, maps) for call in (gate, up, down) if call is not None):
                continue
            norm, _ = _norm_before(gate.x, calls)
            if norm is not None or any(close(gate.x, state) for state in states):
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
            if up.name in maps and up is not gate and _same(up.x, gate.x) and up.y.shape == gate.y.shape:
                yield gate.y, up, up.y, None
    if gate.y.shape[1] == 2 * width:
        first, second = slice(0, width), slice(width, 2 * width)
        for halves in ((first, second), (second, first)):
            yield gate.y[:, halves[0]], None, gate.y[:, halves[1]], halves


def _attention(
    out: Call, calls: list[Call], maps: dict[str, LinearMap], states: list[Tensor], heads: list[Heads]
) -> Attention | None:
    """How the input of `out` is computed, if it is attention over outputs of a linear map of the stream or its norm."""
    seen = next((h for h in heads if _same(h.output, out.x)), None)
    if seen is None or not _readable(out, maps):
        return None
    for call in calls:
        columns = _columns(seen.value, call.y) if call.name in maps else None
        if columns is not None and _readable(call, maps):
            norm, _ = _norm_before(call.x, calls)
            if norm is not None or any(close(call.x, state) for state in states):
                return Attention(norm, maps[call.name], columns)
    return None


def _columns(part: Tensor, whole: Tensor) -> Tensor | None:
    """Which column of `whole` [n, d] each column of `part` [n, e] is, int64 [e]; None if one of them is none."""
    equal = torch.ones(part.shape[1], whole.shape[1], dtype=torch.bool, device=whole.device)
    for row, other in zip(part.to(whole.device), whole, strict=True):
        equal &= row.unsqueeze(1) == other
    return equal.int().argmax(1) if bool(equal.any(1).all()) else None


def _readable(call: Call, maps: dict[str, LinearMap]) -> bool:
    """Whether the map's weight can be read, and does to the rows of `call` what the map itself does."""
    weight = maps[call.name].dense_weight()
    if weight is None or weight.is_meta:
        return False
    if maps[call.name].wide:  # its own forward has the branches in it
        return True
    x = call.x.to(weight.dtype)  # under autocast it may be of another
    own = exact(call.module.forward(x)) - exact(call.module.forward(torch.zeros_like(x)))
    return bool((exact(x @ weight.t()) - own).norm() <= 0.1 * own.norm())


def _norm_before(x: Tensor, calls: list[Call]) -> tuple[Norm | None, Tensor]:
    """The norm whose output is `x`, and its input."""
    for call in calls:
        if _is_leaf(call.module) and _same(call.y, x) and (norm := Norm.of(call.module, call.x)):
            return norm, call.x
    return None, x


def _least_squares(a: Tensor, b: Tensor) -> Tensor:
    scale = a.norm(dim=0).clamp(min=1e-30)
    return torch.linalg.lstsq(a / scale, b.unsqueeze(1), driver="gelsd").solution.squeeze(1) / scale


def _ratio(y: Tensor, x: Tensor) -> float | None:
    """s such that ``y = s x``, if there is one."""
    if y.shape != x.shape:
        return None
    source = exact(x)
    ratio = float((exact(y) * source).sum() / source.square().sum().clamp(min=1e-30))
    return ratio if close(y, ratio * source) else None


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal, but for a change to a coarser dtype between them."""
    coarser = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return one.shape == other.shape and torch.equal(one.to(coarser), other.to(one.device, coarser))


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _weights(module: nn.Module) -> bool:
    """Whether it has parameters other than single numbers."""
    return any(parameter.numel() > 1 for parameter in module.parameters())


def _is_entry(name: str) -> bool:
    return name.rpartition(".")[2].isdigit()
