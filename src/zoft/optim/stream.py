"""The residual stream of a transformer, found by looking at what flows through one forward pass.

``h_end = h_0 + sum of what the blocks add``. For every block, the change of the stream over it is regressed on the
outputs of its modules: those that carry it are its writers. No module names are assumed, except that blocks are
entries of a list (``nn.ModuleList`` or ``nn.Sequential``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoft.optim.inside import Attention, attention_of, feed_forward_of, norm_before, readable
from zoft.optim.layers import LinearMap, as_linear_map
from zoft.optim.placement import device_of
from zoft.optim.recording import Call, Heads, Recording, close, exact, is_leaf, recorded, same
from zoft.optim.transpose import FeedForward, Norm


class NoStream(ValueError):
    """The model has no residual stream that ends in a norm; the message says what is missing."""


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
class Head:
    """``logits = scale * map(norm(h_end))``."""

    map: LinearMap
    scale: float


@dataclass(frozen=True)
class Stream:
    """The stream runs through `blocks` and ends in `norm`, whose output alone what follows reads.

    That is a `head` with a readable weight, or something else. `token_bytes` is the stream's size at a token.
    """

    head: Head | None
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
        NoStream: there is none.
    """
    with recorded(model) as seen:
        forward()
    if seen.calls and not bool(seen.calls[-1].y.isfinite().all()):
        return None
    inner = [call for call in seen.calls if call.name]
    maps = {call.name: layer for call in inner if (layer := as_linear_map(call.name, call.module)) is not None}
    head, norm, stream = _head(seen, inner, maps) or (None, *_last_norm(model, seen, inner))

    blocks: list[Block] = []
    while block := next((c for c in inner if _is_entry(c.name) and same(c.y, stream) and not same(c.x, c.y)), None):
        inside = [call for call in inner if call.name.startswith(f"{block.name}.")]
        writers = _writers(block, inside, maps, seen.heads)
        readers = {writer.feed_forward.reader for writer in writers if writer.feed_forward}
        parallel = any(call.module in readers and same(call.x, block.x) for call in inside)
        blocks.insert(0, Block(block.module, writers, parallel))
        stream = block.x
    if not any(block.writers for block in blocks):
        raise NoStream(f"no block of {type(model).__name__} adds the output of a linear map to its input")
    return Stream(head, norm, blocks, stream.shape[1] * stream.element_size())


def _head(seen: Recording, inner: list[Call], maps: dict[str, LinearMap]) -> tuple[Head, Norm, Tensor] | None:
    """The head that gives what the model returns, the norm before it, and the norm's input; None if it is no such."""
    last = next((call for call in reversed(inner) if call.name in maps), None)
    scale = None if last is None or seen.calls[-1].name else _ratio(seen.calls[-1].y, last.y)
    if last is None or scale is None or not readable(last, maps):
        return None
    norm, stream = norm_before(last.x, inner)
    return None if norm is None else (Head(maps[last.name], scale), norm, stream)


def _last_norm(model: nn.Module, seen: Recording, inner: list[Call]) -> tuple[Norm, Tensor]:
    """The norm that reads what the last of the blocks gives, and that output.

    Raises:
        NoStream: there is none, or more of the blocks runs after it, or of other lists of blocks.
    """
    entries = {name for name, module in model.named_modules() if _is_entry(name) and not is_leaf(module)}
    called = [name for name in seen.names if name in entries]
    outermost = {name for name in called if not any(name.startswith(f"{other}.") for other in called)}
    if len(lists := {name.rpartition(".")[0] for name in outermost}) > 1:
        raise NoStream(
            f"{type(model).__name__} has several lists of blocks ({', '.join(sorted(lists))}), not one stream"
        )
    blocks = [call for call in inner if call.name in outermost]
    for call in reversed(inner):
        if is_leaf(call.module) and any(same(block.y, call.x) for block in blocks):
            after = seen.names[seen.names.index(call.name) + 1 :]
            norm = Norm.of(call.module, call.x)
            if norm is not None and call.name not in after and outermost.isdisjoint(after):
                return norm, call.x
    raise NoStream(f"no norm reads what the last block of {type(model).__name__} gives")


def _writers(block: Call, inside: list[Call], maps: dict[str, LinearMap], heads: list[Heads]) -> list[Writer]:
    """The linear maps whose outputs, times something, add up to what `block` adds to the stream."""
    states = [exact(block.x)]  # of the stream, as the writers join it
    writers = []
    for joining, gain in _parts(block, inside, maps):
        source: Call | None = joining
        norm: Norm | None = None
        if joining.name not in maps:  # perhaps a norm between the writer and the stream
            norm = Norm.of(joining.module, joining.x) if is_leaf(joining.module) else None
            source = next((c for c in inside if c.name in maps and norm is not None and same(c.y, joining.x)), None)
        if source is not None:
            attention = attention_of(source, inside, maps, states, heads)
            feed_forward = None if attention else feed_forward_of(source, inside, maps, states)
            writers.append(Writer(maps[source.name], gain, norm, feed_forward, attention))
        states.append(states[-1] + gain * exact(joining.y))
    return writers


def _parts(block: Call, inside: list[Call], maps: dict[str, LinearMap]) -> list[tuple[Call, float]]:
    """Calls and gains such that the outputs times the gains are what `block` adds; none, if there are no such."""
    distinct: list[Call] = []
    for call in sorted(inside, key=lambda call: call.name not in maps):  # of equal outputs, a linear map's is taken
        if call.y.shape == block.y.shape and not any(same(call.y, other.y) for other in distinct):
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


def _is_entry(name: str) -> bool:
    return name.rpartition(".")[2].isdigit()
