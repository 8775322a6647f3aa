"""The residual stream of a transformer, found by looking at what flows through one forward pass.

``h_end = h_0 + sum of what the blocks add``. No module names are assumed, except that blocks are
entries of a list (``nn.ModuleList`` or ``nn.Sequential``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from zoft.optim.block import Block, Writer, block_of
from zoft.optim.inside import norm_before, readable
from zoft.optim.layers import LinearMap, as_linear_map
from zoft.optim.recording import Call, Recording, close, exact, is_leaf, recorded, same
from zoft.optim.transpose import Norm


class NoStream(ValueError):
    """The model has no residual stream that ends in a norm; the message says what is missing."""


@dataclass(frozen=True)
class Head:
    """``logits = scale * map(norm(h_end))``."""

    map: LinearMap
    scale: float


@dataclass(frozen=True)
class Stream:
    """The stream runs through `blocks` and ends in `norm`, whose output alone what follows reads.

    That is a `head` with a readable weight, or something else; `behind` has the names of the modules that run there.
    The norm may be the last thing in the last block, and may have run before: it runs so many `times`, and ends the
    stream the last time. `token_bytes` is the stream's size at a token.
    """

    head: Head | None
    norm: Norm
    blocks: list[Block]
    token_bytes: int
    times: int
    behind: Set[str]

    @property
    def writers(self) -> list[Writer]:
        """Of all blocks."""
        return [writer for block in self.blocks for writer in block.writers]

    @property
    def attends(self) -> bool:
        """Whether there is attention of which it is known how it comes by its values."""
        return any(writer.attention is not None for writer in self.writers)

    def reached(self, feed_forward: bool, attention: bool) -> set[str]:
        """The names of the writers, and with `feed_forward` and `attention` of other maps in the parts they end.

        And of what is `behind` the stream.
        """
        inner = [w.feed_forward for w in self.writers if w.feed_forward and feed_forward]
        maps = [w.map for w in self.writers] + [layer for part in inner for layer in part.inner]
        maps += [m for w in self.writers if w.attention and attention for m in w.attention.maps.values()]
        return {m.name for m in maps} | self.behind


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
    entries = [call for call in inner if _is_entry(call.name, call.module)]
    while call := next((c for c in entries if same(c.y, stream) and not same(c.x, c.y)), None):
        block = block_of(call, seen, maps, norm.module)
        if block is None:
            break
        blocks.insert(0, block)
        stream = call.x
    if not any(block.writers for block in blocks):
        raise NoStream(f"no block of {type(model).__name__} adds the output of a linear map to its input")
    if len({block.module for block in blocks}) < len(blocks):
        raise NoStream(f"{type(model).__name__} runs some of its blocks more than once")
    end = next(call.name for call in inner if call.module is norm.module)
    first = next(call.name for call in inner if call.module is blocks[0].module)
    times = seen.names[: seen.names.index(first)].count(end) + 1
    behind = seen.names[::-1][: seen.names[::-1].index(end)]
    return Stream(head, norm, blocks, stream.shape[1] * stream.element_size(), times, frozenset(behind))


def _head(seen: Recording, inner: list[Call], maps: dict[str, LinearMap]) -> tuple[Head, Norm, Tensor] | None:
    """The head that gives what the model returns, the norm before it, and what of that norm the last block gives.

    None if there is no such head, or several lists of blocks run on the same tokens.
    """
    last = next((call for call in reversed(inner) if call.name in maps), None)
    scale = None if last is None or seen.calls[-1].name else _ratio(seen.calls[-1].y, last.y)
    if last is None or scale is None or not readable(last, maps):
        return None
    norm, stream = norm_before(last.x, inner)
    blocks = [call for call in inner if _is_entry(call.name, call.module)]
    end = next((state for state in (stream, last.x) if any(same(block.y, state) for block in blocks)), None)
    if norm is None or end is None or len(_lists(call.name for call in blocks)) > 1:
        return None
    return Head(maps[last.name], scale), norm, end


def _last_norm(model: nn.Module, seen: Recording, inner: list[Call]) -> tuple[Norm, Tensor]:
    """The norm that reads what the last of the blocks gives, or with which it ends, and that output.

    Raises:
        NoStream: there is none, or more of the blocks runs after it, or of other lists of blocks.
    """
    entries = {name for name, module in model.named_modules() if _is_entry(name, module)}
    outermost = _outermost(name for name in seen.names if name in entries)
    if len(lists := _lists(outermost)) > 1:
        raise NoStream(
            f"{type(model).__name__} has several lists of blocks ({', '.join(sorted(lists))}), not one stream"
        )
    outputs = [call.y for call in inner if call.name in outermost]
    for call in reversed(inner):
        end = next((state for state in (call.x, call.y) if any(same(output, state) for output in outputs)), None)
        if end is not None and is_leaf(call.module):
            after = seen.names[seen.names.index(call.name) + 1 :]
            around = {name for name in after if call.name.startswith(f"{name}.")}
            norm = Norm.of(call.module, call.x)
            if norm is not None and call.name not in after and outermost.isdisjoint(set(after) - around):
                return norm, end
    raise NoStream(f"no norm reads what the last block of {type(model).__name__} gives")


def _outermost(names: Iterable[str]) -> set[str]:
    """Those that lie in no other."""
    called = set(names)
    return {name for name in called if not any(name.startswith(f"{other}.") for other in called)}


def _lists(blocks: Iterable[str]) -> set[str]:
    """The lists that the outermost of `blocks` are in."""
    return {name.rpartition(".")[0] for name in _outermost(blocks)}


def _ratio(y: Tensor, x: Tensor) -> float | None:
    """s such that ``y = s x``, if there is one."""
    if y.shape != x.shape:
        return None
    source = exact(x)
    ratio = float((exact(y) * source).sum() / source.square().sum().clamp(min=1e-30))
    return ratio if close(y, ratio * source) else None


def _is_entry(name: str, module: nn.Module) -> bool:
    """Whether it may be a block: it is an entry of a list, and made of others."""
    return name.rpartition(".")[2].isdigit() and not is_leaf(module)
